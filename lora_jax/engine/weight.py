"""Weight: what a program makes of parameters, held symbolically as `gain · base + Σ a·b`, with an id for every axis.

Axes carry integer ids. A structural operation (transpose, slice, reshape, ...) runs on the base and
renames or moves ids; the factors, which carry the ids of their own axes and the rank axis, follow only
where they must. A contraction is then written from ids alone, never from sizes or positions. Where a reshape merges
axes, the base has one `Merged` axis and the factors keep its parts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapter.factors import whole
from lora_jax.dtypes import promoted
from lora_jax.engine.bases import View, array_of
from lora_jax.engine.meshes import explicit, follow
from lora_jax.engine.sizes import several

RANK = -1
"""The id of the rank axis of every factor."""

SLOT = -2
"""The id of the axis of slots, where the factors are those of a bank of adapters."""


class Merged(NamedTuple):
    """Several axes that the program has reshaped into one.

    Attributes:
      parts: their ids, in row-major order.
      sizes: their lengths.
    """

    parts: tuple[int, ...]
    sizes: tuple[int, ...]


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


@partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["dropout", "adapter", "path"])
@dataclass(frozen=True)
class Term:
    """One low-rank term of a weight: two factors that share the rank axis, the scale folded into `b`.

    Attributes:
      a: factor over the input axes (and any stacked axes).
      b: factor over the output axes (and any stacked axes).
      dropout: probability of dropping elements of the input.
      adapter: number of the adapter among those applied; keeps their dropout keys apart.
      path: the parameter that the adapter has it for.
    """

    a: Labelled
    b: Labelled
    dropout: float
    adapter: int
    path: str

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
    meta_fields=["axes", "paths", "formed", "coded"],
)
@dataclass(frozen=True)
class Weight:
    """What the program makes of its parameters, symbolic: its value is `gain · base + Σ a·b` over its terms.

    Attributes:
      base: the array that the program has without adapters, or the view of a quantised one. Its own tangent is
        followed too, as it may be a function of something that trains; that of a parameter as it is given is zero.
      terms: low-rank terms; none while sites are being discovered.
      axes: ids of the base's axes.
      paths: the parameters that it is made of.
      coded: whether the parameter holds codes, which the program makes numbers of. Its terms are beside those numbers:
        what scales and shifts codes does not reach them.
      formed: why `W + a·b` is in the base already, for a linear operation without a low-rank form; empty if it is not.
      gain: what the base is multiplied by, over some of its axes; None for one.
      numbering: set where the inputs are observed.
      keys: over the axis of slots and the input axes, what a router compares the inputs with; None without a router.
    """

    base: Any
    terms: tuple[Term, ...]
    axes: tuple[Any, ...]
    paths: tuple[str, ...]
    gain: Labelled | None = None
    numbering: Numbering | None = None
    keys: Labelled | None = None
    formed: str = ""
    coded: bool = False

    @property
    def path(self) -> str:
        """The parameters' paths, for messages."""
        return " and ".join(self.paths)

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
        base = array_of(self.base)
        if not self.adapted:
            return base
        if self.merged:
            return self.split().dense().reshape(base.shape)
        wide = promoted(base.dtype, jnp.float32)
        value = base.astype(wide)
        if self.gain is not None:
            value = value * self.gain.over(self.axes).astype(wide)
        deltas = [_outer(term, self.axes, wide, explicit(base)) for term in self.terms]
        return (value + sum(deltas[1:], start=deltas[0]) if deltas else value).astype(base.dtype)

    @property
    def merged(self) -> bool:
        """Whether an axis of the base is several axes of the factors."""
        return any(isinstance(axis, Merged) for axis in self.axes)

    def split(self) -> "Weight":
        """The weight with its merged axes apart."""
        axes = flat_ids(self.axes)
        return replace(self, base=self.base.reshape(split_sizes(self.axes, self.base.shape)), axes=axes)

    def renamed(self, names: Mapping[int, int]) -> "Weight":
        """The weight with other ids for some of its axes."""

        def rename(factor: Labelled) -> Labelled:
            return replace(factor, axes=tuple(names.get(axis, axis) for axis in factor.axes))

        return self.map(self.base, [names.get(axis, axis) for axis in self.axes], rename)

    def unstack(self) -> tuple[list[Any], Callable[[Sequence[Any]], "Weight"]]:
        """Split off the leading axis: the arrays that run along it, and the weight made of their slices."""
        axis, *rest = self.axes
        base = (self.base.stack() or array_of(self.base)) if isinstance(self.base, View) else self.base
        leaves, rebuild = jax.tree.flatten(
            self.map(base, self.axes, lambda f: f.ordered(_front(f.axes, axis))), is_leaf=_is_whole
        )
        moving = [leaf is leaves[0] or axis in leaf.axes for leaf in leaves]

        def step(slices: Sequence[Any]) -> "Weight":
            taken = iter(slices)
            new = [_sliced(leaf, next(taken)) if moves else leaf for leaf, moves in zip(leaves, moving, strict=True)]
            return replace(jax.tree.unflatten(rebuild, new), axes=tuple(rest))

        chosen = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
        return [leaf.array if _is_labelled(leaf) else leaf for leaf in chosen], step


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["path", "refusal"])
@dataclass(frozen=True)
class Versions:
    """A value that is the same for all examples and another with each adapter of a bank.

    It comes of what is no example's own: learned queries, positions.

    Attributes:
      array: `[slots + 1, *shape]`, the base's version last.
      path: the parameter, for messages.
      refusal: the error where examples never come in.
    """

    array: Any
    path: str
    refusal: str

    def unstack(self) -> tuple[Any, Callable[[Any], "Versions"]]:
        """As of a weight: the array with the leading axis of the value in front, and what rebuilds its slices."""
        return jnp.moveaxis(self.array, 1, 0), lambda part: replace(self, array=part)


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
    return replace(factor, array=whole(factor.array))


def _outer(term: Term, axes: tuple[int, ...], dtype: Any, where: Any) -> Any:
    order = {axis: i for i, axis in enumerate(dict.fromkeys((*term.a.axes, *term.b.axes)))}
    labels = [[order[axis] for axis in names] for names in (term.a.axes, term.b.axes, axes)]
    a, b = (factor.array.astype(dtype) for factor in (term.a, term.b))
    return jnp.einsum(a, labels[0], b, labels[1], labels[2], precision=jax.lax.Precision.HIGHEST, out_sharding=where)


def _front(axes: tuple[int, ...], axis: int) -> list[int]:
    return [axis, *(i for i in axes if i != axis)] if axis in axes else list(axes)


def _is_labelled(node: Any) -> bool:
    return isinstance(node, Labelled)


def _is_whole(node: Any) -> bool:
    return isinstance(node, Labelled | View)


def _sliced(leaf: Any, value: Any) -> Any:
    return Labelled(value, leaf.axes[1:]) if _is_labelled(leaf) else value


def flat_size(array: Labelled, axes: Sequence[int]) -> int:
    """Product of the lengths along the given ids."""
    return prod(array.size(axis) for axis in axes)


def flat_ids(axes: Iterable[Any]) -> tuple[int, ...]:
    """The ids of axes, those of a merged one in its place."""
    return tuple(part for axis in axes for part in (axis.parts if isinstance(axis, Merged) else (axis,)))


def split_sizes(axes: Sequence[Any], shape: Sequence[int]) -> list[int]:
    """The lengths of axes, those of the parts of a merged one in its place."""
    sizes = [axis.sizes if isinstance(axis, Merged) else (size,) for axis, size in zip(axes, shape, strict=True)]
    return [part for each in sizes for part in each]


def with_axis(factor: Labelled, axis: int, size: int) -> Labelled:
    """The factor with an axis of this length, along which it is constant if it does not have it yet."""
    if axis in factor.axes:
        return factor
    array = jnp.broadcast_to(factor.array[..., None], (*factor.array.shape, size))
    return Labelled(array, (*factor.axes, axis))


def collapsed(weight: Weight, fresh: Callable[[Sequence[int]], int]) -> Weight | None:
    """The weight with simple axes only, or None where the parts of a merged axis are in different factors.

    Args:
      weight: the weight.
      fresh: gives an id for the axis that parts of these ids are merged into.
    """
    for merged in [axis for axis in weight.axes if isinstance(axis, Merged)]:
        new, rest = fresh(merged.parts), [*riders(weight)]
        parts = dict(zip(merged.parts, merged.sizes, strict=True))
        long = {axis for axis, size in parts.items() if several(size)}
        if any({*term.a.axes} & long and {*term.b.axes} & long for term in weight.terms):
            return None
        if any(long & {*each.axes} not in (set(), long) for each in rest):
            return None

        def merge(factor: Labelled, parts: dict[int, int] = parts, new: int = new) -> Labelled:
            if not {*parts} & {*factor.axes}:
                return factor
            for axis, size in parts.items():
                factor = with_axis(factor, axis, size)
            return reshaped(factor, [*parts], [new], [prod(parts.values())])

        def merge_term(term: Term, long: set[int] = long, parts: dict[int, int] = parts, merge: Any = merge) -> Term:
            # Parts of length one may be in the other factor, which loses them.
            first, second = (term.a, term.b) if {*term.a.axes} & (long or {*parts}) else (term.b, term.a)
            for axis in parts:
                second = second.without(axis)
            pair = (merge(first), second) if first is term.a else (second, merge(first))
            return replace(term, a=pair[0], b=pair[1])

        axes = [new if axis == merged else axis for axis in weight.axes]
        moved = weight.map(weight.base, axes, merge)
        weight = replace(moved, terms=tuple(merge_term(term) for term in weight.terms))
    return weight


def riders(weight: Weight) -> list[Labelled]:
    """What goes with a weight beside its terms."""
    numbers = [weight.numbering.maps, weight.numbering.inputs] if weight.numbering else []
    return [*numbers, *(each for each in (weight.gain, weight.keys) if each is not None)]
