"""Lift: traces a call of the user's function to a jaxpr, and evaluates that with some parameters symbolic.

An equation without symbolic operands is evaluated as it stands. One with symbolic operands goes to the
rule of its primitive, looked up by name; where there is no rule, or the rule declines, the operands
are materialised and the equation is evaluated on `gain · W + Σ a·b`: always correct, and logged.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from lora_jax.adapter.factors import is_traced
from lora_jax.engine import jaxprs
from lora_jax.engine.bases import View, array_of
from lora_jax.engine.context import Context, Log
from lora_jax.engine.declared import operation
from lora_jax.engine.dependence import Dependence
from lora_jax.engine.dropout import drops
from lora_jax.engine.jaxprs import Program
from lora_jax.engine.meshes import mesh_of
from lora_jax.engine.recompute import Frame
from lora_jax.engine.weight import Versions, Weight, collapsed
from lora_jax.errors import ParameterError
from lora_jax.paths import is_array, named_leaves, rebuild
from lora_jax.quantised.leaf import Quantised, abstract

Rule: TypeAlias = Callable[[Context, Any, Sequence[Any]], "list[Any] | None"]

RULES: dict[str, Rule] = {}
"""Rules by primitive name. A rule gets the context, the equation and the operands; None means it declines."""

VERSIONED: list[Rule] = []
"""The rule for equations of which an operand has a version for each adapter, whatever their primitive."""

MERGED: set[str] = set()
"""Primitives whose rules take weights with merged axes as they are."""


def rule(*names: str, merged: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for the primitives of the given names.

    Args:
      names: of the primitives.
      merged: whether it takes weights with merged axes; where it does not, it gets them with simple axes only.
    """

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        MERGED.update(names if merged else ())
        return fn

    return register


@dataclass(frozen=True)
class Call:
    """A traced call.

    Attributes:
      arrays: the parameters that are arrays, by path, in the order of the program's inputs.
      given: abstract arguments, which follow the parameters among the program's inputs.
      program: the program; everything else the call closes over is a constant of it.
      result: rebuilds the function's result from the program's outputs.
    """

    arrays: Mapping[str, Any]
    given: list[jax.ShapeDtypeStruct]
    program: Program
    result: Callable[[list[Any]], Any]


def trace_call(fn: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Trace `fn(params, *args, **kwargs)`; arguments and results may be anything, arrays or not."""
    leaves, treedef = named_leaves(params)
    arrays = {path: leaf for path, leaf in leaves.items() if is_array(leaf)}
    inputs, structure = jax.tree.flatten((args, kwargs))
    given = [leaf for leaf in inputs if isinstance(leaf, jax.ShapeDtypeStruct)]
    outputs: list[Any] = []

    def run(values: list[Any], abstract: list[Any]) -> list[Any]:
        known, rest = dict(zip(arrays, values, strict=True)), iter(abstract)
        full = rebuild(treedef, {path: known.get(path, leaf) for path, leaf in leaves.items()})
        call = (args, kwargs)
        if given:
            filled = [next(rest) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in inputs]
            call = jax.tree.unflatten(structure, filled)
        results, shape = jax.tree.flatten(fn(full, *call[0], **call[1]))
        # Strings, numbers and the like go to the caller as they are.
        outputs[:] = [shape, [None if isinstance(leaf, jax.Array) else leaf for leaf in results]]
        return [leaf for leaf in results if isinstance(leaf, jax.Array)]

    program, _ = jaxprs.trace(run, [abstract(leaf) for leaf in arrays.values()], given)

    def result(values: list[Any]) -> Any:
        shape, leaves = outputs
        rest = iter(values)
        return jax.tree.unflatten(shape, [next(rest) if leaf is None else leaf for leaf in leaves])

    return Call(arrays, given, program, result)


def evaluate_call(ctx: Context, call: Call, given: Sequence[Any], symbolic: Callable[[str, Any], Any]) -> Any:
    """Evaluate a traced call.

    Args:
      ctx: the context.
      call: the call.
      given: values for its abstract arguments.
      symbolic: makes of a frozen parameter, given its path, what the program is to see.
    """
    analyse(ctx.log, call)
    inputs = [followed(ctx, path, symbolic(path, frozen(leaf))) for path, leaf in call.arrays.items()]
    outputs = interpret(ctx, call.program, [*inputs, *given])
    return call.result([dense(ctx, None, output, "returned by the function") for output in outputs])


def analyse(log: Log, call: Call) -> None:
    """Find out what depends on what in a call, before it is evaluated."""
    log.facts = Dependence.of(call.program, len(call.arrays))
    narrow = {path: leaf for path, leaf in call.arrays.items() if not isinstance(leaf, Quantised)}
    combined = {path for number, path in enumerate(call.arrays) if number in log.facts.combined}
    log.coded = frozenset(
        path
        for path, leaf in narrow.items()
        if jnp.issubdtype(leaf.dtype, jnp.integer) or (leaf.dtype.itemsize == 1 and path in combined)
    )


def followed(ctx: Context, path: str, value: Any) -> Any:
    """What the program sees of a parameter: of a quantised one a weight, so that it is dequantised where it is used."""
    return ctx.weight(path, value) if isinstance(value, Quantised) else value


def frozen(leaf: Any) -> Any:
    """A parameter without a gradient; anything but an array as it is.

    Codes that a program does not get as an argument would be constants of it, and XLA would dequantise those while it
    compiles, to dense constants. A barrier keeps it from that.
    """
    if isinstance(leaf, Quantised) and not is_traced(leaf.codes):
        leaf = jax.lax.optimization_barrier(leaf)
    return jax.lax.stop_gradient(leaf) if is_array(leaf) else leaf


def interpret(ctx: Context, program: Program, args: Sequence[Any], needed: Sequence[bool] | None = None) -> list[Any]:
    """Evaluate a program; the results may be symbolic where the program returns (views of) its weights.

    Args:
      ctx: the context.
      program: the program.
      args: its inputs.
      needed: which of its results are used; all if None. What nothing needs is not evaluated, and None in the results.
    """
    jaxpr = program.jaxpr
    env = dict(zip(jaxpr.constvars, program.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if jaxprs.is_literal(atom) else env[atom]

    ctx = ctx.within(Frame(jaxpr, read))
    wanted = [atom for i, atom in enumerate(jaxpr.outvars) if needed is None or needed[i]]
    live = jaxprs.live(jaxpr, wanted)
    for position, eqn in enumerate(jaxpr.eqns):
        if position in live or ctx.look_inside:
            here = ctx.at(position) if position in live else replace(ctx.at(position), dead=True)
            operands = [read(atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, evaluate(here, eqn, operands), strict=True))
    unread = () if needed is None or ctx.look_inside else [i for i, each in enumerate(needed) if not each]
    return [None if i in unread else read(atom) for i, atom in enumerate(jaxpr.outvars)]


def evaluate(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluate one equation, by rule where an operand is symbolic."""
    if any(isinstance(operand, Versions) for operand in operands):
        with mesh_of(eqn):
            (versioned,) = VERSIONED
            return versioned(ctx, eqn, operands) or []
    if not any(isinstance(operand, Weight) for operand in operands):
        return jaxprs.bind(eqn, operands)
    name = eqn.primitive.name
    with mesh_of(eqn):
        if name not in MERGED:
            operands = [simple(ctx, eqn, operand) for operand in operands]
            if not any(isinstance(operand, Weight) for operand in operands):
                return jaxprs.bind(eqn, operands)
        results = RULES[name](ctx, eqn, operands) if name in RULES else None
        if results is not None:
            return results
        return jaxprs.bind(eqn, [dense(ctx, eqn, operand) for operand in operands])


def simple(ctx: Context, eqn: Any, value: Any) -> Any:
    """An operand without merged axes: a weight whose factors do not allow that is materialised."""
    if not isinstance(value, Weight) or not value.merged:
        return value
    reason = "axes of its inputs and of its outputs are merged"
    return collapsed(value, ctx.merging) or dense(ctx, eqn, value, reason)


def formed(ctx: Context, eqn: Any, value: Weight, reason: str) -> Weight:
    """The weight with `W + a·b` in its base, where a linear operation has no low-rank form; its use is logged."""
    if not value.adapted:
        return replace(value, formed=value.formed or reason)
    if value.routed:
        raise unroutable(value.path, reason)
    _warn_of_dropout(ctx, value, reason)
    return replace(value, base=value.dense(), terms=(), gain=None, numbering=None, keys=None, formed=reason)


def _warn_of_dropout(ctx: Context, value: Weight, reason: str) -> None:
    if any(drops(ctx, term) for term in value.terms):
        warnings.warn(
            f"{value.path} has dropout, which does nothing where W + a·b is formed ({reason}). Leave it out of the "
            "targets, set dropout=0 for it, or call without lora_key",
            stacklevel=2,
        )


def unroutable(path: str, reason: str) -> ParameterError:
    """The error for a weight of a bank that has no low-rank form where it is used."""
    return ParameterError(
        f"{path} would have to be formed for every example ({reason}): leave it out of the bank, or run each example "
        "with its own adapter"
    )


def opaque(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluate an equation whose inside is not ours on formed weights."""
    reason = f"{eqn.primitive.name} is opaque; if it is a product, declare it with lora.rules.linear"
    return jaxprs.bind(eqn, [dense(ctx, eqn, operand, reason) for operand in operands])


def dense(ctx: Context, eqn: Any, value: Any, reason: str = "", **facts: Any) -> Any:
    """The value of an operand (of an equation, or of the program's end): a weight is materialised, and logged."""
    if isinstance(value, Versions):
        raise ParameterError(value.refusal)
    if not isinstance(value, Weight):
        return value
    if value.routed:
        raise unroutable(value.path, reason or f"{eqn.primitive.name} has no low-rank form")
    if value.coded and value.adapted:
        raise ParameterError(
            f"{value.path} holds codes, and {operation(eqn) if eqn is not None else 'return'} uses them otherwise than "
            "to make numbers of them: leave it out of the targets, or quantise the base with lora_jax.quantise"
        )
    if value.formed and not ctx.look_inside:
        return array_of(value.base)
    rows = [ctx.log.looked_up[axis] for axis in value.axes if axis in ctx.log.looked_up]
    flops = 2 * value.base.size * sum(term.rank for term in value.terms)
    if rows and rows[0]:
        ctx.record(value, eqn, "look-up", rows[0], kind="embedding", flops=flops)
    else:
        formed = value.adapted or isinstance(value.base, View)
        nbytes = value.base.size * value.base.dtype.itemsize if formed else 0
        reason = reason or f"{eqn.primitive.name} has no low-rank form"
        _warn_of_dropout(ctx, value, reason)
        ctx.record(value, eqn, "materialised", reason=value.formed or reason, flops=flops, nbytes=nbytes, **facts)
    return value.dense()
