"""Compositions that are weighted sums: exact, of a lower rank, along a circle, or merged in a shared basis."""

from collections.abc import Sequence
from itertools import accumulate

import jax.numpy as jnp

from lora_jax import svd
from lora_jax.adapter.factors import Array
from lora_jax.compose.elementwise import TIES, merged
from lora_jax.compose.terms import (
    Fused,
    Options,
    Part,
    compressed,
    exactly,
    inner_product,
    joined,
    largest,
    product,
)

PARALLEL = 0.9995
"""Cosine from which on two updates count as parallel, and are interpolated along a line."""


def cat(parts: Sequence[Part], options: Options, key: Array | None) -> Fused:
    """Every term of every adapter: exact, and ranks add up."""
    return exactly(*joined(parts))


def truncated(parts: Sequence[Part], options: Options, key: Array | None) -> Fused:
    """The weighted sum, at a rank: no other factors of that rank are nearer to it."""
    return compressed(*joined(parts), largest(parts, options))


def slerp(parts: Sequence[Part], options: Options, key: Array | None) -> Fused:
    """Two updates interpolated along the circle through both; a weighted sum, with weights from their angle.

    References:
      Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.
    """
    if len(parts) == 1:
        return truncated(parts, options, key)
    pairs = [(part.a, part.scale * part.b) for part in parts]
    first, inner, second = (inner_product(pairs[i], pairs[j]) for i, j in ((0, 0), (0, 1), (1, 1)))
    turned = along_circle(first, inner, second, jnp.stack([part.weight for part in parts]))
    parts = [part._replace(weight=weight) for part, weight in zip(parts, turned, strict=True)]
    return truncated(parts, options, key)


def along_circle(first: Array, inner: Array, second: Array, weights: Array) -> Array:
    """Weights of two vectors on the circle through both.

    Args:
      first: squared norm of the first vector.
      inner: product of both.
      second: squared norm of the second vector.
      weights: `[2]`, shares of the angle between them that add up to one.

    Returns:
      `[2]`; the shares themselves where the vectors are parallel, or one of them is zero.
    """
    size = jnp.sqrt(first * second)
    known = size > 0
    cosine = jnp.where(known, inner / jnp.where(known, size, 1), 1)
    parallel = jnp.abs(cosine) > PARALLEL
    angle = jnp.arccos(jnp.where(parallel, 0, cosine))
    return jnp.where(parallel, weights, jnp.sin(weights * angle) / jnp.sin(angle))


def knots(parts: Sequence[Part], options: Options, key: Array | None) -> Fused:
    """TIES in a basis that all updates share: the left singular vectors of the updates side by side.

    References:
      Stoica et al., KnOTS, arXiv 2410.19735.
    """
    outputs, core_b = jnp.linalg.qr(jnp.concatenate([part.scale * part.b for part in parts]).T)
    mine = jnp.split(core_b, _ends([part.rank for part in parts]), axis=1)
    inputs, cores = zip(*[jnp.linalg.qr(part.a.T) for part in parts], strict=True)
    core = jnp.concatenate([product(b, a.T) for b, a in zip(mine, cores, strict=True)], 1)
    shared = svd.exact(core, min(core.shape))
    # A direction without size has arbitrary vectors, which would take part in pruning and voting.
    real = shared.values > shared.values[0] * jnp.finfo(core.dtype).eps * max(core.shape)
    blocks = jnp.split(shared.right * real[:, None], _ends([basis.shape[1] for basis in inputs]), axis=1)
    aligned = [product(own, basis.T) for own, basis in zip(blocks, inputs, strict=True)]
    a = merged(aligned, jnp.stack([part.weight for part in parts]), TIES, options, key)
    b = shared.values[:, None] * product(shared.left, outputs.T)
    return compressed(a, b, largest(parts, options))


def _ends(sizes: Sequence[int]) -> list[int]:
    """Where all pieces but the last end."""
    return list(accumulate(sizes))[:-1]
