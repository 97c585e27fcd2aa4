"""Weights that are whole tensors of float8 or int8, with a scale for every tile, every row, or all of them."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np

from lora_jax.io.hf.quantised.packed import Packed, Tensors, array, refuse
from lora_jax.io.hf.tensors import FLOATS, Tensor
from lora_jax.quantised.leaf import Quantised


def tiles(where: Any, said: Any, tensors: dict[str, Any], dtype: str) -> Tensors:
    """Float8 with a scale for every tile of a weight."""
    tile = tuple(said.get("weight_block_size") or ())
    if len(tile) != 2 or not any(name.endswith(".weight_scale_inv") for name in tensors):
        refuse(where, f"fp8 and weight_block_size={tile or None}")
    make = lambda codes, scale: _tiled(codes, scale, tile, dtype)  # noqa: E731
    return _with_scales(tensors, "_scale_inv", (".activation_scale",), dtype, make)


def _with_scales(
    tensors: Mapping[str, Tensor],
    suffix: str,
    beside: tuple[str, ...],
    dtype: str,
    make: Callable[[np.ndarray, np.ndarray], Quantised],
) -> Tensors:
    """Every `weight` with a tensor of its name and a suffix, of both; what is beside them is left out."""

    def packed(tensor: Tensor, scale: Tensor) -> Packed:
        return Packed(tensor.name, dtype, tensor.shape, lambda: make(array(tensor), array(scale)))

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


def rows(where: Any, said: Any, tensors: dict[str, Any], dtype: str) -> Tensors:
    """Float8 or int8 with one scale for a weight, or one for each of its rows."""
    for name, tensor in tensors.items():
        if name.endswith(".weight_zero_point") and array(tensor).any():
            refuse(where, f"zero points ({name})")
        weight = tensors.get(name.removesuffix("_scale")) if name.endswith(".weight_scale") else None
        if weight is not None and prod(tensor.shape) not in (1, weight.shape[0]):
            refuse(where, f"scales of shape {tensor.shape} for {weight.name} of shape {weight.shape}")
    beside = (".weight_zero_point", ".input_scale", ".input_zero_point")
    make = lambda codes, scale: whole(codes, scale.reshape(-1, 1), dtype)  # noqa: E731
    return _with_scales(tensors, "_scale", beside, dtype, make)


def whole(codes: np.ndarray, scale: np.ndarray, dtype: str) -> Quantised:
    """Rows with one scale each."""
    by_row = np.broadcast_to(scale.astype(np.float32), (len(codes), 1))
    format = "int8" if codes.dtype == np.int8 else "fp8"
    columns = codes.shape[1:]
    return Quantised(codes, by_row, format=format, dtype=FLOATS[dtype], block=prod(columns), trailing=columns)
