"""Compositions that choose: the strongest rank-one terms of all adapters, or the strongest adapters."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.factors import Array
from lora_jax.compose.terms import Fused, Options, Part, energy, joined, triplets
from lora_jax.errors import ConfigError


def rank_one(parts: Sequence[Part], options: Options, key: Array | None) -> Fused:
    """The strongest of all adapters' singular terms, each as it is: by default half of as many as the ranks add up to.

    What one adapter does stays apart from what another does; a singular value decomposition of the sum mixes them.
    """
    found = [triplets(part.a, part.scale * part.b) for part in parts]
    values = jnp.concatenate([part.weight * each.values for part, each in zip(parts, found, strict=True)])
    root = jnp.sqrt(jnp.abs(values))[:, None]
    a = root * jnp.concatenate([each.left for each in found])
    b = jnp.sign(values)[:, None] * root * jnp.concatenate([each.right for each in found])
    rank = _half(parts) if options.rank is None else options.rank
    return _chosen(a, b, jnp.argsort(-jnp.abs(values)), jnp.arange(len(values)) < rank, rank)


def block(parts: Sequence[Part], options: Options, key: Array | None) -> Fused:
    """Whole adapters, those with most energy first, as many as fit into a rank.

    The rank is half of the sum by default, and at least that of the largest adapter, so that the strongest one fits.
    """
    a, b = joined(parts)
    sizes = jnp.stack([jnp.square(part.weight * part.scale) * energy(part.a, part.b) for part in parts])
    ranks = np.array([part.rank for part in parts])
    rank = max(_half(parts), ranks.max()) if options.rank is None else options.rank
    if rank < ranks.max():
        raise ConfigError(f"method='block' keeps whole adapters, and rank={rank} is less than their {ranks.max()}")
    by_size = jnp.argsort(-sizes)
    place = jnp.argsort(by_size)
    ends = jnp.cumsum(jnp.asarray(ranks)[by_size])[place]
    owner = np.repeat(np.arange(len(parts)), ranks)
    order = jnp.argsort(place[owner])
    return _chosen(a, b, order, (ends[owner] <= rank)[order], int(rank))


def _chosen(a: Array, b: Array, order: Array, keep: Array, rank: int) -> Fused:
    """The terms to keep, in order, filled up with zeros; the rest is lost."""
    a, b = a[order], b[order]
    first = min(rank, len(a))
    rest = jnp.where(keep, 0, 1)[:, None] * b
    return Fused(a[:first], (b - rest)[:first], energy(a, b), energy(a, rest))


def _half(parts: Sequence[Part]) -> int:
    total = sum(part.rank for part in parts)
    return total if len(parts) == 1 else total // 2
