"""Safetensors files as named ranges of bytes, so that a file of any size is rewritten in bounded memory."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import BufferedReader
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.errors import CheckpointError
from lora_jax.io.formats.signatures import check_bytes

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""The dtypes that can be changed, by their names in the files. Others are copied as bytes."""

_COUNTS = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "BOOL": np.dtype(np.bool_)}
_PIECE = 1 << 20


class Tensor(NamedTuple):
    """One tensor in a file: `begin` and `end` are positions in the file, in bytes."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes the tensor occupies."""
        return self.end - self.begin

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes, a megabyte at a time. A piece is overwritten by the next one."""
        buffer = memoryview(bytearray(min(_PIECE, self.nbytes)))
        left = self.nbytes
        with opened(self.file) as file:
            file.seek(self.begin)
            while left:
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise self._cut()
                yield buffer[:count]
                left -= count

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of the tensor seen as a matrix whose columns are its last axis."""
        dtype, columns = FLOATS[self.dtype], self.shape[-1]
        count = (stop - start) * columns
        with opened(self.file) as file:
            file.seek(self.begin + start * columns * dtype.itemsize)
            values = np.fromfile(file, dtype, count)
        if len(values) < count:
            raise self._cut()
        return values.reshape(stop - start, columns)

    def read_into(self, out: np.ndarray) -> None:
        """Read all of it into an array of its shape and dtype: several times faster than mapping it."""
        with opened(self.file) as file:
            file.seek(self.begin)
            if file.readinto(out.reshape(-1).view(np.uint8).data) < self.nbytes:
                raise self._cut()

    def mapped(self) -> np.ndarray:
        """The tensor as an array of the file's own bytes, of which only what is looked at is read."""
        return np.memmap(self.file, FLOATS[self.dtype], "r", self.begin, self.shape)

    def _cut(self) -> CheckpointError:
        return CheckpointError(f"{self.file} ends in the middle of {self.name}: it changed while it was read")


def opened(file: Path) -> BufferedReader:
    """A file of a base, to be read.

    Raises:
      CheckpointError: it cannot be opened, as where it was removed in the meantime.
    """
    try:
        return file.open("rb")
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror or error}. It was there at the start: leave the base alone until "
            "the merge is done."
        ) from None


class Item(NamedTuple):
    """A tensor to write: its bytes come in pieces, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Iterable[Any]


def bytes_of(array: Any) -> memoryview:
    """The bytes of an array, fetched from its device."""
    return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8).data


def read_header(path: Path) -> tuple[dict[str, str], list[Tensor]]:
    """The metadata of a file, and its tensors in the order of their bytes.

    Raises:
      CheckpointError: the file is damaged.
    """
    try:
        check_bytes(path, "a model")
        # It checks the header's size, every dtype and shape, and that the ranges neither overlap nor leave holes.
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {error}. It is damaged or cut short; copy it again."
        ) from None
    metadata = header.pop("__metadata__", {})
    tensors = [
        Tensor(path, name, entry["dtype"], tuple(entry["shape"]), *(8 + size + end for end in entry["data_offsets"]))
        for name, entry in header.items()
    ]
    return metadata, sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end))


def write_file(
    path: Path, metadata: Mapping[str, str], items: list[Item], advance: Callable[[int], None], *, threads: int = 1
) -> None:
    """Write a file piece by piece.

    Args:
      path: of the new file.
      metadata: of the file.
      items: its tensors, in order.
      advance: is told the bytes of every piece, by one thread at a time.
      threads: how many tensors are made and written at once.
    """
    ends = list(accumulate((item.nbytes for item in items), initial=0))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for item, place in zip(items, pairwise(ends), strict=True):
        header[item.name] = {"dtype": item.dtype, "shape": item.shape, "data_offsets": place}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
    telling, stopped = Lock(), Event()

    def put(item: Item, start: int) -> None:
        with path.open("r+b") as file:
            file.seek(8 + len(text) + start)
            for piece in item.pieces:
                if stopped.is_set():
                    return
                file.write(piece)
                with telling:
                    advance(len(piece))

    with ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(put, item, start) for item, start in zip(items, ends, strict=False)]
        try:
            for task in as_completed(tasks):
                task.result()
        finally:  # Of one that fails, and of whoever stops this, the others take notice.
            stopped.set()
            pool.shutdown(cancel_futures=True)


def new_item(name: str, value: np.ndarray) -> Item:
    """An array as something to write."""
    names = {dtype: name for name, dtype in (FLOATS | _COUNTS).items()}
    if value.dtype not in names:
        raise CheckpointError(f"{name} is {value.dtype}; only {', '.join(names.values())} can be put into a checkpoint")
    raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return Item(name, names[value.dtype], value.shape, prod(value.shape) * value.dtype.itemsize, [raw.data])
