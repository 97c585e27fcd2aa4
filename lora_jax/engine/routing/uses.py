"""Uses of a weight in a call where every row has its own factors: products, convolutions and look-ups."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.dtypes import promoted
from lora_jax.engine import contract
from lora_jax.engine.context import Context
from lora_jax.engine.dropout import inputs
from lora_jax.engine.lift import unroutable
from lora_jax.engine.product import adapted_result, times
from lora_jax.engine.routing.axes import Axis, length
from lora_jax.engine.routing.forms import Form, Routed
from lora_jax.engine.routing.router import Router, row_weights
from lora_jax.engine.routing.slots import chosen, gate, own_gain, routing_of, split
from lora_jax.engine.routing.versions import of_product, of_terms
from lora_jax.engine.weight import SLOT, Labelled, Term, Versions, Weight, flat_size
from lora_jax.errors import ParameterError

IMAGE = SLOT - 1
"""The id of a convolution's axis of images."""


def routed_product(
    ctx: Context, eqn: Any, side: int, x: Labelled, weight: Weight, out: Sequence[int], dot: Callable[[Any, Any], Any]
) -> Any:
    """A product of an activation with a weight of which each row has its own.

    Args:
      ctx: the context.
      eqn: the equation.
      side: which of its operands the activation is.
      x: the activation.
      weight: the weight; its factors have an axis of slots.
      out: ids of the result's axes.
      dot: the program's product of activation and base.
    """
    routing = routing_of(ctx)
    read, found, new = x, [], {}
    if not isinstance(routing.given, Router):
        read, found, new = split(x, routing.operand(ctx.trail, side, x.array.shape), weight)
    inner = tuple(part for name in out for part in new.get(name, [name]))
    if isinstance(routing.given, Router):
        choice = row_weights(ctx, routing.given, weight, x, inner)
    elif routing.same_for_all(found):
        return _same_for_all(ctx, eqn, x, weight, out, dot)
    else:
        choice = routing.choice(weight.path, found, read.axes)
    if not {*choice.axes} <= {*inner, SLOT}:
        raise ParameterError(
            f"{weight.path} is applied over the axis of examples (or tokens) itself, which have adapters of their own: "
            "leave it out of the bank"
        )
    gain = weight.gain and own_gain(weight.gain, choice)
    before = gain is not None and not {*gain.axes} <= {*inner}
    if gain is not None and before and not {*gain.axes} <= {*read.axes}:
        raise unroutable(weight.path, "its gain runs along axes of both its inputs and its outputs")
    met = times(read.array, read.axes, gain).astype(x.array.dtype).reshape(x.array.shape) if before else x.array
    y = dot(met, weight.base)
    sizes = {name: size for name, size in zip(read.axes, read.array.shape, strict=True)}
    sizes |= {name: n for name, n in zip(out, y.shape, strict=True) if name not in new}
    like = y.reshape([sizes[name] for name in inner]) if new else y
    product = Routed(routing, choice, inner, eqn.params.get("precision"), like)
    pairs = [contract.ordered(term, read.axes, inner) for term in weight.terms]
    _record_product(ctx, eqn, weight, product.form(read, *pairs[0]), read, product.out)
    with jax.named_scope("lora"):
        reads = inputs(ctx, weight, read)
        terms = [
            product.marked(product.term(each, first, second))
            for each, (first, second) in zip(reads, pairs, strict=True)
        ]
        return adapted_result(like, inner, None if before else gain, terms).reshape(y.shape)


def _same_for_all(
    ctx: Context, eqn: Any, x: Labelled, weight: Weight, out: Sequence[int], dot: Callable[[Any, Any], Any]
) -> Versions:
    """The product of what is no example's own, with each adapter."""
    slots = routing_of(ctx).slots
    _record_product(ctx, eqn, weight, "mask", x, out)
    with jax.named_scope("lora"):
        y = dot(x.array, weight.base)
        return of_product(ctx, weight, x, out, jnp.broadcast_to(y, (slots + 1, *y.shape)))


def _record_product(ctx: Context, eqn: Any, weight: Weight, form: Form, x: Labelled, out: Sequence[int]) -> None:
    """Log the form, and what it adds to one forward evaluation."""
    into = [axis for axis in weight.axes if axis in x.axes and axis not in out]
    left = [axis for axis in weight.axes if axis not in x.axes]
    tokens = flat_size(x, [axis for axis in x.axes if axis not in weight.axes])
    rank = sum(term.rank for term in weight.terms) * (routing_of(ctx).slots if form == "mask" else 1)
    lengths = dict(zip(weight.axes, weight.base.shape, strict=True))
    ends = prod(lengths[axis] for axis in into) + prod(lengths[axis] for axis in left)
    roles = ctx.roles(weight, into=into, out=left)
    ctx.record(weight, eqn, form, roles, kind="dense", flops=2 * tokens * rank * ends, nbytes=4 * tokens * rank)


def of_images(ctx: Context, eqn: Any, kernel: Weight) -> tuple[Any, Labelled, Labelled | None]:
    """What each image of a convolution keeps of every slot, `[images, slots]`; its slots; its gain, with axis `IMAGE`.

    Raises:
      ParameterError: positions within an image have adapters of their own.
    """
    routing, shape = routing_of(ctx), eqn.invars[0].aval.shape
    axes = routing.operand(ctx.trail, 0, shape)
    batch = eqn.params["dimension_numbers"].lhs_spec[0]
    names = [IMAGE if i == batch else IMAGE - 1 for i in range(len(axes))]
    choice = routing.choice(kernel.path, axes, names)
    if not {*choice.axes} <= {IMAGE, SLOT}:
        raise ParameterError(
            f"{kernel.path} convolves over tokens that have adapters of their own: each result reads several of them. "
            "Leave it out of the bank, or route by examples alone"
        )
    keeps = gate(choice, routing.slots, jnp.float32).over((IMAGE, SLOT))
    gain = kernel.gain and own_gain(kernel.gain, choice)
    return jnp.broadcast_to(keeps, (shape[batch], routing.slots)), choice, gain


def look_up(ctx: Context, table: Weight, axes: Sequence[Axis], rows: Sequence[int], taken: Weight) -> Any:
    """Rows of a table, each with what its own adapter adds.

    Args:
      ctx: the context.
      table: the table.
      axes: what runs along the axes of the indices.
      rows: ids of these axes in the result.
      taken: the rows; factors that the index does not choose from have an axis of slots, the others too if examples
        have weights of all slots.
    """
    routing = routing_of(ctx)
    if routing.same_for_all(axes):
        bases = jnp.broadcast_to(taken.base, (routing.slots + 1, *taken.base.shape))
        return of_terms(ctx, taken, taken.axes, bases, [_by_row(term, rows) for term in taken.terms])
    choice = routing.choice(table.path, axes, rows)
    product = Routed(routing, choice, taken.axes, jax.lax.Precision.HIGHEST, taken.base)
    wide = promoted(taken.base.dtype, jnp.float32)
    terms = []
    for term in taken.terms:
        first, second = (factor.astype(wide) for factor in _by_row(term, rows))
        if not routing.mixes:  # The base's rows looked up some slot too.
            own = replace(choice, array=choice.array < routing.slots).over(first.axes)
            first = replace(first, array=jnp.where(own, first.array, 0))
        if SLOT in second.axes and product.form(first, second, second) == "mask":
            terms.append(product.marked(product.masked(first, first, second)))
        else:
            terms.append(product.marked(product.mixed(first, chosen(second, choice))))
    gain = taken.gain and own_gain(taken.gain, choice)
    return adapted_result(taken.base, taken.axes, gain, terms)


def _by_row(term: Term, rows: Sequence[int]) -> tuple[Labelled, Labelled]:
    """The factors of a term, that which was looked up first."""
    return (term.a, term.b) if {*rows} & {*term.a.axes} else (term.b, term.a)


def slot_of_rows(ctx: Context, table: Weight, axes: Sequence[Axis], rows: Sequence[int]) -> Any | None:
    """`[*rows]` integers: the slot that each look-up is made in; None where it is made in all of them.

    Rows of the base look up some slot too, to no effect.
    """
    routing = routing_of(ctx)
    if routing.mixes or routing.same_for_all(axes):
        return None
    sizes = [length(axis) for axis in axes]
    return jnp.minimum(jnp.broadcast_to(routing.choice(table.path, axes, rows).over(rows), sizes), routing.slots - 1)
