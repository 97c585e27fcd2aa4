"""Optimizers for adapters, on optax: freezing, learning rates by role and by site, preconditioning.

Each is a gradient transformation or a label function and goes with any base optimizer. None keeps state of its own.

```python
tx = lora.optimizer(
    optax.chain(
        lora.riemannian(),  # before the base optimizer: changes gradients
        optax.adamw(2e-4),
        lora.lora_plus(ratio=16),  # after it: changes steps
        lora.rate_pattern({"lm_head": 0.1}),
    ),
    adapter,
)
```
"""

from lora_jax.optim.frozen import optimizer as optimizer
from lora_jax.optim.precondition import lora_fa as lora_fa
from lora_jax.optim.precondition import riemannian as riemannian
from lora_jax.optim.rates import lora_plus as lora_plus
from lora_jax.optim.rates import lora_plus_labels as lora_plus_labels
from lora_jax.optim.rates import rate_pattern as rate_pattern
