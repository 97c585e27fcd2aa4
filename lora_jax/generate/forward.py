"""A decoder for continuing texts: by itself, with an adapter, or with an adapter of its own for every row."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from lora_jax.adapter.adapter import Adapter
from lora_jax.apply import adapt
from lora_jax.generate.decoding import Forward
from lora_jax.many.bank import AdapterBank
from lora_jax.many.route import route
from lora_jax.models.cache import Cache
from lora_jax.models.load import Model

_OF_CACHE = Cache._make((1, 1, 0, 0, None))
"""Where the rows run in each part of a cache."""


class Programs(NamedTuple):
    """The forms of one model; make them once, as each is compiled for itself.

    Attributes:
      plain: weights are the parameters.
      adapted: weights are the parameters and an adapter, or a tuple of adapters that are added.
      routed: weights are the parameters, a bank, and the slot of each row, `[batch]`.
    """

    plain: Forward
    adapted: Forward
    routed: Forward


def programs(model: Model) -> Programs:
    """The forms in which a model continues texts.

    Args:
      model: of `lora_jax.models.load`.
    """

    def last(
        params: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        hidden, cache = model.hidden(params, tokens, positions=positions, segments=segments, cache=cache)
        return model.head(params, hidden[:, -1]), cache

    with_adapter, with_bank = adapt(last), route(last, batch_axes=(0, 0, 0, _OF_CACHE))

    def adapted(weights: tuple[Any, Adapter | Sequence[Adapter]], *args: Any) -> tuple[jax.Array, Cache]:
        return with_adapter(*weights, *args)

    def routed(weights: tuple[Any, AdapterBank, jax.Array], *args: Any) -> tuple[jax.Array, Cache]:
        return with_bank(*weights, *args)

    return Programs(last, adapted, routed)
