"""Rules for what is put together from weights: concatenated, stacked, padded, gathered over a mesh axis.

Weights that are stacked have their factors stacked, so that each keeps its own rank; in other directions a factor is
padded with zeros to the length of the whole.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax.dtypes import promoted
from lora_jax.engine.bases import array_of, bind
from lora_jax.engine.context import Context
from lora_jax.engine.lift import rule
from lora_jax.engine.rules.elementwise import joined
from lora_jax.engine.weight import RANK, Labelled, Merged, Term, Weight, flat_ids, with_axis


@rule("concatenate")
def _concatenate(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    return _put_together(ctx, eqn, operands, eqn.params["dimension"], operands)


@rule("stack")
def _stack(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """As `concatenate` of arrays with one more axis, of length one."""
    axis = eqn.params["axis"]
    return _put_together(ctx, eqn, operands, axis, [_with_layer(ctx, operand, axis) for operand in operands])


def _with_layer(ctx: Context, operand: Any, place: int) -> Any:
    if not isinstance(operand, Weight):
        return jnp.expand_dims(operand, place)
    axes, new = list(operand.axes), ctx.fresh()
    axes.insert(place, new)
    terms = tuple(replace(term, b=with_axis(term.b, new, 1)) for term in operand.terms)
    return replace(operand, base=jnp.expand_dims(array_of(operand.base), place), axes=tuple(axes), terms=terms)


def _put_together(
    ctx: Context, eqn: Any, operands: Sequence[Any], place: int, pieces: Sequence[Any]
) -> list[Any] | None:
    """Pieces, weights or arrays, end to end along an axis; the operands are what the program puts together."""
    given = [weight for weight in pieces if isinstance(weight, Weight)]
    shape = [size if i != place else None for i, size in enumerate(eqn.outvars[0].aval.shape)]
    same = ctx.alike(given, shape)
    if same is None or any(weight.gain or weight.numbering or weight.keys for weight in given):
        return None
    (base,) = bind(eqn, [w.base if isinstance(w, Weight) else w for w in operands])
    axis, rest = same[0].axes[place], iter(same)
    sizes = [(piece.base if isinstance(piece, Weight) else piece).shape[place] for piece in pieces]
    parts = [next(rest) if isinstance(piece, Weight) else None for piece in pieces]
    terms = _shared(parts, axis) or _stacked(parts, axis, sizes) or _padded(parts, axis, sizes)
    return [replace(joined(base, same), terms=tuple(terms))]


def _shared(parts: Sequence[Weight | None], axis: int) -> list[Term] | None:
    """Pieces of one weight (a roll, say) have one factor in common."""
    weights = [part for part in parts if part is not None]
    if len(weights) < len(parts) or len({len(part.terms) for part in weights}) > 1:
        return None
    columns = list(zip(*(part.terms for part in weights), strict=True))
    terms = []
    for column in columns:
        name = "a" if axis in column[0].a.axes else "b"
        other = "b" if name == "a" else "a"
        factors, beside = ([getattr(term, each) for term in column] for each in (name, other))
        if any(factor.array is not beside[0].array or axis in factor.axes for factor in beside):
            return None
        terms.append(replace(column[0], **{name: _end_to_end(factors, axis)}))
    return terms


def _stacked(parts: Sequence[Weight | None], axis: int, sizes: Sequence[int]) -> list[Term] | None:
    """Whole weights, one behind the other along a new axis: both factors get that axis. Ranks are made equal."""
    first = next((part.terms for part in parts if part is not None and part.terms), ())
    if not first or any(size != 1 for size in sizes):
        return None
    terms = []
    for i, like in enumerate(first):
        column = [part.terms[i] if part is not None and i < len(part.terms) else None for part in parts]
        facts = {(t.dropout, t.adapter, *(frozenset({*f.axes, axis}) for f in (t.a, t.b))) for t in column if t}
        if len(facts) > 1 or any(part is not None and len(part.terms) > len(first) for part in parts):
            return None
        rank = max(term.rank for term in column if term)
        a, b = (
            _end_to_end([_of_rank(getattr(term or like, name), axis, rank, bool(term)) for term in column], axis)
            for name in ("a", "b")
        )
        terms.append(replace(like, a=a, b=b))
    return terms


def _of_rank(factor: Labelled, axis: int, rank: int, used: bool) -> Labelled:
    """A factor with one layer along the axis, with zeros up to the rank; nothing but zeros where it is not used."""
    factor = with_axis(factor, axis, 1)
    array = factor.array if used else jnp.zeros_like(factor.array)
    place = factor.axes.index(RANK)
    more = rank - array.shape[place]
    widths = [(0, more if i == place else 0, 0) for i in range(array.ndim)]
    return replace(factor, array=lax.pad(array, jnp.zeros((), array.dtype), widths) if more else array)


def _end_to_end(factors: Sequence[Labelled], axis: int) -> Labelled:
    ordered = [factor.ordered(factors[0].axes) for factor in factors]
    dtype = promoted(*(factor.array for factor in ordered))
    arrays = [factor.array.astype(dtype) for factor in ordered]
    return Labelled(jnp.concatenate(arrays, ordered[0].axes.index(axis)), ordered[0].axes)


def _padded(parts: Sequence[Weight | None], axis: int, sizes: Sequence[int]) -> list[Term]:
    """Every term for itself, zero outside of its own piece."""
    ends = list(accumulate(sizes))
    terms = []
    for part, size, end in zip(parts, sizes, ends, strict=True):
        widths = {axis: (end - size, ends[-1] - end, 0)}
        terms += [_pad_term(term, widths, {axis: size}) for term in (part.terms if part is not None else ())]
    return terms


@rule("tile", merged=True)
def _tile(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A repeated axis is two in one: that of the repetitions, and its own."""
    (weight,) = operands
    if weight.gain or weight.numbering or weight.keys:
        return None
    (base,) = bind(eqn, [weight.base])
    axes, terms = [], weight.terms
    for axis, size, times in zip(weight.axes, weight.base.shape, eqn.params["reps"], strict=True):
        if times > 1:
            new = ctx.fresh()
            terms = tuple(replace(term, b=with_axis(term.b, new, times)) for term in terms)
            sizes = axis.sizes if isinstance(axis, Merged) else (size,)
            axis = Merged((new, *flat_ids([axis])), (times, *sizes))
        axes.append(axis)
    return [replace(weight, base=base, axes=tuple(axes), terms=terms)]


@rule("pad")
def _pad(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    weight, value = operands
    if not isinstance(weight, Weight) or isinstance(value, Weight) or weight.gain or weight.keys or weight.numbering:
        return None
    (base,) = bind(eqn, [weight.base, value])
    config = zip(weight.axes, eqn.params["padding_config"], strict=True)
    widths = {axis: (low, high, inner) for axis, (low, high, inner) in config if (low, high, inner) != (0, 0, 0)}
    sizes = dict(zip(weight.axes, weight.base.shape, strict=True))
    terms = tuple(_pad_term(term, widths, sizes) for term in weight.terms)
    return [replace(weight, base=base, terms=terms)]


def _pad_term(term: Term, widths: dict[int, tuple[int, int, int]], sizes: dict[int, int]) -> Term:
    """The term with zeros around it; an axis that neither factor has is put into `b`."""
    for axis in widths:
        if axis not in (*term.a.axes, *term.b.axes):
            term = replace(term, b=with_axis(term.b, axis, sizes[axis]))

    def pad(factor: Labelled) -> Labelled:
        config = [widths.get(axis, (0, 0, 0)) for axis in factor.axes]
        zero = jnp.zeros((), factor.array.dtype)
        return replace(factor, array=lax.pad(factor.array, zero, config)) if any(map(any, config)) else factor

    return term.map(pad)


@rule("all_gather")
def _all_gather(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Inside a `shard_map`, the shards of a weight put together again: so are those of the factor that has the axis."""
    (weight,) = operands
    params = eqn.params
    if not params["tiled"]:
        return None
    axis = weight.axes[params["all_gather_dimension"]]
    (base,) = bind(eqn, [weight.base])

    def gather(array: Any, place: int) -> Any:
        groups = params["axis_index_groups"]
        return lax.all_gather(array, params["axis_name"], axis=place, tiled=True, axis_index_groups=groups)

    return [weight.map(base, weight.axes, lambda factor: factor.at(axis, gather))]
