"""Recomputation: inputs of layers that the backward pass computes again, where that is cheap, instead of keeping them.

A frozen product keeps nothing for its backward pass, an adapted one its input. Often that input is one or two
elementwise operations away from values that are kept anyway: `silu(gate) · up`, or a normalised activation times its
scale. Then the few operations are repeated in the backward pass instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp

from lora_jax.engine import jaxprs, platforms
from lora_jax.engine.meshes import spread
from lora_jax.engine.weight import Versions, Weight

_REPEATED = {"add", "sub", "neg", "mul", "div", "convert_element_type", "broadcast_in_dim", "reshape", "squeeze"}
"""What is repeated: linear in each operand, and cheap."""

_NOTHING_KEPT = {"add", "add_any", "sub", "neg", "convert_element_type", "broadcast_in_dim", "reshape", "squeeze"} | {
    "transpose", "slice", "concatenate", "reduce_sum", "copy", "stop_gradient", "dot_general", "conv_general_dilated",
}  # fmt: skip
"""Operations that keep no operand for their own gradient (products: where the other operand is a weight)."""


@dataclass(frozen=True)
class Replay:
    """Equations as a function of values; equal to another that does the same to others.

    Attributes:
      steps: what each equation does, and to which of the values and of the results before it.
      eqns: the equations.
    """

    steps: tuple[tuple[Any, ...], ...]
    eqns: tuple[Any, ...] = field(compare=False)

    @classmethod
    def of(cls, eqns: Sequence[Any], leaves: Sequence[Any]) -> "Replay":
        """The replay of equations in order, of values of these variables; each has one result."""
        numbers = {var: i for i, var in enumerate([*leaves, *(eqn.outvars[0] for eqn in eqns)])}
        refer = lambda atom: jaxprs.written(atom) if jaxprs.is_literal(atom) else numbers[atom]  # noqa: E731
        steps = tuple((jaxprs.content(eqn), *map(refer, eqn.invars)) for eqn in eqns)
        return cls(steps, tuple(eqns))

    def __call__(self, values: Sequence[Any]) -> Any:
        """The result of the last equation."""
        known = list(values)
        for (_, *operands), eqn in zip(self.steps, self.eqns, strict=True):
            given = [
                atom.val if jaxprs.is_literal(atom) else known[number]
                for number, atom in zip(operands, eqn.invars, strict=True)
            ]
            known += jaxprs.bind(jaxprs.unnamed(eqn), given)
        return known[-1]


class Recomputation(NamedTuple):
    """How to compute a value again.

    Attributes:
      leaves: the values to start from, which are kept anyway or small.
      run: computes the value from the leaves.
    """

    leaves: list[Any]
    run: Callable[[Sequence[Any]], Any]


@dataclass(frozen=True, eq=False)
class Frame:
    """The program around an equation.

    Attributes:
      jaxpr: its jaxpr.
      read: the value of an operand that has been computed.
    """

    jaxpr: Any
    read: Callable[[Any], Any]

    @cached_property
    def positions(self) -> dict[int, int]:
        """Where each equation is in the program, by identity."""
        return {id(eqn): i for i, eqn in enumerate(self.jaxpr.eqns)}

    @cached_property
    def makers(self) -> dict[Any, Any]:
        """The equation that computes each variable."""
        return {var: eqn for eqn in self.jaxpr.eqns for var in eqn.outvars}

    def shared(self, atom: Any, value: Any) -> Any:
        """An operand as the first products of several sites read it: one value beside it; None if one site reads it.

        So the backward pass adds up what those products give to its gradient before anything else: on a mesh that is
        one sum over devices for all sites, and on one device one pass over the gradient. A CPU would only hold a copy.
        """
        if jaxprs.is_literal(atom) or len(self.users.get(atom, ())) < 2:
            return None
        if not (platforms.accelerated() or spread(value)):
            return None
        key = atom, value.shape, value.dtype
        if key not in self._copies:
            self._copies[key] = jnp.copy(value)
        return self._copies[key]

    @cached_property
    def _copies(self) -> dict[Any, Any]:
        return {}

    def needed(self, eqn: Any) -> list[bool]:
        """For each result of an equation whether anything uses it."""
        return [var in self.users or var in self.jaxpr.outvars for var in eqn.outvars]

    @cached_property
    def users(self) -> dict[Any, list[Any]]:
        """The equations that use each variable."""
        users: dict[Any, list[Any]] = {}
        for eqn in self.jaxpr.eqns:
            for atom in eqn.invars:
                if not jaxprs.is_literal(atom):
                    users.setdefault(atom, []).append(eqn)
        return users

    def kept(self, var: Any) -> bool:
        """Whether the gradient of some use of a variable needs its value, so that it is kept whatever we do."""
        return any(self._keeps(eqn, var) for eqn in self.users.get(var, ()))

    def _keeps(self, eqn: Any, var: Any) -> bool:
        name = eqn.primitive.name
        if name not in ("mul", "div"):
            return name not in _NOTHING_KEPT
        if name == "div" and eqn.invars[1] is var:
            return True
        (other,) = [atom for atom in eqn.invars if atom is not var] or [var]
        return other is var or not self._spread_out(other)

    def _spread_out(self, atom: Any) -> bool:
        """Whether a value is a constant or a smaller one repeated."""
        if jaxprs.is_literal(atom):
            return True
        maker = self.makers.get(atom)
        return maker is not None and maker.primitive.name == "broadcast_in_dim"

    def recomputed(self, atom: Any) -> Recomputation | None:
        """How to compute an operand again from what is kept anyway; None if it is best kept itself."""
        if jaxprs.is_literal(atom) or self.kept(atom) or not self._repeats(atom):
            return None
        steps, leaves, stack, seen = [], [], [atom], set()
        while stack:
            var = stack.pop()
            if jaxprs.is_literal(var) or var in seen:
                continue
            seen.add(var)
            if self._repeats(var) and (var is atom or not self.kept(var)):
                steps.append(self.makers[var])
                stack += self.makers[var].invars
            else:
                leaves.append(var)
        if any(not self.kept(leaf) and 8 * _size(leaf) > _size(atom) for leaf in leaves):
            return None
        values = [self.read(leaf) for leaf in leaves]
        if any(isinstance(value, (Versions, Weight)) for value in values):
            return None
        order = sorted(steps, key=lambda eqn: self.positions[id(eqn)])
        return Recomputation(values, Replay.of(order, leaves))

    def _repeats(self, var: Any) -> bool:
        return var in self.makers and self.makers[var].primitive.name in _REPEATED


def _size(atom: Any) -> int:
    return prod(atom.aval.shape)
