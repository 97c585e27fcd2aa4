"""Linear rules: products and grouped products run on the base, plus two thin products."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.engine import jaxprs, planner
from lora_jax.engine.context import Context
from lora_jax.engine.contract import split_factors
from lora_jax.engine.dropout import drops, inputs, masks
from lora_jax.engine.hooks import observe, observe_groups
from lora_jax.engine.lift import dense, rule
from lora_jax.engine.meshes import spread, unreduced
from lora_jax.engine.planner import Plan
from lora_jax.engine.product import adapted_product, adapted_result, takes
from lora_jax.engine.recompute import Recomputation
from lora_jax.engine.routing.uses import routed_product
from lora_jax.engine.weight import RANK, SLOT, Labelled, Weight


@rule("dot_general")
def _dot_general(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Either operand may be the weight, on any axes; axes of the activation alone get negative ids."""
    lhs, rhs = operands
    if isinstance(lhs, Weight) and isinstance(rhs, Weight):
        contracted, batch = ([lhs.axes[i] for i in axes[0]] for axes in eqn.params["dimension_numbers"])
        roles = ctx.roles(lhs.path, contracted, [axis for axis in lhs.axes if axis not in (*contracted, *batch)])
        lhs = dense(ctx, eqn, lhs, "the other operand is adapted too", kind="dense", **roles)
    side = 0 if isinstance(lhs, Weight) else 1
    weight: Weight = operands[side] if side else lhs
    other: Any = lhs if side else rhs
    if weight.adapted and unreduced(eqn.params["out_sharding"]):
        return None  # Two products in a row cannot share one sum over devices.
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    ours, theirs = ((*lc, *lb), (*rc, *rb)) if side == 0 else ((*rc, *rb), (*lc, *lb))
    free, paired = count(SLOT - 1, -1), dict(zip(theirs, ours, strict=True))
    names = [weight.axes[paired[i]] if i in paired else next(free) for i in range(other.ndim)]
    contracted = {weight.axes[i] for i in (lc, rc)[side]}
    batch = [weight.axes[i] for i in (lb, rb)[side]]
    remains = [[i for i in axes if i not in contracted and i not in batch] for axes in (weight.axes, names)]
    out = (*batch, *remains[side], *remains[1 - side])

    def dot(x: Any, w: Any) -> Any:
        return jaxprs.bind(eqn, (w, x) if side == 0 else (x, w))[0]

    x = Labelled(_floating(other, weight.base.dtype), tuple(names))
    if weight.routed:
        return [routed_product(ctx, eqn, 1 - side, x, weight, out, dot)]
    if not takes(weight, x, out):
        return None
    dropout = any(drops(ctx, term) for term in weight.terms)
    planned = planner.plan(weight, x, out, ctx.strategy, dropout)
    _record(ctx, eqn, weight, x, contracted, remains[0], out, planned)
    observe(ctx, weight, x, contracted)
    precision = eqn.params["precision"]
    if not weight.adapted:
        return [dot(other, weight.base)]
    recomputed = _recomputed(ctx, eqn.invars[1 - side], x, weight)
    with jax.named_scope("lora"):
        return [adapted_product(dot, x, weight, out, precision, planned, recomputed, masks(ctx, weight, x))]


def _recomputed(ctx: Context, atom: Any, x: Labelled, weight: Weight) -> Recomputation | None:
    """How to compute the activation again for the gradient of A, where that is worth it."""
    return None if ctx.frame is None or spread(x.array, weight.base) else ctx.frame.recomputed(atom)


def _floating(x: Any, dtype: Any) -> Any:
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)


def _record(
    ctx: Context, eqn: Any, weight: Weight, x: Labelled, into: Iterable[int], left: list[int], out: Any, planned: Plan
) -> None:
    """Log a product, its form, and what it adds to one forward evaluation."""
    rank = sum(term.rank for term in weight.terms)
    tokens, inner, outer = planner.extents(weight, x, out)
    flops = 2 * rank * weight.base.size if planned.call else 2 * tokens * rank * (inner + outer)
    nbytes = 4 * (weight.base.size if planned.call else tokens * rank)
    roles = ctx.roles(weight.path, into=list(into), out=left)
    ctx.record(weight, eqn, "merged" if planned.call else "factored", kind="dense", flops=flops, nbytes=nbytes, **roles)


@rule("ragged_dot_general", "ragged_dot")
def _ragged_dot(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Rows of the left operand are grouped; group g meets weight g: both thin products are grouped the same way."""
    rows, stack, sizes, *offset = operands
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    usual = tuple(map(tuple, (numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions, lc, lb, rb)))
    if not isinstance(stack, Weight) or offset or usual != ((0,), (0,), (1,), (), ()) or len(stack.axes) != 3:
        return None
    group, into, out = stack.axes if tuple(rc) == (1,) else (stack.axes[0], stack.axes[2], stack.axes[1])
    pairs = split_factors(stack.terms, [into], [out], [group])
    if pairs is None or (stack.gain and {*stack.gain.axes} != {group, out}):
        return None
    x = dense(ctx, eqn, rows, "the weights are adapted too")
    (y,) = jaxprs.bind(eqn, [x, stack.base, sizes])
    rank = sum(term.rank for term in stack.terms)
    flops = 2 * x.shape[0] * rank * (x.shape[1] + y.shape[1])
    roles = ctx.roles(stack.path, into=[into], out=[out])
    ctx.record(stack, eqn, "factored", kind="ragged", flops=flops, nbytes=4 * rank * x.shape[0], **roles)
    observe_groups(ctx, stack, x, sizes, group, into)
    reads = inputs(ctx, stack, Labelled(x, ()))
    with jax.named_scope("lora"):
        terms = [
            _thin_ragged(read.array, a.ordered((group, into, RANK)).array, b.array, sizes)
            for (a, b), read in zip(pairs, reads, strict=True)
        ]
        gain = stack.gain and _by_row(stack.gain.ordered((group, out)), sizes, len(y))
        return [adapted_result(y, (group, out), gain, terms)]


def _by_row(gain: Labelled, sizes: Any, rows: int) -> Labelled:
    """The gain of each row's group."""
    groups = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=rows)
    return replace(gain, array=gain.array[groups])


def _thin_ragged(x: Any, a: Any, b: Any, sizes: Any) -> Any:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    hidden = lax.ragged_dot(x, a.astype(x.dtype), sizes, preferred_element_type=wide)
    return lax.ragged_dot(hidden.astype(x.dtype), b.astype(x.dtype), sizes, preferred_element_type=wide)
