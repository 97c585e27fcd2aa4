"""Formats of few bits: what a code stands for, relative to the scale of its block, and which code is nearest."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, as the QLoRA paper lists them (appendix E)."""

_FP4 = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
"""Of bitsandbytes' 4-bit float, without its sign, which is the highest bit of a code."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Likewise of the 4-bit float of mxfp4, with two bits of exponent and one of mantissa."""


@dataclass(frozen=True)
class Format:
    """A format of codes.

    Attributes:
      name: of the format.
      bits: of a code, 4 (two share a byte, the first in its upper half) or 8.
      levels: what each code stands for, by code; empty where a code is a number itself (`int8`, `fp8`).
      largest: what the largest number of a block is stored as.
      stored: dtype of the array that holds codes.
    """

    name: str
    bits: int
    levels: tuple[float, ...]
    largest: float
    stored: Any

    def decode(self, codes: jax.Array) -> jax.Array:
        """What the codes stand for, relative to their scale: float32, two for every byte of a format of 4 bits.

        Example:
          >>> FORMATS["nf4"].decode(jnp.uint8([0x0F, 0x77])), FORMATS["int8"].decode(jnp.int8([-3]))
          (Array([-1.,  1.,  0.,  0.], dtype=float32), Array([-3.], dtype=float32))
        """
        if not self.levels:
            return codes.astype(jnp.float32)
        if self.bits == 8:
            return _looked_up(self.levels, codes)
        pairs = jnp.stack([_selected(self.levels, codes >> 4), _selected(self.levels, codes & 15)], -1)
        return pairs.reshape(*codes.shape[:-1], 2 * codes.shape[-1])

    def encode(self, values: jax.Array) -> jax.Array:
        """The nearest codes of float32 values relative to their scale; of 4 bits an even number on the last axis.

        Example:
          >>> FORMATS["nf4"].encode(jnp.float32([-1, 1, 0.03, -0.02])).tolist()
          [15, 119]
        """
        if not self.levels:
            whole = jnp.issubdtype(self.stored, jnp.integer)
            bounded = jnp.clip(values, -self.largest, self.largest)
            return (jnp.round(bounded) if whole else bounded).astype(self.stored)
        order = np.argsort(self.levels, kind="stable")
        levels = np.asarray(self.levels, np.float32)[order]
        # Compared one by one, and not searched for: XLA makes one loop of it, without arrays of indices.
        middles = ((levels[1:] + levels[:-1]) / 2).reshape(*[1] * values.ndim, -1)
        nearest = (values[..., None] > middles).sum(-1)
        sorted_already = (order == np.arange(len(order))).all()
        codes = (nearest if sorted_already else _looked_up(order.tolist(), nearest)).astype(self.stored)
        return codes if self.bits == 8 else codes[..., 0::2] << 4 | codes[..., 1::2]


def _selected(levels: Sequence[float], codes: jax.Array) -> jax.Array:
    """Levels by bits of their codes, the lowest first: accelerators select faster than they look up."""
    values: list[Any] = [np.float32(level) for level in levels]
    for bit in range(len(levels).bit_length() - 1):
        odd = (codes >> bit) & 1 == 1
        values = [jnp.where(odd, high, low) for low, high in zip(values[0::2], values[1::2], strict=True)]
    return values[0]


def _looked_up(levels: Sequence[float], codes: jax.Array) -> jax.Array:
    where = jax.typeof(codes).sharding
    on_mesh = where if AxisType.Explicit in where.mesh.axis_types else None
    return jnp.asarray(levels, jnp.float32).at[codes].get(out_sharding=on_mesh)


@lru_cache
def dynamic_levels() -> tuple[float, ...]:
    """The 256 levels of bitsandbytes' signed dynamic format: a sign, an exponent to base ten, and the bits that remain.

    Example:
      >>> levels = dynamic_levels()
      >>> len(levels), round(levels[0], 6), levels[127], levels[255]
      (256, -0.992969, 0.0, 1.0)

    References:
      Dettmers, 8-bit approximations for parallelism in deep learning, arXiv 1511.04561.
    """
    found = [np.float32(0), np.float32(1)]
    for exponent in range(7):
        count = np.arange(2**exponent + 1)
        step = np.float64(np.float32(0.9) / np.float32(2**exponent))
        # As torch.linspace does it, from both ends to the middle and rounded once, to have its levels to the last bit.
        edges = np.where(2 * count < len(count), np.float32(0.1) + step * count, 1 - step * count[::-1])
        edges = edges.astype(np.float32)
        means = (edges[1:] + edges[:-1]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        found += [*means, *-means]
    return tuple(map(float, sorted(found)))


def _signed(levels: tuple[float, ...]) -> tuple[float, ...]:
    return (*levels, *(-level for level in levels))


FORMATS = {
    each.name: each
    for each in (
        Format("nf4", 4, NF4, 1.0, jnp.uint8),
        Format("int4", 4, tuple(float(code - 8) for code in range(16)), 7.0, jnp.uint8),
        Format("int8", 8, (), 127.0, jnp.int8),
        Format("fp8", 8, (), 448.0, jnp.float8_e4m3fn),
        Format("fp4", 4, _signed(_FP4), 1.0, jnp.uint8),
        Format("mxfp4", 4, _signed(_E2M1), 6.0, jnp.uint8),
        Format("dynamic", 8, dynamic_levels(), 1.0, jnp.uint8),
    )
}
"""All formats by name; `dynamic` is that of scales which are quantised themselves, `fp4` and `mxfp4` are of files."""
