"""The encoder: tokens to hidden states to classes, or to one embedding for each text."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import ParameterError
from lora_jax.models.blocks import Remat, rematerialised
from lora_jax.models.encoder_config import EncoderConfig
from lora_jax.models.layers import ACTIVATIONS, Params, linear, norm


def hidden(
    config: EncoderConfig,
    remat: Remat,
    params: Params,
    tokens: jax.Array,
    *,
    mask: jax.Array | None = None,
    types: jax.Array | None = None,
) -> jax.Array:
    """Hidden states of the last layer, `[batch, time, width]`.

    Args:
      config: the encoder.
      remat: what is kept for the backward pass.
      params: as `models.load` gives them.
      tokens: `[batch, time]` integers.
      mask: `[batch, time]`, zero for padding, which no token sees; all ones by default.
      types: `[batch, time]`, which of several texts in a row a token belongs to; all zero by default.

    Raises:
      ParameterError: `tokens` is no matrix, or longer than the model has positions.
    """
    body = params[config.root] if config.root else params
    x = _embedded(config, body["embeddings"], tokens, types)
    seen = None if mask is None else (mask != 0)[:, None, None, :]

    def step(layer: Params, x: jax.Array) -> jax.Array:
        return _block(config, layer, x, seen)

    step, layers = rematerialised(step, remat), body["encoder"]["layer"]
    if "0" in layers:
        for index in range(config.layers):
            x = step(layers[str(index)], x)
        return x
    return jax.lax.scan(lambda x, layer: (step(layer, x), None), x, layers)[0]


def head(config: EncoderConfig, params: Params, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """What becomes of hidden states, in float32: logits `[batch, labels]`, or the mean of each text `[batch, width]`.

    The mean is over tokens that `mask` does not leave out, as in sentence-transformers, and is not normalised.
    """
    if not config.labels:
        wide = x.astype(jnp.float32)
        weights = jnp.ones(x.shape[:2]) if mask is None else (mask != 0).astype(jnp.float32)
        return (wide * weights[:, :, None]).sum(1) / jnp.maximum(weights.sum(1), 1e-9)[:, None]
    first, layer = x[:, 0], params["classifier"]
    if "out_proj" in layer:
        return linear(layer["out_proj"], jnp.tanh(linear(layer["dense"], first))).astype(jnp.float32)
    pooled = jnp.tanh(linear(params[config.root]["pooler"]["dense"], first))
    return linear(layer, pooled).astype(jnp.float32)


def apply(
    config: EncoderConfig, remat: Remat, params: Params, tokens: jax.Array, *, mask: Any = None, types: Any = None
) -> jax.Array:
    """`head` of `hidden`: logits of classes, or embeddings of texts."""
    return head(config, params, hidden(config, remat, params, tokens, mask=mask, types=types), mask)


def _embedded(config: EncoderConfig, tables: Params, tokens: jax.Array, types: jax.Array | None) -> jax.Array:
    if jnp.ndim(tokens) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        raise ParameterError(f"tokens must be integers of shape [batch, time]; these are {jax.typeof(tokens)}")
    room = config.positions - (0 if config.padding is None else config.padding + 1)
    if tokens.shape[1] > room:
        raise ParameterError(f"{tokens.shape[1]} tokens are more than the {room} that this model has positions for")
    if config.padding is None:
        positions = jnp.arange(tokens.shape[1])[None]
    else:
        real = (tokens != config.padding).astype(jnp.int32)
        positions = jnp.cumsum(real, 1) * real + config.padding
    types = jnp.zeros_like(tokens) if types is None else types
    rows = zip(("word", "token_type", "position"), (tokens, types, positions), strict=True)
    word, kind, place = (tables[f"{name}_embeddings"]["weight"][each] for name, each in rows)
    return norm(config, tables["LayerNorm"], word + kind + place)


def _block(config: EncoderConfig, layer: Params, x: jax.Array, seen: jax.Array | None) -> jax.Array:
    attention = layer["attention"]
    parts = (linear(attention["self"][name], x) for name in ("query", "key", "value"))
    q, k, v = (part.reshape(*x.shape[:2], config.heads, -1) for part in parts)
    read = jax.nn.dot_product_attention(q, k, v, mask=seen).reshape(x.shape)
    x = norm(config, attention["output"]["LayerNorm"], x + linear(attention["output"]["dense"], read))
    inner = ACTIVATIONS[config.activation](linear(layer["intermediate"]["dense"], x))
    return norm(config, layer["output"]["LayerNorm"], x + linear(layer["output"]["dense"], inner))
