"""Weights that compressed-tensors stored: whole tensors of float8 or int8, or whole numbers packed into words."""

from collections.abc import Mapping
from functools import partial
from math import ceil
from typing import Any

import numpy as np

from lora_jax.io.hf.quantised.packed import Packed, Tensors, array, damaged, misfit, of_parts, refuse
from lora_jax.io.hf.quantised.scaled import rows
from lora_jax.io.hf.quantised.whole_numbers import BITS, by_group, in_order, kernel, unpacked
from lora_jax.io.hf.tensors import FLOATS, Tensor
from lora_jax.quantised.leaf import Quantised

_PARTS = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")


def compressed(where: Any, said: Mapping[str, Any], tensors: dict[str, Tensor], dtype: str) -> Tensors:
    """The tensors of a directory, with those of each weight as one.

    Raises:
      CheckpointError: the format or the bits are not read, or tensors are missing or do not fit together.
    """
    if said.get("format") in ("float-quantized", "int-quantized"):
        return rows(where, said, tensors, dtype)
    if said.get("format") != "pack-quantized":
        refuse(where, f"compressed-tensors' format {said.get('format')!r}")
    sizes = _group_sizes(where, said)
    return of_parts(tensors, _PARTS, ".weight", partial(_weight, where, sizes, dtype))


def _group_sizes(where: Any, said: Mapping[str, Any]) -> set[int | None]:
    """How many inputs are a group, of all that are said; None or -1 for all.

    Raises:
      CheckpointError: weights are of other bits, or no whole numbers.
    """
    groups = said.get("config_groups")
    schemes = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, Mapping) else []
    for each in schemes:
        bits, kind, size = each.get("num_bits"), each.get("type", "int"), each.get("group_size")
        if bits not in BITS or kind != "int":
            refuse(where, f"compressed-tensors' pack-quantized, num_bits={bits!r}, type={kind!r}, group_size={size!r}")
    return {each.get("group_size") for each in schemes}


def _weight(where: Any, sizes: set[int | None], dtype: str, name: str, parts: list[Tensor | None]) -> Packed:
    words, scale, shape, zeros, group_of = parts
    if words is None or scale is None or shape is None or shape.shape != (2,):
        raise misfit(where, name, weight_packed=words, weight_scale=scale, weight_shape=shape)
    outputs, inputs = map(int, array(shape))
    bits = next((bits for bits in BITS if _fit(outputs, inputs, bits, words, scale, zeros)), None)
    if bits is None or (group_of and group_of.shape != (inputs,)):
        optional = {"weight_zero_point": zeros, "weight_g_idx": group_of}
        given = {part: tensor for part, tensor in optional.items() if tensor is not None}
        raise misfit(where, f"{name} {[outputs, inputs]}", weight_packed=words, weight_scale=scale, **given)

    def read() -> Quantised:
        groups = _groups(where, name, inputs, scale.shape[1], sizes) if group_of is None else array(group_of)
        block, order = by_group(where, name, groups, scale.shape[1])
        codes = unpacked(array(words), bits)[:, :inputs]
        zero = None if zeros is None else unpacked(array(zeros).T, bits)[:, :outputs].T
        return kernel(codes, array(scale), zero, bits=bits, block=block, dtype=dtype, order=order)

    return Packed(name, dtype, (outputs, inputs), read)


def _fit(outputs: int, inputs: int, bits: int, words: Tensor, scale: Tensor, zeros: Tensor | None) -> bool:
    """Whether tensors are those of a kernel in so many bits."""
    if words.dtype != "I32" or scale.dtype not in FLOATS or len(scale.shape) != 2 or not outputs * inputs:
        return False
    packed = (ceil(outputs * bits / 32), scale.shape[1])
    zeros_fit = zeros is None or (zeros.dtype == "I32" and zeros.shape == packed)
    return zeros_fit and words.shape == (outputs, ceil(inputs * bits / 32)) and scale.shape[0] == outputs


def _groups(where: Any, name: str, inputs: int, count: int, sizes: set[int | None]) -> np.ndarray:
    """The group of each input, of a size that the config says."""
    block = inputs // count
    if inputs % count or (block not in sizes and count > 1):
        raise damaged(where, f"{name} has {inputs} inputs and {count} scales for each output, in groups of {sizes}")
    return in_order(inputs, block)
