"""Norms of the columns of an adapted weight, without forming it: `‖W + ab‖² = ‖W‖² + 2⟨W, ab⟩ + ‖ab‖²`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.adapter.factors import Array, joined, widened
from lora_jax.adapter.site import Site

_EXACT = jax.lax.Precision.HIGHEST


def squares(site: Site, weight: Array) -> Array:
    """`[*batch, *out]` float32: the squared norm of each column of a weight.

    Example:
      >>> site = Site(path="w", shape=(2, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> squares(site, jnp.ones((2, 3))).tolist()
      [2.0, 2.0, 2.0]
    """
    summed = jnp.sum(jnp.square(widened(weight)), site.in_axes)
    left = sorted((*site.batch_axes, *site.out_axes))
    return jnp.transpose(summed, [left.index(axis) for axis in (*site.batch_axes, *site.out_axes)])


def changed_squares(site: Site, weight: Array, base_squares: Array, pairs: Sequence[tuple[Array, Array]]) -> Array:
    """The same for the weight plus the products of its factors; never below zero.

    Args:
      site: the roles of the weight's axes.
      weight: the frozen parameter, in any dtype.
      base_squares: `squares` of it.
      pairs: factors `[*batch, rank, *in]` and `[*batch, rank, *out]`, scales folded in.
    """
    where = jax.typeof(base_squares).sharding
    sums: Any = partial(_changed_squares, site)
    if AxisType.Explicit in where.mesh.axis_types:  # How sums over sharded axes are spread is left to the compiler.
        sums = jax.sharding.auto_axes(sums, out_sharding=where)
    return sums(weight, base_squares, pairs)


def beside(weight: Array, tree: Any) -> Any:
    """A tree of small arrays on the mesh of a weight, replicated if they are on none, where its axes are explicit."""
    mesh = jax.typeof(weight).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return tree
    elsewhere = lambda leaf: jax.typeof(leaf).sharding.mesh != mesh  # noqa: E731
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, whole) if elsewhere(leaf) else leaf, tree)


def _changed_squares(site: Site, weight: Array, base_squares: Array, pairs: Sequence[tuple[Array, Array]]) -> Array:
    a, b = joined(site, [(widened(a), widened(b)) for a, b in pairs])
    batch, into, out = (list(axes) for axes in (site.batch_axes, site.in_axes, site.out_axes))
    r, s = len(site.shape), len(site.shape) + 1
    met = _met(site, weight, a)
    gram = jnp.einsum(a, [*batch, r, *into], a, [*batch, s, *into], [*batch, r, s], precision=_EXACT)
    mixed = jnp.einsum(gram, [*batch, r, s], b, [*batch, s, *out], [*batch, r, *out], precision=_EXACT)
    change = jnp.sum(b * (2 * met + mixed), len(batch))
    return jnp.maximum(base_squares + change, 0)


def _met(site: Site, weight: Array, a: Array) -> Array:
    """`[*batch, rank, *out]`: the weight contracted with `a`, as exact as in float32.

    A narrow weight is not widened, which would be an array of its size: `a` is split into parts of its dtype instead,
    whose products with it are exact in float32.
    """
    batch, into, out = (list(axes) for axes in (site.batch_axes, site.in_axes, site.out_axes))
    r = len(site.shape)
    narrow = jnp.dtype(weight.dtype).itemsize == 2
    parts = _split(a, weight.dtype) if narrow else [a]
    found = jnp.einsum(
        jnp.concatenate(parts, len(batch)), [*batch, r, *into],
        weight if narrow else widened(weight), list(range(len(site.shape))),
        [*batch, r, *out], precision=_EXACT, preferred_element_type=jnp.float32,
    )  # fmt: skip
    return sum(jnp.split(found, len(parts), len(batch)), jnp.zeros((), jnp.float32))


def _split(a: Array, dtype: jnp.dtype) -> list[Array]:
    """Three arrays of a narrow dtype that add up to `a`, to float32 accuracy."""
    parts = []
    for _ in range(3):
        parts.append(a.astype(dtype))
        a = a - parts[-1].astype(a.dtype)
    return parts
