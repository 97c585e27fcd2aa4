"""PiSSA and MiLoRA: start at the principal, or at the minor, singular components of the weight."""

import jax
import jax.numpy as jnp

from lora_jax import svd
from lora_jax.adapter.registry import register
from lora_jax.adapter.site import Site
from lora_jax.svd import Triplets


@register("pissa", reads=("weight", "scale"), away=True)
def pissa(
    key: jax.Array, site: Site, rank: int, dtype: str, *, weight: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Factors whose scaled product is the best approximation of the weight, from a full decomposition.

    PEFT's `init_lora_weights="pissa"`, except that the base keeps its value: see `LowRank`. So a bfloat16 model does
    not change at the start, and nothing has to be decomposed again when the adapter is loaded.

    Example:
      >>> site = Site(path="w", shape=(4, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> weight = jnp.outer(jnp.arange(4.0), jnp.ones(3))  # of rank one
      >>> a, b = pissa(jax.random.key(0), site, 1, "float32", weight=weight, scale=jnp.float32(2))
      >>> bool(jnp.allclose(2 * a.T @ b, weight, atol=1e-5))
      True

    References:
      Meng et al., PiSSA, arXiv 2404.02948.
    """
    return _halves(svd.exact(weight, rank), scale, dtype)


@register("pissa_niter_N", reads=("weight", "scale"), away=True)
def pissa_niter(
    key: jax.Array, site: Site, rank: int, dtype: str, *, weight: jax.Array, scale: jax.Array, number: int
) -> tuple[jax.Array, jax.Array]:
    """The same, from a randomised decomposition with `number` iterations: much faster for large weights.

    PEFT's `"pissa_niter_4"` draws other random directions when it loads the adapter, and so restores another base. Here
    the start is kept with the adapter.

    Example:
      >>> import lora_jax as lora
      >>> lora.LoraConfig(init="pissa_niter_4").init
      'pissa_niter_4'
    """
    return _halves(svd.randomised(key, weight, rank, number), scale, dtype)


@register("milora", reads=("weight", "scale"), away=True)
def milora(
    key: jax.Array, site: Site, rank: int, dtype: str, *, weight: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Factors whose scaled product is what the smallest singular values contribute to the weight.

    Training then changes what matters least to the base. PEFT has no such start.

    Example:
      >>> site = Site(path="w", shape=(3, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> a, b = milora(jax.random.key(0), site, 1, "float32", weight=jnp.diag(jnp.float32([3, 1, 2])), scale=1.0)
      >>> (a.T @ b).round(4).tolist()
      [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]

    References:
      Wang et al., MiLoRA, arXiv 2406.09044.
    """
    return _halves(svd.exact(weight, rank, last=True), scale, dtype)


def _halves(found: Triplets, scale: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Factors that share the singular values evenly, the scale taken out of their product."""
    root = jnp.sqrt(found.values / scale)[:, None]
    return (root * found.left).astype(dtype), (root * found.right).astype(dtype)
