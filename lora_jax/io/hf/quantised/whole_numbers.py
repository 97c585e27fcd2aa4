"""Whole numbers of 4 or 8 bits as kernels `(out, in)`: inputs are in groups with a scale and a zero point each."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from lora_jax.io.hf.quantised.packed import damaged
from lora_jax.io.hf.tensors import FLOATS
from lora_jax.quantised.formats import FORMATS
from lora_jax.quantised.leaf import Quantised

BITS = {4: "int4", 8: "int8"}
"""The bits that are read, and the format of each."""


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes out of words of 32 bits along the last axis, from the lowest bits of each.

    Example:
      >>> unpacked(np.int32([[0x7210, 0x3]]), 4).tolist()
      [[0, 1, 2, 7, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]]
    """
    codes = np.ascontiguousarray(words).view(np.uint8)
    return codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)


def kernel(
    codes: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    *,
    bits: int,
    block: int,
    dtype: str,
    order: np.ndarray | None = None,
) -> Quantised:
    """A kernel whose numbers are `(code - zero) · scale`.

    Args:
      codes: `[out, in]` uint8.
      scale: `[out, groups]`.
      zero: `[out, groups]` uint8; None for the middle of the codes.
      bits: of a code.
      block: how many inputs are a group.
      dtype: of the numbers, by its name in files.
      order: `[in]`, the place of each input where groups are neighbours; None where they are.
    """
    middle = 1 << (bits - 1)
    shift = None if zero is None or (zero == middle).all() else (zero.astype(np.int16) - middle).astype(np.int8)
    sorted_codes = codes if order is None else np.take(codes, np.argsort(order), 1)
    padded = np.pad(sorted_codes, [(0, 0), (0, scale.shape[1] * block - codes.shape[1])])
    stored = (padded.astype(np.int16) - middle).astype(FORMATS[BITS[bits]].stored)
    leaf = Quantised(
        stored, np.ascontiguousarray(scale), zero=shift, format=BITS[bits], dtype=FLOATS[dtype], block=block,
        trailing=codes.shape[1:],
    )  # fmt: skip
    return leaf if order is None else replace(jax.tree.map(np.ravel, leaf), trailing=codes.shape, order=order)


def in_order(inputs: int, block: int) -> np.ndarray:
    """The group of each input where groups are neighbours; a block of 0 or less is all of them."""
    return np.arange(inputs) // (block if block > 0 else inputs)


def by_group(where: Any, name: str, group_of: np.ndarray, count: int) -> tuple[int, np.ndarray | None]:
    """How many inputs are a group, and the place of each input where groups are neighbours; None where they are.

    Args:
      where: the directory, for errors.
      name: of the weight.
      group_of: the group of each input.
      count: of groups.

    Raises:
      CheckpointError: a group is not there, or they have different sizes.
    """
    if group_of.min() < 0 or group_of.max() != count - 1:
        raise damaged(where, f"{name} has inputs in groups {group_of.min()} to {group_of.max()}, and {count} scales")
    sizes, neighbours = np.bincount(group_of), (np.diff(group_of) >= 0).all()
    alike = sizes[:-1] if neighbours else sizes  # The last may be cut off by the end of the inputs.
    if (alike != sizes[0]).any() or not 0 < sizes[-1] <= sizes[0]:
        raise damaged(where, f"{name} has groups of {sizes.min()} to {sizes.max()} inputs, which should be of one size")
    order = None if neighbours else np.argsort(np.argsort(group_of, kind="stable")).astype(np.int32)
    return int(sizes[0]), order
