"""The layers of a decoder, one by one or under `scan`, with what is kept for the backward pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.errors import ConfigError, listed
from lora_jax.models.attention import Sight, attend, project
from lora_jax.models.cache import Cache
from lora_jax.models.config import DecoderConfig
from lora_jax.models.layers import Params, norm
from lora_jax.models.mlp import mlp

Remat = bool | str | Callable[..., bool]
"""What is kept for the backward pass: see `models.load`."""
_Angles = tuple[jax.Array, jax.Array]
_Stored = tuple[jax.Array, jax.Array] | None
_Step = Callable[..., tuple[jax.Array, _Stored]]


class _Layer(NamedTuple):
    """What a layer needs beside its parameters and its input: its window, its angles, its number."""

    window: jax.Array | int
    rope: _Angles | None
    number: jax.Array | int


def run_layers(
    config: DecoderConfig,
    remat: Remat,
    layers: Params,
    x: jax.Array,
    angles: list[_Angles],
    sight: Sight,
    cache: Cache | None,
) -> tuple[jax.Array, Cache | None]:
    """The residual stream `[batch, time, width]` after all layers, and the cache with their keys and values.

    Args:
      config: the decoder.
      remat: what is kept for the backward pass.
      layers: parameters, stacked or by number.
      x: the embedded tokens.
      angles: cosine and sine of each of the config's ropes.
      sight: which tokens see which.
      cache: what was read before.
    """

    def step(params: Params, x: jax.Array, layer: _Layer, stored: _Stored) -> tuple[jax.Array, _Stored]:
        return _block(config, params, x, layer, sight, stored)

    step = rematerialised(step, remat)
    stored: _Stored = None if cache is None else (cache.keys, cache.values)
    run = _one_by_one if "0" in layers else _scanned
    x, stored = run(config, step, layers, x, angles, stored)
    return x, cache if cache is None or stored is None else cache._replace(keys=stored[0], values=stored[1])


def _one_by_one(
    config: DecoderConfig,
    step: _Step,
    layers: Params,
    x: jax.Array,
    angles: list[_Angles],
    stored: _Stored,
) -> tuple[jax.Array, _Stored]:
    for index, (window, rope) in enumerate(zip(config.windows, config.rope_of, strict=True)):
        x, stored = step(layers[str(index)], x, _Layer(window, angles[rope] if rope >= 0 else None, index), stored)
    return x, stored


def _scanned(
    config: DecoderConfig,
    step: _Step,
    layers: Params,
    x: jax.Array,
    angles: list[_Angles],
    stored: _Stored,
) -> tuple[jax.Array, _Stored]:
    layer_of = _layers_by_kind(config, angles)

    def body(carry: tuple[jax.Array, _Stored], each: Any) -> tuple[tuple[jax.Array, _Stored], None]:
        params, index, kind = each
        return step(params, carry[0], layer_of(index, kind), carry[1]), None

    # The cache is carried, not scanned, so that only the new places are written.
    numbers = jnp.arange(config.layers), jnp.asarray(config.kind_of)
    return jax.lax.scan(body, (x, stored), (layers, *numbers))[0]


def _layers_by_kind(config: DecoderConfig, angles: list[_Angles]) -> Callable[[jax.Array, jax.Array], _Layer]:
    """A layer by its number and the number of its kind; what all kinds share stays static."""
    windows, ropes = zip(*config.kinds, strict=True)
    sizes, each = jnp.asarray(windows), None
    if len({*ropes}) > 1:
        still = jnp.ones_like(angles[0][0]), jnp.zeros_like(angles[0][1])
        each = jax.tree.map(lambda *parts: jnp.stack(parts), *(angles[rope] if rope >= 0 else still for rope in ropes))

    def layer(index: jax.Array, kind: jax.Array) -> _Layer:
        window = windows[0] if len({*windows}) == 1 else sizes[kind]
        if each is not None:
            return _Layer(window, (each[0][kind], each[1][kind]), index)
        return _Layer(window, angles[ropes[0]] if ropes[0] >= 0 else None, index)

    return layer


def _block(
    config: DecoderConfig, params: Params, x: jax.Array, layer: _Layer, sight: Sight, stored: _Stored
) -> tuple[jax.Array, _Stored]:
    """One layer: attention and MLP, with norms before, around, or before both at once."""
    names = config.modules
    norms = [lambda x, name=name: norm(config, params[name], x) for name in names.norms]
    q, k, v = project(config, params[names.attention], norms[0](x), layer.rope)
    if stored is not None:
        k, v, stored = _with_stored(k, v, layer.number, sight.queries[0], stored)
    read = attend(config, params[names.attention], q, k, v, sight.mask(layer.window))
    if config.residual == "parallel":
        return x + read + mlp(config, params[names.mlp], norms[1](x)), stored
    if config.residual == "around":
        x = x + norms[1](read)
        return x + norms[3](mlp(config, params[names.mlp], norms[2](x))), stored
    x = x + read
    return x + mlp(config, params[names.mlp], norms[1](x)), stored


def _with_stored(
    k: jax.Array, v: jax.Array, index: jax.Array | int, start: jax.Array, stored: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """All keys and values of a layer, old and new, and the cache with the new ones."""
    zero = jnp.int32(0)
    at = (jnp.asarray(index, jnp.int32), zero, start.astype(jnp.int32), zero, zero)
    keys, values = (
        jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)
        for old, new in zip(stored, (k, v), strict=True)
    )
    own = (jax.lax.dynamic_index_in_dim(each, at[0], keepdims=False).astype(k.dtype) for each in (keys, values))
    return next(own), next(own), (keys, values)


def rematerialised(step: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The step of a layer, keeping for the backward pass what `remat` says.

    Raises:
      ConfigError: there is no policy of that name.
    """
    if remat is False:
        return step
    if isinstance(remat, str):
        known = [name for name in dir(jax.checkpoint_policies) if not name.startswith("_")]
        if remat not in known:
            raise ConfigError(
                f"remat={remat!r} is no policy; there are {listed(known, count=20)}, True to keep a layer's input "
                "only, and False to keep all"
            )
        return jax.checkpoint(step, policy=getattr(jax.checkpoint_policies, remat))
    return jax.checkpoint(step) if remat is True else jax.checkpoint(step, policy=remat)
