"""Linear layers, norms and activations, on parameters with Hugging Face's names and layouts."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

Params = Mapping[str, Any]


class Normed(Protocol):
    """What a config says of norms; see `DecoderConfig`."""

    @property
    def norm(self) -> Literal["rms", "layer"]:
        """Which norm it is."""
        ...

    @property
    def norm_offset(self) -> float:
        """What is added to its weights."""
        ...

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        ...


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}
"""Activations by Hugging Face's names."""


def linear(layer: Params, x: jax.Array, *, transposed: bool = False) -> jax.Array:
    """A linear layer on the last axis, in the dtype of `x`; its weight is `(out, in)`, or `(in, out)` if transposed."""
    weight = layer["weight"].astype(x.dtype)
    contracted = ((x.ndim - 1,), (0 if transposed else 1,))
    y = jax.lax.dot_general(x, weight, (contracted, ((), ())))
    return y + _on_last(layer["bias"].astype(x.dtype), y) if "bias" in layer else y


def norm(config: Normed, layer: Params, x: jax.Array) -> jax.Array:
    """The config's norm over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    if config.norm == "layer":
        wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + config.eps)
    wide = wide * _on_last(layer["weight"].astype(jnp.float32) + config.norm_offset, wide)
    return (wide + _on_last(layer["bias"].astype(jnp.float32), wide) if "bias" in layer else wide).astype(x.dtype)


def _on_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector along the last of as many axes as `like` has, as JAX can be told to refuse it otherwise."""
    return vector.reshape(*(1,) * (like.ndim - 1), -1)


def capped(x: jax.Array, cap: float) -> jax.Array:
    """Soft cap: nearly `x` where it is small, never beyond `±cap`; a cap of 0 is none."""
    return jnp.tanh(x / cap) * cap if cap else x
