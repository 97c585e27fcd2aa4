"""Weight: a parameter held symbolically as `gain · base + Σ a·b`, with an identity for every axis.

Axes carry integer ids. A structural operation (transpose, slice, reshape, ...) runs on the base and
renames or moves ids; the factors, which carry the ids of their own axes and the rank axis, follow only
where they must. A contraction is then written from ids alone, never from sizes or positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.engine.meshes import explicit, follow

RANK = -1
"""The id of the rank axis of every factor."""

SLOT = -2
"""The id of the axis of slots, where the factors are those of a bank of adapters."""


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes"])
@dataclass(frozen=True)
class Labelled:
    """An array whose axes have ids."""

    array: Any
    axes: tuple[int, ...]

    def size(self, axis: int) -> int:
        """Length along the axis with this id."""
        return self.array.shape[self.axes.index(axis)]

    def at(self, axis: int, fn: Callable[[Any, int], Any]) -> "Labelled":
        """Apply `fn(array, position)` where the axis is present; leave the array alone where it is not."""
        if axis not in self.axes:
            return self
        return replace(self, array=fn(self.array, self.axes.index(axis)))

    def ordered(self, axes: Sequence[int]) -> "Labelled":
        """Transposed to the given order of ids."""
        order = tuple(self.axes.index(axis) for axis in axes)
        if order == tuple(range(len(order))):
            return self
        return Labelled(jnp.transpose(self.array, order), tuple(axes))

    def without(self, axis: int) -> "Labelled":
        """With a length-one axis removed."""
        if axis not in self.axes:
            return self
        kept = tuple(i for i in self.axes if i != axis)
        return Labelled(jax.lax.squeeze(self.array, (self.axes.index(axis),)), kept)

    def over(self, axes: Sequence[int]) -> Any:
        """The array, such that it broadcasts against one with these axes, which include its own."""
        array = self.ordered([axis for axis in axes if axis in self.axes]).array
        return jnp.expand_dims(array, [i for i, axis in enumerate(axes) if axis not in self.axes])

    def astype(self, dtype: Any) -> "Labelled":
        """Cast to a dtype."""
        return replace(self, array=self.array.astype(dtype))


@partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["dropout", "adapter"])
@dataclass(frozen=True)
class Term:
    """One low-rank term of a weight: two factors that share the rank axis, the scale folded into `b`.

    Attributes:
      a: factor over the input axes (and any stacked axes).
      b: factor over the output axes (and any stacked axes).
      dropout: probability of dropping elements of the input.
      adapter: number of the adapter among those applied; keeps their dropout keys apart.
    """

    a: Labelled
    b: Labelled
    dropout: float
    adapter: int

    @property
    def rank(self) -> int:
        """Number of rank-one terms."""
        return self.a.size(RANK)

    def map(self, fn: Callable[[Labelled], Labelled]) -> "Term":
        """The term with `fn` applied to both factors."""
        return replace(self, a=fn(self.a), b=fn(self.b))


@partial(jax.tree_util.register_dataclass, data_fields=["maps", "inputs"], meta_fields=["order", "fan_in"])
@dataclass(frozen=True)
class Numbering:
    """What a weight carries whose inputs are observed: where its parts were in the parameter.

    Attributes:
      maps: over the stacked axes, the number of each linear map in the stack.
      inputs: over the input axes, the number of each input among those of one map.
      order: ids that the input axes had at first, in the order that numbers them.
      fan_in: how many inputs one map has.
    """

    maps: Labelled
    inputs: Labelled
    order: tuple[int, ...]
    fan_in: int

    def map(self, fn: Callable[[Labelled], Labelled]) -> "Numbering":
        """The numbering with `fn` applied to its numbers."""
        return replace(self, maps=fn(self.maps), inputs=fn(self.inputs))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "terms", "gain", "numbering", "keys"],
    meta_fields=["axes", "path"],
)
@dataclass(frozen=True)
class Weight:
    """A parameter of the program, symbolic: its value is `gain · base + Σ a·b` over its terms.

    Attributes:
      base: the frozen array.
      terms: low-rank terms; none while sites are being discovered.
      axes: ids of the base's axes.
      path: the parameter's path.
      gain: what the base is multiplied by, over some of its axes; None for one.
      numbering: set where the inputs are observed.
      keys: over the axis of slots and the input axes, what a router compares the inputs with; None without a router.
    """

    base: Any
    terms: tuple[Term, ...]
    axes: tuple[int, ...]
    path: str
    gain: Labelled | None = None
    numbering: Numbering | None = None
    keys: Labelled | None = None

    @property
    def adapted(self) -> bool:
        """Whether the value differs from the base."""
        return bool(self.terms) or self.gain is not None

    @property
    def routed(self) -> bool:
        """Whether its factors are those of a bank, of which each row of an activation meets its own."""
        return any(SLOT in term.a.axes for term in self.terms)

    def map(self, base: Any, axes: Sequence[int], fn: Callable[[Labelled], Labelled]) -> "Weight":
        """The weight with a new base, new axis ids, and `fn` applied to every array that has some of its axes."""
        terms = tuple(term.map(fn) for term in self.terms)
        gain, keys = (each and fn(each) for each in (self.gain, self.keys))
        numbering = self.numbering and self.numbering.map(fn)
        return replace(self, base=base, axes=tuple(axes), terms=terms, gain=gain, numbering=numbering, keys=keys)

    def dense(self) -> Any:
        """The value `gain · base + Σ a·b`, computed in float32 or wider and rounded once to the base's dtype."""
        if not self.adapted:
            return self.base
        wide = jnp.promote_types(self.base.dtype, jnp.float32)
        value = self.base.astype(wide)
        if self.gain is not None:
            value = value * self.gain.over(self.axes).astype(wide)
        deltas = [_outer(term, self.axes, wide, explicit(self.base)) for term in self.terms]
        return (value + sum(deltas[1:], start=deltas[0]) if deltas else value).astype(self.base.dtype)

    def unstack(self) -> tuple[list[Any], Callable[[Sequence[Any]], "Weight"]]:
        """Split off the leading axis: the arrays that run along it, and the weight made of their slices."""
        axis, *rest = self.axes
        leaves, rebuild = jax.tree.flatten(
            self.map(self.base, self.axes, lambda f: f.ordered(_front(f.axes, axis))), is_leaf=_is_labelled
        )
        moving = [leaf is leaves[0] or axis in leaf.axes for leaf in leaves]

        def step(slices: Sequence[Any]) -> "Weight":
            taken = iter(slices)
            new = [_sliced(leaf, next(taken)) if moves else leaf for leaf, moves in zip(leaves, moving, strict=True)]
            return replace(jax.tree.unflatten(rebuild, new), axes=tuple(rest))

        chosen = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
        return [leaf.array if _is_labelled(leaf) else leaf for leaf in chosen], step


def reshaped(factor: Labelled, old: Sequence[int], new: Sequence[int], sizes: Sequence[int]) -> Labelled:
    """Replace the adjacent axes `old` of a factor by axes `new` of the given sizes (same total size)."""
    first = min((factor.axes.index(axis) for axis in old), default=len(factor.axes))
    rest = [axis for axis in factor.axes if axis not in old]
    axes = [*rest[:first], *old, *rest[first:]]
    array = factor.ordered(axes).array
    shape = (*array.shape[:first], *sizes, *array.shape[first + len(old) :])
    return Labelled(array.reshape(shape), (*axes[:first], *new, *axes[first + len(old) :]))


def beside(weight: Weight) -> Weight:
    """The weight with its factors where its base is, on a mesh with explicit axes; the rank axis is replicated."""
    base = Labelled(weight.base, weight.axes)

    def place(factor: Labelled) -> Labelled:
        return replace(factor, array=follow(factor.array, factor.axes, base))

    return weight.map(base.array, base.axes, place)


def gathered(factor: Labelled) -> Labelled:
    """The factor replicated, on a mesh with explicit axes, so that its axes can be merged or split in any way."""
    where = explicit(factor.array)
    whole = where and NamedSharding(where.mesh, PartitionSpec(*[None] * len(factor.axes)))
    return factor if whole == where else replace(factor, array=jax.sharding.reshard(factor.array, whole))


def _outer(term: Term, axes: tuple[int, ...], dtype: Any, where: Any) -> Any:
    order = {axis: i for i, axis in enumerate(dict.fromkeys((*term.a.axes, *term.b.axes)))}
    labels = [[order[axis] for axis in names] for names in (term.a.axes, term.b.axes, axes)]
    a, b = (factor.array.astype(dtype) for factor in (term.a, term.b))
    return jnp.einsum(a, labels[0], b, labels[1], labels[2], precision=jax.lax.Precision.HIGHEST, out_sharding=where)


def _front(axes: tuple[int, ...], axis: int) -> list[int]:
    return [axis, *(i for i in axes if i != axis)] if axis in axes else list(axes)


def _is_labelled(node: Any) -> bool:
    return isinstance(node, Labelled)


def _sliced(leaf: Any, value: Any) -> Any:
    return Labelled(value, leaf.axes[1:]) if _is_labelled(leaf) else value


def flat_size(array: Labelled, axes: Sequence[int]) -> int:
    """Product of the lengths along the given ids."""
    return prod(array.size(axis) for axis in axes)
