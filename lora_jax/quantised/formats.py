"""Formats of few bits: what a code stands for, relative to the scale of its block, and which code is nearest."""

from collections.abc import Sequence
from dataclasses import dataclass
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
      levels: what each code stands for, by its bits; empty where a code is a number itself (`int4`, `int8`, `fp8`).
      largest: what the largest number of a block is stored as.
      stored: dtype of the array that holds codes. Of 4 bits it is JAX's own int4, of which every backend puts two in a
        byte in the order that suits it.
    """

    name: str
    levels: tuple[float, ...]
    largest: float
    stored: Any

    @property
    def bits(self) -> int:
        """Of a code."""
        return jax.dtypes.itemsize_bits(self.stored)

    def decode(self, codes: jax.Array) -> jax.Array:
        """What the codes stand for, relative to their scale: float32.

        Example:
          >>> FORMATS["nf4"].decode(jnp.int4([0, 7, -1])), FORMATS["int8"].decode(jnp.int8([-3]))
          (Array([-1.,  0.,  1.], dtype=float32), Array([-3.], dtype=float32))
        """
        if not self.levels:
            return codes.astype(jnp.float32)
        return _selected(self.levels, codes.astype(jnp.int32))

    def encode(self, values: jax.Array) -> jax.Array:
        """The nearest codes of float32 values relative to their scale.

        Example:
          >>> FORMATS["nf4"].encode(jnp.float32([-1, 1, 0.03, -0.02])).tolist()
          [0, -1, 7, 7]
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
        codes = nearest if sorted_already else _looked_up(order, nearest)
        return codes.astype(self.stored)


def _selected(levels: Sequence[float], codes: jax.Array) -> jax.Array:
    """Levels by the bits of their codes, the lowest first: accelerators select faster than they look up."""
    values: list[Any] = [np.float32(level) for level in levels]
    for bit in range(len(levels).bit_length() - 1):
        odd = (codes >> bit) & 1 == 1
        values = [jnp.where(odd, high, low) for low, high in zip(values[0::2], values[1::2], strict=True)]
    return values[0]


def _looked_up(table: np.ndarray, places: jax.Array) -> jax.Array:
    where = jax.typeof(places).sharding
    on_mesh = where if AxisType.Explicit in where.mesh.axis_types else None
    return jnp.asarray(table).at[places].get(out_sharding=on_mesh)


def _signed(levels: tuple[float, ...]) -> tuple[float, ...]:
    return (*levels, *(-level for level in levels))


FORMATS = {
    each.name: each
    for each in (
        Format("nf4", NF4, 1.0, jnp.int4),
        Format("int4", (), 7.0, jnp.int4),
        Format("int8", (), 127.0, jnp.int8),
        Format("fp8", (), 448.0, jnp.float8_e4m3fn),
        Format("fp4", _signed(_FP4), 1.0, jnp.int4),
        Format("mxfp4", _signed(_E2M1), 6.0, jnp.int4),
    )
}
"""All formats by name; `fp4` and `mxfp4` are of files."""
