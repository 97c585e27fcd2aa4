"""Products that statistics are made of, accumulated in float32, and how they are added up in references."""

from typing import Any

import jax
import jax.numpy as jnp

_PANEL = 512
"""Columns of a panel of a symmetric product."""


def products(subscripts: str, *operands: Any) -> Any:
    """An einsum in float32 at full precision."""
    return jnp.einsum(
        subscripts, *operands, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )  # fmt: skip


def add_at(ref: Any, entry: Any, value: Any) -> None:
    """Add a value `[*maps, ...]` to the entries of a reference `[all maps, ...]` that `entry` `[*maps]` numbers."""
    if entry.ndim == 0:
        ref[entry] += value
    else:
        # Through a value, because an entry may be there twice.
        ref[...] = ref[...].at[entry].add(value)


def add_gram(ref: Any, entry: Any, x: Any) -> None:
    """Add `xᵀx` of `[*maps, tokens, size]`: of one map's only the panels on and right of the diagonal; see `mirrored`."""
    if entry.ndim > 0:
        return add_at(ref, entry, products("...ti,...tj->...ij", x, x))
    for start in range(0, x.shape[-1], _PANEL):
        rows = slice(start, min(start + _PANEL, x.shape[-1]))
        ref[entry, rows, start:] += products("ti,tj->ij", x[:, rows], x[:, start:])


def mirrored(gram: Any) -> Any:
    """The symmetric matrix whose panels on and right of the diagonal are given."""
    panel = jnp.arange(len(gram)) // _PANEL
    return jnp.where(panel[:, None] <= panel[None], gram, gram.T)
