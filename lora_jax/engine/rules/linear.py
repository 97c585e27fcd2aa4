"""Linear rules: products and grouped products run on the base, plus two thin products."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.dtypes import promoted
from lora_jax.engine import jaxprs, planner
from lora_jax.engine.bases import bind, used
from lora_jax.engine.context import Context
from lora_jax.engine.contract import contraction, split_factors
from lora_jax.engine.declared import declared
from lora_jax.engine.dropout import drops, inputs, masks
from lora_jax.engine.hooks import observe, observe_groups
from lora_jax.engine.lift import dense, rule, simple
from lora_jax.engine.meshes import spread, unreduced
from lora_jax.engine.planner import Plan
from lora_jax.engine.product import adapted_result, takes
from lora_jax.engine.recompute import Recomputation
from lora_jax.engine.routing.uses import routed_product
from lora_jax.engine.shared import Product, shared_product
from lora_jax.engine.weight import RANK, SLOT, Labelled, Weight, collapsed, flat_ids, split_sizes


@rule("dot_general", merged=True)
def _dot_general(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Either operand may be the weight, on any axes; axes of the activation alone get negative ids."""
    lhs, rhs = _one_weight(ctx, eqn, *(_collapsed(ctx, eqn, operand) for operand in operands))
    side = 0 if isinstance(lhs, Weight) else 1
    weight: Weight = rhs if side else lhs
    other: Any = lhs if side else rhs
    if weight.adapted and unreduced(eqn.params["out_sharding"]):
        return None  # Two products in a row cannot share one sum over devices.
    names, contracted, left, out = contraction(eqn.params["dimension_numbers"], side, weight.axes, other.ndim)
    given, is_merged = weight, weight.merged
    shapes = (other.shape, weight.base.shape, tuple(split_sizes(out, eqn.outvars[0].aval.shape))) if is_merged else None
    dot = _Dot(jaxprs.content(eqn), side, other.dtype, shapes, eqn)

    x = Labelled(_inexact(other, weight.base.dtype), tuple(names))
    if weight.merged:
        x, weight = Labelled(x.array.reshape(split_sizes(names, other.shape)), flat_ids(names)), weight.split()
        contracted, out, left = set(flat_ids(contracted)), flat_ids(out), list(flat_ids(left))
    found = _product(ctx, eqn, 1 - side, x, weight, (contracted, left, out), dot)
    if found is not None and not weight.routed and not weight.adapted:
        return bind(eqn, [given.base if operand is given else operand for operand in (lhs, rhs)])
    return None if found is None else [found.reshape(eqn.outvars[0].aval.shape) if is_merged else found]


@dataclass(frozen=True)
class _Dot:
    """A program's product of an activation and a weight; equal to another that is the same operation.

    Attributes:
      operation: what the equation does.
      side: which of its operands the weight is.
      dtype: of the activation in the program.
      shapes: where axes are merged in the program, and apart here: those of the activation and of the weight there, and
        that of the result here.
      eqn: the equation.
    """

    operation: tuple[Any, ...]
    side: int
    dtype: Any
    shapes: tuple[tuple[int, ...], ...] | None
    eqn: Any = field(compare=False)

    def __call__(self, x: Any, w: Any) -> Any:
        """The product."""
        if self.shapes:
            x, w = x.reshape(self.shapes[0]), w.reshape(self.shapes[1])
        pair = (w, x) if self.side == 0 else (x, w)
        eqn = jaxprs.unnamed(self.eqn)
        # Of integers, factors see a floating copy.
        (y,) = bind(eqn, pair) if x.dtype == self.dtype else used(partial(jaxprs.bind_as, eqn), pair)
        return y.reshape(self.shapes[2]) if self.shapes else y


def declared_product(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A function that is declared to be a product; None if the equation is none, or has no such form.

    The function itself runs on the base.
    """
    kernel = operands[1] if len(operands) > 1 else None
    letters = declared(eqn) if isinstance(kernel, Weight) else None
    if letters is None:
        return None
    weight = simple(ctx, eqn, kernel)
    if not isinstance(weight, Weight):
        return bind(eqn, [dense(ctx, eqn, operand) if operand is not kernel else weight for operand in operands])
    given = [
        dense(ctx, eqn, each, "the other operand is adapted too") if i != 1 else each for i, each in enumerate(operands)
    ]
    ids, free = dict(zip(letters.kernel, weight.axes, strict=True)), count(SLOT - 1, -1)
    ids |= {letter: next(free) for letter in letters.x if letter not in ids}
    x = Labelled(_inexact(given[0], weight.base.dtype), tuple(ids[letter] for letter in letters.x))
    out = tuple(ids[letter] for letter in letters.out)
    contracted = {ids[letter] for letter in letters.x if letter in letters.kernel and letter not in letters.out}
    left = [ids[letter] for letter in letters.kernel if letter not in letters.x]
    dtype, others = given[0].dtype, given[2:]

    def dot(x: Any, w: Any) -> Any:
        return bind(eqn, [x.astype(dtype), w, *others])[0]

    if ctx.strategy == "auto":  # A kernel of one's own is there so that something large is not formed.
        ctx = replace(ctx, strategy="factored")
    found = _product(ctx, eqn, 0, x, weight, (contracted, left, out), dot)
    return None if found is None else [found]


def _product(
    ctx: Context, eqn: Any, side: int, x: Labelled, weight: Weight, ids: tuple[Any, list[int], Sequence[int]], dot: Any
) -> Any | None:
    """An activation times a weight, logged; None if the weight's gain can be applied to neither side.

    Args:
      ctx: the context.
      eqn: the equation.
      side: which of its operands the activation is.
      x: the activation.
      weight: the weight.
      ids: those that are contracted, those of the weight that are left over, and those of the result.
      dot: the program's product of activation and base.
    """
    contracted, left, out = ids
    if weight.routed:
        return routed_product(ctx, eqn, side, x, weight, out, dot)
    if not takes(weight, x, out):
        return None
    dropout = any(drops(ctx, term) for term in weight.terms)
    planned = planner.plan(weight, x, out, ctx.strategy, dropout)
    _record(ctx, eqn, weight, x, contracted, left, out, planned)
    observe(ctx, weight, x, contracted)
    if not weight.adapted:
        return dot(x.array, weight.base)
    recomputed, precision = _recomputed(ctx, eqn.invars[side], x, weight), eqn.params.get("precision")
    opaque = declared(eqn) is not None
    product = Product(dot, tuple(out), precision, planned, recomputed and recomputed.run, opaque)
    leaves, kept = recomputed.leaves if recomputed else (), masks(ctx, weight, x)
    read = ctx.frame and ctx.frame.shared(eqn.invars[side], x.array)
    with jaxprs.scope(eqn):
        return shared_product(product, x, weight, leaves, kept, read)


def _collapsed(ctx: Context, eqn: Any, operand: Any) -> Any:
    """An operand with simple axes, where its factors allow that; a weight of a bank is refused otherwise."""
    if not isinstance(operand, Weight):
        return operand
    return simple(ctx, eqn, operand) if operand.routed else collapsed(operand, ctx.merging) or operand


def _one_weight(ctx: Context, eqn: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    """The operands, of which one is formed if both are weights: that which is an activation, or the first."""
    if not (isinstance(lhs, Weight) and isinstance(rhs, Weight)):
        return lhs, rhs
    reason, here = "the other operand is adapted too", ctx.log.facts.activations
    activations = [not jaxprs.is_literal(atom) and atom in here for atom in eqn.invars]
    if activations == [False, True]:
        return lhs, dense(ctx, eqn, rhs, reason)
    if activations == [True, False]:
        return dense(ctx, eqn, lhs, reason), rhs
    contracted, batch = ([lhs.axes[i] for i in axes[0]] for axes in eqn.params["dimension_numbers"])
    left = [axis for axis in lhs.axes if axis not in (*contracted, *batch)]
    roles = ctx.roles(lhs, flat_ids(contracted), flat_ids(left))
    return dense(ctx, eqn, lhs, reason, kind="dense", roles=roles), rhs


def _recomputed(ctx: Context, atom: Any, x: Labelled, weight: Weight) -> Recomputation | None:
    """How to compute the activation again for the gradient of A, where that is worth it."""
    return None if ctx.frame is None or spread(x.array, weight.base) else ctx.frame.recomputed(atom)


def _inexact(x: Any, dtype: Any) -> Any:
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(dtype)


def _record(
    ctx: Context, eqn: Any, weight: Weight, x: Labelled, into: Iterable[int], left: list[int], out: Any, planned: Plan
) -> None:
    """Log a product, its form, and what it adds to one forward evaluation."""
    rank = sum(term.rank for term in weight.terms)
    tokens, inner, outer = planner.extents(weight, x, out)
    merged, joined = planned.call == "merged", planned.call == "joined"
    flops = 2 * rank * weight.base.size if merged else 2 * tokens * rank * (inner + outer)
    nbytes = 4 * (weight.base.size if merged else tokens * rank)
    if joined:  # The copies of both operands that have something appended.
        nbytes = weight.base.dtype.itemsize * ((tokens + outer) * (inner + rank) + tokens * rank)
    roles = ctx.roles(weight, into=list(into), out=left)
    kind = "embedding" if id(eqn) in ctx.log.facts.one_hot else "dense"
    ctx.record(weight, eqn, planned.call, roles, kind=kind, flops=flops, nbytes=nbytes)


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
    (y,) = bind(eqn, [x, stack.base, sizes])
    rank = sum(term.rank for term in stack.terms)
    flops = 2 * x.shape[0] * rank * (x.shape[1] + y.shape[1])
    roles = ctx.roles(stack, into=[into], out=[out])
    ctx.record(stack, eqn, "factored", roles, kind="ragged", flops=flops, nbytes=4 * rank * x.shape[0])
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
    wide = promoted(x.dtype, jnp.float32)
    hidden = lax.ragged_dot(x, a.astype(x.dtype), sizes, preferred_element_type=wide)
    return lax.ragged_dot(hidden.astype(x.dtype), b.astype(x.dtype), sizes, preferred_element_type=wide)
