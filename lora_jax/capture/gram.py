"""Products that statistics are made of, accumulated in float32, and how they are added up in references."""

from typing import Any

import jax
import jax.numpy as jnp

_PANEL = 256
"""Columns of a panel of a symmetric product."""


def products(subscripts: str, *operands: Any) -> Any:
    """An einsum in float32 at full precision."""
    return jnp.einsum(
        subscripts, *operands, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )  # fmt: skip


def gram(x: Any) -> Any:
    """`xᵀx` of `[..., tokens, size]`: of a symmetric product only the blocks on and above the diagonal are computed.

    Example:
      >>> gram(jnp.array([[1.0, 2.0], [0.0, 1.0]]))
      Array([[1., 2.],
             [2., 5.]], dtype=float32)
    """
    size = x.shape[-1]
    if size < 2 * _PANEL:
        return products("...ti,...tj->...ij", x, x)
    starts = range(0, size, max(_PANEL, -(-size // 8)))
    width = starts.step
    rows = [products("...ti,...tj->...ij", x[..., i : i + width], x[..., i:]) for i in starts]
    pads = [[(0, 0)] * (row.ndim - 1) + [(i, 0)] for row, i in zip(rows, starts, strict=True)]
    upper = jnp.concatenate([jnp.pad(row, pad) for row, pad in zip(rows, pads, strict=True)], axis=-2)
    panel = jnp.arange(size) // width
    known = jnp.broadcast_to(panel[:, None] <= panel[None], upper.shape)
    return jnp.where(known, upper, jnp.matrix_transpose(upper))


def add_at(ref: Any, entry: Any, value: Any) -> None:
    """Add a value `[*maps, ...]` to the entries of a reference `[all maps, ...]` that `entry` `[*maps]` numbers."""
    if entry.ndim == 0:
        ref[entry] += value
    elif len(ref) == entry.size == 1:
        ref[...] += value.reshape(ref.shape)
    else:
        # Through a value, because an entry may be there twice.
        ref[...] = ref[...].at[entry].add(value)
