"""PEFT's `"gaussian"`: A normal, B zero."""

import jax
import jax.numpy as jnp

from lora_jax.adapter.registry import register
from lora_jax.adapter.site import Site
from lora_jax.init.default import default


@register("gaussian")
def gaussian(key: jax.Array, site: Site, rank: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    """A from `N(0, std=1/rank)`, B zero; a look-up table starts as with `"default"`, as in PEFT.

    The standard deviation, not the variance, is `1/rank`, whatever the fan-in: this is what PEFT does, while
    arXiv 2106.09685 leaves the size open.

    Example:
      >>> site = Site(path="w", shape=(512, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> a, b = gaussian(jax.random.key(0), site, 4, "float32")
      >>> round(float(a.std()), 2), float(abs(b).max())
      (0.25, 0.0)
    """
    if site.kind == "embedding":
        return default(key, site, rank, dtype)
    a = jax.random.normal(key, (rank, site.fan_in)) / rank
    return a.astype(dtype), jnp.zeros((rank, site.fan_out), dtype)
