"""lora_jax: LoRA for any JAX function, as a pure parameter-tree transform."""

from lora_jax.adapter import Adapter as Adapter
from lora_jax.adapter import scale as scale
from lora_jax.adapter import trainable as trainable
from lora_jax.apply import adapt as adapt
from lora_jax.sites import explain as explain
from lora_jax.sites import find_sites as find_sites
