"""Structural rules: operations that move, cut or cast a weight and leave it symbolic."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.engine import jaxprs
from lora_jax.engine.context import Context
from lora_jax.engine.lift import rule
from lora_jax.engine.weight import Labelled, Term, Weight, beside, gathered, reshaped


@rule("convert_element_type")
def _convert(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return None
    return _on_base(ctx, eqn, operands)


@rule("copy", "copy_p", "sharding_constraint", "optimization_barrier", "pvary", "reduce_precision")
def _on_base(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The operation concerns the storage of the base; the factors are placed and cast where they are used."""
    bases = [operand.base if isinstance(operand, Weight) else operand for operand in operands]
    results = jaxprs.bind(eqn, bases)
    return [
        operand.map(result, operand.axes, lambda factor: factor) if isinstance(operand, Weight) else result
        for operand, result in zip(operands, results, strict=True)
    ]


@rule("reshard")
def _reshard(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """On explicit axes the factors move with the base."""
    (weight,) = operands
    (base,) = jaxprs.bind(eqn, [weight.base])
    return [beside(weight.map(base, weight.axes, lambda factor: factor))]


@rule("stop_gradient")
def _stop_gradient(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    (weight,) = operands
    return [jax.lax.stop_gradient(weight)]


@rule("transpose")
def _transpose(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    (weight,) = operands
    axes = [weight.axes[position] for position in eqn.params["permutation"]]
    return [weight.map(*jaxprs.bind(eqn, [weight.base]), axes, lambda factor: factor)]


@rule("squeeze")
def _squeeze(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    (weight,) = operands
    gone = [weight.axes[position] for position in eqn.params["dimensions"]]
    (base,) = jaxprs.bind(eqn, [weight.base])

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

    (base,) = jaxprs.bind(eqn, [weight.base])
    terms = tuple(replace(term, a=grow(term.a), b=grow(term.b, new)) for term in weight.terms)
    return [replace(weight.map(base, axes, grow), terms=terms)]


@rule("reshape")
def _reshape(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Reshape group by group; a group that mixes the axes of both factors has no low-rank form."""
    weight, *dynamic = operands
    if dynamic or eqn.params.get("dimensions") is not None:
        return None
    groups = _groups(weight.base.shape, eqn.params["new_sizes"])
    if groups is None:
        return None
    origins, axes, moves = ctx.log.origins, [], []
    for old, sizes in groups:
        names = [weight.axes[i] for i in old]
        if [weight.base.shape[i] for i in old] == sizes:
            axes += names
            continue
        origin = frozenset().union(*(origins[name] for name in names))
        new = [ctx.fresh(origin) for _ in sizes]
        moves.append((names, new, sizes))
        axes += new
    placed = eqn.params.get("sharding") is not None
    (base,) = jaxprs.bind(eqn, [weight.base])
    weight = weight.map(weight.base, weight.axes, gathered) if placed else weight
    lengths = dict(zip(weight.axes, weight.base.shape, strict=True))
    for old, new, sizes in moves:
        long = [axis for axis in old if lengths[axis] > 1]
        if any(_straddles(term, long) for term in weight.terms) or any(_cuts(each, long) for each in _others(weight)):
            return None
        regroup = partial(_regroup, old=old, long=long, new=new, sizes=sizes)
        weight = weight.map(weight.base, weight.axes, regroup)
        if not long:  # Axes of length one that were in neither factor must be in one of them.
            terms = tuple(replace(term, b=reshaped(term.b, [], new, sizes)) for term in weight.terms)
            weight = replace(weight, terms=terms)
    result = weight.map(base, axes, lambda factor: factor)
    return [beside(result) if placed else result]


def _straddles(term: Term, axes: list[int]) -> bool:
    """Whether some of the axes are in one factor and some in the other."""
    return _cuts(term.a, axes) or _cuts(term.b, axes)


def _others(weight: Weight) -> list[Labelled]:
    """What rides along with a weight beside its terms."""
    numbers = [weight.numbering.maps, weight.numbering.inputs] if weight.numbering else []
    return [*numbers, *(each for each in (weight.gain, weight.keys) if each is not None)]


def _cuts(factor: Labelled, axes: list[int]) -> bool:
    """Whether a factor has some of the axes, but not all."""
    return set(axes) & set(factor.axes) not in (set(), set(axes))


def _regroup(factor: Labelled, old: list[int], long: list[int], new: list[int], sizes: list[int]) -> Labelled:
    """One group of a reshape on a factor that has all of its axes, those of length one aside, or none."""
    for axis in old:
        factor = factor if axis in long else factor.without(axis)
    return reshaped(factor, long, new, sizes) if set(long) & set(factor.axes) else factor


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Split a reshape into the smallest runs of axes with equal total size; None for empty arrays.

    >>> _groups((2, 3, 4), (6, 4))
    [([0, 1], [6]), ([2], [4])]
    """
    if 0 in old:
        return None
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], list(new[j : j + 1])
        i, j = i + len(left), j + len(right)
        while prod(old[k] for k in left) != prod(right):
            if prod(old[k] for k in left) < prod(right):
                left.append(i)
                i += 1
            else:
                right.append(new[j])
                j += 1
        groups.append((left, right))
    return groups


@rule("slice")
def _slice(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    (weight,) = operands
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides: Sequence[int] = eqn.params["strides"] or (1,) * len(start)
    cuts = dict(zip(weight.axes, zip(start, limit, strides, strict=True), strict=True))
    (base,) = jaxprs.bind(eqn, [weight.base])
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
    bases = jaxprs.bind(eqn, [weight.base])
    return [weight.map(base, weight.axes, partial(_cut, cuts=cut)) for base, cut in zip(bases, cuts, strict=True)]


@rule("dynamic_slice")
def _dynamic_slice(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    weight, *starts = operands
    if not isinstance(weight, Weight):
        return None
    (base,) = jaxprs.bind(eqn, [weight.base, *starts])
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
    (base,) = jaxprs.bind(eqn, [weight.base])

    def flip(factor: Labelled) -> Labelled:
        positions = tuple(factor.axes.index(axis) for axis in flipped if axis in factor.axes)
        return Labelled(jax.lax.rev(factor.array, positions), tuple(new.get(axis, axis) for axis in factor.axes))

    return [weight.map(base, [new.get(axis, axis) for axis in weight.axes], flip)]


@rule("neg")
def _negate(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    return _multiplied(eqn, operands, operands[0], -1.0)


@rule("mul")
def _multiply(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    for weight, factor in (operands, operands[::-1]):
        if isinstance(weight, Weight) and not isinstance(factor, Weight) and jnp.ndim(factor) == 0:
            return _multiplied(eqn, operands, weight, factor)
    return None


@rule("div")
def _divide(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    weight, divisor = operands
    if isinstance(weight, Weight) and not isinstance(divisor, Weight) and jnp.ndim(divisor) == 0:
        return _multiplied(eqn, operands, weight, 1 / divisor)
    return None


def _multiplied(eqn: Any, operands: Sequence[Any], weight: Weight, by: Any) -> list[Any]:
    """The weight times a scalar: the base as the program does it, the factors through `b` alone."""
    (base,) = jaxprs.bind(eqn, [weight.base if operand is weight else operand for operand in operands])
    terms = tuple(
        replace(term, b=replace(term.b, array=term.b.array * jnp.asarray(by, term.b.array.dtype)))
        for term in weight.terms
    )
    return [replace(weight, base=base, terms=terms)]
