"""Weights that AWQ stored: words that run along the outputs, eight of them in an order of their own."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from lora_jax.io.hf.quantised.packed import Packed, Tensors, array, misfit, of_parts, refuse
from lora_jax.io.hf.quantised.whole_numbers import by_group, in_order, kernel, unpacked
from lora_jax.io.hf.tensors import FLOATS, Tensor
from lora_jax.quantised.leaf import Quantised

_PARTS = (".qweight", ".qzeros", ".scales")
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""The place of each of eight outputs in their word, from its lowest bits."""


def awq(where: Any, said: Mapping[str, Any], tensors: dict[str, Tensor], dtype: str) -> Tensors:
    """The tensors of a directory, with those of each weight as one.

    Raises:
      CheckpointError: the layout or the bits are not read, or tensors are missing or do not fit together.
    """
    layout = str(said.get("checkpoint_format") or said.get("format") or said.get("version") or "gemm").lower()
    bits, group = said.get("bits"), said.get("group_size", 128)
    if layout != "gemm" or bits != 4 or not isinstance(group, int):
        refuse(where, f"AWQ, bits={bits!r}, group_size={group!r}, version={layout!r}")
    return of_parts(tensors, _PARTS, ".weight", partial(_weight, where, group, dtype))


def _weight(where: Any, group: int, dtype: str, name: str, parts: list[Tensor | None]) -> Packed:
    words, zeros, scale = parts
    if words is None or zeros is None or scale is None or not _fit(words, zeros, scale):
        raise misfit(where, name, qweight=words, qzeros=zeros, scales=scale)
    inputs, outputs = words.shape[0], scale.shape[1]

    def read() -> Quantised:
        block, _ = by_group(where, name, in_order(inputs, group), scale.shape[0])
        codes, zero = _outputs_first(array(words)), _outputs_first(array(zeros))
        return kernel(codes, array(scale).T, zero, bits=4, block=block, dtype=dtype)

    return Packed(name, dtype, (outputs, inputs), read)


def _fit(words: Tensor, zeros: Tensor, scale: Tensor) -> bool:
    if not words.dtype == zeros.dtype == "I32" or scale.dtype not in FLOATS:
        return False
    if not len(words.shape) == len(scale.shape) == 2 or 0 in words.shape:
        return False
    return zeros.shape == (scale.shape[0], words.shape[1]) and scale.shape[1] == 8 * words.shape[1]


def _outputs_first(words: np.ndarray) -> np.ndarray:
    """Codes `[out, in]` out of words `[in, out / 8]`."""
    codes = unpacked(words, 4).reshape(*words.shape, 8)[..., _PLACES]
    return np.ascontiguousarray(codes.reshape(len(words), -1).T)
