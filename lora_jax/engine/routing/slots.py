"""Routing: which slot of a bank each example or token meets, and the forms in which its factors are applied.

Factors of a bank have an axis of slots. What an example meets is either one slot, by number, or a sum over all slots
with weights of its own. Three forms compute the same:

* `rows`: the factors of each row's slot are gathered, and every row is multiplied by its own.
* `mask`: every row meets all slots at once, in two ordinary products; between them all but its own are set to zero.
* `blocks`: rows are brought into blocks of one slot each, and every block is multiplied by its factors. The number of
  blocks has a bound that depends on shapes only, so nothing is dropped and nothing recompiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.engine import contract
from lora_jax.engine.meshes import placed, spread
from lora_jax.engine.routing.axes import Axis, labels, length, plain
from lora_jax.engine.routing.labels import Flow, Trail
from lora_jax.engine.routing.router import Router
from lora_jax.engine.weight import RANK, SLOT, Labelled, Weight, flat_size
from lora_jax.errors import ParameterError

Form = Literal["rows", "mask", "blocks"]
RouteStrategy = Literal["auto", "rows", "mask", "blocks"]


@dataclass(frozen=True, eq=False)
class Routing:
    """What a routed call knows beside its program.

    Attributes:
      given: `[*sizes]` integers, positions along the axis of slots, past its end for the base; or `[*sizes, slots]`
        floating-point numbers, weights of all slots; or a router, which finds such weights where rows are used.
      sizes: of the axes that the labels number; none with a router.
      slots: number of slots, that of the base not among them.
      flow: what runs along the axes of the program's values.
      strategy: the form, or `auto` for the planner's choice.
    """

    given: Any
    sizes: tuple[int, ...]
    slots: int
    flow: Flow
    strategy: RouteStrategy

    @property
    def mixes(self) -> bool:
        """Whether every row has weights of all slots."""
        return isinstance(self.given, Router) or jnp.issubdtype(self.given.dtype, jnp.floating)

    @cached_property
    def wanted(self) -> list[int]:
        """The labels that tell rows apart: those of axes longer than one."""
        return [label for label, size in enumerate(self.sizes) if size > 1]

    def operand(self, trail: Trail, index: int, shape: Sequence[int]) -> list[Axis]:
        """What runs along the axes of an operand."""
        known = self.flow.operands.get(trail)
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
        array = jnp.squeeze(self.given, [i for i, size in enumerate(self.sizes) if size == 1])
        places = [self.wanted.index(label) for label in order]
        array = jnp.transpose(array, [*places, *range(len(places), array.ndim)])
        used = [(name, axis) for name, axis in zip(names, axes, strict=True) if labels([axis])]
        parts = [part for _, axis in used for part in axis]
        spread = array.reshape(*(size if labels([((label, size),)]) else 1 for label, size in parts), *rest)
        spread = jnp.broadcast_to(spread, (*(size for _, size in parts), *rest))
        found = (*(name for name, _ in used), *([SLOT] if self.mixes else []))
        return Labelled(spread.reshape(*(length(axis) for _, axis in used), *rest), found)

    def check(self, path: str, axes: Sequence[Axis]) -> None:
        """Refuse a value whose rows cannot be told apart."""
        found = labels(axes)
        for label in self.wanted:
            if found.count(label) == 1:
                continue
            what = "tokens" if label else "examples"
            lost = ", ".join(self.flow.lost) or "(none)"
            several = "along several axes at once"
            why = several if found.count(label) else f"along none; operations that lose them: {lost}"
            raise ParameterError(
                f"Each of the {what} is to have its own adapter, but in what {path} is applied to they run {why}. Have "
                f"batch_axes and token_axes say where they run in every positional argument, or leave {path!r} out of "
                "the bank"
            )


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
        keep = {*choice.axes, *factor.axes} - {SLOT}
        return contract.product(choice.astype(factor.array.dtype), factor, keep, lax.Precision.HIGHEST, ())
    shared = [axis for axis in choice.axes if axis in factor.axes]  # A weight may be stacked over the rows already.
    rest = [axis for axis in factor.axes if axis != SLOT and axis not in shared]
    places = [lax.broadcasted_iota(jnp.int32, choice.array.shape, choice.axes.index(axis)) for axis in shared]
    array = factor.ordered((*shared, SLOT, *rest)).array
    axes = (*choice.axes, *rest)
    found = array.at[(*places, choice.array)].get(
        mode="fill", fill_value=base, out_sharding=placed(axes, choice, factor)
    )
    return Labelled(found, axes)


def kept(inner: Any, by: Any, mixes: bool) -> Any:
    """What is between the two products times its weights; where these are a choice, what is not chosen is never read.

    So one broken adapter, with numbers that are not finite, stays with the examples that chose it.
    """
    return inner * by if mixes else jnp.where(by != 0, inner, jnp.zeros((), inner.dtype))


def own_gain(gain: Labelled, choice: Labelled) -> Labelled:
    """The gain that each row meets: of weighted adapters, one plus the weighted distances from one."""
    if SLOT not in choice.axes:
        return chosen(gain, choice, 1.0)
    less = chosen(replace(gain, array=gain.array - 1), choice)
    return replace(less, array=1 + less.array)


def planned(routing: Routing, rows: int, tokens: int, rank: int, blocks: bool) -> Form:
    """The form of a product, from static shapes.

    Args:
      routing: of the call.
      rows: how many choices there are.
      tokens: how many rows the product has.
      rank: of one slot.
      blocks: whether the product can run in blocks.
    """
    if routing.mixes:
        return "mask"
    if routing.strategy != "auto":
        return routing.strategy if blocks or routing.strategy != "blocks" else "rows"
    wide = routing.slots * rank
    if tokens >= 8 * rows or rows <= routing.slots:
        return "rows"
    if routing.slots <= 4 or (wide <= 1024 and (tokens < 256 or not blocks)):
        return "mask"
    return "blocks" if blocks and tokens > 16 else "rows"


@dataclass(frozen=True, eq=False)
class Routed:
    """A product whose rows meet different factors.

    Attributes:
      routing: of the call.
      choice: what each row meets.
      out: ids of the result's axes.
      precision: as of `jax.lax.dot_general`.
      like: the base's own product; on a mesh results go where it is.
    """

    routing: Routing
    choice: Labelled
    out: Sequence[int]
    precision: Any
    like: Any

    def form(self, x: Labelled, first: Labelled, second: Labelled) -> Form:
        """How a term is applied to an activation."""
        free, into = [axis for axis in x.axes if axis not in first.axes], {*first.axes} - {SLOT, RANK}
        blocks = into <= {*x.axes} and not into & {*self.out} and not {*second.axes} & {*x.axes} and not spread(x.array)
        rows = prod(size for size, axis in zip(self.choice.array.shape, self.choice.axes, strict=True) if axis != SLOT)
        return planned(self.routing, rows, flat_size(x, free), first.size(RANK), blocks)

    def term(self, x: Labelled, first: Labelled, second: Labelled) -> Any:
        """What a term adds to the result: `(x·a)·b` with each row's own `a` and `b`."""
        form = self.form(x, first, second)
        if form == "blocks":
            return self.in_blocks(x, first, second)
        if form == "rows":
            first, second = chosen(first, self.choice), chosen(second, self.choice)
        inner = contract.hidden(x, first, second, self.out, self.precision, self.like)
        return self.mixed(inner, second)

    def mixed(self, inner: Labelled, second: Labelled) -> Any:
        """The second product of a term; of a first one over all slots, what each row has chosen."""
        if SLOT in second.axes:
            by = gate(self.choice, self.routing.slots, inner.array.dtype)
            axes = inner.axes if SLOT in inner.axes else (*inner.axes, SLOT)
            inner = Labelled(kept(inner.over(axes), by.over(axes), self.routing.mixes), axes)
        return contract.mixed(inner, second, self.out, self.precision, self.like)

    def in_blocks(self, x: Labelled, first: Labelled, second: Labelled) -> Any:
        """The term, computed in blocks of rows that have the same slot."""
        into = [axis for axis in first.axes if axis not in (SLOT, RANK)]
        left = [axis for axis in second.axes if axis not in (SLOT, RANK)]
        free = [axis for axis in x.axes if axis not in into]
        sizes = [x.size(axis) for axis in free]
        ids = jnp.broadcast_to(self.choice.over(free), sizes).reshape(-1)
        rows = x.ordered((*free, *into)).array.reshape(len(ids), -1)
        a = first.ordered((SLOT, RANK, *into)).array
        b = second.ordered((SLOT, RANK, *left)).array
        narrow, wide = (each.reshape(*each.shape[:2], -1) for each in (a, b))
        result = block_product(rows, ids, narrow, wide, self.precision)
        sizes += [second.size(axis) for axis in left]
        return Labelled(result.reshape(sizes), (*free, *left)).ordered(self.out).array


def block_product(x: Any, ids: Any, a: Any, b: Any, precision: Any = None) -> Any:
    """`[rows, out]` in float32 or wider: each row of `x` times `a` and `b` of its slot, in blocks of one slot each.

    Args:
      x: `[rows, in]`.
      ids: `[rows]` integers; rows with one past the end get zeros.
      a: `[slots, rank, in]`.
      b: `[slots, rank, out]`.
      precision: as of `jax.lax.dot_general`.
    """
    slots, rows = len(a), len(x)
    size = min(max(1 << (max(rows // slots, 1).bit_length() - 1), 8), 64)
    source, place, owner = _blocks(ids, slots + 1, size)
    block = x.at[source].get(mode="fill", fill_value=0).reshape(-1, size, x.shape[1])
    own = [each.astype(x.dtype).at[owner].get(mode="fill", fill_value=0) for each in (a, b)]
    accumulate = {"precision": precision, "preferred_element_type": jnp.promote_types(x.dtype, jnp.float32)}
    inner = lax.dot_general(block, own[0], (((2,), (2,)), ((0,), (0,))), **accumulate).astype(x.dtype)
    found = lax.dot_general(inner, own[1], (((2,), (1,)), ((0,), (0,))), **accumulate)
    return found.reshape(-1, b.shape[2])[place]


def _blocks(ids: Any, slots: int, size: int) -> tuple[Any, Any, Any]:
    """The row behind each place in a block (past the end for none), the place of each row, the slot of each block."""
    rows = len(ids)
    counts = jnp.bincount(ids, length=slots)
    ends = jnp.cumsum(-(-counts // size) * size)
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    firsts = jnp.cumsum(counts) - counts
    order = jnp.argsort(ids, stable=True)
    ordered = ids[order]
    places = starts[ordered] + jnp.arange(rows) - firsts[ordered]
    total = -(-rows // size) + min(slots, rows)
    source = jnp.full(total * size, rows, order.dtype).at[places].set(order)
    place = jnp.zeros(rows, places.dtype).at[order].set(places)
    owner = jnp.searchsorted(ends, jnp.arange(total) * size, side="right")
    return source, place, jnp.minimum(owner, slots - 1)


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
