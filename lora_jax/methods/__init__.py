"""One module per variant of LoRA: what an adapter holds at a parameter, and what that makes of the parameter."""

from lora_jax.adapter.registry import method_names as names
from lora_jax.adapter.registry import register_method
from lora_jax.methods.adalora import AdaLora, trim
from lora_jax.methods.alora import ALora, invoked
from lora_jax.methods.dora import Dora, Gained, precompute
from lora_jax.methods.lora_bias import Shift
from lora_jax.methods.lora_fa import FrozenA
from lora_jax.methods.lora_xs import LoraXS
from lora_jax.methods.parts import Parts
from lora_jax.methods.trainable_tokens import Rows
from lora_jax.methods.vera import Vera

__all__ = [
    "ALora", "AdaLora", "Dora", "FrozenA", "Gained", "LoraXS", "Parts", "Rows", "Shift", "Vera", "invoked", "names",
    "precompute", "register_method", "trim",
]  # fmt: skip
