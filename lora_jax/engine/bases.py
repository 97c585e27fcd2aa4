"""Bases of weights: arrays, or views of quantised parameters, which are dequantised where they are used.

A view is a quantised parameter and the structural operations that the program has done to it. They are done again
wherever it is used, on numbers that exist there only: forward, and again in the backward pass, so that what is kept
between the two is codes. What cuts along the leading axes (the slices of a scan, indexing, look-ups) cuts the codes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any, TypeAlias

import jax
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax.engine import jaxprs
from lora_jax.quantised.leaf import Quantised, Shaped


@dataclass(frozen=True, eq=False)
class Step:
    """A structural operation on a view.

    Attributes:
      run: does it.
      shape: of its result; None where it is that of what it is done to.
      dtype: of its result; None likewise.
      sliced: the same for each slice along the first axis, if it leaves that axis where it is; else None.
    """

    run: Callable[[Any], Any]
    shape: tuple[int, ...] | None = None
    dtype: Any = None
    sliced: "Step | None" = None

    @property
    def pointwise(self) -> bool:
        """Whether it changes each number by itself, so that it makes no difference what is cut out before."""
        return self.shape is None

    @property
    def inner(self) -> "Step | None":
        """The same for each slice along the first axis, or None."""
        return self if self.pointwise else self.sliced


@partial(jax.tree_util.register_dataclass, data_fields=["leaf"], meta_fields=["steps"])
@dataclass(frozen=True)
class View(Shaped):
    """A quantised parameter after structural operations.

    Attributes:
      leaf: the parameter.
      steps: the operations, in order.
    """

    leaf: Quantised
    steps: tuple[Step, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers."""
        return next((step.shape for step in reversed(self.steps) if step.shape is not None), self.leaf.shape)

    @property
    def dtype(self) -> Any:
        """Their dtype."""
        return next((step.dtype for step in reversed(self.steps) if step.dtype is not None), self.leaf.dtype)

    @property
    def movable(self) -> bool:
        """Whether codes can be cut as the numbers are: nothing but single numbers has been changed."""
        return all(step.pointwise for step in self.steps)

    @property
    def aval(self) -> Any:
        """The type of the numbers, with their place on a mesh."""
        codes = jax.typeof(self.leaf.codes)
        return codes if codes.sharding.mesh.empty else jax.make_jaxpr(self.dense)().out_avals[0]

    def dense(self) -> jax.Array:
        """The numbers."""
        value = self.leaf.dense()
        for step in self.steps:
            value = step.run(value)
        return value

    def then(self, *steps: Step) -> "View":
        """The view after more steps."""
        return replace(self, steps=(*self.steps, *steps))

    def reshape(self, shape: Sequence[int]) -> "View":
        """The numbers in another shape."""
        return self.then(_reshaped(self.shape, tuple(shape)))

    def stack(self) -> "View | None":
        """For a scan: the view of which a slice of every array is the view of a slice; None if there is none."""
        inner = [step.inner for step in self.steps]
        if not self.leaf.leading or any(step is None for step in inner):
            return None
        return replace(self, steps=tuple(step for step in inner if step is not None))

    def spread(self, entries: Sequence[Any], counts: Sequence[int]) -> "tuple[View, View] | None":
        """For a `shard_map`: the view as shards see it, and specs of its arrays; None if blocks do not end with shards.

        Args:
          entries: the spec of the numbers, with an entry for each axis.
          counts: into how many shards each axis is split.
        """
        leaf, lead = self.leaf, len(self.leaf.leading)
        if not self.movable:
            return None
        if all(count == 1 for count in counts[lead:]):
            return self, jax.tree.map(lambda part: PartitionSpec(*entries[:lead]), self)
        lengths = [part.shape[-1] for part in (leaf.codes, leaf.scale, leaf.zero) if part is not None]
        simple = len(leaf.trailing) == 1 and leaf.order is None and not isinstance(leaf.scale, Quantised)
        if not simple or lengths[0] != leaf.trailing[0] or any(length % counts[lead] for length in lengths):
            return None
        spec = lambda part: PartitionSpec(*entries[: lead if part.shape[-1] == 1 else lead + 1])  # noqa: E731
        shard = replace(leaf, trailing=(leaf.trailing[0] // counts[lead],))
        return replace(self, leaf=shard), replace(self, leaf=jax.tree.map(spec, shard))


Base: TypeAlias = Any
"""An array or a `View`."""


def array_of(base: Base) -> Any:
    """The numbers of a base."""
    return base.dense() if isinstance(base, View) else base


def base_of(leaf: Any) -> Base:
    """What stands for a parameter in a weight."""
    return View(leaf) if isinstance(leaf, Quantised) else leaf


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate an equation on bases: a structural operation gives views again, any other uses the numbers."""
    if not any(isinstance(value, View) for value in values):
        return jaxprs.bind(eqn, values)
    move = _MOVES.get(eqn.primitive.name)
    moved = move(eqn, *values) if move is not None and isinstance(values[0], View) else None
    return used(partial(jaxprs.bind, eqn), values) if moved is None else moved


def used(run: Callable[[Sequence[Any]], Any], values: Sequence[Any]) -> Any:
    """Apply a function of arrays to bases, and for its gradient keep no numbers of quantised ones."""
    if not any(isinstance(value, View) for value in values):
        return run(values)
    return jax.checkpoint(lambda values: run([array_of(value) for value in values]))(list(values))


_Bounds: TypeAlias = tuple[int, int, int]
_Move: TypeAlias = "Callable[..., list[Any] | None]"
_MOVES: dict[str, _Move] = {}


def _move(*names: str) -> Callable[[_Move], _Move]:
    def register(fn: _Move) -> _Move:
        _MOVES.update(dict.fromkeys(names, fn))
        return fn

    return register


@_move("copy", "copy_p", "sharding_constraint", "optimization_barrier", "name")
def _stored(eqn: Any, *views: Any) -> list[Any] | None:
    """What concerns the storage of numbers that are not stored."""
    return list(views)


@_move("convert_element_type", "reduce_precision", "stop_gradient")
def _pointwise(eqn: Any, view: View) -> list[Any]:
    dtype = eqn.params.get("new_dtype")
    if eqn.primitive.name == "convert_element_type":
        run = partial(lax.convert_element_type, new_dtype=dtype)
    elif eqn.primitive.name == "stop_gradient":
        run = lax.stop_gradient
    else:
        run = partial(lax.reduce_precision, **eqn.params)
    return [view.then(Step(run, dtype=dtype))]


@_move("transpose")
def _transpose(eqn: Any, view: View) -> list[Any]:
    return [view.then(_transposed(view.shape, tuple(eqn.params["permutation"])))]


def _transposed(shape: tuple[int, ...], order: tuple[int, ...]) -> Step:
    inner = _transposed(shape[1:], tuple(i - 1 for i in order[1:])) if order and order[0] == 0 else None
    return Step(partial(lax.transpose, permutation=order), tuple(shape[i] for i in order), sliced=inner)


@_move("reshape")
def _reshape(eqn: Any, view: View, *dynamic: Any) -> list[Any] | None:
    if dynamic or eqn.params.get("dimensions") or eqn.params.get("sharding") is not None:
        return None
    return [view.reshape(eqn.params["new_sizes"])]


def _reshaped(old: tuple[int, ...], new: tuple[int, ...]) -> Step:
    inner = _reshaped(old[1:], new[1:]) if old and new and old[0] == new[0] else None
    return Step(lambda value: value.reshape(new), new, sliced=inner)


@_move("squeeze")
def _squeeze(eqn: Any, view: View) -> list[Any]:
    gone = {i % view.ndim for i in eqn.params["dimensions"]}
    leading = len(view.leaf.leading)
    if view.movable and all(i < leading for i in gone):
        return [_cut(view, lambda part: lax.squeeze(part, tuple(gone)))]
    return [view.reshape([size for i, size in enumerate(view.shape) if i not in gone])]


@_move("broadcast_in_dim")
def _broadcast(eqn: Any, view: View, *dynamic: Any) -> list[Any] | None:
    """New axes of length one are no more than another shape; what is repeated is left to where it is used."""
    shape = tuple(eqn.params["shape"])
    if dynamic or eqn.params.get("sharding") is not None or prod(shape) != view.size:
        return None
    return [view.reshape(shape)]


@_move("slice")
def _slice(eqn: Any, view: View) -> list[Any]:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * view.ndim
    return [_sliced(view, list(zip(start, limit, strides, strict=True)))]


@_move("split")
def _split(eqn: Any, view: View) -> list[Any]:
    axis, ends = eqn.params["axis"], list(accumulate(map(int, eqn.params["sizes"])))
    whole: list[_Bounds] = [(0, size, 1) for size in view.shape]
    pieces = [(start, end, 1) for start, end in zip([0, *ends], ends, strict=False)]
    return [_sliced(view, [*whole[:axis], piece, *whole[axis + 1 :]]) for piece in pieces]


def _sliced(view: View, cuts: Sequence[_Bounds]) -> View:
    """A slice of a view: along the leading axes one of its arrays."""
    lead = len(view.leaf.leading)
    if view.movable and all(cut == (0, n, 1) for cut, n in zip(cuts[lead:], view.shape[lead:], strict=True)):
        return _cut(view, lambda part: _slice_of(part, [*cuts[:lead], (0, part.shape[-1], 1)]))
    return view.then(_slices(view.shape, cuts))


def _slice_of(array: Any, cuts: Sequence[_Bounds]) -> Any:
    start, limit, strides = zip(*cuts, strict=True)
    return lax.slice(array, start, limit, strides)


def _slices(shape: tuple[int, ...], cuts: Sequence[_Bounds]) -> Step:
    whole = bool(shape) and cuts[0] == (0, shape[0], 1)
    sizes = tuple(-(-(limit - start) // stride) for start, limit, stride in cuts)
    run = partial(_slice_of, cuts=cuts)
    return Step(run, sizes, sliced=_slices(shape[1:], cuts[1:]) if whole and len(shape) > 1 else None)


@_move("dynamic_slice")
def _dynamic_slice(eqn: Any, view: View, *starts: Any) -> list[Any] | None:
    lead, sizes = len(view.leaf.leading), tuple(eqn.params["slice_sizes"])
    if not view.movable or sizes[lead:] != view.shape[lead:]:
        return None
    zero = jax.numpy.zeros((), starts[0].dtype)
    begin = (*starts[:lead], zero)
    return [_cut(view, lambda part: lax.dynamic_slice(part, begin, (*sizes[:lead], part.shape[-1])))]


@_move("gather")
def _gather(eqn: Any, view: View, indices: Any) -> list[Any] | None:
    """Rows are looked up in codes and in scales. What is out of bounds has NaN for its scale, or zero."""
    numbers, sizes = eqn.params["dimension_numbers"], tuple(eqn.params["slice_sizes"])
    lead, fill = len(view.leaf.leading), eqn.params["fill_value"]
    last = {*numbers.start_index_map, *numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    one = len(view.leaf.trailing) == 1 and sizes[lead:] == view.shape[lead:]
    if not view.movable or not one or lead in last or fill not in (None, 0):
        return None

    def take(part: Any) -> Any:
        options = {name: eqn.params[name] for name in ("indices_are_sorted", "unique_indices", "mode", "fill_value")}
        return lax.gather(part, indices, numbers, (*sizes[:lead], part.shape[-1]), **options)

    return [_cut(view, take)]


def _cut(view: View, cut: Callable[[Any], Any]) -> View:
    """The view of what is cut out of every array along the leading axes."""
    return replace(view, leaf=jax.tree.map(cut, view.leaf))
