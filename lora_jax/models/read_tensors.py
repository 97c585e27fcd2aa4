"""Reading a checkpoint's tensors into parameters: each stack is allocated once, and filled from the files."""

from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import CheckpointError, listed, nearest
from lora_jax.io.hf.quantised.packed import Packed
from lora_jax.io.hf.tensors import FLOATS, Tensor
from lora_jax.models.gguf import GgufTensor
from lora_jax.models.small import Small, in_few_bits
from lora_jax.models.tensors import Leaf

Stored = Tensor | GgufTensor | Packed
Place = Callable[[Leaf], jax.sharding.Sharding]
_ALIGNED = 64
"""Bytes at which JAX takes an array of the host as it is, on CPUs."""


def check_tensors(where: Path, leaves: Iterable[Leaf], tensors: Mapping[str, Stored]) -> None:
    """Hold a checkpoint's tensors against those that the config describes.

    Raises:
      CheckpointError: one is missing, unexpected, of another shape, or not of floats.
    """
    wanted = {name: leaf.shape for leaf in leaves for _, name in leaf.members()}
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    if missing:
        raise CheckpointError(
            f"{where} lacks {len(missing)} tensors that its config.json describes: {listed(missing)}. Nearest there: "
            f"{nearest(missing[0], tensors, separator='.')}. Download the model again, or correct config.json."
        )
    if unexpected:
        raise CheckpointError(
            f"{where} holds {len(unexpected)} tensors that its config.json does not describe: {listed(unexpected)}. "
            "They would be left out of what the model computes: correct config.json, or remove them."
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tensors[name].shape}, and config.json describes {shape}. They belong to "
                "different models."
            )
        if tensors[name].dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: {name} holds {tensors[name].dtype}; only {', '.join(FLOATS)} are read. Give the directory "
                "of the unquantised model."
            )


def read_parameters(
    leaves: Iterable[Leaf], tensors: Mapping[str, Stored], dtype: Any, place: Place | None, small: Small
) -> dict[str, Any]:
    """All parameters as a nested dict.

    Args:
      leaves: what to read.
      tensors: where it is.
      dtype: of the parameters; None for that of the files.
      place: where a parameter lies; None for the default device.
      small: which become codes.
    """
    params: dict[str, Any] = {}
    for leaf in leaves:
        inner = params
        for part in leaf.path[:-1]:
            inner = inner.setdefault(part, {})
        where, whole = place and place(leaf), lambda name, leaf=leaf: _tensor(leaf, tensors[name], dtype)
        codes = in_few_bits(leaf, tensors, small, whole, where, dtype)
        inner[leaf.path[-1]] = _read(leaf, tensors, dtype, where) if codes is None else codes
    return params


def _tensor(leaf: Leaf, tensor: Stored, dtype: Any) -> np.ndarray:
    """The numbers of one tensor."""
    one = leaf._replace(stack=())
    own = jax.dtypes.canonicalize_dtype(FLOATS[tensor.dtype] if dtype is None else dtype)
    return _filled(one, {(): tensor}, own, (slice(None),) * len(leaf.shape))


def _read(leaf: Leaf, tensors: Mapping[str, Stored], dtype: Any, where: Any) -> jax.Array:
    members = {index: tensors[name] for index, name in leaf.members()}
    own = jnp.result_type(*{FLOATS[tensor.dtype] for tensor in members.values()})
    dtype = jax.dtypes.canonicalize_dtype(own if dtype is None else dtype)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        return _filled(leaf, members, dtype, index or (slice(None),) * len(leaf.whole))

    if where is None:
        return jax.device_put(part(None), may_alias=True)
    return jax.make_array_from_callback(leaf.whole, where, part)


def _filled(leaf: Leaf, members: Mapping[Any, Stored], dtype: np.dtype[Any], index: tuple[slice, ...]) -> np.ndarray:
    """The part of a parameter that an index selects, read from the files."""
    ranges = [range(*each.indices(size)) for each, size in zip(index, leaf.whole, strict=True)]
    out = _aligned(tuple(map(len, ranges)), dtype)
    count = len(leaf.stack)
    for at in product(*(range(len(each)) for each in ranges[:count])):
        tensor = members[tuple(each[place] for each, place in zip(ranges, at, strict=False))]
        _fill(out[at], tensor, index[count:])
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An empty array that starts where a CPU's device need not copy it."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)


def _fill(out: np.ndarray, tensor: Stored, index: tuple[slice, ...]) -> None:
    """Read a tensor, or a part of it, into an array of the part's shape."""
    assert not isinstance(tensor, Packed)
    own = FLOATS[tensor.dtype]
    if isinstance(tensor, GgufTensor):
        out[...] = tensor.read()[index]
        return
    if out.shape != tensor.shape:
        out[...] = tensor.mapped()[index]
        return
    read = out if own == out.dtype else np.empty(tensor.shape, own)
    tensor.read_into(read)
    if read is not out:
        out[...] = read
