"""Quantised Hugging Face directories: the tensors of a weight, in codes and scales, as one `Quantised` parameter."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import CheckpointError
from lora_jax.io.hf.tensors import FLOATS, Tensor
from lora_jax.quantised.formats import FORMATS
from lora_jax.quantised.leaf import Quantised

_STORED = {
    **FLOATS,
    "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
}  # fmt: skip
_FLOAT_NAMES = {dtype.name: name for name, dtype in FLOATS.items()}
_STATE = ".quant_state.bitsandbytes__"


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


def packed_tensors(
    where: Any, said: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor | Packed]:
    """The tensors of a directory, with those that make up a quantised weight as one.

    Read are bitsandbytes in 4 bits (nf4 and fp4, double quantisation too) and in 8 bits, fp8 in blocks (DeepSeek), and
    what compressed-tensors stores as whole float8 or int8 tensors.

    Args:
      where: the directory, for errors.
      said: its `quantization_config`.
      config: the rest of its `config.json`.
      tensors: its tensors by name.

    Raises:
      CheckpointError: the directory is quantised in another way, or a tensor is missing.
    """
    method = said.get("quant_method") if isinstance(said, Mapping) else said
    if method is None and isinstance(said, Mapping) and ("load_in_4bit" in said or "load_in_8bit" in said):
        method = "bitsandbytes"
    reader = {"bitsandbytes": _bitsandbytes, "fp8": _scaled, "compressed-tensors": _compressed}.get(str(method))
    if reader is None:
        _refuse(where, f"quant_method={method!r}")
    return reader(where, said, dict(tensors), _own_dtype(config))


def _refuse(where: Any, what: str) -> NoReturn:
    raise CheckpointError(
        f"{where}: the model is quantised with {what}, which is not read. Read are bitsandbytes (4 and 8 bits), fp8 in "
        "blocks, and compressed-tensors of whole float8 or int8 tensors. Give the directory of the unquantised model, "
        "and quantise it while it is read: quantise='nf4', or --quantise nf4."
    )


def _own_dtype(config: Mapping[str, Any]) -> str:
    """The dtype of the numbers, by its name in files."""
    given = config.get("dtype") or config.get("torch_dtype")
    return _FLOAT_NAMES.get(str(given).removeprefix("torch."), "BF16")


def _bitsandbytes(where: Any, said: Any, tensors: dict[str, Any], dtype: str) -> dict[str, Tensor | Packed]:
    states = {name.partition(_STATE)[0]: name for name in tensors if _STATE in name}
    rows = {name.removesuffix(".SCB"): name for name in tensors if name.endswith(".SCB")}
    found: dict[str, Tensor | Packed] = {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        if name in states:
            found[name] = _of_four_bits(where, name, tensors, states[name])
        elif module in rows and name == f"{module}.weight":
            scale = tensors[rows[module]]
            read = lambda tensor=tensor, scale=scale: _whole(_array(tensor), _array(scale)[:, None] / 127, dtype)  # noqa: E731
            found[name] = Packed(name, dtype, tensor.shape, read)
        elif not _part_of(name, (*states, *rows)):
            found[name] = tensor
    return found


def _part_of(name: str, owners: tuple[str, ...]) -> bool:
    """Whether a tensor says more of another: scales, code books, formats."""
    kinds = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
    return _STATE in name or name.endswith((*kinds, ".SCB", ".weight_format"))


def _of_four_bits(where: Any, name: str, tensors: Mapping[str, Tensor], state: str) -> Packed:
    facts = json.loads(_array(tensors[state]).tobytes())
    format, block, shape = facts["quant_type"], facts["blocksize"], tuple(facts["shape"])
    parts = {part: tensors.get(f"{name}.{part}") for part in ("absmax", "nested_absmax", "nested_quant_map")}
    nested = parts["nested_absmax"] is not None
    if parts["absmax"] is None or ("nested_offset" in facts) != nested:
        raise CheckpointError(f"{where} lacks the scales of {name}: download the model again")
    if format not in ("nf4", "fp4"):
        _refuse(where, f"bitsandbytes' {format!r}")

    def read() -> Quantised:
        codes, scale = _array(tensors[name]).reshape(-1), _array(parts["absmax"]).reshape(-1)
        if nested:
            scale = _nested(where, name, scale, parts, facts)
        return _by_rows(codes, scale, format, block, shape, np.dtype(FLOATS[_FLOAT_NAMES[facts["dtype"]]]))

    return Packed(name, _FLOAT_NAMES[facts["dtype"]], shape, read)


def _nested(where: Any, name: str, codes: np.ndarray, parts: Mapping[str, Any], facts: Mapping[str, Any]) -> np.ndarray:
    """Scales that were quantised themselves: as numbers, because their blocks run across the rows of the weight."""
    levels = _array(parts["nested_quant_map"])
    if not np.allclose(levels, FORMATS["dynamic"].levels, atol=1e-6):
        raise CheckpointError(f"{where}: the scales of {name} have levels that bitsandbytes' are not")
    scale = np.repeat(_array(parts["nested_absmax"]), facts["nested_blocksize"])[: codes.size]
    return levels[codes] * scale + np.float32(facts["nested_offset"])


def _by_rows(
    codes: np.ndarray, scale: np.ndarray, format: str, block: int, shape: tuple[int, ...], dtype: Any
) -> Quantised:
    """Codes and scales of a flat weight, with its rows as a leading axis where blocks end with them."""
    whole = shape[-1] % block == 0
    leading, trailing = (shape[:-1], shape[-1:]) if whole else ((), shape)
    arrays = (codes.reshape(*leading, -1), scale.astype(np.float32).reshape(*leading, -1))
    return Quantised(*arrays, format=format, dtype=dtype, block=block, trailing=trailing)


def _scaled(where: Any, said: Any, tensors: dict[str, Any], dtype: str) -> dict[str, Tensor | Packed]:
    """Float8 with a scale for every tile of a weight."""
    tile = tuple(said.get("weight_block_size") or ())
    if len(tile) != 2 or not any(name.endswith(".weight_scale_inv") for name in tensors):
        _refuse(where, f"fp8 and weight_block_size={tile or None}")
    make = lambda codes, scale: _tiled(codes, scale, tile, dtype)  # noqa: E731
    return _with_scales(tensors, "_scale_inv", (".activation_scale",), dtype, make)


def _with_scales(
    tensors: Mapping[str, Tensor],
    suffix: str,
    beside: tuple[str, ...],
    dtype: str,
    make: Callable[[np.ndarray, np.ndarray], Quantised],
) -> dict[str, Tensor | Packed]:
    """Every `weight` with a tensor of its name and a suffix, of both; what is beside them is left out."""

    def packed(tensor: Tensor, scale: Tensor) -> Packed:
        return Packed(tensor.name, dtype, tensor.shape, lambda: make(_array(tensor), _array(scale)))

    others = (f".weight{suffix}", *beside)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(others)}
    return {
        name: packed(tensor, tensors[name + suffix])
        if name.endswith(".weight") and name + suffix in tensors
        else tensor
        for name, tensor in kept.items()
    }


def _tiled(codes: np.ndarray, scale: np.ndarray, tile: tuple[int, ...], dtype: str) -> Quantised:
    """Every row has the scales of its tiles."""
    rows, columns = codes.shape
    by_row = np.repeat(scale.astype(np.float32), tile[0], axis=0)[:rows]
    padded = np.pad(codes.view(np.uint8), [(0, 0), (0, -columns % tile[1])]).view(codes.dtype)
    facts = {"format": "fp8", "dtype": FLOATS[dtype], "block": tile[1], "trailing": (columns,)}
    return Quantised(padded, by_row, **facts)


def _compressed(where: Any, said: Any, tensors: dict[str, Any], dtype: str) -> dict[str, Tensor | Packed]:
    """Float8 or int8 with one scale for a weight, or one for each of its rows."""
    if said.get("format") not in ("float-quantized", "int-quantized"):
        _refuse(where, f"compressed-tensors' format {said.get('format')!r}")
    for name, tensor in tensors.items():
        if name.endswith(".weight_zero_point") and _array(tensor).any():
            _refuse(where, f"zero points ({name})")
        weight = tensors.get(name.removesuffix("_scale")) if name.endswith(".weight_scale") else None
        if weight is not None and prod(tensor.shape) not in (1, weight.shape[0]):
            _refuse(where, f"scales of shape {tensor.shape} for {weight.name} of shape {weight.shape}")
    beside = (".weight_zero_point", ".input_scale", ".input_zero_point")
    make = lambda codes, scale: _whole(codes, scale.reshape(-1, 1), dtype)  # noqa: E731
    return _with_scales(tensors, "_scale", beside, dtype, make)


def _whole(codes: np.ndarray, scale: np.ndarray, dtype: str) -> Quantised:
    """Rows with one scale each."""
    by_row = np.broadcast_to(scale.astype(np.float32), (len(codes), 1))
    format = "int8" if codes.dtype == np.int8 else "fp8"
    columns = codes.shape[1:]
    return Quantised(codes, by_row, format=format, dtype=FLOATS[dtype], block=prod(columns), trailing=columns)


def _array(tensor: Tensor | None) -> np.ndarray:
    """A whole tensor."""
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
