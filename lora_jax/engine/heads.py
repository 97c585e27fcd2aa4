"""Output heads, as a language model has one: products that every path from an output back to the data goes through."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from lora_jax.engine import jaxprs
from lora_jax.engine.jaxprs import Program

_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot"}
_INLINED = {"jit", "pjit", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call", "closed_call"}
_OPAQUE = {"scan", "while", "cond", "shard_map", "pallas_call"}


class _Frame(NamedTuple):
    """One program on the way: the equation that makes each variable, and what its inputs are outside."""

    makers: dict[Any, Any]
    inputs: dict[Any, tuple["_Frame | None", Any]]


def head_equations(program: Program, parameters: int) -> set[int]:
    """Identities of the equations that are output heads.

    An output's head is the one product behind it, seen through biases, casts, softmax and the like. A
    residual stream has several products behind it, so the last block of a backbone is no head.

    Args:
      program: the traced call.
      parameters: how many of its leading inputs are parameters; every other floating input is data.
    """
    frame = _frame(program, {var: (None, var) for var in program.jaxpr.invars[:parameters]})
    found = {_behind(frame, atom) for atom in program.jaxpr.outvars}
    return {eqn for eqn in found if eqn is not None}


def _frame(program: Program, inputs: dict[Any, Any]) -> _Frame:
    return _Frame({var: eqn for eqn in program.jaxpr.eqns for var in eqn.outvars}, inputs)


def _behind(frame: _Frame, atom: Any) -> int | None:
    """The only product behind a value, or None if there is none, several, or data beside it."""
    found: set[int] = set()
    stack, seen = [(frame, atom)], set()
    while stack and len(found) < 2:
        frame, atom = stack.pop()
        if jaxprs.is_literal(atom) or not jnp.issubdtype(atom.aval.dtype, jnp.floating) or (id(frame), atom) in seen:
            continue
        seen.add((id(frame), atom))
        if atom not in frame.makers:
            outer, where = frame.inputs.get(atom, (frame, None))
            if where is None:
                return None
            stack += [(outer, where)] if outer is not None else []
            continue
        eqn = frame.makers[atom]
        if eqn.primitive.name in _PRODUCTS:
            found.add(id(eqn))
        elif eqn.primitive.name in _INLINED:
            sub = jaxprs.sub_programs(eqn)[0]
            inner = _frame(sub, {var: (frame, outer) for var, outer in zip(sub.jaxpr.invars, eqn.invars, strict=True)})
            stack.append((inner, sub.jaxpr.outvars[list(eqn.outvars).index(atom)]))
        elif eqn.primitive.name in _OPAQUE:
            return None
        else:
            stack += [(frame, operand) for operand in eqn.invars]
    return found.pop() if len(found) == 1 else None
