"""The adapted product: `x·(G·W + Σ a·b)` in the planned forms, with the factors' own gradients.

Plain autodiff of `x·W + (x·a)·b` already gives the thin backward pass, but keeps the whole input for the gradient
of `a`, and cannot run forward on the merged weight without forming a gradient of its size. Written as a
`custom_jvp`, forward mode, reverse mode, `vmap` and higher derivatives all work. Its tangent is

    dx·W + (dx·a + x·da)·b + (x·a)·db

without the parts that belong to something frozen, so that the backward pass reads the output's gradient once per
factor (`z = g·bᵀ` serves both the input and `a`), and keeps no input for a factor that does not train. A gain `G` on
the outputs scales the base's product, one on the inputs scales what the base reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from lora_jax.dtypes import promoted
from lora_jax.engine import contract
from lora_jax.engine.dropout import dropped
from lora_jax.engine.joined import Joint
from lora_jax.engine.meshes import follow
from lora_jax.engine.planner import Form, Plan
from lora_jax.engine.recompute import Recomputation
from lora_jax.engine.weight import RANK, Labelled, Term, Weight

HIDDEN = "lora_hidden"
"""What `jax.checkpoint_policies.save_only_these_names` and its like know the first products `x·a` by."""


class Operands(NamedTuple):
    """What a product is a function of.

    Attributes:
      x: the activation.
      read: the activation as first products read it, which is the same value; None where it is `x` itself.
      leaves: what the activation can be computed from again.
      gain_in: gain on what the base reads, or None.
      base: the base of the weight.
      gain_out: gain on the base's product, or None.
      factors: for every term its two factors, the one that meets the activation first.
      masks: for every term what its dropout keeps of the activation; None for everything.
    """

    x: Any
    read: Any
    leaves: Sequence[Any]
    gain_in: Labelled | None
    base: Any
    gain_out: Labelled | None
    factors: Sequence[tuple[Labelled, Labelled]]
    masks: Sequence[Any]

    @property
    def seconds(self) -> list[Labelled]:
        """The factors that meet first products."""
        return [second for _, second in self.factors]

    @property
    def firsts(self) -> list[Labelled]:
        """The factors that meet the activation."""
        return [first for first, _ in self.factors]

    @property
    def thin(self) -> Any:
        """The activation as first products read it."""
        return self.x if self.read is None else self.read


def takes(weight: Weight, x: Labelled, out: Sequence[int]) -> bool:
    """Whether the weight's gain can be applied to the activation or to the result."""
    return weight.gain is None or set(weight.gain.axes) <= set(out) or set(weight.gain.axes) <= set(x.axes)


def adapted_product(
    dot: Callable[[Any, Any], Any],
    x: Labelled,
    weight: Weight,
    out: Sequence[int],
    precision: Any,
    planned: Plan,
    recomputed: Recomputation | None,
    masks: Sequence[Any],
    opaque: bool = False,
    read: Any = None,
) -> Any:
    """`dot(x, G·W + Σ ab)` without any gradient of the weight's size.

    Args:
      dot: the program's product of activation and weight.
      x: the activation.
      weight: the weight, with its terms, and a gain that it `takes`.
      out: ids of the result's axes.
      precision: as of `jax.lax.dot_general`.
      planned: the forms of the products.
      recomputed: how to compute the activation again for the gradient of `a`; None to keep it.
      masks: for every term what its dropout keeps of the activation; None for everything.
      opaque: whether `dot` is a function of the user, which may have a gradient of its own.
      read: the activation as the first products of several sites read it, so that what they add to its gradient is
        summed before it meets anything else; None for one that reads it alone.
    """
    again = recomputed or Recomputation([x.array], lambda leaves: leaves[0])
    kinds = [(term.dropout, term.adapter) for term in weight.terms]
    product = _Product(
        dot, x.axes, weight.axes, kinds, out, precision, planned, again.run, recomputed is not None, opaque
    )
    after = weight.gain is not None and set(weight.gain.axes) <= set(out)
    gains = (None, weight.gain) if after else (weight.gain, None)
    factors = [contract.ordered(term, x.axes, out) for term in weight.terms]
    run = jax.custom_jvp(product.value)
    run.defjvp(product.tangent, symbolic_zeros=True)
    read = None if planned.backward == "joined" else read
    return run(Operands(x.array, read, again.leaves, gains[0], weight.base, gains[1], factors, masks))


@dataclass(frozen=True, eq=False)
class _Product:
    """One adapted product of a program: value and tangent as functions of its operands, and nothing of their values.

    Attributes:
      dot: the program's product of activation and weight.
      given: ids of the activation's axes.
      axes: ids of the weight's axes.
      kinds: for every term its dropout, and the number of its adapter.
      out: ids of the result's axes.
      precision: as of `jax.lax.dot_general`.
      planned: the forms of the products.
      again: computes the activation for the gradient of `a`.
      recomputed: whether that is more than to keep it.
      opaque: whether `dot` may have a gradient of its own, rather than being its own tangent in each operand.
    """

    dot: Callable[[Any, Any], Any]
    given: tuple[int, ...]
    axes: tuple[Any, ...]
    kinds: Sequence[tuple[float, int]]
    out: Sequence[int]
    precision: Any
    planned: Plan
    again: Callable[[Sequence[Any]], Any]
    recomputed: bool
    opaque: bool

    def value(self, of: Operands) -> Any:
        """The product."""
        if self.planned.call == "merged":
            return self.formed(of)
        adapters = {adapter for _, adapter in self.kinds}
        # The terms of one adapter stay apart: at a start away from zero they cancel exactly.
        of = _side_by_side(of) if len(adapters) == len(of.factors) else of
        return self.forward(self.planned.call, of)[0]

    def tangent(self, primals: tuple[Operands], tangents: tuple[Operands]) -> tuple[Any, Any]:
        """The product and its tangent; tangents of what is frozen are symbolic zeros, and cost nothing."""
        (of,), (change,) = primals, tangents
        value, inner = self.forward(self.planned.forward, of)
        if self.planned.forward == "factored":
            # Without the barrier XLA repeats this sum in the backward pass, and keeps both its parts until then.
            value = lax.optimization_barrier(value)
        moved, found = self.by_input(of, change, value)
        if not _frozen(change.base):
            moved.append(self.dot_tangent(of, base=change.base))
        parts = [*(times(each, self.out, of.gain_out) for each in moved), *self.gain_tangent(of, change, value, inner)]
        found = self.with_firsts(found, of, change, value)
        parts += [self.mixed(each, of.seconds[i], value) for i, each in found.items()]
        seconds = zip(inner, change.seconds, strict=True)
        parts += [self.mixed(each, second, value) for each, second in seconds if _moves(second)]
        return value, _total(parts, value) if parts else jnp.zeros_like(value)

    def forward(self, form: Form, of: Operands) -> tuple[Any, list[Labelled]]:
        """The product in a form, and the first products of the terms."""
        if form == "joined":
            inner = self.named(of, None)
            return self.joint.summed(*self.labelled(of), inner, of.seconds, self.options(of)), inner
        y = self.formed(of) if form == "merged" else self.plain(of)
        inner = self.named(of, y)
        return y if form == "merged" else self.summed(of, y, inner), inner

    def named(self, of: Operands, like: Any) -> list[Labelled]:
        """The first products, with a name for policies of rematerialisation."""
        return [replace(each, array=checkpoint_name(each.array, HIDDEN)) for each in self.inner(of.thin, of, like)]

    @property
    def joint(self) -> Joint:
        """The axes of a joined product."""
        return Joint.of(self.given, self.axes, self.out)

    def labelled(self, of: Operands) -> tuple[Labelled, Labelled]:
        """Activation and base, with their axes."""
        return Labelled(of.x, self.given), Labelled(of.base, self.axes)

    def options(self, of: Operands) -> dict[str, Any]:
        """What a joined product takes from the program's."""
        dtype = jax.eval_shape(self.dot, of.x, of.base).dtype
        return {"precision": self.precision, "preferred_element_type": dtype}

    def formed(self, of: Operands) -> Any:
        """The product with the merged weight."""
        terms = tuple(Term(first, second, 0.0, 0, "") for first, second in of.factors)
        gain = of.gain_out if of.gain_in is None else of.gain_in
        return self.dot(of.x, Weight(of.base, terms, self.axes, (), gain).dense())

    def plain(self, of: Operands) -> Any:
        """The base's product, before a gain on it."""
        return self.dot(times(of.x, self.given, of.gain_in).astype(of.x.dtype), of.base)

    def summed(self, of: Operands, y: Any, inner: Sequence[Labelled]) -> Any:
        """The base's product `y` with its gain, plus the terms."""
        terms = [self.mixed(each, second, y) for each, (_, second) in zip(inner, of.factors, strict=True)]
        return adapted_result(y, self.out, of.gain_out, terms)

    def inner(self, x: Any, of: Operands, like: Any) -> list[Labelled]:
        """The first product of every term."""
        return [self.hidden(i, x, of, first, like) for i, first in enumerate(of.firsts)]

    def hidden(self, i: int, x: Any, of: Operands, first: Labelled, like: Any) -> Labelled:
        """The first product of one term, with `first` for its first factor."""
        read = dropped(Labelled(x, self.given), self.kinds[i][0], of.masks[i])
        return contract.hidden(read, first, of.factors[i][1], self.out, self.precision, like)

    def mixed(self, inner: Labelled, second: Labelled, like: Any) -> Any:
        """The second product of a term."""
        return contract.mixed(inner, second, self.out, self.precision, like)

    def by_input(self, of: Operands, change: Operands, like: Any) -> tuple[list[Any], dict[int, Labelled]]:
        """By how much the base's product and the first products change with what they read, where it does."""
        thin = change.x if of.read is None else change.read
        if self.planned.backward == "joined" and not _frozen(change.x):
            x, base = self.labelled(of._replace(x=change.x))
            u, found = self.joint.apart(x, base, of.firsts, self.options(of))
            return [u], dict(enumerate(found))
        found = {} if _frozen(thin) else dict(enumerate(self.inner(thin, of, like)))
        read = [] if _frozen(change.x) else [times(change.x, self.given, of.gain_in)]
        if _moves(change.gain_in):
            read.append(times(of.x, self.given, change.gain_in))
        return [self.dot_tangent(of, x=_total(read, of.x))] if read else [], found

    def with_firsts(self, found: dict[int, Labelled], of: Operands, change: Operands, like: Any) -> dict[int, Labelled]:
        """By how much first products change, for each term whose does: as found, plus with their own factors."""
        firsts = {i: first for i, first in enumerate(change.firsts) if _moves(first)}

        def read(leaves: Sequence[Any], firsts: dict[int, Labelled]) -> dict[int, Labelled]:
            x = self.again(leaves)
            return {i: self.hidden(i, x, of, first, like) for i, first in firsts.items()}

        # The leaves' tangents are not lost: the activation is a function of them, and its own are in change.x.
        by_first = (jax.checkpoint(read) if self.recomputed else read)(of.leaves, firsts) if firsts else {}
        both = {i: jax.tree.map(lax.add, found[i], each) for i, each in by_first.items() if i in found}
        return found | by_first | both

    def dot_tangent(self, of: Operands, x: Any = None, base: Any = None) -> Any:
        """How the base's product changes with one of its operands; what is opaque says so itself."""
        read = times(of.x, self.given, of.gain_in).astype(of.x.dtype)
        run = (lambda x: self.dot(x, of.base)) if base is None else (lambda base: self.dot(read, base))
        at, change = (read, x) if base is None else (of.base, base)
        return jax.jvp(run, (at,), (change,))[1] if self.opaque else run(change)

    def gain_tangent(self, of: Operands, change: Operands, value: Any, inner: Sequence[Labelled]) -> list[Any]:
        """How the result changes with a gain on the base's product, which is `(value - terms) / gain`.

        So the value is kept for the backward pass, which the program often keeps anyway, and not the product, which a
        merged forward pass does not have; and the terms' share of the gradient is read off that of their factors.
        """
        if of.gain_out is None or change.gain_out is None or not _moves(change.gain_out):
            return []
        gain = of.gain_out.array
        inverse = jnp.where(gain == 0, 0, 1 / jnp.where(gain == 0, 1, gain))
        ratio = replace(of.gain_out, array=change.gain_out.array * inverse)
        less = replace(ratio, array=-ratio.array)
        terms = [
            self.scaled_term(each, second, less, value) for each, (_, second) in zip(inner, of.factors, strict=True)
        ]
        return [times(value, self.out, ratio), *terms]

    def scaled_term(self, inner: Labelled, second: Labelled, gain: Labelled, like: Any) -> Any:
        """What a term adds to the result times a gain, in the second factor if that has its axes."""
        if set(gain.axes) <= set(second.axes):
            return self.mixed(inner, Labelled(times(second.array, second.axes, gain), second.axes), like)
        return times(self.mixed(inner, second, like), self.out, gain)


def _side_by_side(of: Operands) -> Operands:
    """The operands with the factors of several terms in one pair, where they have the same axes and no dropout.

    Only where nothing is differentiated: side by side with factors that train, frozen ones would get a gradient.
    """
    if len(of.factors) < 2 or any(mask is not None for mask in of.masks):
        return of
    alike: dict[tuple[Any, ...], list[tuple[Labelled, Labelled]]] = {}
    for pair in of.factors:
        alike.setdefault(tuple((factor.axes, factor.array.dtype) for factor in pair), []).append(pair)
    factors = [(_joined([first for first, _ in each]), _joined([last for _, last in each])) for each in alike.values()]
    return of._replace(factors=factors, masks=[None] * len(factors))


def _joined(factors: Sequence[Labelled]) -> Labelled:
    first = factors[0]
    return replace(first, array=jnp.concatenate([each.array for each in factors], first.axes.index(RANK)))


def _moves(tangent: Labelled | None) -> bool:
    return tangent is not None and not _frozen(tangent.array)


def _frozen(tangent: Any) -> bool:
    leaves = jax.tree.leaves(tangent, is_leaf=_is_zero)
    return all(map(_is_zero, leaves))


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def times(array: Any, axes: Sequence[int], gain: Labelled | None) -> Any:
    """The array times a gain on some of its axes, in float32 or wider; the array itself without one."""
    if gain is None:
        return array
    wide = promoted(array.dtype, jnp.float32)
    beside = replace(gain, array=follow(gain.array, gain.axes, Labelled(array, tuple(axes))))
    return array.astype(wide) * beside.over(axes).astype(wide)


def _total(parts: Sequence[Any], like: Any) -> Any:
    """The sum, in the widest dtype there is, rounded once to that of the result."""
    return _sum(parts).astype(like.dtype)


def _sum(parts: Sequence[Any]) -> Any:
    wide = promoted(*parts)
    return reduce(lax.add, [part.astype(wide) for part in parts])


def adapted_result(y: Any, axes: Sequence[int], gain: Labelled | None, terms: Sequence[Any]) -> Any:
    """A base's result, with axes `axes`, times its gain and plus the terms, rounded once to the base's dtype.

    Terms are added up first: at the start of training they may cancel exactly.
    """
    base = times(y, axes, gain)
    return _total([base, _sum(terms)], y) if terms else base.astype(y.dtype)
