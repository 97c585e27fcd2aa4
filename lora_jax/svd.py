"""The largest singular triplets of matrices, exactly or by a randomised range finder."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapter.factors import Array, matrices, whole, widened
from lora_jax.adapter.site import Site
from lora_jax.errors import ConfigError
from lora_jax.quantised.leaf import dense_of

OVERSAMPLING = 10
"""Extra directions of the randomised range finder; torch's `svd_lowrank`, which PEFT calls, has none."""

_EXACT = jax.lax.Precision.HIGHEST


class Triplets(NamedTuple):
    """`Σ_r values[r] · left[r] ⊗ right[r]`, values descending.

    Attributes:
      left: `[rank, rows]`, orthonormal.
      values: `[rank]`.
      right: `[rank, columns]`, orthonormal.
    """

    left: Array
    values: Array
    right: Array


def exact(matrix: Array, rank: int, *, last: bool = False) -> Triplets:
    """The first singular triplets, or the last ones, from a full decomposition.

    Args:
      matrix: `[rows, columns]` float32.
      rank: how many.
      last: those of the smallest singular values, still in descending order.

    Raises:
      ConfigError: the matrix has fewer.

    Example:
      >>> exact(jnp.diag(jnp.float32([3, 1, 2])), 2).values.tolist()
      [3.0, 2.0]
    """
    check_rank(matrix, rank)
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    kept = slice(-rank, None) if last else slice(rank)
    return Triplets(left.T[kept], values[kept], right[kept])


def randomised(key: Array, matrix: Array, rank: int, iterations: int) -> Triplets:
    """The first singular triplets, approximately, from `2 · iterations + 2` thin products with the matrix.

    Args:
      key: for the random directions; the same key gives the same triplets.
      matrix: `[rows, columns]` float32.
      rank: how many.
      iterations: of the subspace iteration; 2 to 4 are enough for weights, whose singular values fall slowly.

    Raises:
      ConfigError: the matrix has fewer.

    References:
      Halko et al., arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    check_rank(matrix, rank)
    rows, columns = matrix.shape
    drawn = jax.random.normal(key, (columns, min(rank + OVERSAMPLING, rows, columns)), matrix.dtype)
    basis = _orthonormal(jnp.dot(matrix, drawn, precision=_EXACT))
    for _ in range(iterations):
        across = _orthonormal(jnp.dot(matrix.T, basis, precision=_EXACT))
        basis = _orthonormal(jnp.dot(matrix, across, precision=_EXACT))
    inner = exact(jnp.dot(basis.T, matrix, precision=_EXACT), rank)
    return inner._replace(left=jnp.dot(inner.left, basis.T, precision=_EXACT))


def of_site(site: Site, weight: Array, rank: int) -> Triplets:
    """The first singular triplets of every weight of a site's stack, on one leading axis.

    Raises:
      ConfigError: a weight has fewer.

    Example:
      >>> axes = {"in_axes": (1,), "out_axes": (2,), "batch_axes": (0,)}
      >>> site = Site(path="w", shape=(4, 2, 3), dtype="float32", kind="dense", **axes)
      >>> of_site(site, jnp.ones((4, 2, 3)), 1).left.shape
      (4, 1, 2)
    """
    return _each(matrices(site, dense_of(weight)), rank)


def check_rank(matrix: Array, rank: int) -> None:
    """Raise a `ConfigError` if a matrix cannot have that rank; PEFT then makes smaller factors without a word."""
    if rank > min(matrix.shape):
        raise ConfigError(
            f"rank {rank} is more than a {' × '.join(map(str, matrix.shape))} matrix has; lower rank=, or give this "
            "parameter its own in rank_pattern"
        )


def _orthonormal(columns: Array) -> Array:
    return jnp.linalg.qr(columns)[0]


@partial(jax.jit, static_argnames="rank")
def _each(stack: Array, rank: int) -> Triplets:
    """One after the other: XLA would hold the workspace of all of them at once."""
    return jax.lax.map(lambda matrix: exact(whole(widened(matrix)), rank), stack)
