"""What depends on what in a program: heads, activations, one-hot inputs, indices that the program computes itself.

One pass over the program follows, for every value, the products it depends on. A head is a product on which no other
product depends, and to whose result no other function of the data is added: neither the last layer of a backbone, whose
result joins a residual stream, nor keys and values that are also returned for a cache.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import jax.numpy as jnp

from lora_jax.engine import jaxprs
from lora_jax.engine.declared import declared
from lora_jax.engine.jaxprs import Program
from lora_jax.engine.sizes import exceeds

_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot", "pallas_call"}
_SUMS = {"add", "add_any", "sub"}
_MOVES = {"convert_element_type", "broadcast_in_dim", "reshape", "transpose", "squeeze", "copy"}
_LOOPS = {"scan", "while", "cond"}


@dataclass(frozen=True)
class Facts:
    """What is known about a value.

    Attributes:
      products: equations of products that it depends on.
      streams: those of them whose features still run along it, not summed up or otherwise reduced.
      data: whether it depends on data, and is more than data broadcast (as a mask over a vocabulary is).
      parameter: whether it depends on a parameter.
      weights: the parameters, by number, that it is computed from if it is computed from nothing else.
      counter: whether it is an `iota`.
      one_hot: whether it is 1 where an integer is equal to an `iota`, and 0 elsewhere.
      gathers: gathers from a parameter of which it is a view.
    """

    products: frozenset[int] = frozenset()
    streams: frozenset[int] = frozenset()
    data: bool = False
    parameter: bool = False
    weights: frozenset[int] = frozenset()
    counter: bool = False
    one_hot: bool = False
    gathers: frozenset[int] = frozenset()


_Region: TypeAlias = Callable[[Sequence[Facts]], list[Facts]]


def _union(facts: Iterable[Facts]) -> Facts:
    """What holds of a value that is computed from all of these."""
    facts = list(facts)
    products, streams = (
        frozenset().union(*(getattr(fact, name) for fact in facts)) for name in ("products", "streams")
    )
    data, parameter = any(fact.data for fact in facts), any(fact.parameter for fact in facts)
    weights = frozenset() if data or products else frozenset().union(*(fact.weights for fact in facts))
    return Facts(products, streams, data, parameter, weights)


@dataclass
class Dependence:
    """Findings about the equations of a program, by identity; `of` makes them.

    Attributes:
      candidates: products.
      followed: products that another product depends on.
      residual: products to whose result another function of data is added.
      one_hot: products with a one-hot operand that is no function of other products.
      computed: gathers whose indices depend on products.
      chosen: those of them whose results are added to those of products, as biases of experts are: no look-ups.
      permuted: gathers from a parameter whose result multiplies data, as a weight with permuted columns does.
      scaled: products whose results parameters scale.
      combined: numbers of parameters that come to a product together with others, as codes and their scales do.
      activations: variables that depend on parameters and on data.
      reached: numbers of parameters that an operand of a product, or a table that is looked up, is computed from.
    """

    candidates: set[int] = field(default_factory=set)
    followed: set[int] = field(default_factory=set)
    residual: set[int] = field(default_factory=set)
    one_hot: set[int] = field(default_factory=set)
    computed: set[int] = field(default_factory=set)
    chosen: set[int] = field(default_factory=set)
    permuted: set[int] = field(default_factory=set)
    scaled: set[int] = field(default_factory=set)
    combined: set[int] = field(default_factory=set)
    activations: set[Any] = field(default_factory=set)
    reached: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, program: Program, parameters: int) -> "Dependence":
        """Analyse a traced call.

        Args:
          program: the program.
          parameters: how many of its leading inputs are parameters; the others are data.
        """
        found = cls()
        inputs = range(len(program.jaxpr.invars))
        given = [Facts(parameter=True, weights=frozenset([i])) if i < parameters else Facts(data=True) for i in inputs]
        found._region(program, given)
        return found

    @property
    def heads(self) -> set[int]:
        """Products that are output heads."""
        return self.candidates - self.followed - self.residual

    def _region(self, program: Program, inputs: Sequence[Facts]) -> list[Facts]:
        """Follow a program from its inputs to its results."""
        known: dict[Any, Facts] = dict.fromkeys(program.jaxpr.constvars, Facts(data=True))
        known.update(zip(program.jaxpr.invars, inputs, strict=True))
        read = lambda atom: Facts() if jaxprs.is_literal(atom) else known.get(atom, Facts())  # noqa: E731
        for eqn in program.jaxpr.eqns:
            known.update(zip(eqn.outvars, self._equation(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        self.activations |= {var for var, facts in known.items() if facts.parameter and facts.data}
        return [read(atom) for atom in program.jaxpr.outvars]

    def _equation(self, eqn: Any, operands: list[Facts]) -> list[Facts]:
        name = eqn.primitive.name
        if name in _LOOPS:
            return self._loop(eqn, operands)
        if name in _PRODUCTS or declared(eqn):
            return [self._product(eqn, operands)] * len(eqn.outvars)
        inner = jaxprs.sub_programs(eqn)[:1]
        if inner and len(inner[0].jaxpr.invars) == len(operands) and len(inner[0].jaxpr.outvars) == len(eqn.outvars):
            return self._region(inner[0], operands)
        if name == "gather":
            return [self._gather(eqn, operands)]
        if name in ("mul", "div") and any(each.weights for each in operands):
            self.scaled |= operands[0].streams | operands[1].streams
        if name in _SUMS:
            self._sum(eqn, operands)
        return [self._elementwise(eqn, operands)] * len(eqn.outvars)

    def _product(self, eqn: Any, operands: list[Facts]) -> Facts:
        """A product of an activation with something given (a mask, targets, a mixing matrix) is no layer."""
        result = _union(operands)
        if result.products and not all(each.parameter for each in operands[:2]):
            return replace(result, streams=frozenset())
        for one, other in (operands[:2], operands[1::-1]):
            if (other.data or other.products) and not other.gathers:
                self.permuted |= one.gathers
        self.followed |= result.products
        self.reached |= frozenset().union(*(each.weights for each in operands))
        self.candidates.add(id(eqn))
        if any(each.one_hot and not each.products for each in operands):
            self.one_hot.add(id(eqn))
        self.combined |= frozenset().union(*(each.weights for each in operands if len(each.weights) > 1))
        me = frozenset([id(eqn)])
        return replace(result, products=result.products | me, streams=me)

    def _gather(self, eqn: Any, operands: list[Facts]) -> Facts:
        table, indices = operands
        self.reached |= table.weights
        if indices.products:
            self.computed.add(id(eqn))
        views = frozenset([id(eqn)]) if table.weights else frozenset()
        return replace(_union(operands), gathers=views)

    def _sum(self, eqn: Any, operands: list[Facts]) -> None:
        for stream, beside, atom in zip(operands, operands[::-1], eqn.invars[::-1], strict=True):
            whole = beside.data and atom.aval.size == eqn.outvars[0].aval.size
            self.residual |= stream.streams - beside.products if whole else set()
            self.chosen |= beside.gathers & self.computed if stream.streams else set()

    def _elementwise(self, eqn: Any, operands: list[Facts]) -> Facts:
        name, result = eqn.primitive.name, _union(operands)
        if name == "iota":
            return Facts(counter=True)
        if (
            name == "broadcast_in_dim"
            and not result.products
            and exceeds(eqn.outvars[0].aval.size, eqn.invars[0].aval.size)
        ):
            result = replace(result, data=False)
        if name in _MOVES:
            first = operands[0]
            return replace(result, counter=first.counter, one_hot=first.one_hot, gathers=first.gathers)
        if name == "eq" and sum(each.counter for each in operands) == 1:
            whole = all(jnp.issubdtype(atom.aval.dtype, jnp.integer) for atom in eqn.invars)
            return replace(result, one_hot=whole)
        if name.startswith(("reduce_", "arg")):
            return replace(result, streams=frozenset())
        return result

    def _loop(self, eqn: Any, operands: list[Facts]) -> list[Facts]:
        """What a loop carries may depend on everything that one turn makes of it."""
        if eqn.primitive.name == "cond":
            results = [self._region(jaxprs.program(body), operands[1:]) for body in eqn.params["branches"]]
            return [_union([operands[0], *each]) for each in zip(*results, strict=True)]
        turn, carried, rest = self._turn(eqn, operands)
        while True:
            scratch = Dependence()
            after = turn(scratch, carried)[: len(carried)]
            grown = [old if old == new else _union([old, new]) for old, new in zip(carried, after, strict=True)]
            if grown == carried:
                return [*carried, *turn(self, carried)[len(carried) : len(carried) + rest]]
            carried = grown

    def _turn(self, eqn: Any, operands: list[Facts]) -> tuple[Any, list[Facts], int]:
        """One turn of a loop as a function of what is carried; what is carried first; how many results are not."""
        if eqn.primitive.name == "scan":
            loop = jaxprs.loop(eqn)
            end = loop.consts + loop.carries
            consts, carried, scanned = operands[: loop.consts], operands[loop.consts : end], operands[end:]
            run = lambda found, carry: found._region(loop.body, [*consts, *carry, *scanned])  # noqa: E731
            return run, carried, len(eqn.outvars) - loop.carries
        carries = len(eqn.outvars)
        test, body = (jaxprs.program(eqn.params[name]) for name in ("cond_jaxpr", "body_jaxpr"))
        split = len(test.jaxpr.invars) - carries
        consts = operands[split : len(operands) - carries]
        run = lambda found, carry: found._region(body, [*consts, *carry])  # noqa: E731
        return run, operands[len(operands) - carries :], 0
