"""The table of methods: how each makes a random update, and one that changes nothing, from random factors."""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapter.updates import LowRank, Update
from lora_jax.methods import AdaLora, Dora, FrozenA, LoraXS, Vera


class Method(NamedTuple):
    """A row of the table.

    Attributes:
      trained: an update of which every leaf is random, from random factors and the weight.
      start: an update that changes nothing, from factors whose product is zero and the weight.
    """

    trained: Callable[[LowRank, Any], Update]
    start: Callable[[LowRank, Any], Update]


def _away(update: LowRank, weight: Any) -> LowRank:
    """Factors that started elsewhere."""
    return replace(update, a_start=jnp.cos(update.a) / 8, b_start=jnp.sin(update.b))


def _at_start(update: LowRank, weight: Any) -> LowRank:
    """Factors that are where they started, away from zero."""
    a, b = update.a + 1, update.b + 1
    return replace(update, a=a, b=b, a_start=a, b_start=b)


def _dora(update: LowRank, weight: Any) -> Dora:
    start = Dora.around(update, weight)
    return replace(start, magnitude=start.magnitude * (1 + 0.5 * jnp.sin(jnp.arange(start.magnitude.size))).reshape(
        start.magnitude.shape))  # fmt: skip


def _frozen_a(update: LowRank, weight: Any) -> FrozenA:
    return FrozenA(update.a, update.b, update.scale, update.site, update.dropout)


def _core(update: LowRank, core: Any) -> LoraXS:
    return LoraXS(update.a, update.b, update.scale, update.site, update.dropout, core=core)


def _square(update: LowRank) -> jax.Array:
    """Numbers for a core, another matrix for every weight of a stack."""
    shape = (*update.site.batch_shape, update.rank, update.rank)
    return jnp.cos(jnp.arange(1.0, 1 + prod(shape))).reshape(shape)


def _values(update: LowRank, values: Any) -> AdaLora:
    return AdaLora(update.a, update.b, update.scale, update.site, update.dropout, values=values)


def _vectors(update: LowRank, b: Any) -> Vera:
    return Vera(_square(update)[..., 0] / 4, b, update.scale, update.site, 3, update.dropout)


def _row(update: LowRank) -> jax.Array:
    """The first row of B."""
    return jnp.take(update.b, 0, len(update.site.batch_axes))


METHODS = {
    "lora": Method(lambda update, weight: update, lambda update, weight: update),
    "away": Method(_away, _at_start),
    "dora": Method(_dora, Dora.around),
    "dora_away": Method(lambda u, w: _dora(_away(u, w), w), lambda u, w: Dora.around(_at_start(u, w), w)),
    "lora-fa": Method(_frozen_a, _frozen_a),
    "lora-xs": Method(lambda u, w: _core(u, _square(u)), lambda u, w: _core(u, jnp.zeros_like(_square(u)))),
    "adalora": Method(
        lambda u, w: _values(u, _square(u)[..., 0]), lambda u, w: _values(u, jnp.zeros_like(_square(u)[..., 0]))
    ),
    "vera": Method(lambda u, w: _vectors(u, _row(u)), lambda u, w: _vectors(u, jnp.zeros_like(_row(u)))),
}
