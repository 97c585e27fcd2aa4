"""Weights that GPTQ stored: words that run along the inputs, and for act-order the group of each input."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from lora_jax.io.hf.quantised.packed import Packed, Tensors, array, misfit, of_parts, refuse
from lora_jax.io.hf.quantised.whole_numbers import BITS, by_group, in_order, kernel, unpacked
from lora_jax.io.hf.tensors import FLOATS, Tensor
from lora_jax.quantised.leaf import Quantised

_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
_LAYOUTS = {"gptq": 1, "gptq_v2": 0}
"""What is to be added to zero points, by the name of a layout."""


def gptq(where: Any, said: Mapping[str, Any], tensors: dict[str, Tensor], dtype: str) -> Tensors:
    """The tensors of a directory, with those of each weight as one.

    Raises:
      CheckpointError: the layout or the bits are not read, or tensors are missing or do not fit together.
    """
    layout = said.get("checkpoint_format") or said.get("gptq_format") or said.get("format") or "gptq"
    layout = "marlin" if said.get("is_marlin_format") else layout
    bits, group = said.get("bits"), said.get("group_size", -1)
    if layout not in _LAYOUTS or bits not in BITS or not isinstance(group, int):
        refuse(where, f"GPTQ, bits={bits!r}, group_size={group!r}, checkpoint_format={layout!r}")
    return of_parts(tensors, _PARTS, ".weight", partial(_weight, where, group, _LAYOUTS[layout], dtype))


def _weight(where: Any, group: int, added: int, dtype: str, name: str, parts: list[Tensor | None]) -> Packed:
    words, zeros, scale, group_of = parts
    bits = _bits(words, zeros, scale)
    if words is None or zeros is None or scale is None or bits is None:
        raise misfit(where, name, qweight=words, qzeros=zeros, scales=scale)
    if bits not in BITS:
        refuse(where, f"GPTQ of {bits} bits ({name})")
    shape = (words.shape[1], words.shape[0] * 32 // bits)
    if group_of is not None and group_of.shape != shape[1:]:
        raise misfit(where, name, qweight=words, qzeros=zeros, g_idx=group_of)

    def read() -> Quantised:
        inputs = in_order(shape[1], group) if group_of is None else array(group_of)
        block, order = by_group(where, name, inputs, scale.shape[0])
        zero = unpacked(array(zeros), bits) + np.uint8(added) & np.uint8((1 << bits) - 1)
        codes = unpacked(array(words).T, bits)
        return kernel(codes, array(scale).T, zero.T, bits=bits, block=block, dtype=dtype, order=order)

    return Packed(name, dtype, shape, read)


def _bits(words: Tensor | None, zeros: Tensor | None, scale: Tensor | None) -> int | None:
    """Bits of a code, which layers of one directory may have in different numbers; None where tensors do not fit."""
    if words is None or zeros is None or scale is None or not words.dtype == zeros.dtype == "I32":
        return None
    if scale.dtype not in FLOATS or not len(words.shape) == len(zeros.shape) == 2 or 0 in words.shape:
        return None
    bits, rest = divmod(zeros.shape[1] * 32, words.shape[1])
    return None if rest or scale.shape != (zeros.shape[0], words.shape[1]) else bits
