"""Attention: queries, keys and values of one layer, and which tokens see which."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.models.config import DecoderConfig
from lora_jax.models.layers import Params, capped, linear, norm
from lora_jax.models.ropes import rotate

_NOTHING = -1e30
"""A score that gets no probability, and is finite so that a row of nothing else has gradients."""


class Sight(NamedTuple):
    """Places of queries and keys in the row (or cache), and the segments that both belong to, if there are several.

    Attributes:
      queries: `[time]` int32.
      keys: `[places]` int32.
      segments: `[batch, time]` of queries and `[batch, places]` of keys, or None.
    """

    queries: jax.Array
    keys: jax.Array
    segments: tuple[jax.Array, jax.Array] | None

    def mask(self, window: jax.Array | int) -> jax.Array:
        """`[batch or 1, 1, time, places]`: what each query sees; a window of 0 is none."""
        back = self.queries[:, None] - self.keys[None, :]
        seen = (back >= 0) & ((back < window) | (window == 0))
        if self.segments is None:
            return seen[None, None]
        one, other = self.segments
        return (seen[None] & (one[:, :, None] == other[:, None, :]))[:, None]


def project(
    config: DecoderConfig, layer: Params, x: jax.Array, rope: tuple[jax.Array, jax.Array] | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[batch, time, heads, features]`, and keys and values `[batch, time, kv_heads, features]`."""
    heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
    parts = [linear(layer[name], x, transposed=config.transposed) for name in config.modules.qkv]
    if config.interleaved:
        fused = parts[0].reshape(*x.shape[:2], heads, 3 * dim)
        q, k, v = jnp.split(fused, 3, -1)
    else:
        cuts = (heads * dim, (heads + kv_heads) * dim)
        parts = parts if len(parts) == 3 else jnp.split(parts[0], cuts, -1)
        q, k, v = (part.reshape(*x.shape[:2], -1, dim) for part in parts)
    if config.qk_norm:
        q, k = norm(config, layer["q_norm"], q), norm(config, layer["k_norm"], k)
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    return q, k, v


def attend(
    config: DecoderConfig, layer: Params, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """What the heads read, through the output layer: `[batch, time, width]`."""
    if config.attention_cap or config.sinks:
        read = _scores_read(config, layer, q, k, v, mask)
    else:
        read = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=config.scale)
    read = read.reshape(*q.shape[:2], -1)
    return linear(layer[config.modules.out], read, transposed=config.transposed)


def _scores_read(
    config: DecoderConfig, layer: Params, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """Attention with a soft cap on scores, or with sinks, which `jax.nn.dot_product_attention` has not."""
    grouped = q.reshape(*q.shape[:2], config.kv_heads, -1, config.head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * config.scale
    scores = jnp.where(mask[:, :, None], capped(scores, config.attention_cap), _NOTHING)
    if config.sinks:
        sinks = layer["sinks"].astype(jnp.float32).reshape(1, config.kv_heads, -1, 1, 1)
        sinks = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sinks], -1), -1)[..., :-1]
    else:
        weights = jax.nn.softmax(scores, -1)
    return jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v)
