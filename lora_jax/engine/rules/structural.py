"""Structural rules: operations that move, cut or cast a weight and leave it symbolic."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.engine.bases import bind
from lora_jax.engine.context import Context
from lora_jax.engine.lift import rule
from lora_jax.engine.sizes import several
from lora_jax.engine.weight import (
    Labelled,
    Merged,
    Weight,
    beside,
    collapsed,
    flat_ids,
    gathered,
    reshaped,
    split_sizes,
    with_axis,
)  # fmt: skip


@rule("convert_element_type", merged=True)
def _convert(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    wanted = eqn.params["new_dtype"]
    if operands[0].coded:
        return _on_base(ctx, eqn, operands)
    if not jnp.issubdtype(wanted, jnp.inexact):
        return None
    if jnp.issubdtype(operands[0].base.dtype, jnp.complexfloating) and not jnp.issubdtype(wanted, jnp.complexfloating):
        return None  # The real part of a product is no product of real parts.
    return _on_base(ctx, eqn, operands)


@rule(
    "copy", "copy_p", "sharding_constraint", "optimization_barrier", "pvary", "reduce_precision", "name", "device_put",
    merged=True,
)  # fmt: skip
def _on_base(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The operation concerns the storage of the base; the factors are placed and cast where they are used."""
    bases = [operand.base if isinstance(operand, Weight) else operand for operand in operands]
    results = bind(eqn, bases)
    return [
        operand.map(result, operand.axes, lambda factor: factor) if isinstance(operand, Weight) else result
        for operand, result in zip(operands, results, strict=True)
    ]


@rule("reshard")
def _reshard(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """On explicit axes the factors move with the base."""
    (weight,) = operands
    (base,) = bind(eqn, [weight.base])
    return [beside(weight.map(base, weight.axes, lambda factor: factor))]


@rule("stop_gradient", merged=True)
def _stop_gradient(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    (weight,) = operands
    return [jax.lax.stop_gradient(weight)]


@rule("transpose", merged=True)
def _transpose(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    (weight,) = operands
    axes = [weight.axes[position] for position in eqn.params["permutation"]]
    return [weight.map(*bind(eqn, [weight.base]), axes, lambda factor: factor)]


@rule("squeeze")
def _squeeze(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    (weight,) = operands
    gone = [weight.axes[position] for position in eqn.params["dimensions"]]
    (base,) = bind(eqn, [weight.base])

    def squeeze(factor: Labelled) -> Labelled:
        for axis in gone:
            factor = factor.without(axis)
        return factor

    return [weight.map(base, [axis for axis in weight.axes if axis not in gone], squeeze)]


@rule("broadcast_in_dim")
def _broadcast(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    weight, *dynamic = operands
    shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if dynamic:
        return None
    known = dict(zip(kept, weight.axes, strict=True))
    axes = [known[i] if i in known else ctx.fresh() for i in range(len(shape))]
    sizes = dict(zip(axes, shape, strict=True))
    new = [axis for i, axis in enumerate(axes) if i not in known]

    def grow(factor: Labelled, extra: Sequence[int] = ()) -> Labelled:
        array = factor.array.reshape(factor.array.shape + (1,) * len(extra))
        names = (*factor.axes, *extra)
        full = [sizes.get(axis, n) for axis, n in zip(names, array.shape, strict=True)]
        return Labelled(jnp.broadcast_to(array, full), names)

    (base,) = bind(eqn, [weight.base])
    terms = tuple(replace(term, a=grow(term.a), b=grow(term.b, new)) for term in weight.terms)
    return [replace(weight.map(base, axes, grow), terms=terms)]


@rule("reshape", merged=True)
def _reshape(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Axes are cut into the pieces that old and new axes have in common; a new axis of several pieces is `Merged`."""
    weight, *dynamic = operands
    if dynamic or 0 in weight.base.shape:
        return None
    if weight.coded and not weight.adapted and ctx.look_inside:
        return None  # The layer's axes are not those of the codes: only a site that is written by hand knows both.
    order = eqn.params.get("dimensions") or range(weight.base.ndim)
    axes, shape = [weight.axes[i] for i in order], [weight.base.shape[i] for i in order]
    old = dict(zip(flat_ids(axes), split_sizes(axes, shape), strict=True))
    pieces = _pieces(list(old.values()), eqn.params["new_sizes"])
    if pieces is None:
        return None
    on_mesh = eqn.params.get("sharding") is not None
    (base,) = bind(eqn, [weight.base])
    weight = weight.map(weight.base, weight.axes, gathered) if on_mesh else weight
    weight, axes = _cut_up(ctx, weight, old, *pieces)
    result = weight.map(base, axes, lambda factor: factor)
    if on_mesh:
        whole = collapsed(result, ctx.merging)
        return None if whole is None else [beside(whole)]
    return [result]


def _cut_up(
    ctx: Context, weight: Weight, old: Mapping[int, int], cuts: list[list[int]], groups: list[list[tuple[int, int]]]
) -> tuple[Weight, list[Any]]:
    """The weight with its factors' axes cut up, and the axes of the reshaped base."""
    origins, short = ctx.log.origins, [axis for axis, size in old.items() if size == 1]
    names: dict[int, list[int]] = {}
    for axis, sizes in zip(old, cuts, strict=True):
        names[axis] = [axis] if len(sizes) == 1 else [ctx.fresh(origins[axis]) for _ in sizes]

    def cut(factor: Labelled) -> Labelled:
        for axis in short:
            factor = factor.without(axis)
        for axis, sizes in zip(old, cuts, strict=True):
            if len(sizes) > 1 and axis in factor.axes:
                factor = reshaped(factor, [axis], names[axis], sizes)
        return factor

    weight = weight.map(weight.base, weight.axes, cut)
    known, axes = list(old), []
    for group in groups:
        parts = [(names[known[i]][j], cuts[i][j]) for i, j in group]
        if not parts:  # An axis of length one, which stands for one that has gone, or is new; a factor must have it.
            parts = [(ctx.fresh(origins[short.pop(0)] if short else None), 1)]
            terms = tuple(replace(term, b=with_axis(term.b, parts[0][0], 1)) for term in weight.terms)
            weight = replace(weight, terms=terms)
        axes.append(parts[0][0] if len(parts) == 1 else Merged(*zip(*parts, strict=True)))
    return weight, axes


def _pieces(old: Sequence[int], new: Sequence[int]) -> tuple[list[list[int]], list[list[tuple[int, int]]]] | None:
    """The largest pieces of which both the old and the new axes of a reshape are made; None if there are none.

    Returns:
      For each old axis the sizes of its pieces (none for one of length one), and for each new axis its pieces, by old
      axis and number.

    Example:
      >>> _pieces((6, 4), (2, 12))
      ([[2, 3], [4]], [[(0, 0)], [(0, 1), (1, 0)]])
    """
    cuts: list[list[int]] = [[] for _ in old]
    groups: list[list[tuple[int, int]]] = [[] for _ in new]
    long = iter([(i, size) for i, size in enumerate(old) if several(size)])
    axis, rest = next(long, (0, 1))
    for j, size in enumerate(new):
        while several(size):
            piece = min(size, rest)
            if size % piece or rest % piece:
                return None
            groups[j].append((axis, len(cuts[axis])))
            cuts[axis].append(piece)
            size, rest = size // piece, rest // piece
            if rest == 1:
                axis, rest = next(long, (0, 1))
    return cuts, groups


@rule("slice")
def _slice(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    (weight,) = operands
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides: Sequence[int] = eqn.params["strides"] or (1,) * len(start)
    cuts = dict(zip(weight.axes, zip(start, limit, strides, strict=True), strict=True))
    (base,) = bind(eqn, [weight.base])
    return [weight.map(base, weight.axes, lambda factor: _cut(factor, cuts))]


def _cut(factor: Labelled, cuts: Mapping[int, tuple[int, int, int]]) -> Labelled:
    if not factor.axes:
        return factor
    full = [cuts.get(axis, (0, size, 1)) for axis, size in zip(factor.axes, factor.array.shape, strict=True)]
    return Labelled(jax.lax.slice(factor.array, *zip(*full, strict=True)), factor.axes)


@rule("split")
def _split(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    (weight,) = operands
    axis = weight.axes[eqn.params["axis"]]
    ends = list(accumulate(map(int, eqn.params["sizes"])))
    cuts = [{axis: (start, end, 1)} for start, end in zip([0, *ends], ends, strict=False)]
    bases = bind(eqn, [weight.base])
    return [weight.map(base, weight.axes, partial(_cut, cuts=cut)) for base, cut in zip(bases, cuts, strict=True)]


@rule("dynamic_slice")
def _dynamic_slice(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    weight, *starts = operands
    if not isinstance(weight, Weight):
        return None
    (base,) = bind(eqn, [weight.base, *starts])
    cuts = dict(zip(weight.axes, zip(starts, eqn.params["slice_sizes"], strict=True), strict=True))

    def cut(factor: Labelled) -> Labelled:
        if not factor.axes:
            return factor
        zero = jnp.zeros((), starts[0].dtype if starts else jnp.int32)
        full = [cuts.get(axis, (zero, size)) for axis, size in zip(factor.axes, factor.array.shape, strict=True)]
        begin, sizes = zip(*full, strict=True)
        return Labelled(jax.lax.dynamic_slice(factor.array, begin, sizes), factor.axes)

    return [weight.map(base, weight.axes, cut)]


@rule("rev")
def _rev(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    (weight,) = operands
    flipped = [weight.axes[position] for position in eqn.params["dimensions"]]
    new = {axis: ctx.fresh(ctx.log.origins[axis]) for axis in flipped}
    (base,) = bind(eqn, [weight.base])

    def flip(factor: Labelled) -> Labelled:
        positions = tuple(factor.axes.index(axis) for axis in flipped if axis in factor.axes)
        return Labelled(jax.lax.rev(factor.array, positions), tuple(new.get(axis, axis) for axis in factor.axes))

    return [weight.map(base, [new.get(axis, axis) for axis in weight.axes], flip)]
