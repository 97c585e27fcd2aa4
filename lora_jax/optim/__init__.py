"""Optimizers for adapters, on optax: freezing, learning rates by role and by site, preconditioning.

Each is a gradient transformation or a label function and goes with any base optimizer. None keeps state of its own.

```python
tx = lora.optimizer(
    optax.chain(
        lora.optim.riemannian(),  # before the base optimizer: changes gradients
        optax.adamw(2e-4),
        lora.optim.lora_plus(ratio=16),  # after it: changes steps
        lora.optim.rate_pattern({"lm_head": 0.1}),
    ),
    adapter,
)
```
"""

from lora_jax.optim.adalora import adalora, orthogonality
from lora_jax.optim.frozen import optimizer, schedule_free_eval_params
from lora_jax.optim.lanes import lanes
from lora_jax.optim.precondition import lora_fa, riemannian
from lora_jax.optim.rates import lora_plus, lora_plus_labels, rate_pattern

__all__ = [
    "adalora", "lanes", "lora_fa", "lora_plus", "lora_plus_labels", "optimizer", "orthogonality", "rate_pattern",
    "riemannian", "schedule_free_eval_params",
]  # fmt: skip
