"""Indices that a program writes out itself: which of them count the positions along an axis, as `arange(batch)` does.

Values are followed as far as they depend on nothing but the program, entry by entry, so that an index vector of which
one column counts examples and another is data is known in the first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.factors import is_traced
from lora_jax.engine import jaxprs
from lora_jax.engine.jaxprs import Program
from lora_jax.engine.meshes import mesh_of

_LARGEST = 1 << 20
"""Larger arrays are not followed."""

_MOVES = {"broadcast_in_dim", "reshape", "squeeze", "transpose", "concatenate", "slice", "expand_dims", "copy"}
_ELEMENTWISE = {"add", "sub", "mul", "lt", "ge", "le", "gt", "eq", "ne", "and", "or", "not", "min", "max", "clamp"}
_ELEMENTWISE |= {"select_n", "convert_element_type", "rem", "sign"}


@dataclass(frozen=True)
class Known:
    """Integers of which some are known.

    Attributes:
      values: all of them, with anything where they are not known.
      where: which are known.
    """

    values: np.ndarray[Any, Any]
    where: np.ndarray[Any, Any]


def constant(value: Any) -> Known | None:
    """An array that is there, if it holds few integers."""
    if is_traced(value) or not _followed(value):
        return None
    return Known(np.asarray(value), np.ones(np.shape(value), bool))


class Indices:
    """What is known of the integers of a program, computed where it is asked for."""

    def __init__(self, program: Program):
        names = zip(program.jaxpr.constvars, program.consts, strict=True)
        self._found: dict[Any, Known | None] = {var: constant(value) for var, value in names}
        self._makers = {eqn.outvars[0]: (i, eqn) for i, eqn in enumerate(program.jaxpr.eqns) if _is_followed(eqn)}

    def of(self, atom: Any) -> Known | None:
        """What is known of a value."""
        needed, stack = {}, [atom]
        while stack:
            each = stack.pop()
            if not jaxprs.is_literal(each) and each in self._makers and each not in self._found:
                place, eqn = self._makers[each]
                if place not in needed:
                    needed[place] = eqn
                    stack += eqn.invars
        for _, eqn in sorted(needed.items()):
            self._found[eqn.outvars[0]] = _known(eqn, [self._read(operand) for operand in eqn.invars])
        return self._read(atom)

    def _read(self, atom: Any) -> Known | None:
        return constant(atom.val) if jaxprs.is_literal(atom) else self._found.get(atom)


def _is_followed(eqn: Any) -> bool:
    if len(eqn.outvars) != 1 or not all(_followed(atom.aval) for atom in (*eqn.invars, *eqn.outvars)):
        return False
    return eqn.primitive.name in _MOVES | _ELEMENTWISE or (eqn.primitive.name == "iota" and not eqn.invars)


def _known(eqn: Any, operands: Sequence[Known | None]) -> Known | None:
    """What is known of an equation's result, given what is of its operands."""
    name = eqn.primitive.name
    if name == "iota":
        return constant(_run(eqn, []))
    if not any(each is not None and each.where.any() for each in operands):
        return None
    shapes = [atom.aval for atom in eqn.invars]
    given = [
        Known(np.zeros(aval.shape, aval.dtype), np.zeros(aval.shape, bool)) if each is None else each
        for each, aval in zip(operands, shapes, strict=True)
    ]
    values = _run(eqn, [each.values for each in given])
    if name in _MOVES:
        masks = [each.where.astype(each.values.dtype) for each in given]
        return Known(values, _run(eqn, masks).astype(bool))
    return Known(values, _all_known(name, given, eqn.outvars[0].aval.shape))


def _all_known(name: str, given: Sequence[Known], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Where an elementwise result is known: where its operands are, and of a choice the operand that is chosen."""
    masks = [np.broadcast_to(each.where, shape) for each in given]
    if name != "select_n":
        return np.logical_and.reduce(masks)
    which = np.broadcast_to(given[0].values, shape).astype(int)
    return masks[0] & np.choose(which, masks[1:])


def counted(indices: Known | None) -> Mapping[int, int]:
    """Of index vectors, along the last axis, the columns that count positions: by column, along which other axis."""
    found: dict[int, int] = {}
    if indices is None:
        return found
    rows = indices.values.shape[:-1]
    for column in range(indices.values.shape[-1]):
        if indices.where[..., column].all():
            for axis, size in enumerate(rows):
                count = np.arange(size).reshape([-1 if i == axis else 1 for i in range(len(rows))])
                if size > 1 and (indices.values[..., column] == count).all():
                    found[column] = axis
    return found


def _followed(value: Any) -> bool:
    dtype, shape = getattr(value, "dtype", None), np.shape(value)
    if dtype is None or not all(isinstance(size, int) for size in shape):
        return False
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.bool_)) and prod(shape) <= _LARGEST


def _run(eqn: Any, values: Sequence[Any]) -> np.ndarray[Any, Any]:
    with jax.ensure_compile_time_eval(), mesh_of(eqn):
        return np.asarray(jaxprs.bind(eqn, [jnp.asarray(value) for value in values])[0])
