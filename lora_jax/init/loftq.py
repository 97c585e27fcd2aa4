"""LoftQ: factors fitted to what quantising the base takes away."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp

from lora_jax import svd
from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.by_path import updates_by_path
from lora_jax.adapter.factors import Array, outer, times, whole, widened
from lora_jax.adapter.updates import LowRank
from lora_jax.errors import ConfigError, ParameterError
from lora_jax.paths import named_leaves, rebuild
from lora_jax.quantise import Scheme, dequantise
from lora_jax.quantise import quantise as quantised_tree


def loftq(
    adapter: Adapter, params: Any, quantise: Callable[[Array], Array] | Scheme, *, steps: int = 1
) -> tuple[Adapter, Any]:
    """Fit low-rank factors to the error of quantisation, so that the adapted model starts close to the full one.

    Alternates between quantising `W - scale·ab` and decomposing what is left, `W - Q`. PEFT ignores the scale there,
    so that its start is wrong unless `alpha == rank`, and needs bitsandbytes and a GPU.

    Args:
      adapter: from `lora_jax.init`; ranks and scales are kept, the values of its factors are not used.
      params: the full base; left untouched.
      quantise: a format of `lora_jax.quantise`, in blocks of 64. Or a function: of a parameter (in its own layout,
        float32) after quantisation, as numbers again, what the quantised model computes with.
      steps: alternations; 1 in PEFT.

    Returns:
      The adapter with fitted factors, and the base for it: quantised as `lora_jax.quantise` does it, where a format was
      given; else parameters whose adapted ones are what the function returned, in their own dtype.

    Raises:
      ParameterError: the adapter does not fit, or holds something else than plain low-rank factors.
      ConfigError: a rank is higher than that of its parameter.

    Example:
      >>> import jax, lora_jax as lora
      >>> params = {"w": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> fn, x = lambda params, x: x @ params["w"], jnp.ones((2, 16))
      >>> sites = lora.find_sites(fn, params, x)
      >>> adapter = lora.init(jax.random.key(1), lora.LoraConfig(rank=4, targets="w"), params, sites)
      >>> fitted, coarse = lora.loftq(adapter, params, "int4")
      >>> coarse = lora.dequantise(coarse)
      >>> error = lambda tree: float(jnp.linalg.norm(tree["w"] - params["w"]))
      >>> error(lora.merge(coarse, fitted)) < 0.7 * error(coarse)
      True

    References:
      Li et al., LoftQ, arXiv 2310.08659.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps!r} must be at least 1")
    leaves, treedef = named_leaves(params)
    run = quantise if callable(quantise) else partial(_numbers, quantise)
    fitted: dict[str, Any] = {}
    coarse = dict(leaves)
    for path, updates in updates_by_path(adapter, leaves).items():
        update = updates[0].update
        if type(update) is not LowRank:
            raise ParameterError(f"{path!r} holds a {type(update).__name__}; loftq fits plain low-rank factors")
        fitted[path], quantised = _alternate(update, whole(widened(leaves[path])), run, steps)
        coarse[path] = quantised.astype(leaves[path].dtype)
    base = rebuild(treedef, coarse)
    if callable(quantise):
        return Adapter(fitted), base
    # Those that were fitted are on their levels already, and stay there, however small they are.
    chosen = quantised_tree(base, quantise, where=lambda path, leaf: path in fitted)
    return Adapter(fitted), quantised_tree(chosen, quantise)


def _numbers(format: Scheme, weight: Array) -> Array:
    return dequantise(quantised_tree({"w": weight}, format, where=("w",)))["w"]


def _alternate(update: LowRank, weight: Array, quantise: Callable[[Array], Array], steps: int) -> tuple[LowRank, Array]:
    quantised = quantise(weight)
    for step in range(steps):
        update = _decomposed(update, weight - quantised)
        if step + 1 < steps:
            quantised = quantise(weight - outer(update.site, *update.pairs()[0]))
    return update, quantised


def _decomposed(update: LowRank, rest: Array) -> LowRank:
    """The factors whose scaled product is nearest to what is left of each weight of a stack."""
    site, rank = update.site, update.rank
    found = svd.of_site(site, rest, rank)
    root = jnp.sqrt(found.values)[..., None]
    a, b = (root * found.left).reshape(site.a_shape(rank)), (root * found.right).reshape(site.b_shape(rank))
    half = jnp.sqrt(jnp.abs(update.scale))
    a, b = times(1 / half, a), times(jnp.sign(update.scale) / half, b)
    return replace(update, a=a.astype(update.a.dtype), b=b.astype(update.b.dtype), a_start=None, b_start=None)
