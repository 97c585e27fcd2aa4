"""PEFT's default: A uniform, B zero."""

import jax
import jax.numpy as jnp

from lora_jax.adapter.registry import register
from lora_jax.adapter.site import Site


@register("default")
def default(key: jax.Array, site: Site, rank: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    """A from `U(±1/sqrt(fan_in))`, B zero; for a look-up table A zero, B from `N(0, 1)`.

    PEFT's `init_lora_weights=True` (`kaiming_uniform_` with `a=sqrt(5)`), except that PEFT rounds A to the
    base's dtype. arXiv 2106.09685 says "random Gaussian" for A; see `"gaussian"`.

    Example:
      >>> site = Site(path="w", shape=(16, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> a, b = default(jax.random.key(0), site, 2, "float32")
      >>> a.shape, bool(abs(a).max() <= 0.25), float(abs(b).max())
      ((2, 16), True, 0.0)
    """
    a_shape, b_shape = (rank, site.fan_in), (rank, site.fan_out)
    if site.kind == "embedding":
        return jnp.zeros(a_shape, dtype), jax.random.normal(key, b_shape).astype(dtype)
    bound = max(site.fan_in, 1) ** -0.5
    return jax.random.uniform(key, a_shape, minval=-bound, maxval=bound).astype(dtype), jnp.zeros(b_shape, dtype)
