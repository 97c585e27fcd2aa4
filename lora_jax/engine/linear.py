"""Linear rules: products, convolutions and grouped products run on the base, plus two thin products."""

from collections.abc import Sequence
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.engine import contract, jaxprs
from lora_jax.engine.context import Context
from lora_jax.engine.lift import dense, rule
from lora_jax.engine.weight import RANK, Labelled, Term, Weight, flat_size


@rule("dot_general")
def _dot_general(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Either operand may be the weight, on any axes; axes of the activation alone get negative ids."""
    lhs, rhs = operands
    if isinstance(lhs, Weight) and isinstance(rhs, Weight):
        lhs = dense(ctx, eqn, lhs, "the other operand is adapted too")
    side = 0 if isinstance(lhs, Weight) else 1
    weight, other = (lhs, rhs)[side], (lhs, rhs)[1 - side]
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    ours, theirs = ((*lc, *lb), (*rc, *rb)) if side == 0 else ((*rc, *rb), (*lc, *lb))
    free, paired = count(RANK - 1, -1), dict(zip(theirs, ours, strict=True))
    names = [weight.axes[paired[i]] if i in paired else next(free) for i in range(other.ndim)]
    contracted = {weight.axes[i] for i in (lc, rc)[side]}
    batch = [weight.axes[i] for i in (lb, rb)[side]]
    remains = [[i for i in axes if i not in contracted and i not in batch] for axes in (weight.axes, names)]
    out = (*batch, *remains[side], *remains[1 - side])

    def dot(x: Any, w: Any) -> Any:
        return jaxprs.bind(eqn, (w, x) if side == 0 else (x, w))[0]

    x = Labelled(_floating(other, weight.base.dtype), tuple(names))
    chosen = _record(ctx, eqn, weight, x, contracted, remains[0], out)
    return [_apply(ctx, eqn, weight, x, other, out, dot, chosen)]


def _apply(ctx: Context, eqn: Any, weight: Weight, x: Labelled, other: Any, out: Any, dot: Any, chosen: str) -> Any:
    """The base's own product, as the program wrote it, plus the low-rank terms."""
    precision = eqn.params["precision"]
    if chosen == "merged":
        return contract.merged(
            dot, x, weight, lambda v, terms: contract.low_rank(v, terms, out, [v] * len(terms), precision)
        )
    y = dot(other, weight.base)
    if not weight.terms:
        return y
    with jax.named_scope("lora"):
        change = contract.low_rank(x, weight.terms, out, _inputs(ctx, weight, x), precision)
    return add(y, change)


def add(y: Any, change: Any) -> Any:
    """Add in the wider dtype and round once to the dtype the program expects."""
    return (y.astype(change.dtype) + change).astype(y.dtype)


def _floating(x: Any, dtype: Any) -> Any:
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)


def _inputs(ctx: Context, weight: Weight, x: Labelled) -> list[Labelled]:
    """What each term reads: the activation, with that term's own dropout where there is a key."""
    if ctx.key is None:
        return [x] * len(weight.terms)
    return [
        contract.dropped(x, term.dropout, ctx.dropout_key(weight.path, term.slot)) if term.dropout else x
        for term in weight.terms
    ]


def _record(
    ctx: Context, eqn: Any, weight: Weight, x: Labelled, contracted: set[int], remains: list[int], out: Any
) -> str:
    """Choose the form of a product and log it."""
    dropout = ctx.key is not None and any(term.dropout for term in weight.terms)
    route = "merged" if weight.terms and contract.merges(weight, x, out, ctx.strategy, dropout) else "factored"
    rank = sum(term.rank for term in weight.terms)
    tokens = flat_size(x, [axis for axis in x.axes if axis not in weight.axes])
    inner = flat_size(x, list(contracted))
    outer = weight.base.size // max(inner, 1)
    flops = 2 * rank * weight.base.size if route == "merged" else 2 * tokens * rank * (inner + outer)
    nbytes = weight.base.size * 4 if route == "merged" else tokens * rank * 4
    roles = ctx.roles(weight.path, into=list(contracted), out=remains)
    ctx.record(weight, eqn, route, kind="dense", flops=flops, nbytes=nbytes if rank else 0, **roles)
    return route


@rule("conv_general_dilated")
def _convolution(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A convolves with the geometry of the kernel into `rank` channels; B mixes them at each position."""
    image, kernel = operands
    groups, numbers = eqn.params["feature_group_count"], eqn.params["dimension_numbers"]
    if not isinstance(kernel, Weight) or eqn.params["batch_group_count"] != 1:
        return None
    x = dense(ctx, eqn, image, "the kernel is adapted too")
    out_axis, *window = (kernel.axes[i] for i in numbers.rhs_spec)
    pairs = [_split_factors(term, window, out_axis) for term in kernel.terms]
    if None in pairs:
        return None
    (y,) = jaxprs.bind(eqn, [x, kernel.base])
    rank = sum(term.rank for term in kernel.terms)
    positions = y.size // y.shape[numbers.out_spec[1]]
    flops = 2 * positions * rank * (groups * kernel.base.size // kernel.base.shape[numbers.rhs_spec[0]] + y.shape[numbers.out_spec[1]])
    roles = ctx.roles(kernel.path, into=window, out=[out_axis])
    ctx.record(kernel, eqn, "factored", kind="conv", flops=flops, nbytes=4 * positions * rank * groups if rank else 0, **roles)
    inputs = _inputs(ctx, kernel, Labelled(x, ()))
    for (a, b), read in zip(pairs, inputs, strict=True):
        with jax.named_scope("lora"):
            y = add(y, _thin_convolution(eqn, read.array, a.ordered((RANK, *window)).array, b.ordered((RANK, out_axis)).array))
    return [y]


def _split_factors(term: Term, window: list[int], out_axis: int) -> tuple[Labelled, Labelled] | None:
    """The factor over the window and the one over the output channels; None if the axes are divided otherwise."""
    for a, b in ((term.a, term.b), (term.b, term.a)):
        if {*a.axes} == {RANK, *window} and {*b.axes} == {RANK, out_axis}:
            return a, b
    return None


def _thin_convolution(eqn: Any, x: Any, a: Any, b: Any) -> Any:
    """Convolve with `a` (rank, in, *window) once per feature group, then mix by `b` (rank, out)."""
    numbers, groups, rank = eqn.params["dimension_numbers"], eqn.params["feature_group_count"], a.shape[0]
    kernel = jnp.tile(a.astype(x.dtype), (groups,) + (1,) * (a.ndim - 1))
    kernel = jnp.transpose(kernel, [numbers.rhs_spec.index(i) for i in range(a.ndim)])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    geometry = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "precision")
    hidden = lax.conv_general_dilated(
        x, kernel, **{name: eqn.params[name] for name in geometry},
        feature_group_count=groups, preferred_element_type=wide,
    )  # fmt: skip
    batch, channel, *space = numbers.out_spec
    hidden = jnp.transpose(hidden, (batch, *space, channel)).astype(x.dtype)
    hidden = hidden.reshape(*hidden.shape[:-1], groups, rank)
    mixed = jnp.einsum("...gr,rgo->...go", hidden, b.astype(x.dtype).reshape(rank, groups, -1), preferred_element_type=wide)
    mixed = mixed.reshape(*mixed.shape[:-2], -1)
    order = (batch, *space, channel)
    return jnp.transpose(mixed, [order.index(i) for i in range(len(order))])


@rule("ragged_dot_general", "ragged_dot")
def _ragged_dot(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Rows of the left operand are grouped; group g meets weight g: both thin products are grouped the same way."""
    rows, stack, sizes, *offset = operands
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    plain = tuple(map(tuple, (numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions, lc, lb, rb)))
    if not isinstance(stack, Weight) or offset or plain != ((0,), (0,), (1,), (), ()) or len(stack.axes) != 3:
        return None
    (into,), group = rc, stack.axes[0]
    out = ({1, 2} - {into}).pop()
    pairs = [_split_factors(term.map(lambda f: _ungrouped(f, group)), [stack.axes[into]], stack.axes[out]) for term in stack.terms]
    if None in pairs or any(group not in f.axes for term in stack.terms for f in (term.a, term.b)):
        return None
    x = dense(ctx, eqn, rows, "the weights are adapted too")
    (y,) = jaxprs.bind(eqn, [x, stack.base, sizes])
    rank = sum(term.rank for term in stack.terms)
    flops = 2 * x.shape[0] * rank * (x.shape[1] + y.shape[1])
    roles = ctx.roles(stack.path, into=[stack.axes[into]], out=[stack.axes[out]])
    ctx.record(stack, eqn, "factored", kind="ragged", flops=flops, nbytes=4 * rank * x.shape[0], **roles)
    for term, read in zip(stack.terms, _inputs(ctx, stack, Labelled(x, ())), strict=True):
        a, b = (term.a, term.b) if stack.axes[into] in term.a.axes else (term.b, term.a)
        y = add(y, _thin_ragged(read.array, a.ordered((group, stack.axes[into], RANK)), b.ordered((group, RANK, stack.axes[out])), sizes))
    return [y]


def _ungrouped(factor: Labelled, group: int) -> Labelled:
    return Labelled(factor.array, tuple(axis for axis in factor.axes if axis != group))


def _thin_ragged(x: Any, a: Labelled, b: Labelled, sizes: Any) -> Any:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    hidden = lax.ragged_dot(x, a.array.astype(x.dtype), sizes, preferred_element_type=wide)
    return lax.ragged_dot(hidden.astype(x.dtype), b.array.astype(x.dtype), sizes, preferred_element_type=wide)
