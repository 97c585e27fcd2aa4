"""The decoder: tokens to hidden states to logits, with its layers under `scan` or one by one."""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import ParameterError
from lora_jax.models.attention import Sight
from lora_jax.models.blocks import Remat, run_layers
from lora_jax.models.cache import Cache
from lora_jax.models.config import DecoderConfig
from lora_jax.models.layers import Params, capped, linear, norm
from lora_jax.models.tensors import SCORE


def body_of(config: DecoderConfig, params: Params) -> Params:
    """The parameters of everything but the head."""
    return reduce(lambda inner, name: inner[name], config.modules.root.split("."), params)


def hidden(
    config: DecoderConfig,
    remat: Remat,
    params: Params,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    cache: Cache | None = None,
) -> Any:
    """Hidden states after the last norm, `[batch, time, width]`, and the cache if there is one.

    Args:
      config: the decoder.
      remat: what is kept for the backward pass.
      params: as `models.load` gives them.
      tokens: `[batch, time]` integers.
      positions: `[batch, time]`; by default they count from 0, or on from where the cache is.
      segments: `[batch, time]` integers; tokens see those of their own segment. All 1 by default.
      cache: what was read before; its places are filled in order.

    Raises:
      ParameterError: `tokens` is no matrix, or longer than the model or the cache has places for.
    """
    _check_length(config, tokens, cache)
    body, (batch, time) = body_of(config, params), tokens.shape
    start = 0 if cache is None else cache.filled
    if positions is None:
        first = jnp.zeros(1, jnp.int32) if cache is None else cache.positions
        positions = first[:, None] + jnp.arange(time)[None]
    if cache is not None:
        segments = jnp.ones((batch, time), jnp.int32) if segments is None else segments
        cache = _noted(cache, positions, segments)
    x = _embedded(config, body, tokens, positions)
    length = time if cache is None else cache.length
    places = start + jnp.arange(time)
    own = None if segments is None else (segments, segments if cache is None else cache.segments)
    sight = Sight(places, places if cache is None else jnp.arange(length), own)
    angles = [rope.angles(positions, length) for rope in config.ropes]
    x, cache = run_layers(config, remat, body[config.modules.layers], x, angles, sight, cache)
    x = norm(config, body[config.modules.last_norm], x)
    return x if cache is None else (x, cache._replace(filled=start + time))


def head(config: DecoderConfig, params: Params, x: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """Logits in float32, `[..., vocabulary]`, of hidden states `[..., width]`.

    Of a model for classes `[batch, labels]`, of the last token of each row that has a segment other than 0.
    """
    names = config.modules
    if config.labels:
        return linear(params[SCORE], _last(x, segments).astype(jnp.float32))
    layer = body_of(config, params)[names.table] if config.tied else params[names.head]
    return capped(linear(layer, x).astype(jnp.float32), config.logit_cap)


def apply(config: DecoderConfig, remat: Remat, params: Params, tokens: jax.Array, **kwargs: Any) -> Any:
    """`head` of `hidden`: logits in float32, and the cache if there is one."""
    if kwargs.get("cache") is None:
        x = hidden(config, remat, params, tokens, **kwargs)
        return head(config, params, x, kwargs.get("segments"))
    x, cache = hidden(config, remat, params, tokens, **kwargs)
    return head(config, params, x), cache


def _last(x: jax.Array, segments: jax.Array | None) -> jax.Array:
    """What stands at the last token of each row, `[batch, width]`."""
    if segments is None:
        return x[:, -1]
    places = jnp.where(segments > 0, jnp.arange(x.shape[1])[None], 0).max(1)
    return jnp.take_along_axis(x, places[:, None, None], 1)[:, 0]


def _check_length(config: DecoderConfig, tokens: jax.Array, cache: Cache | None) -> None:
    if jnp.ndim(tokens) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        raise ParameterError(f"tokens must be integers of shape [batch, time]; these are {jax.typeof(tokens)}")
    length = tokens.shape[1] if cache is None else cache.length
    if config.positions and length > config.positions:
        what = "tokens are" if cache is None else "places of a cache are"
        raise ParameterError(f"{length} {what} more than the {config.positions} positions that this model has learned")
    if cache is not None and tokens.shape[1] > length:
        raise ParameterError(f"{tokens.shape[1]} tokens are more than the {length} places of the cache")


def _noted(cache: Cache, positions: jax.Array, segments: jax.Array) -> Cache:
    """The cache with segments of the new tokens, and the position after them."""
    segments = jax.lax.dynamic_update_slice(cache.segments, segments.astype(jnp.int32), (0, cache.filled))
    after = jnp.broadcast_to(positions[:, -1] + 1, cache.positions.shape).astype(jnp.int32)
    return cache._replace(segments=segments, positions=after)


def _embedded(config: DecoderConfig, body: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    x = body[config.modules.table]["weight"][tokens]
    if config.embed_scale != 1:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    return x + body[config.modules.positions]["weight"][positions] if config.positions else x
