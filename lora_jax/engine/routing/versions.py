"""What is the same for all examples and differs by adapter: each version is computed, and each example takes its own.

Learned queries, positions and the like meet an adapted parameter before they meet any example. What comes of them is
carried on with one version for every adapter, through any operation, until examples come in.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.engine import contract, jaxprs
from lora_jax.engine.bases import array_of
from lora_jax.engine.context import Context
from lora_jax.engine.dropout import inputs
from lora_jax.engine.lift import RULES, VERSIONED, unroutable
from lora_jax.engine.product import adapted_result
from lora_jax.engine.routing.axes import Axes, Axis, labels, plain
from lora_jax.engine.routing.batch_axes import ALIGNED
from lora_jax.engine.routing.slots import chosen, routing_of
from lora_jax.engine.weight import SLOT, Labelled, Versions, Weight

_INSIDE = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "remat", "cond")
_LOOPS = ("scan", "while")


def versions(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """An equation of which some operand has a version for each adapter: with each of them, or with each row's own."""
    name = eqn.primitive.name
    if name in _INSIDE:
        return RULES[name](ctx, eqn, operands) or []
    routing = routing_of(ctx)
    axes = [tuple(routing.operand(ctx.trail, i, getattr(atom.aval, "shape", ()))) for i, atom in enumerate(eqn.invars)]
    weights = [operand for operand in operands if isinstance(operand, Weight)]
    meets = any(label in routing.wanted for each in axes for label in labels(each))
    if not meets and not weights:
        return _each(eqn, operands)
    after = routing.batch_axes.results(eqn, axes, ctx.trail)
    if name in _LOOPS:
        first, count = _carries(eqn)
        carried = dict(enumerate(after[:count], first))
        given = [own(ctx, each, carried[i]) if i in carried else each for i, each in enumerate(operands)]
        return RULES[name](ctx, eqn, given) or []
    if weights:
        return [_product(ctx, eqn, operands)]
    given = _own_rows(ctx, eqn, operands, axes, after[0])
    if given is not None:
        return jaxprs.bind(eqn, given)
    return [own(ctx, each, runs) for each, runs in zip(_each(eqn, operands), after, strict=True)]


VERSIONED.append(versions)


def _carries(eqn: Any) -> tuple[int, int]:
    """Where among the operands of a loop those begin that it carries, and how many they are."""
    if eqn.primitive.name == "while":
        return len(eqn.invars) - len(eqn.outvars), len(eqn.outvars)
    loop = jaxprs.loop(eqn)
    return loop.consts, loop.carries


def own(ctx: Context, value: Any, axes: Axes) -> Any:
    """Of a value with versions each row's own, given what runs along the axes of what it meets.

    Raises:
      ParameterError: rows cannot be told apart there.
    """
    if not isinstance(value, Versions):
        return value
    names = range(value.array.ndim - 1)
    choice = routing_of(ctx).choice(value.path, axes, names)
    short = [i for i in choice.axes if value.array.shape[1 + i] == 1]
    given = Labelled(value.array, (SLOT, *names))
    for axis in short:
        given = given.without(axis)
    return chosen(given, choice).ordered(tuple(names)).array


def of_product(ctx: Context, weight: Weight, x: Labelled, out: Sequence[int], bases: Any) -> Versions:
    """A product of what is no example's own with a weight of a bank.

    Args:
      ctx: the context.
      weight: the weight.
      x: the activation; it may have versions, along `SLOT`.
      out: ids of the result's axes.
      bases: the base's own products, `[slots + 1, ...]`, the base's version last.
    """
    pairs = [contract.ordered(term, x.axes, out) for term in weight.terms]
    names, precision, products = (SLOT, *out), jax.lax.Precision.HIGHEST, []
    for read, (first, second) in zip(inputs(ctx, weight, x), pairs, strict=True):
        products.append((contract.hidden(read, first, second, names, precision, bases), second))
    return of_terms(ctx, weight, out, bases, products)


def of_terms(
    ctx: Context, weight: Weight, out: Sequence[int], bases: Any, terms: Sequence[tuple[Labelled, Labelled]]
) -> Versions:
    """The versions of a value whose axes are `out`: the base's, and what each adapter adds.

    Args:
      ctx: the context.
      weight: the weight that is used.
      out: ids of the value's axes.
      bases: the base's own results, `[slots + 1, ...]`, the base's version last.
      terms: for each term what is between its factors, and the second factor.
    """
    names, routing = (SLOT, *out), routing_of(ctx)
    added = [contract.mixed(inner, second, names, jax.lax.Precision.HIGHEST, bases) for inner, second in terms]
    found = adapted_result(bases[:-1], names, weight.gain, added)
    if routing.broken is not None:
        found = jnp.where(jnp.expand_dims(routing.broken, tuple(range(1, found.ndim))), jnp.nan, found)
    return Versions(jnp.concatenate([found, bases[-1:]]), weight.path, routing.refusal(weight.path, ()))


def _product(ctx: Context, eqn: Any, operands: Sequence[Any]) -> Versions:
    """A product of a value that has versions with a weight that has: version by version."""
    (value,) = [operand for operand in operands if isinstance(operand, Versions)]
    (weight,) = [operand for operand in operands if isinstance(operand, Weight)]
    if eqn.primitive.name != "dot_general" or weight.merged or weight.formed:
        raise unroutable(weight.path, f"{eqn.primitive.name} with what {value.path} gives for each adapter")
    side = 0 if operands[0] is weight else 1
    (bases,) = _each(eqn, [array_of(operand.base) if operand is weight else operand for operand in operands])
    rank = value.array.ndim - 1
    names, _, _, out = contract.contraction(eqn.params["dimension_numbers"], side, weight.axes, rank)
    return of_product(ctx, weight, Labelled(value.array[:-1], (SLOT, *names)), out, bases.array)


def _each(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The equation with every version."""
    given = [operand for operand in operands if isinstance(operand, Versions)]
    in_axes = tuple(0 if isinstance(operand, Versions) else None for operand in operands)
    arrays = [operand.array if isinstance(operand, Versions) else operand for operand in operands]
    results = jax.vmap(lambda *values: jaxprs.bind(eqn, values), in_axes)(*arrays)
    return [replace(given[0], array=result) for result in results]


def _own_rows(ctx: Context, eqn: Any, operands: Sequence[Any], axes: Sequence[Axes], after: Axes) -> list[Any] | None:
    """The operands with each row's own version, where rows of the operands are rows of the result; None elsewhere."""
    name, routing = eqn.primitive.name, routing_of(ctx)
    places: list[Sequence[Axis]]
    if name in ALIGNED:
        places = [after] * len(operands)
    elif name == "concatenate":
        along = eqn.params["dimension"]
        sizes = [atom.aval.shape[along] for atom in eqn.invars]
        places = [(*after[:along], plain(size), *after[along + 1 :]) for size in sizes]
    elif name == "dot_general":
        _, (lb, rb) = eqn.params["dimension_numbers"]
        shared = list(after[: len(lb)])
        places = [
            [shared[batch.index(i)] if i in batch else plain(size) for i, size in enumerate(atom.aval.shape)]
            for batch, atom in zip((list(lb), list(rb)), eqn.invars, strict=True)
        ]
    else:
        return None
    pairs = list(zip(operands, places, strict=True))
    if any(isinstance(o, Versions) and (o.array.ndim - 1 != len(p) or routing.refusal("", p)) for o, p in pairs):
        return None
    return [own(ctx, operand, tuple(place)) for operand, place in pairs]
