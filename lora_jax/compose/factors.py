"""Low-rank factors as matrices: joined into sums, their singular value decomposition from a QR of each, their norms.

One linear map has `a` as `[rank, fan_in]` and `b` as `[rank, fan_out]`; stacks of layers or experts are mapped over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax import svd
from lora_jax.adapter.factors import Array, whole, widened
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, Update
from lora_jax.methods import Gained
from lora_jax.svd import Triplets

_EXACT = jax.lax.Precision.HIGHEST
_NOISE = 8 * float(jnp.finfo(jnp.float32).eps)
"""Singular values below this share of the factors' norms are what rounding leaves of zero."""


class Part(NamedTuple):
    """What one adapter adds to one linear map: `weight · scale · Σ_r a[r] ⊗ b[r]`, in float32.

    Attributes:
      a: `[rank, fan_in]`.
      b: `[rank, fan_out]`.
      scale: of the adapter.
      weight: of the adapter in the composition.
    """

    a: Array
    b: Array
    scale: Array
    weight: Array

    @property
    def rank(self) -> int:
        """Number of rank-one terms."""
        return self.a.shape[0]


class Fused(NamedTuple):
    """Factors that stand for several adapters, and what was lost on the way.

    Attributes:
      a: `[rank, fan_in]`.
      b: `[rank, fan_out]`, with every scale and weight in it (of whole sites both are in the site's layout).
      whole: squared Frobenius norm of what was to be represented.
      lost: squared norm of what is missing of it.
    """

    a: Array
    b: Array
    whole: Array
    lost: Array


@dataclass(frozen=True)
class Options:
    """Settings of a composition that decide shapes or code; static under `jit`.

    Attributes:
      rank: the rank to keep at most; None for what the method keeps by default.
      density: share of entries that are kept.
      majority_sign: how signs are elected.
    """

    rank: int | None = None
    density: float = 1.0
    majority_sign: str = "total"


def product(left: Array, right: Array) -> Array:
    """A matrix product at full precision."""
    return jnp.dot(left, right, precision=_EXACT)


def joined(parts: Sequence[Part]) -> tuple[Array, Array]:
    """All parts as one pair of factors: the weighted sum, exactly."""
    a = jnp.concatenate([part.a for part in parts])
    return a, jnp.concatenate([part.weight * part.scale * part.b for part in parts])


def triplets(a: Array, b: Array) -> svd.Triplets:
    """Singular triplets of `Σ_r a[r] ⊗ b[r]`, from a QR of each factor and an SVD of the rank's size.

    Example:
      >>> found = triplets(jnp.float32([[3, 0, 0], [0, 1, 0]]), jnp.float32([[0, 1], [2, 0]]))
      >>> [round(float(value), 5) for value in found.values]
      [3.0, 2.0]
    """
    (inputs, core_a), (outputs, core_b) = jnp.linalg.qr(a.T), jnp.linalg.qr(b.T)
    core = product(core_a, core_b.T)
    inner = svd.exact(core, min(core.shape))
    return svd.Triplets(product(inner.left, inputs.T), inner.values, product(inner.right, outputs.T))


def significant(a: Array, b: Array) -> svd.Triplets:
    """The same, with a value of zero where it is nothing but rounding: as where a start is taken off again."""
    found = triplets(a, b)
    noise = _NOISE * jnp.linalg.norm(a) * jnp.linalg.norm(b)
    return found._replace(values=jnp.where(found.values > noise, found.values, 0))


def energy(a: Array, b: Array) -> Array:
    """Squared Frobenius norm of `Σ_r a[r] ⊗ b[r]`, from two Gram matrices."""
    return jnp.maximum(inner_product((a, b), (a, b)), 0)


def inner_product(one: tuple[Array, Array], other: tuple[Array, Array]) -> Array:
    """`⟨Σ_r a[r] ⊗ b[r], Σ_s a[s] ⊗ b[s]⟩` of two pairs of factors."""
    grams = [product(mine, theirs.T) for mine, theirs in zip(one, other, strict=True)]
    return jnp.sum(grams[0] * grams[1])


def balanced(found: svd.Triplets, rank: int) -> Fused:
    """The first triplets as factors of equal size, and the energy of the others."""
    size = jnp.square(found.values)
    root = jnp.sqrt(found.values[:rank, None])
    return Fused(root * found.left[:rank], root * found.right[:rank], jnp.sum(size), jnp.sum(size[rank:]))


def compressed(a: Array, b: Array, rank: int) -> Fused:
    """The best approximation of `Σ_r a[r] ⊗ b[r]` of a rank; nothing is lost if it has no more terms.

    References:
      Eckart and Young, 1936: no other matrix of that rank is nearer.
    """
    return balanced(triplets(a, b), rank)


def exactly(a: Array, b: Array) -> Fused:
    """Factors of which nothing is lost."""
    return Fused(a, b, energy(a, b), jnp.zeros((), a.dtype))


def largest(parts: Sequence[Part], options: Options) -> int:
    """The rank asked for, or that of the largest part."""
    return max(part.rank for part in parts) if options.rank is None else options.rank


def gathered(tree: Any) -> Any:
    """Arrays on a mesh with explicit axes, whole on every device of it; decompositions are not spread over devices."""

    def whole(leaf: Any) -> Any:
        mesh = jax.typeof(leaf).sharding.mesh
        explicit = AxisType.Explicit in mesh.axis_types
        return jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec())) if explicit else leaf

    return jax.tree.map(whole, tree)


def decomposed(update: Any) -> Triplets:
    """Singular triplets of what the factors of an update add, stacked: `[weights, rank, ...]`."""
    return _decomposed(*nameless([update]))


def sizes(new: Any, updates: Sequence[Any], weights: Sequence[Array]) -> tuple[Array, Array, Array]:
    """Norms, over a stack, of what the factors of an update add, of the weighted sum, and of their difference."""
    return _sizes(*nameless([new]), nameless(updates), tuple(weights))


def has_factors(update: Update) -> bool:
    """Whether an update has low-rank factors, found out without computing them."""
    plain = isinstance(update, Gained) or type(update).low_rank is LowRank.low_rank
    return plain or jax.eval_shape(lambda update: update.low_rank(), update) is not None


def plain_factors(update: Any) -> LowRank:
    """The factors of an update that has some: of DoRA those inside of its norm."""
    if isinstance(update, Gained):
        return LowRank(update.a, update.b, jnp.ones(update.site.batch_shape, jnp.float32), update.site, update.dropout)
    factors = update.low_rank()
    assert factors is not None
    return factors


def stacked(update: Any, weight: Any = 1.0) -> Part:
    """Factors as stacks of matrices, `[weights, rank, fan]`, and a scale and a weight for each."""
    factors = plain_factors(update)
    site, rank = factors.site, factors.rank
    stack = prod(site.batch_shape)
    a = whole(widened(factors.a)).reshape(stack, rank, site.fan_in)
    b = whole(widened(factors.b)).reshape(stack, rank, site.fan_out)
    spread = lambda value: jnp.broadcast_to(value, site.batch_shape).reshape(stack).astype(a.dtype)  # noqa: E731
    return Part(a, b, spread(factors.scale), spread(weight))


def nameless(updates: Sequence[Any]) -> tuple[Any, ...]:
    """The updates without what differs between sites of one shape, so that those share a compilation."""
    return tuple(
        replace(each, site=replace(each.site, path="", uses=1, head=False), dropout=0.0) for each in updates
    )  # fmt: skip


def laid_out(site: Site, a: Array, b: Array) -> tuple[Array, Array]:
    """Stacks of factors in the layout of their site."""
    rank = a.shape[1]
    return a.reshape(site.a_shape(rank)), b.reshape(site.b_shape(rank))


@jax.jit
def _decomposed(update: Any) -> Triplets:
    part = stacked(update)
    found = jax.vmap(lambda part: triplets(*joined([part])))(part)
    left, right = laid_out(update.site, found.left, found.right)
    return Triplets(left, found.values.reshape(*update.site.batch_shape, -1), right)


@jax.jit
def _sizes(new: Any, updates: Any, weights: Any) -> tuple[Array, Array, Array]:
    """From singular values: in Gram matrices a small difference of large products would be rounded away."""

    def norm(parts: Sequence[Part]) -> Array:
        values = jax.vmap(lambda parts: triplets(*joined(parts)).values)(tuple(parts))
        return jnp.sqrt(jnp.sum(jnp.square(values)))

    made = stacked(new)
    parts = [stacked(update, weight) for update, weight in zip(updates, weights, strict=True)]
    return norm([made]), norm(parts), norm([made, *(part._replace(weight=-part.weight) for part in parts)])
