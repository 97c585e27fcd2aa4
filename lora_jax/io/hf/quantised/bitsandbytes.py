"""Weights that bitsandbytes stored: nf4 and fp4, with double quantisation too, and int8."""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.errors import CheckpointError
from lora_jax.io.hf.quantised.packed import FLOAT_NAMES, Packed, Tensors, array, refuse
from lora_jax.io.hf.quantised.scaled import whole
from lora_jax.io.hf.tensors import FLOATS, Tensor
from lora_jax.quantised.leaf import Quantised

_STATE = ".quant_state.bitsandbytes__"


def bitsandbytes(where: Any, said: Any, tensors: dict[str, Any], dtype: str) -> Tensors:
    """The tensors of a directory, with those of each weight as one."""
    states = {name.partition(_STATE)[0]: name for name in tensors if _STATE in name}
    rows = {name.removesuffix(".SCB"): name for name in tensors if name.endswith(".SCB")}
    found: Tensors = {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        if name in states:
            found[name] = _of_four_bits(where, name, tensors, states[name])
        elif module in rows and name == f"{module}.weight":
            scale = tensors[rows[module]]
            read = lambda tensor=tensor, scale=scale: whole(array(tensor), array(scale)[:, None] / 127, dtype)  # noqa: E731
            found[name] = Packed(name, dtype, tensor.shape, read)
        elif not _part_of(name, (*states, *rows)):
            found[name] = tensor
    return found


def _part_of(name: str, owners: tuple[str, ...]) -> bool:
    """Whether a tensor says more of another: scales, code books, formats."""
    kinds = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
    return _STATE in name or name.endswith((*kinds, ".SCB", ".weight_format"))


def _of_four_bits(where: Any, name: str, tensors: Mapping[str, Tensor], state: str) -> Packed:
    facts = json.loads(array(tensors[state]).tobytes())
    format, block, shape = facts["quant_type"], facts["blocksize"], tuple(facts["shape"])
    nested = "nested_offset" in facts
    needed = ("absmax", "nested_absmax", "nested_quant_map") if nested else ("absmax",)
    parts = {part: tensors.get(f"{name}.{part}") for part in needed}
    if None in parts.values():
        raise CheckpointError(f"{where} lacks the scales of {name}: download the model again")
    if format not in ("nf4", "fp4"):
        refuse(where, f"bitsandbytes' {format!r}")

    def read() -> Quantised:
        codes, scale = array(tensors[name]).reshape(-1), array(parts["absmax"]).reshape(-1)
        if nested:
            scale = _nested(scale, parts, facts)
        return _by_rows(codes, scale, format, block, shape, np.dtype(FLOATS[FLOAT_NAMES[facts["dtype"]]]))

    return Packed(name, FLOAT_NAMES[facts["dtype"]], shape, read)


def _nested(codes: np.ndarray, parts: Mapping[str, Any], facts: Mapping[str, Any]) -> np.ndarray:
    """Scales that were quantised themselves: as numbers, because their blocks run across the rows of the weight."""
    levels = array(parts["nested_quant_map"])
    scale = np.repeat(array(parts["nested_absmax"]), facts["nested_blocksize"])[: codes.size]
    return levels[codes] * scale + np.float32(facts["nested_offset"])


def _by_rows(
    codes: np.ndarray, scale: np.ndarray, format: str, block: int, shape: tuple[int, ...], dtype: Any
) -> Quantised:
    """Codes and scales of a flat weight, with its rows as a leading axis where blocks end with them."""
    whole = shape[-1] % block == 0
    leading, trailing = (shape[:-1], shape[-1:]) if whole else ((), shape)
    # The first of two shares its byte's upper half; what blocks do not fill is left out.
    each = np.stack([codes >> 4, codes & 15], -1).reshape(-1)[: -(-prod(shape) // block) * block].astype(jnp.int4)
    arrays = (each.reshape(*leading, -1), scale.astype(np.float32).reshape(*leading, -1))
    return Quantised(*arrays, format=format, dtype=dtype, block=block, trailing=trailing)
