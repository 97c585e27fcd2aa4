"""What adapters do to one tensor, and doing it a few rows at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from lora_jax.errors import CheckpointError, MergeError
from lora_jax.io.hf.tensors import FLOATS, Item, Tensor

_BLOCK = 1 << 19
"""Elements that are changed at a time: 2 MiB of float32 stay in the processor's cache, and more is slower."""

_ALONE, _ROWS = 1 << 18, 4
"""Rows times columns times rank of a product that OpenBLAS leaves to the thread that asks, and how many rows it has.

Of a larger one the other processors get a part. They wait for the next in a loop, and take the time of whoever reads,
writes or changes another tensor.
"""

Rounding = Callable[[np.ndarray, np.dtype[Any], int], np.ndarray]
"""From exact numbers, a dtype and the position of the first one in the tensor, to numbers of that dtype."""


@dataclass(frozen=True)
class Part:
    """`scale · left·right`, added to a tensor seen as a stack of matrices `[stack, rows, columns]`."""

    scale: float
    left: np.ndarray
    right: np.ndarray

    def same(self, other: "Part") -> bool:
        """Whether the other adds the same numbers."""
        return (
            self.scale == other.scale
            and np.array_equal(self.left, other.left)
            and np.array_equal(self.right, other.right)
        )  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What happens to one tensor, in this order.

    Attributes:
      value: replaces it.
      rows: rows that are replaced, by index.
      parts: what is added.
      magnitude: of DoRA; the sum's norms along all but the outputs become these.
      outputs_last: whether the outputs are the last axis and not the first.
      shared: whether what replaces is the base's own parameter, which a head that is tied to it sees too. In PEFT
        trained rows and saved base tables are; copies from `modules_to_save` are not.
    """

    value: np.ndarray | None = None
    rows: tuple[tuple[int, np.ndarray], ...] = ()
    parts: tuple[Part, ...] = ()
    magnitude: np.ndarray | None = None
    outputs_last: bool = False
    shared: bool = False

    @property
    def empty(self) -> bool:
        """Whether nothing happens."""
        return self.value is None and not self.rows and not self.parts

    def same(self, other: "Change") -> bool:
        """Whether the other does the same."""
        values = (self.value, self.magnitude), (other.value, other.magnitude)
        return (
            all(
                (a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in zip(*values, strict=True)
            )
            and [i for i, _ in self.rows] == [i for i, _ in other.rows]
            and all(np.array_equal(a, b) for (_, a), (_, b) in zip(self.rows, other.rows, strict=True))
            and len(self.parts) == len(other.parts)
            and all(a.same(b) for a, b in zip(self.parts, other.parts, strict=True))
        )

    def replaces(self, tensor: Tensor) -> bool:
        """Whether the tensor's values no longer matter, and it takes no arithmetic to write the new ones."""
        whole = self.value is not None and self.value.dtype.kind in "ib" and not self.rows and not self.parts
        return whole and tensor.dtype not in FLOATS

    def shaped(self, tensor: Tensor) -> Tensor:
        """The tensor with the shape of what replaces it."""
        return tensor if self.value is None else tensor._replace(shape=self.value.shape)

    def check(self, tensor: Tensor) -> None:
        """Refuse a tensor that this change does not fit.

        Raises:
          CheckpointError: its shape or dtype is another one.
        """
        if tensor.dtype not in FLOATS and not self.replaces(tensor):
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} is {tensor.dtype}, so it is quantised, and a merge would round the "
                f"update away. Merge into the unquantised model; possible dtypes: {', '.join(FLOATS)}."
            )
        shapes = [] if self.value is None else [self.value.shape]
        shapes += [(tensor.shape[0], *row.shape) for _, row in self.rows]
        wrong = [shape for shape in shapes if shape != tensor.shape]
        if wrong:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} has shape {tensor.shape}, but the adapter was made for {wrong[0]}. It "
                "belongs to another base."
            )


def holds(tensor: Tensor, value: np.ndarray) -> bool:
    """Whether a tensor of the base has these numbers, once they are rounded to its dtype."""
    if tensor.dtype not in FLOATS or tensor.shape != value.shape or not value.shape:
        return False
    rows, columns = _matrix(value.shape)
    flat, wanted = tensor._replace(shape=(rows, columns)), value.reshape(rows, columns)
    step = max(_BLOCK // max(columns, 1), 1)
    blocks = ((start, min(start + step, rows)) for start in range(0, rows, step))
    return all(
        np.array_equal(flat.rows(*block), wanted[slice(*block)].astype(FLOATS[tensor.dtype])) for block in blocks
    )


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape seen as rows and columns; a bias is a column."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def bias_part(bias: np.ndarray, scale: float) -> Part:
    """A bias of B as a change to the base's bias."""
    return Part(scale, np.asarray(bias, np.float32)[None, :, None], np.ones((1, 1, 1), np.float32))


def changed(tensor: Tensor, change: Change, round_: Rounding) -> Item:
    """The tensor with the change, to be written; it is computed while it is written."""
    new = change.shaped(tensor)
    nbytes = prod(new.shape) * FLOATS[new.dtype].itemsize
    return Item(new.name, new.dtype, new.shape, nbytes, _pieces(new, change, round_))


def _pieces(tensor: Tensor, change: Change, round_: Rounding) -> Iterator[Any]:
    dtype = FLOATS[tensor.dtype]
    limit = float(np.finfo(dtype).max) if dtype.kind == "f" else float(np.finfo(np.float32).max)
    norms = _norms(tensor, change)
    for first, columns, exact in _exact(tensor, change):
        if change.magnitude is not None:
            _rescale(exact, change, first, norms)
        # A comparison with NaN is false.
        if not (exact.size == 0 or (exact.max() <= limit and exact.min() >= -limit)):
            raise MergeError(
                f"Merging makes NaN or infinite entries in {tensor.name!r}. Either the adapter diverged in training, "
                f"or the base is not finite there, or the sum overflows {tensor.dtype}: look at both."
            )
        rounded = round_(exact, dtype, first * columns)
        yield np.ascontiguousarray(rounded).reshape(-1).view(np.uint8).data


def _exact(tensor: Tensor, change: Change) -> Iterator[tuple[int, int, np.ndarray]]:
    """Blocks of rows of the sum: the first one's number, the number of columns, and the numbers, unrounded."""
    parts = _joined(change.parts)
    stack, (rows, columns) = 1, _matrix(tensor.shape)
    if parts:
        stack, rows, columns = *parts.left.shape[:2], parts.right.shape[-1]
    step = max(_BLOCK // max(columns, 1), 1)
    flat = tensor._replace(shape=(stack * rows, columns))
    for index in range(stack):
        for start in range(0, rows, step):
            stop, first = min(start + step, rows), index * rows + start
            exact = _wide(flat, change, first, first + stop - start)
            if parts:
                # What is not finite is refused later, with the tensor's name.
                with np.errstate(over="ignore", invalid="ignore"):
                    exact += _product(parts.left[index, start:stop], parts.right[index])
            yield first, columns, exact


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`left @ right` by this thread alone, as products that are too small to wake others for."""
    (rows, rank), columns = left.shape, right.shape[1]
    out = np.empty((rows, columns), np.float32)
    step = max(_ALONE // max(_ROWS * rank, 1), 1)
    for first, count, height in ((0, rows // _ROWS, _ROWS), (rows - rows % _ROWS, 1, rows % _ROWS)):
        last = first + count * height
        factor, result = left[first:last].reshape(count, height, rank), out[first:last].reshape(count, height, columns)
        for start in range(0, columns, step):
            part = slice(start, start + step)
            np.matmul(factor, right[:, part], out=result[..., part])
    return out


def _wide(flat: Tensor, change: Change, first: int, last: int) -> np.ndarray:
    """Rows of what the parts are added to."""
    wide = np.float64 if flat.dtype == "F64" else np.float32
    if change.value is None:
        block = flat.rows(first, last).astype(wide)
    else:
        block = change.value.reshape(-1, flat.shape[-1])[first:last].astype(wide)
    for index, row in change.rows:
        if first <= index < last:
            block[index - first] = row
    return block


def _joined(parts: Sequence[Part]) -> Part | None:
    """Several parts as one product."""
    if not parts:
        return None
    left = np.concatenate([part.left * np.float32(part.scale) for part in parts], axis=-1)
    return Part(1.0, left, np.concatenate([part.right for part in parts], axis=-2))


def _norms(tensor: Tensor, change: Change) -> np.ndarray | None:
    """Norms of the columns of the sum, where DoRA's outputs are columns: they need a pass of their own."""
    if change.magnitude is None or not change.outputs_last:
        return None
    squares = sum(np.square(exact, dtype=np.float64).sum(0) for _, _, exact in _exact(tensor, change))
    return np.sqrt(squares).astype(np.float32)


def _rescale(exact: np.ndarray, change: Change, first: int, norms: np.ndarray | None) -> None:
    assert change.magnitude is not None
    magnitude = change.magnitude.reshape(-1).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if norms is None:
            norms = np.sqrt(np.square(exact, dtype=np.float64).sum(-1)).astype(np.float32)
            exact *= (magnitude[first : first + len(exact)] / norms)[:, None]
        else:
            exact *= magnitude / norms


def merged_with(one: Change, other: Change, where: str) -> Change:
    """Both changes: what is added adds up, everything else must be the business of one adapter alone.

    Raises:
      CheckpointError: both replace the tensor, or one is DoRA.
    """
    if one.magnitude is not None or other.magnitude is not None:
        raise CheckpointError(
            f"{where}: two adapters change it and one is DoRA, which rescales the sum, so the result would depend on "
            "their order. Merge them one after the other, in the order you mean."
        )
    if (one.value is not None or one.rows) and (other.value is not None or other.rows):
        raise CheckpointError(f"{where}: two adapters replace it (modules_to_save or tokens). Merge one of them.")
    base = one if one.value is not None or one.rows else other
    return replace(base, parts=(*one.parts, *other.parts))
