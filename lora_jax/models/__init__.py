"""Models to fine-tune: plain Flax code that knows nothing of LoRA."""

from lora_jax.models.generate import generate as generate
from lora_jax.models.transformer import Cache as Cache
from lora_jax.models.transformer import Transformer as Transformer
from lora_jax.models.transformer import TransformerConfig as TransformerConfig
