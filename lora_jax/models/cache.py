"""The cache of keys and values with which a decoder continues texts, as a pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.models.config import DecoderConfig


class Cache(NamedTuple):
    """Keys and values of the tokens read so far.

    Attributes:
      keys: `[layers, batch, length, kv_heads, head_dim]`, rotated.
      values: likewise.
      segments: `[batch, length]` int32; tokens see those of their own segment. 0 where nothing was read.
      positions: `[batch]` int32, the position of each row's next token.
      filled: how many places are filled, a scalar; the same for all rows.
    """

    keys: jax.Array
    values: jax.Array
    segments: jax.Array
    positions: jax.Array
    filled: jax.Array

    @property
    def length(self) -> int:
        """How many tokens there is room for."""
        return self.keys.shape[2]


def empty_cache(config: DecoderConfig, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """A cache with room for `length` tokens of `batch` texts, in the dtype of the activations.

    Example:
      >>> from lora_jax.models.read_config import decoder_config
      >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
      >>> config = decoder_config("config.json", {"model_type": "llama", "vocab_size": 9, **sizes})
      >>> empty_cache(config, batch=2, length=5).keys.shape
      (3, 2, 5, 2, 4)
    """
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    return Cache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, length), jnp.int32),
        jnp.zeros(batch, jnp.int32), jnp.int32(0),
    )  # fmt: skip
