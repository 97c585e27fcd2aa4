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


def panels(size: int) -> list[slice]:
    """The rows of each panel of a symmetric matrix; a panel holds the columns from its first row on.

    >>> panels(1200)
    [slice(0, 512, None), slice(512, 1024, None), slice(1024, 1200, None)]
    """
    return [slice(start, min(start + _PANEL, size)) for start in range(0, size, _PANEL)]


def add_gram(refs: tuple[Any, ...], entry: Any, x: Any) -> None:
    """Add `xᵀx` of `[*maps, tokens, size]` to the panels `[all maps, rows, columns]` of a symmetric matrix."""
    for ref, rows in zip(refs, panels(x.shape[-1]), strict=True):
        add_at(ref, entry, products("...ti,...tj->...ij", x[..., rows], x[..., rows.start :]))


def whole(given: tuple[Any, ...]) -> Any:
    """The symmetric matrix of its panels `[rows, columns]`.

    >>> whole((jnp.array([[1.0, 2.0], [2.0, 5.0]]),)).tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    size = given[0].shape[-1]
    upper = jnp.concatenate([jnp.pad(panel, [(0, 0), (size - panel.shape[-1], 0)]) for panel in given])
    number = jnp.arange(size) // _PANEL
    return jnp.where(number[:, None] <= number[None], upper, upper.T)
