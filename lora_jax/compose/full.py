"""Composing what has no low-rank factors: `modules_to_save` and rows trained in full, additions to biases."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapter.factors import Array, times, widened
from lora_jax.adapter.updates import Replace
from lora_jax.compose.factors import Options, gathered
from lora_jax.compose.methods import Method
from lora_jax.errors import ParameterError
from lora_jax.methods import Rows, Shift
from lora_jax.methods.trainable_tokens import rows_of


class Weighted(NamedTuple):
    """An update, and how much it counts.

    Attributes:
      update: the update.
      weight: its weight.
      known: the weight as a number; None under a transformation, where it has no value yet.
    """

    update: Any
    weight: Array
    known: float | None


class Blend(NamedTuple):
    """How whole tensors become one.

    Attributes:
      method: the method of the composition.
      options: its settings.
      key: of the parameter.
      base: the base's parameters by path, where they were given.
    """

    method: Method
    options: Options
    key: Array | None
    base: Mapping[str, Any]

    def changes(self, given: Sequence[Array], held: Sequence[Weighted], stack: tuple[int, ...] = ()) -> Array:
        """One tensor out of several changes of it; each entry along the axes of a stack by itself."""
        weights, size = jnp.stack([each.weight for each in held]), prod(stack)
        keys = None if self.key is None else jax.random.split(self.key, size)
        rows = tuple(each.reshape(size, -1) for each in given)
        one = lambda own: self.method.tensors(own[0], weights, self.options, own[1])  # noqa: E731
        return jax.vmap(one)((rows, keys)).reshape(given[0].shape)

    def values(self, path: str, given: Sequence[Array], held: Sequence[Weighted], base: Array | None) -> Array:
        """One value out of several that stand for the base's."""
        if base is None:
            _check_shares(path, held, self.method)
            return jnp.stack([value * each.weight for value, each in zip(given, held, strict=True)]).sum(0)
        return base + self.changes([value - base for value in given], held)


def shift(path: str, held: Sequence[Weighted], blend: Blend) -> Shift:
    """Additions to a bias, composed; scales go into the values."""
    first: Shift = held[0].update
    given = [times(each.update.scale, widened(each.update.value)) for each in held]
    return Shift(blend.changes(given, held, first.scale.shape), jnp.ones_like(first.scale), first.site)


def replace(path: str, held: Sequence[Weighted], blend: Blend) -> Replace:
    """Parameters trained in full, composed: by their differences to the base's, or by shares of one."""
    base = gathered(widened(blend.base[path])) if path in blend.base else None
    given = [widened(each.update.value) for each in held]
    return Replace(blend.values(path, given, held, base), held[0].update.site)


def rows(path: str, held: Sequence[Weighted], blend: Blend) -> Rows:
    """Rows trained by any of the adapters; one that an adapter does not train is the base's there."""
    site = held[0].update.site
    trained = [each.update.rows for each in held]
    numbers = tuple(sorted(set().union(*trained)))
    if path in blend.base:
        base = widened(rows_of(site, gathered(blend.base[path]), numbers))
        given = [base.at[_places(each.update, numbers)].set(widened(each.update.value)) for each in held]
        return Rows(blend.values(path, given, held, base), site, numbers)
    for number in numbers:
        sharing = [each for each, own in zip(held, trained, strict=True) if number in own]
        _check_shares(f"{path} (row {number})", sharing, blend.method)
    value = jnp.zeros((len(numbers), *site.sizes(site.out_axes)))
    for each in held:
        value = value.at[_places(each.update, numbers)].add(each.weight * widened(each.update.value))
    return Rows(value, site, numbers)


def _places(update: Rows, numbers: tuple[int, ...]) -> Array:
    return jnp.asarray([numbers.index(row) for row in update.rows])


def _check_shares(path: str, held: Sequence[Weighted], method: Method) -> None:
    """Without the base, values that replace it can be mixed, but not added up, pruned or elected."""
    given = [each.known for each in held]
    if method.adds and None not in given and abs(sum(map(float, given)) - 1) < 1e-6:  # type: ignore[arg-type]
        return
    what = f"with weights {given}" if method.adds else "entry by entry"
    raise ParameterError(
        f"{path} is trained in full, and values can be composed {what} only as differences to the base's: pass "
        f"params=, or weights whose sum there is 1 and a method that adds up, or leave it out of the adapters: "
        f"adapter.without({path.partition(' ')[0]!r})"
    )
