"""Sampling from a `Transformer`, one byte at a time."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.transformer import Cache, Transformer


@partial(jax.jit, static_argnames=("model", "length"))
def generate(
    variables: Any,
    model: Transformer,
    prompt: jax.Array,
    length: int,
    *,
    temperature: jax.Array | float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Continue texts by `length` bytes.

    It is a function of the parameters like any other, so the adapted model's sampler is
    `lora_jax.adapt(generate)`; wrap that in `jax.jit` to compile it once.

    Args:
      variables: what `model.init` returned.
      model: the model.
      prompt: `[batch, time]` bytes; `time` is at least 1.
      length: how many bytes to add.
      temperature: 0 takes the most probable byte; otherwise logits are divided by it and a byte is drawn.
      key: `jax.random` key to draw with; not needed at temperature 0.

    Returns:
      The new bytes, uint8 `[batch, length]`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lora_jax.models import Transformer, TransformerConfig
      >>> model = Transformer(TransformerConfig(layers=1, width=16, heads=2, kv_heads=1, hidden=32))
      >>> prompt = jnp.frombuffer(b"def ", jnp.uint8)[None]
      >>> variables = model.init(jax.random.key(0), prompt)
      >>> generate(variables, model, prompt, 3).shape
      (1, 3)
    """
    batch, time = prompt.shape
    apply: Any = model.apply
    logits, cache = apply(variables, prompt, Cache.empty(model.config, batch, time + length))

    def extend(carry: tuple[jax.Array, Cache], key: jax.Array) -> tuple[tuple[jax.Array, Cache], jax.Array]:
        logits, cache = carry
        token = _choose(logits, temperature, key)
        logits, cache = apply(variables, token[:, None], cache)
        return (logits[:, -1], cache), token

    keys = jax.random.split(jax.random.key(0) if key is None else key, length)
    return jax.lax.scan(extend, (logits[:, -1], cache), keys)[1].T


def _choose(logits: jax.Array, temperature: jax.Array | float, key: jax.Array) -> jax.Array:
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(jnp.uint8)
