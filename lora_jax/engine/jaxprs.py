"""The one place that knows how jaxprs differ between JAX releases; everything else sees these helpers.

Parameters of control-flow primitives are renamed from release to release, so a loop's split between
constants, carries and scanned inputs is read off the shapes: a scanned input has one more axis outside
the loop than inside.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.extend.core as jec

# JAX 0.12 has one class for open and closed programs, and keeps this name for older code only.
_closed: Callable[[Any, Any], Any] = getattr(jec, "ClosedJaxpr", lambda jaxpr, consts: jaxpr)
_DEBUG_INFO = jec.DebugInfo("lora_jax", "one equation", None, None)


class Program(NamedTuple):
    """A jaxpr with the values of its constants."""

    jaxpr: Any
    consts: Sequence[Any]


class Loop(NamedTuple):
    """A scan: its body, and how many of its inputs are constants, carries and scanned arrays."""

    body: Program
    consts: int
    carries: int
    scanned: int


def trace(fn: Callable[..., Any], *leaves: Any) -> tuple[Program, Any]:
    """Trace `fn` of array leaves to a program; also returns the shapes of its output tree."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*leaves)
    return Program(closed.jaxpr, closed.consts), shapes


def program(sub: Any) -> Program:
    """A sub-jaxpr from an equation's parameters: open, closed, or (jax >= 0.12) both in one class."""
    return Program(getattr(sub, "jaxpr", sub), getattr(sub, "consts", ()))


def is_literal(atom: Any) -> bool:
    """Whether an operand is written out in the equation."""
    return isinstance(atom, jec.Literal)


def written(literal: Any) -> tuple[str, str]:
    """A literal as what is equal to the same literal elsewhere; numbers are not, as 0 is equal to -0."""
    return repr(literal.val), str(literal.aval)


def content(eqn: Any) -> tuple[Any, ...]:
    """What an equation does, to operands of which types; hashable if its parameters are."""
    types = tuple(atom.aval for atom in (*eqn.invars, *eqn.outvars))
    return eqn.primitive, tuple(sorted(eqn.params.items())), types, eqn.ctx


def unnamed(eqn: Any) -> Any:
    """The equation outside of the scopes that its operation was named in."""
    where = eqn.source_info
    return eqn.replace(source_info=where.replace(name_stack=type(where.name_stack)()))


def scope(eqn: Any) -> AbstractContextManager[Any]:
    """Enter the scopes that an equation's operation was named in."""
    name = str(eqn.source_info.name_stack)
    return jax.named_scope(name) if name else nullcontext()


def live(jaxpr: Any, results: Sequence[Any]) -> set[int]:
    """Positions of the equations that these results of a program, or its effects, depend on."""
    needed, found = {atom for atom in results if not is_literal(atom)}, set()
    for position, eqn in reversed(list(enumerate(jaxpr.eqns))):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            found.add(position)
            needed.update(atom for atom in eqn.invars if not is_literal(atom))
    return found


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation on ordinary values, whatever its primitive and its parameters are."""
    variables = [atom for atom in eqn.invars if not is_literal(atom)]
    if len(set(variables)) < len(variables):  # One variable, as two operands, may have two values.
        eqn = eqn.replace(invars=[atom if is_literal(atom) else jec.Var(atom.aval) for atom in eqn.invars])
    operands = {v: value for v, value in zip(eqn.invars, values, strict=True) if not is_literal(v)}
    single = jec.Jaxpr((), list(operands), eqn.outvars, [eqn], eqn.effects, _DEBUG_INFO)
    return list(jec.jaxpr_as_fun(_closed(single, ()))(*operands.values()))


def bind_as(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate an equation's primitive on operands whose shapes may differ from those it was traced with."""
    results = eqn.primitive.bind(*values, **eqn.params)
    return list(results) if eqn.primitive.multiple_results else [results]


def loop(eqn: Any) -> Loop:
    """Read the layout of a scan equation off the shapes inside and outside its body."""
    body = program(eqn.params["jaxpr"])
    inner, outer = body.jaxpr.invars, eqn.invars
    scanned = sum(len(o.aval.shape) == len(i.aval.shape) + 1 for i, o in zip(inner, outer, strict=True))
    carries = sum(len(o.aval.shape) == len(i.aval.shape) for i, o in zip(body.jaxpr.outvars, eqn.outvars, strict=True))
    return Loop(body, len(outer) - carries - scanned, carries, scanned)


def sub_programs(eqn: Any) -> list[Program]:
    """Every program an equation carries in its parameters."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                found.append(program(item))
    return found
