"""The table of methods: how each makes a random update, and one that changes nothing, from random factors."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp

from lora_jax.methods import Dora
from lora_jax.updates import LowRank, Update


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
    return replace(update, a_start=jnp.cos(update.a), b_start=jnp.sin(update.b))


def _at_start(update: LowRank, weight: Any) -> LowRank:
    """Factors that are where they started, away from zero."""
    a, b = update.a + 1, update.b + 1
    return replace(update, a=a, b=b, a_start=a, b_start=b)


def _dora(update: LowRank, weight: Any) -> Dora:
    start = Dora.around(update, weight)
    return replace(start, magnitude=start.magnitude * (1 + 0.5 * jnp.sin(jnp.arange(start.magnitude.size))).reshape(
        start.magnitude.shape))  # fmt: skip


METHODS = {
    "lora": Method(lambda update, weight: update, lambda update, weight: update),
    "away": Method(_away, _at_start),
    "dora": Method(_dora, Dora.around),
    "dora_away": Method(lambda u, w: _dora(_away(u, w), w), lambda u, w: Dora.around(_at_start(u, w), w)),
}
