"""Arithmetic of LoRA's factors, `a` `[*batch, rank, *in]` and `b` `[*batch, rank, *out]`, and of their parameter."""

from collections.abc import Sequence
from math import prod
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.adapter.site import Site
from lora_jax.quantised.leaf import dense_of

Array: TypeAlias = jax.Array


def outer(site: Site, a: Array, b: Array) -> Array:
    """`Σ_r a[r] ⊗ b[r]` in the layout of the site's parameter, in float32 at full precision."""
    batch, into, out = (list(axes) for axes in (site.batch_axes, site.in_axes, site.out_axes))
    rank = len(site.shape)
    return jnp.einsum(
        widened(a), [*batch, rank, *into], widened(b), [*batch, rank, *out], list(range(rank)),
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip


def aligned(site: Site, per_output: Array) -> Array:
    """An array `[*batch, *out]` that broadcasts against the site's parameter."""
    axes = (*site.batch_axes, *site.out_axes)
    moved = jnp.transpose(per_output, sorted(range(len(axes)), key=lambda i: axes[i]))
    return jnp.expand_dims(moved, sorted(site.in_axes))


def joined(site: Site, pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """All pairs of factors of a site in one, of the sum of their ranks."""
    a, b = (jnp.concatenate(each, len(site.batch_axes)) for each in zip(*pairs, strict=True))
    return a, b


def matrices(site: Site, value: Array) -> Array:
    """`[weights, fan_in, fan_out]`: every linear map in a stack, of an array laid out as the site's parameter."""
    moved = jnp.transpose(value, (*site.batch_axes, *site.in_axes, *site.out_axes))
    shape = prod(site.batch_shape), site.fan_in, site.fan_out
    return moved if moved.shape == shape else whole(moved).reshape(shape)


def whole(array: Array) -> Array:
    """The array, replicated if it is on a mesh with explicit axes: for what needs all of it, as decompositions do."""
    sharding = jax.typeof(array).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return array
    everywhere = NamedSharding(sharding.mesh, PartitionSpec(*[None] * array.ndim))
    return array if sharding == everywhere else jax.sharding.reshard(array, everywhere)


def over(lead: Array, array: Array) -> Array:
    """An array of the leading axes of another, such that it broadcasts against that."""
    return lead.reshape(lead.shape + (1,) * (array.ndim - lead.ndim))


def times(scale: Array, factor: Array) -> Array:
    """A factor `[*batch, rank, ...]` times a scale of its leading axes, in the factor's dtype."""
    return factor * over(scale, factor).astype(factor.dtype)


def widened(value: Any) -> Array:
    """The array (or the numbers of a quantised one) in float32, or as it is if that is wider."""
    return jnp.asarray(dense_of(value), jnp.float32 if value.dtype.itemsize < 4 else value.dtype)


def is_traced(value: Any) -> bool:
    """Whether an array has no contents yet, because it is inside `jit`, `grad` or `vmap`."""
    # Only arrays with contents can be copied. The class is asked, as JAX explains what a traced array lacks by a walk
    # through the whole program.
    return isinstance(value, jax.Array) and not hasattr(type(value), "copy_to_host_async")
