"""Slots: which adapter of a bank each example or token of a call meets, and what of the bank's factors that is.

Factors of a bank have an axis of slots, one for each adapter. What an example meets is either one slot, by number, or a
sum over all slots with weights of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.engine import contract
from lora_jax.engine.context import Context
from lora_jax.engine.meshes import follow, here, placed
from lora_jax.engine.routing.axes import Axis, labels, length, marked, plain
from lora_jax.engine.routing.batch_axes import BatchAxes, Trail
from lora_jax.engine.routing.isolation import finite, isolated
from lora_jax.engine.routing.router import Router
from lora_jax.engine.sizes import several
from lora_jax.engine.weight import SLOT, Labelled, Weight
from lora_jax.errors import ParameterError

RouteStrategy = Literal["auto", "rows", "mask", "blocks"]


@dataclass(frozen=True, eq=False)
class Routing:
    """What a routed call knows beside its program.

    Attributes:
      given: `[*sizes]` integers, positions along the axis of slots, past its end for the base; or `[*sizes, slots]`
        floating-point numbers, weights of all slots; or a router, which finds such weights where rows are used.
      sizes: of the axes that the labels number; none with a router.
      slots: number of slots, that of the base not among them.
      batch_axes: what runs along the axes of the program's values.
      strategy: the form, or `auto` for the planner's choice.
      broken: `[slots]`, which of them hold an adapter with numbers that are not finite; None if that is not known.
    """

    given: Any
    sizes: tuple[int, ...]
    slots: int
    batch_axes: BatchAxes
    strategy: RouteStrategy
    broken: Any = None

    @classmethod
    def of(
        cls,
        given: Any,
        sizes: tuple[int, ...],
        slots: int,
        batch_axes: BatchAxes,
        strategy: RouteStrategy,
        broken: Any = None,
    ) -> "Routing":
        """The routing of a call; one without any examples meets the base."""
        if 0 in sizes:
            given, sizes = jnp.full((1,) * len(sizes), slots), (1,) * len(sizes)
        return cls(given, sizes, slots, batch_axes, strategy, broken)

    def spoiled(self, value: Labelled, choice: Labelled) -> Labelled:
        """What adapters add to rows, undefined for rows that a broken one is for, or that have undefined weights."""
        if SLOT in choice.axes:
            rows = tuple(axis for axis in choice.axes if axis != SLOT)
            weights = choice.ordered((*rows, SLOT)).array
            bad = ~jnp.isfinite(weights)
            bad = (
                bad
                if self.broken is None
                else bad | ((weights != 0) & jnp.broadcast_to(here(self.broken), weights.shape))
            ).any(-1)
        elif self.broken is None:
            return value
        else:
            rows = choice.axes
            bad = (
                here(self.broken).at[choice.array].get(mode="fill", fill_value=False, out_sharding=placed(rows, choice))
            )
        undefined = follow(jnp.where(bad, jnp.nan, 0), rows, value)
        array = value.array + Labelled(undefined, rows).over(value.axes).astype(value.array.dtype)
        return replace(value, array=array)

    @property
    def mixes(self) -> bool:
        """Whether every row has weights of all slots."""
        return isinstance(self.given, Router) or jnp.issubdtype(self.given.dtype, jnp.floating)

    @cached_property
    def wanted(self) -> list[int]:
        """The labels that tell rows apart: those of axes longer than one."""
        return [label for label, size in enumerate(self.sizes) if several(size)]

    def operand(self, trail: Trail, index: int, shape: Sequence[int]) -> list[Axis]:
        """What runs along the axes of an operand."""
        known = self.batch_axes.operands.get(trail)
        return list(known[index]) if known else [plain(size) for size in shape]

    def choice(self, path: str, axes: Sequence[Axis], names: Sequence[int]) -> Labelled:
        """The slots (or weights, on a last axis `SLOT`) of a value's rows, over those of its axes that tell them apart.

        Args:
          path: the parameter that is used, for messages.
          axes: what runs along the axes of the value.
          names: their ids.
        """
        if isinstance(self.given, Router):
            raise ParameterError(
                f"{path} is looked up, or convolved, and a router decides by the inputs of products: leave {path!r} "
                "out of the bank, or give ids or weights of examples"
            )
        self.check(path, axes)
        rest = self.given.shape[len(self.sizes) :]
        order = labels(axes)
        array = jnp.squeeze(here(self.given), [i for i, size in enumerate(self.sizes) if size == 1])
        places = [self.wanted.index(label) for label in order]
        array = jnp.transpose(array, [*places, *range(len(places), array.ndim)])
        used = [(name, axis) for name, axis in zip(names, axes, strict=True) if labels([axis])]
        parts = [part for _, axis in used for part in axis]
        spread = array.reshape(*(size if labels([((label, size),)]) else 1 for label, size in parts), *rest)
        spread = jnp.broadcast_to(spread, (*(size for _, size in parts), *rest))
        found = (*(name for name, _ in used), *([SLOT] if self.mixes else []))
        return Labelled(spread.reshape(*(length(axis) for _, axis in used), *rest), found)

    def same_for_all(self, axes: Sequence[Axis]) -> bool:
        """Whether a value is no example's own, so that all it can meet are all adapters, one by one."""
        return not self.mixes and bool(self.wanted) and not marked(axes)

    def check(self, path: str, axes: Sequence[Axis]) -> None:
        """Refuse a value whose rows cannot be told apart."""
        refusal = self.refusal(path, axes)
        if refusal:
            raise ParameterError(refusal)

    def refusal(self, path: str, axes: Sequence[Axis]) -> str:
        """Why the rows of a value cannot be told apart; empty if they can."""
        found = labels(axes)
        for label in self.wanted:
            if found.count(label) == 1:
                continue
            what = "tokens" if label else "examples"
            lost = ", ".join(self.batch_axes.lost) or "(none)"
            several = "along several axes at once"
            why = several if found.count(label) else f"along none; operations that lose them: {lost}"
            keywords = ", ".join(self.batch_axes.keywords)
            return (
                f"Each of the {what} is to have its own adapter, but in what {path} is applied to they run {why}. Have "
                f"batch_axes and token_axes say where they run in every positional argument, or leave {path!r} out of "
                "the bank"
                + (f". Arguments given by keyword ({keywords}) hold none: give them by position" if keywords else "")
            )
        return ""


@dataclass(frozen=True, kw_only=True)
class RoutedContext(Context):
    """The context of a call in which examples have adapters of their own.

    Attributes:
      routing: which slot of the bank each of them meets.
    """

    routing: Routing


def routing_of(ctx: Context) -> Routing:
    """The routing of a call in which some weight has factors of a bank."""
    assert isinstance(ctx, RoutedContext)
    return ctx.routing


def gate(choice: Labelled, slots: int, dtype: Any) -> Labelled:
    """`[*rows, SLOT]`: by how much each slot counts for each row; for the base none does."""
    if SLOT in choice.axes:
        return choice.astype(dtype)
    return Labelled(jax.nn.one_hot(choice.array, slots, dtype=dtype), (*choice.axes, SLOT))


def chosen(factor: Labelled, choice: Labelled, base: float = 0.0) -> Labelled:
    """The factor (or gain) with the axis of slots replaced by the rows that chose; `base` for those that chose none."""
    if SLOT not in factor.axes:
        return factor
    if SLOT in choice.axes:
        return _weighted(factor, choice)
    shared = [axis for axis in choice.axes if axis in factor.axes]  # A weight may be stacked over the rows already.
    rest = [axis for axis in factor.axes if axis != SLOT and axis not in shared]
    places = [lax.broadcasted_iota(jnp.int32, choice.array.shape, choice.axes.index(axis)) for axis in shared]
    array = factor.ordered((*shared, SLOT, *rest)).array
    axes = (*choice.axes, *rest)
    found = array.at[(*places, choice.array)].get(
        mode="fill", fill_value=base, out_sharding=placed(axes, choice, factor)
    )
    return Labelled(found, axes)


def _weighted(factor: Labelled, choice: Labelled) -> Labelled:
    """The sum over all slots with the weights of each row."""
    by, keep = choice.astype(factor.array.dtype), {*choice.axes, *factor.axes} - {SLOT}
    return isolated(contract.product(finite(by), factor, keep, lax.Precision.HIGHEST, ()), by, (factor,))


def kept(inner: Any, by: Any, mixes: bool) -> Any:
    """What is between the two products times its weights; what is not chosen is never read, nor has it a gradient."""
    if not mixes:
        return jnp.where(by != 0, inner, jnp.zeros((), inner.dtype))
    met = jnp.where(by != 0, inner, lax.stop_gradient(inner))  # A weight of zero has a gradient; what it meets, none.
    return jnp.where((by != 0) | jnp.isfinite(inner), met * by, jnp.zeros((), inner.dtype))


def own_gain(gain: Labelled, choice: Labelled) -> Labelled:
    """The gain that each row meets: of weighted adapters, one plus the weighted distances from one."""
    if SLOT not in choice.axes:
        return chosen(gain, choice, 1.0)
    less = chosen(replace(gain, array=gain.array - 1), choice)
    return replace(less, array=1 + less.array)


def split(x: Labelled, axes: Sequence[Axis], weight: Weight) -> tuple[Labelled, list[Axis], dict[int, list[int]]]:
    """The activation with an axis for each part of those that labels share with others.

    Returns:
      The activation, what runs along its axes, and by old id the new ids and their sizes.
    """
    new: dict[int, list[int]] = {}
    free = iter(range(min((*x.axes, SLOT)) - 1, -(1 << 30), -1))
    names: list[int] = []
    found: list[Axis] = []
    for name, axis in zip(x.axes, axes, strict=True):
        if len(axis) > 1 and labels([axis]) and name not in weight.axes:
            new[name] = [next(free) for _ in axis]
            names += new[name]
            found += [(part,) for part in axis]
        else:
            names.append(name)
            found.append(axis)
    if not new:
        return x, list(axes), new
    sizes = [n for n, axis in zip(x.array.shape, axes, strict=True)]
    shape = [
        m for name, n, axis in zip(x.axes, sizes, axes, strict=True) for m in (_lengths(axis) if name in new else [n])
    ]
    return Labelled(x.array.reshape(shape), tuple(names)), found, new


def _lengths(axis: Axis) -> list[int]:
    return [size for _, size in axis]
