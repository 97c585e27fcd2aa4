"""Elementwise rules: weights are added and scaled, along their axes or by numbers, without forming `W + a·b`.

A factor takes what scales its own axes. What scales every entry by itself (a mask) has no low-rank form: there
`W + a·b` is formed, but the result is followed on, so that the product it ends in is still found.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.dtypes import promoted
from lora_jax.engine import jaxprs
from lora_jax.engine.bases import bind
from lora_jax.engine.context import Context
from lora_jax.engine.lift import dense, formed, rule
from lora_jax.engine.sizes import several
from lora_jax.engine.weight import Labelled, Term, Weight, with_axis


@rule("neg", merged=True)
def _negate(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    sign = 1 if operands[0].coded else -1
    return [_times(operands[0], sign, bind(eqn, [operands[0].base])[0])]


@rule("add", "add_any", "sub")
def _add(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A sum has the terms of both sides. An activation that a parameter is added to stays an activation."""
    if _meets_activation(ctx, eqn, operands) or any(isinstance(w, Weight) and w.gain for w in operands):
        return None
    if any(isinstance(w, Weight) and w.coded for w in operands):
        return _decoded(ctx, eqn, operands)
    return _summed(ctx, eqn, operands, (1, -1 if eqn.primitive.name == "sub" else 1))


@rule("complex")
def _complex(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A complex array from its real and its imaginary part."""
    return None if any(isinstance(w, Weight) and w.gain for w in operands) else _summed(ctx, eqn, operands, (1, 1j))


def _summed(ctx: Context, eqn: Any, operands: Sequence[Any], signs: Sequence[Any]) -> list[Any] | None:
    shape = eqn.outvars[0].aval.shape
    if any(weight.base.ndim != len(shape) for weight in operands if isinstance(weight, Weight)):
        return None
    same = ctx.alike([_spread(ctx, weight, shape) for weight in operands if isinstance(weight, Weight)], shape)
    if same is None:
        return None
    (base,) = bind(eqn, [w.base if isinstance(w, Weight) else w for w in operands])
    rest = iter(same)
    scaled = [_times(next(rest), sign) for w, sign in zip(operands, signs, strict=True) if isinstance(w, Weight)]
    return [joined(base, scaled)]


def _decoded(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Codes on their way to numbers: what they are combined with does not reach the terms, which are beside those."""
    operands = _one_weight(ctx, eqn, operands)
    weight = operands[0] if isinstance(operands[0], Weight) else operands[1]
    values = [each.base if isinstance(each, Weight) else each for each in operands]
    if eqn.outvars[0].aval.shape != weight.base.shape or _meets_activation(ctx, eqn, operands):
        return None
    return [replace(weight, base=bind(eqn, values)[0])]


def _spread(ctx: Context, weight: Weight, shape: Sequence[int]) -> Weight:
    """The weight along axes of these lengths, where its own are of length one; its base is left to the operation."""
    for axis, size, wanted in zip(weight.axes, weight.base.shape, shape, strict=True):
        if size < wanted:
            new = ctx.fresh(ctx.log.origins[axis])
            axes = [new if each == axis else each for each in weight.axes]
            narrow = weight.map(weight.base, axes, lambda factor, axis=axis: factor.without(axis))
            terms = [replace(term, b=with_axis(term.b, new, wanted)) for term in narrow.terms]
            weight = replace(narrow, terms=tuple(terms))
    return replace(weight, base=jax.ShapeDtypeStruct(tuple(shape), weight.base.dtype))


def joined(base: Any, parts: Sequence[Weight]) -> Weight:
    """One weight with the terms and the parameters of several that have the same axes."""
    terms = tuple(term for part in parts for term in part.terms)
    paths = tuple(dict.fromkeys(path for part in parts for path in part.paths))
    reason = next((part.formed for part in parts if part.formed), "")
    return replace(parts[0], base=base, terms=terms, paths=paths, formed=reason)


@rule("mul", merged=True)
def _multiply(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    return _scaled(ctx, eqn, operands, lambda factor: factor)


@rule("div", merged=True)
def _divide(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    return _scaled(ctx, eqn, operands, lambda factor: 1 / factor) if isinstance(operands[0], Weight) else None


def _scaled(ctx: Context, eqn: Any, operands: Sequence[Any], factor: Any) -> list[Any] | None:
    """A weight times (or over) an array: by number, along axes, or entry by entry."""
    if any(isinstance(operand, Weight) and operand.coded for operand in operands):
        return _decoded(ctx, eqn, operands)
    operands = _one_weight(ctx, eqn, operands)
    weight, other = operands if isinstance(operands[0], Weight) else operands[::-1]

    def on(base: Any) -> Any:
        return bind(eqn, [base if operand is weight else operand for operand in operands])[0]

    if jnp.ndim(other) == 0:
        return [_times(weight, factor(other), on(weight.base))]
    shape, long = eqn.outvars[0].aval.shape, {i for i, size in enumerate(weight.base.shape) if several(size)}
    runs = _varying(ctx, eqn.invars[1 if operands[0] is weight else 0], other)
    if weight.merged or weight.base.ndim != len(shape) or (runs >= long and _meets_activation(ctx, eqn, operands)):
        return None
    wide = _spread(ctx, weight, shape)
    small = Labelled(factor(_along(other, runs)), tuple(wide.axes[i] for i in sorted(runs)))
    terms = [_term_times(term, small, prod(shape)) for term in wide.terms]
    if runs >= long or None in terms:
        whole = formed(ctx, eqn, weight, f"{eqn.primitive.name} with an array of its own size")
        return [replace(whole, base=on(whole.base), axes=wide.axes)]
    return [replace(wide, base=on(weight.base), terms=tuple(term for term in terms if term is not None))]


def _one_weight(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The operands; of two weights the smaller is formed, a scale of the other, and the divisor in any case."""
    one, other = operands
    if isinstance(one, Weight) and isinstance(other, Weight):
        if eqn.primitive.name == "div" or other.base.size <= one.base.size:
            return [one, dense(ctx, eqn, other, "it scales another weight")]
        return [dense(ctx, eqn, one, "it scales another weight"), other]
    return [one, other]


def _along(array: Any, runs: set[int]) -> Any:
    """The array along the axes it is not constant along."""
    return array[tuple(slice(None) if i in runs else 0 for i in range(array.ndim))]


def _times(weight: Weight, number: Any, base: Any = None) -> Weight:
    """The weight times a number: its factors through `b` alone."""
    if isinstance(number, int) and number == 1:
        return weight if base is None else replace(weight, base=base)
    terms = tuple(replace(term, b=replace(term.b, array=_product(term.b.array, number))) for term in weight.terms)
    return replace(weight, base=weight.base if base is None else base, terms=terms)


def _product(array: Any, number: Any) -> Any:
    """In the array's dtype, but for a complex number."""
    complex_number = jnp.iscomplexobj(number) and not jnp.iscomplexobj(array)
    dtype = promoted(array.dtype, jnp.complex64) if complex_number else array.dtype
    return array.astype(dtype) * jnp.asarray(number).astype(dtype)


def _term_times(term: Term, small: Labelled, limit: int) -> Term | None:
    """The term times an array on some axes, in the factor that grows least; None if that grows to a limit."""
    options = []
    for name in ("a", "b"):
        factor: Labelled = getattr(term, name)
        new = [axis for axis in small.axes if axis not in factor.axes]
        options.append((factor.array.size * prod(small.size(axis) for axis in new), name, factor, new))
    size, name, factor, new = min(options, key=lambda option: option[0])
    if new and size >= limit:
        return None
    axes = (*factor.axes, *new)
    array = jnp.expand_dims(factor.array, range(factor.array.ndim, len(axes)))
    scale = small.over(axes)
    return replace(term, **{name: Labelled(_product_of(array, scale), axes)})


def _product_of(array: Any, scale: Any) -> Any:
    dtype = promoted(array.dtype, scale.dtype) if jnp.iscomplexobj(scale) else array.dtype
    return array.astype(dtype) * scale.astype(dtype)


def _meets_activation(ctx: Context, eqn: Any, operands: Sequence[Any]) -> bool:
    """Whether what a weight is combined with depends on parameters and data, so that the result is an activation."""
    activations = ctx.log.facts.activations
    return any(
        not isinstance(operand, Weight) and not jaxprs.is_literal(atom) and atom in activations
        for atom, operand in zip(eqn.invars, operands, strict=True)
    )


def _varying(ctx: Context, atom: Any, value: Any) -> set[int]:
    """Axes along which an array is not known to be constant: it may be a smaller one that the program broadcasts."""
    runs = {i for i, size in enumerate(value.shape) if several(size)}
    while ctx.frame is not None and not jaxprs.is_literal(atom) and atom in ctx.frame.makers:
        maker = ctx.frame.makers[atom]
        if maker.primitive.name in ("broadcast_in_dim",):
            source = maker.invars[0].aval
            kept = maker.params["broadcast_dimensions"]
            return runs & {i for i, size in zip(kept, source.shape, strict=True) if several(size)}
        if maker.primitive.name not in ("convert_element_type", "copy", "neg", "exp", "sqrt", "rsqrt", "stop_gradient"):
            break
        atom = maker.invars[0]
    return runs


@rule("select_n")
def _select(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A choice between weights (or a weight and an array): each has its terms where it is chosen."""
    which, *cases = operands
    if isinstance(which, Weight) or _meets_activation(ctx, eqn, operands):
        return None
    given = [case for case in cases if isinstance(case, Weight)]
    same = ctx.alike(given, eqn.outvars[0].aval.shape)
    if same is None or any(weight.gain for weight in given):
        return None
    (base,) = bind(eqn, [which, *(w.base if isinstance(w, Weight) else w for w in cases)])
    runs = _varying(ctx, eqn.invars[0], which)
    along = tuple(same[0].axes[i] for i in sorted(runs))
    chosen = _along(which, runs)
    rest, parts = iter(same), []
    for number, case in enumerate(cases):
        if isinstance(case, Weight):
            weight = next(rest)
            hit = Labelled((chosen.astype(jnp.int32) == number).astype(jnp.float32), along)
            terms = [_term_times(term, hit, base.size) for term in weight.terms]
            if None in terms:
                whole = [formed(ctx, eqn, w, "select_n by entries") if isinstance(w, Weight) else w for w in cases]
                values = [w.base if isinstance(w, Weight) else w for w in whole]
                kept = [replace(w, terms=(), gain=None, formed="select_n by entries") for w in same]
                return [joined(bind(eqn, [which, *values])[0], kept)]
            parts.append(replace(weight, terms=tuple(term for term in terms if term is not None)))
    return [joined(base, parts)]


@rule("reduce_sum")
def _sum(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Each factor is summed over its own axes; one that both have, or neither, has no such form."""
    (weight,) = operands
    gone = [weight.axes[i] for i in eqn.params["axes"]]
    apart = all(({*term.a.axes} & {axis}) != ({*term.b.axes} & {axis}) for term in weight.terms for axis in gone)
    if weight.gain or weight.keys or weight.numbering or not apart:
        return None
    (base,) = bind(eqn, [weight.base])

    def total(factor: Labelled) -> Labelled:
        places = tuple(i for i, axis in enumerate(factor.axes) if axis in gone)
        return Labelled(factor.array.sum(places), tuple(axis for axis in factor.axes if axis not in gone))

    return [weight.map(base, [axis for axis in weight.axes if axis not in gone], total)]


@rule("real", "imag", "conj")
def _part(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """`Re(a·b) = Re a · Re b - Im a · Im b`, and the like: twice the rank."""
    (weight,) = operands
    if weight.gain or weight.keys or weight.numbering:
        return None
    (base,) = bind(eqn, [weight.base])
    if eqn.primitive.name == "conj":
        return [weight.map(base, weight.axes, lambda factor: replace(factor, array=jnp.conj(factor.array)))]
    halves = [jnp.real, jnp.imag] if eqn.primitive.name == "real" else [jnp.imag, jnp.real]
    sign = -1 if eqn.primitive.name == "real" else 1
    apply = lambda factor, fn, by=1: replace(factor, array=by * fn(factor.array))  # noqa: E731
    terms = tuple(
        replace(term, a=apply(term.a, fn), b=apply(term.b, other, by))
        for term in weight.terms
        for fn, other, by in ((jnp.real, halves[0], 1), (jnp.imag, halves[1], sign))
    )
    return [replace(weight, base=base, terms=terms)]
