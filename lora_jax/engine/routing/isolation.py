"""Isolation: where all rows meet all slots in one product, what is not finite stays with the rows that chose it.

Zero times a number that is not finite is not zero, so what a row has not chosen must be finite wherever the two meet:
the factors of other slots in the forward pass, inputs and gradients of other rows in the backward pass. Factors are
made finite as they are put into a bank, which remembers whose were not; rows and gradients are here.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax.engine.meshes import follow
from lora_jax.engine.weight import SLOT, Labelled


def finite(value: Labelled) -> Labelled:
    """The array with zeros where it is not finite; no gradient goes there."""
    return replace(value, array=jnp.where(jnp.isfinite(value.array), value.array, jnp.zeros((), value.array.dtype)))


def isolated(result: Labelled, by: Labelled, factors: Sequence[Labelled]) -> Labelled:
    """The result, with a gradient that reaches the slots of its own rows only, however large or undefined it is.

    A gradient that is not finite counts as zero in the sums over all rows, and makes those of the slots that its row
    has chosen undefined.

    Args:
      result: has the axes of the rows.
      by: by how much each row counts each slot: the axes of the rows, and `SLOT`.
      factors: of the slots.
    """
    rows = tuple(axis for axis in by.axes if axis != SLOT)
    order = (*rows, *(axis for axis in result.axes if axis not in rows))
    given = result.ordered(order)
    flag = jnp.where(by.ordered((*rows, SLOT)).array != 0, _reached(factors), 0).sum(-1)
    # The solver wants tangents of all of its operands or of none: flag and result are said to depend on each other.
    some = given.array.real.astype(flag.dtype).sum(range(len(rows), given.array.ndim))
    flag = jnp.where(False, some, flag)

    def backward(_: Any, cotangent: tuple[Any, Any]) -> tuple[Any, Any]:
        gradient, flags = cotangent
        sound = jnp.isfinite(gradient)
        bad = ~sound.all(tuple(range(len(rows), gradient.ndim)))
        return jnp.where(sound, gradient, jnp.zeros((), gradient.dtype)), jnp.where(bad, jnp.nan, flags)

    solved: Any = lax.custom_linear_solve(_same, (given.array, flag), lambda _, value: value, backward)
    array, flag = solved
    whole = jnp.broadcast_to(flag[(..., *[None] * (array.ndim - len(rows)))], array.shape).astype(array.dtype)
    return Labelled(jnp.where(False, follow(whole, order, given), array), order).ordered(result.axes)


def _same(value: Any) -> Any:
    return value


def _reached(factors: Sequence[Labelled]) -> Any:
    """`[slots]`: a number on whose gradient all factors of a slot depend, and whose value nothing does."""
    given = [factor for factor in factors if SLOT in factor.axes]
    parts = [each.ordered((SLOT, *(axis for axis in each.axes if axis != SLOT))).array for each in given]
    return sum(jnp.real(part).astype(jnp.float32).sum(range(1, part.ndim)) for part in parts)
