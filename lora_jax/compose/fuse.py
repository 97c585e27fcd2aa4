"""Composing the factors of one parameter: every linear map of its stack, in one compiled call per shape."""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.compose.methods import METHODS
from lora_jax.compose.terms import Fused, Options, Part, triplets
from lora_jax.site import Site
from lora_jax.svd import Triplets
from lora_jax.updates import Array, LowRank, widened


def stacked(factors: LowRank, weight: Array) -> Part:
    """Factors as stacks of matrices: `[weights, rank, fan_in]` and `[weights, rank, fan_out]`.

    Args:
      factors: without a start to take off again, as `Update.low_rank` gives them.
      weight: of the adapter; a number, or `[*batch]`.
    """
    site, rank = factors.site, factors.rank
    stack = prod(site.batch_shape)
    a = widened(factors.a).reshape(stack, rank, site.fan_in)
    b = widened(factors.b).reshape(stack, rank, site.fan_out)
    spread = lambda value: jnp.broadcast_to(value, site.batch_shape).reshape(stack).astype(a.dtype)  # noqa: E731
    return Part(a, b, spread(factors.scale), spread(weight))


@partial(jax.jit, static_argnames=("name", "options"))
def fused(name: str, options: Options, parts: Sequence[Part], key: Array | None) -> Fused:
    """What a method makes of stacks of parts; each map of a stack is composed by itself, with a key of its own."""
    method, size = METHODS.find(name), parts[0].a.shape[0]
    keys = None if key is None else jax.random.split(key, size)
    one = lambda given: method.fuse(given[0], options, given[1])  # noqa: E731
    # Matrices of the weight's size are formed one at a time.
    return jax.lax.map(one, (parts, keys)) if method.dense else jax.vmap(one)((parts, keys))


@jax.jit
def decomposed(a: Array, b: Array) -> Triplets:
    """Singular triplets of every product of a stack of factors."""
    return jax.vmap(triplets)(a, b)


def placed(site: Site, a: Array, b: Array) -> dict[str, Any]:
    """Stacks of factors as the fields of an update: in the site's layout, with a scale of one."""
    rank = a.shape[1]
    return {
        "a": a.reshape(site.a_shape(rank)),
        "b": b.reshape(site.b_shape(rank)),
        "scale": jnp.ones(site.batch_shape, jnp.float32),
        "site": site,
    }
