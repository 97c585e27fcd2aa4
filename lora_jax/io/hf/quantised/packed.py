"""A weight whose tensors are codes and what belongs to them, and the errors about such directories."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import CheckpointError
from lora_jax.io.hf.tensors import FLOATS, Tensor
from lora_jax.quantised.leaf import Quantised

_STORED = {
    **FLOATS,
    "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "I32": np.dtype(np.int32), "I64": np.dtype(np.int64),
}  # fmt: skip
FLOAT_NAMES = {dtype.name: name for name, dtype in FLOATS.items()}
"""Names of dtypes in files, by those of NumPy."""


@dataclass(frozen=True)
class Packed:
    """A weight that is stored as codes and scales.

    Attributes:
      name: of the weight.
      dtype: of the numbers, by its name in the files.
      shape: of the weight.
      read: reads it, as NumPy arrays.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Quantised]


Tensors: TypeAlias = dict[str, Tensor | Packed]
"""Tensors of a directory by name, with those that make up a quantised weight as one."""


def refuse(where: Any, what: str) -> NoReturn:
    """Refuse a directory for how it is quantised.

    Raises:
      CheckpointError: always.
    """
    raise CheckpointError(
        f"{where}: the model is quantised with {what}, which is not read. Read are bitsandbytes and GPTQ (4 and 8 "
        "bits), AWQ (4 bits, gemm), mxfp4 as gpt-oss has it, fp8 in blocks, and compressed-tensors of whole float8 or "
        "int8 tensors and of packed ones (4 and 8 bits). Give the directory of the unquantised model, and quantise it "
        "while it is read: quantise='nf4', or --quantise nf4."
    )


def damaged(where: Any, what: str) -> CheckpointError:
    """The error for tensors that do not fit together."""
    return CheckpointError(f"{where}: {what}. The directory is incomplete or damaged: download the model again")


def of_parts(
    tensors: Mapping[str, Tensor],
    stored: tuple[str, ...],
    called: str,
    make: Callable[[str, list[Tensor | None]], Packed],
) -> Tensors:
    """Tensors that differ in the ends of their names, as one weight.

    Args:
      tensors: all of the directory, by name.
      stored: the ends; a weight is where there is a tensor with the first.
      called: the end of the weight's own name.
      make: the weight of a name and its tensors, with None for those that there are not.
    """
    stems = {name.removesuffix(stored[0]) for name in tensors if name.endswith(stored[0])}
    parts = {stem + end for stem in stems for end in stored}
    weights = {stem + called: [tensors.get(stem + end) for end in stored] for stem in sorted(stems)}
    return {name: tensor for name, tensor in tensors.items() if name not in parts} | {
        name: make(name, found) for name, found in weights.items()
    }


def misfit(where: Any, name: str, **parts: Tensor | None) -> CheckpointError:
    """The error for tensors of a weight that are not there, or of shapes that do not fit together."""
    if missing := [part for part, tensor in parts.items() if tensor is None]:
        return damaged(where, f"{name} lacks its {' and '.join(missing)}")
    told = [f"{part} {each.dtype}{list(each.shape)}" for part, each in parts.items() if each is not None]
    return damaged(where, f"{name} is of {', '.join(told)}, which do not fit together")


def array(tensor: Tensor | None) -> np.ndarray:
    """A whole tensor.

    Raises:
      CheckpointError: it is of a dtype that nothing here has.
    """
    assert tensor is not None
    if tensor.dtype not in _STORED:
        raise CheckpointError(f"{tensor.file}: {tensor.name} holds {tensor.dtype}, which no known format does")
    found = np.empty(tensor.shape, _STORED[tensor.dtype])
    tensor.read_into(found)
    return found


def stacked(parts: list[Quantised], shape: tuple[int, ...]) -> Quantised:
    """Weights of one shape and format as one parameter, with leading axes of this shape."""
    join = lambda *arrays: jnp.stack([jnp.asarray(each) for each in arrays]).reshape(*shape, *arrays[0].shape)  # noqa: E731
    return jax.tree.map(join, *parts)
