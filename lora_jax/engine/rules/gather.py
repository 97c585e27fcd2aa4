"""The gather rule: indexing a weight with arrays of indices, as look-ups and choices of experts do."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import GatherDimensionNumbers, GatherScatterMode

from lora_jax.dtypes import promoted
from lora_jax.engine.bases import array_of, bind
from lora_jax.engine.context import Context
from lora_jax.engine.lift import dense, rule
from lora_jax.engine.routing.axes import labels
from lora_jax.engine.routing.slots import routing_of
from lora_jax.engine.routing.uses import look_up, slot_of_rows
from lora_jax.engine.weight import SLOT, Labelled, Weight


@dataclass(frozen=True)
class _Gather:
    """A gather in terms of axis ids: every index vector cuts one slice out of the weight.

    Attributes:
      columns: for each axis that the index positions, its column of the index vectors.
      sizes: length of the slice along each axis.
      collapsed: axes that the result lacks, because the slice has length one there.
      paired: for each axis that runs along an axis of the indices, the number of that one.
      rows: ids of the axes of the indices, in the result.
    """

    columns: dict[int, int]
    sizes: dict[int, int]
    collapsed: frozenset[int]
    paired: dict[int, int]
    rows: tuple[int, ...]


@rule("gather")
def _gather(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A look-up if vectors come out, which are formed at once; a choice of weights if matrices do."""
    weight, indices = operands
    plan = _plan(ctx, eqn, weight, indices.ndim - 1)
    if plan is None:
        return None
    (base,) = bind(eqn, [weight.base, indices])
    left = iter([axis for axis in weight.axes if axis not in plan.collapsed and axis not in plan.paired])
    rows, offsets = iter(plan.rows), eqn.params["dimension_numbers"].offset_dims
    axes = [next(left) if i in offsets else next(rows) for i in range(base.ndim)]
    new = [axis for axis in plan.rows if axis not in plan.paired]
    kept = [axis for axis in axes if axis not in plan.columns and axis not in plan.rows]
    roles = ctx.roles(weight, into=list(plan.columns), out=kept)
    ctx.log.looked_up.update(dict.fromkeys(new, None if id(eqn) in ctx.log.facts.chosen else roles))
    chooses = not new or len(kept) > 1 or id(eqn) in ctx.log.facts.permuted
    if weight.routed and (not chooses or _by_row(ctx, indices)):
        return [_routed(ctx, eqn, weight, indices, plan, (array_of(base), axes), roles)]
    taken = weight.map(base, axes, lambda factor: _take(factor, plan, indices, eqn.params))
    return [taken if chooses else dense(ctx, eqn, taken)]


def _by_row(ctx: Context, indices: Any) -> bool:
    """Whether examples have indices of their own."""
    return bool(labels(routing_of(ctx).operand(ctx.trail, 1, indices.shape)[:-1]))


def _routed(
    ctx: Context, eqn: Any, table: Weight, indices: Any, plan: _Gather, result: tuple[Any, list[int]], roles: Any
) -> Any:
    """A look-up in which each row is taken from the factors of its own slot."""
    base, axes = result
    runs = routing_of(ctx).operand(ctx.trail, 1, indices.shape)[:-1]
    slots = slot_of_rows(ctx, table, runs, plan.rows)
    if slots is not None:
        wide = promoted(indices.dtype, jnp.int32)
        indices = jnp.concatenate([indices.astype(wide), slots[..., None].astype(wide)], axis=-1)
        column = {SLOT: indices.shape[-1] - 1}
        plan = replace(
            plan, columns=plan.columns | column, sizes=plan.sizes | {SLOT: 1}, collapsed=plan.collapsed | {SLOT}
        )

    def take(factor: Labelled) -> Labelled:
        chosen = {*plan.columns} - {SLOT} & {*factor.axes}
        return _take(factor, plan, indices, eqn.params) if chosen else factor

    taken = table.map(base, axes, take)
    rank = sum(term.rank for term in table.terms)
    ctx.record(table, eqn, "look-up", roles, kind="embedding", flops=2 * base.size * rank)
    return look_up(ctx, table, runs, plan.rows, taken)


def _plan(ctx: Context, eqn: Any, weight: Weight, rows: int) -> _Gather | None:
    """Read the dimension numbers; None for a gather that cuts an axis without positioning the cut."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    ids, shape = weight.axes, weight.base.shape
    fills = eqn.params["mode"] == GatherScatterMode.FILL_OR_DROP
    columns = {ids[d]: i for i, d in enumerate(numbers.start_index_map) if fills or sizes[d] < shape[d]}
    batching = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    paired = {ids[d]: i for d, i in batching}
    cut = {axis for axis, size, n in zip(ids, sizes, shape, strict=True) if size < n}
    if cut - columns.keys() - paired.keys():
        return None
    along = {i: axis for axis, i in paired.items()}
    names = tuple(along[i] if i in along else ctx.merging(columns) for i in range(rows))
    collapsed = frozenset(ids[d] for d in numbers.collapsed_slice_dims)
    return _Gather(columns, dict(zip(ids, sizes, strict=True)), collapsed, paired, names)


def _take(factor: Labelled, plan: _Gather, indices: Any, params: dict[str, Any]) -> Labelled:
    """The same gather on the axes a factor has, the rows in front; what lies out of bounds adds nothing."""
    columns = [axis for axis in plan.columns if axis in factor.axes]
    for axis in plan.collapsed - set(columns):
        factor = factor.without(axis)
    if not columns:
        return factor
    collapsed = [axis for axis in factor.axes if axis in plan.collapsed]
    paired = [axis for axis in factor.axes if axis in plan.paired]
    left = [axis for axis in factor.axes if axis not in collapsed and axis not in paired]
    rows, place = len(plan.rows), factor.axes.index
    numbers = GatherDimensionNumbers(
        offset_dims=tuple(range(rows, rows + len(left))),
        collapsed_slice_dims=tuple(map(place, collapsed)),
        start_index_map=tuple(map(place, columns)),
        operand_batching_dims=tuple(map(place, paired)),
        start_indices_batching_dims=tuple(plan.paired[axis] for axis in paired),
    )
    starts = jnp.stack([indices[..., plan.columns[axis]] for axis in columns], axis=-1)
    sizes = tuple(plan.sizes.get(axis, n) for axis, n in zip(factor.axes, factor.array.shape, strict=True))
    modes = {name: params[name] for name in ("indices_are_sorted", "mode")}
    array = jax.lax.gather(factor.array, starts, numbers, sizes, fill_value=0, **modes)
    return Labelled(array, (*plan.rows, *left))
