"""Composing the factors of one parameter: every linear map of its stack, in one compiled call per shape."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.adapter.factors import Array, widened
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, Update
from lora_jax.compose.methods import METHODS
from lora_jax.compose.terms import Fused, Options, Part, joined, triplets
from lora_jax.methods import Gained
from lora_jax.svd import Triplets


def gathered(tree: Any) -> Any:
    """Arrays on a mesh with explicit axes, whole on every device of it; decompositions are not spread over devices."""

    def whole(leaf: Any) -> Any:
        mesh = jax.typeof(leaf).sharding.mesh
        explicit = AxisType.Explicit in mesh.axis_types
        return jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec())) if explicit else leaf

    return jax.tree.map(whole, tree)


def fused(name: str, options: Options, updates: Sequence[Any], weights: Sequence[Array], key: Array | None) -> Fused:
    """What a method makes of the factors of updates, in the layout of their site.

    Each map of a stack is composed by itself, with a key of its own.

    Args:
      name: of the method.
      options: its settings.
      updates: of one parameter, with factors.
      weights: numbers, or `[*batch]`.
      key: for methods that draw random numbers.
    """
    return _fused(name, options, _nameless(updates), tuple(weights), key)


def decomposed(update: Any) -> Triplets:
    """Singular triplets of what the factors of an update add, stacked: `[weights, rank, ...]`."""
    return _decomposed(*_nameless([update]))


def sizes(new: Any, updates: Sequence[Any], weights: Sequence[Array]) -> tuple[Array, Array, Array]:
    """Norms, over a stack, of what the factors of an update add, of the weighted sum, and of their difference."""
    return _sizes(*_nameless([new]), _nameless(updates), tuple(weights))


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
    a = widened(factors.a).reshape(stack, rank, site.fan_in)
    b = widened(factors.b).reshape(stack, rank, site.fan_out)
    spread = lambda value: jnp.broadcast_to(value, site.batch_shape).reshape(stack).astype(a.dtype)  # noqa: E731
    return Part(a, b, spread(factors.scale), spread(weight))


def _nameless(updates: Sequence[Any]) -> tuple[Any, ...]:
    """The updates without what differs between sites of one shape, so that those share a compilation."""
    return tuple(
        replace(each, site=replace(each.site, path="", uses=1, head=False), dropout=0.0) for each in updates
    )  # fmt: skip


def _laid_out(site: Site, a: Array, b: Array) -> tuple[Array, Array]:
    rank = a.shape[1]
    return a.reshape(site.a_shape(rank)), b.reshape(site.b_shape(rank))


@partial(jax.jit, static_argnames=("name", "options"))
def _fused(name: str, options: Options, updates: Any, weights: Any, key: Array | None) -> Fused:
    parts = tuple(stacked(update, weight) for update, weight in zip(updates, weights, strict=True))
    method, size = METHODS.find(name), parts[0].a.shape[0]
    keys = None if key is None else jax.random.split(key, size)
    one = lambda given: method.fuse(given[0], options, given[1])  # noqa: E731
    # Matrices of the weight's size are formed one at a time.
    found = jax.lax.map(one, (parts, keys)) if method.dense else jax.vmap(one)((parts, keys))
    a, b = _laid_out(updates[0].site, found.a, found.b)
    return Fused(a, b, found.whole.sum(), found.lost.sum())


@jax.jit
def _decomposed(update: Any) -> Triplets:
    part = stacked(update)
    found = jax.vmap(lambda part: triplets(*joined([part])))(part)
    left, right = _laid_out(update.site, found.left, found.right)
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
