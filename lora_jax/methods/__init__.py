"""One module per variant of LoRA: what an adapter holds at a parameter, and what that makes of the parameter."""

from lora_jax.methods.dora import Dora
from lora_jax.methods.rows import Rows
from lora_jax.methods.shift import Shift
from lora_jax.registry import method_names as names
from lora_jax.registry import register_method

__all__ = ["Dora", "Rows", "Shift", "names", "register_method"]
