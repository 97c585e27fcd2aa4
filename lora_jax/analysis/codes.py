"""INT8, INT4 and NF4 as they round a weight, and what they occupy. For analysis only: nothing runs on them."""

from dataclasses import dataclass

import jax.numpy as jnp

from lora_jax.adapter.factors import Array

SCALE_BYTES = 4
"""Of every block, for its scale in float32."""

_BLOCK = 64

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, as the QLoRA paper lists them (appendix E)."""


@dataclass(frozen=True)
class Format:
    """A format of numbers that share a scale in blocks along the inputs of an output; the largest one is exact.

    Attributes:
      name: of the format.
      bits: of a number.
      block: numbers that share a scale; None for all inputs of an output.
      levels: what a number may be, relative to the largest of its block.
    """

    name: str
    bits: int
    block: int | None
    levels: tuple[float, ...]

    def nbytes(self, fan_in: int, fan_out: int) -> int:
        """Bytes of a matrix, scales included.

        >>> [(each.name, each.nbytes(128, 10)) for each in FORMATS]
        [('INT8', 1320), ('INT4', 720), ('NF4', 720)]
        """
        scales = fan_out * -(-fan_in // (self.block or fan_in))
        return -(-fan_in * fan_out * self.bits // 8) + SCALE_BYTES * scales

    def rounded(self, matrix: Array) -> Array:
        """A matrix `[fan_in, fan_out]` float32, with every number at the nearest of its block's levels.

        >>> [round(float(each), 3) for each in FORMATS[1].rounded(jnp.float32([[2.0], [0.9], [0.1]]))[:, 0]]
        [2.0, 0.857, 0.0]
        """
        fan_in, fan_out = matrix.shape
        block = self.block or fan_in
        blocks = jnp.pad(matrix, [(0, -fan_in % block), (0, 0)]).reshape(-1, block, fan_out)
        scale = jnp.abs(blocks).max(1, keepdims=True)
        levels = jnp.asarray(self.levels, matrix.dtype)
        middles = (levels[1:] + levels[:-1]) / 2
        nearest = levels[jnp.searchsorted(middles, blocks / jnp.where(scale > 0, scale, 1))]
        return (nearest * scale).reshape(-1, fan_out)[:fan_in]


def _whole_numbers(bits: int) -> tuple[float, ...]:
    """Symmetric: one code is left unused, so that zero is one of them."""
    most = 2 ** (bits - 1) - 1
    return tuple(number / most for number in range(-most, most + 1))


FORMATS = (
    Format("INT8", 8, None, _whole_numbers(8)),
    Format("INT4", 4, _BLOCK, _whole_numbers(4)),
    Format("NF4", 4, _BLOCK, _NF4),
)
