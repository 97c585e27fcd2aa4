"""EVA: A spans the directions in which the inputs vary most, B zero."""

import jax
import jax.numpy as jnp

from lora_jax.adapter.registry import register
from lora_jax.adapter.site import Site
from lora_jax.capture.captured import Components
from lora_jax.errors import ConfigError


@register("eva", reads=("components",))
def eva(
    key: jax.Array, site: Site, rank: int, dtype: str, *, components: Components, whiten: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The rows of A are the first principal components of the site's inputs; B zero.

    `"eva-whitened"` divides each by the square root of its singular value, as PEFT's `whiten=True` does. Start from
    `lora_jax.capture(..., "components")`; `lora_jax.redistribute` gives every layer a rank. Differs from PEFT: a layer
    whose inputs cannot be captured is refused where PEFT warns and draws at random; every layer sees the same batches,
    where PEFT leaves out those that have converged; and the factors are not rounded to the base's dtype.

    Args:
      key: unused.
      site: the site.
      rank: number of components, at most as many as were captured.
      dtype: of the factors.
      components: of one map.
      whiten: divide by the square root of the singular value.

    Raises:
      ConfigError: fewer components were captured.

    Example:
      >>> site = Site(path="w", shape=(4, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> found = Components(jnp.eye(4)[:3], jnp.array([16.0, 4.0, 1.0]), jnp.float32(22), jnp.float32(9))
      >>> a, b = eva(jax.random.key(0), site, 2, "float32", components=found)
      >>> a.tolist(), float(abs(b).max())
      ([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], 0.0)

    References:
      Paischer et al., Explained Variance Adaptation, arXiv 2410.07170.
    """
    known = components.vectors.shape[0]
    if rank > known:
        raise ConfigError(
            f"init='eva' with rank {rank} needs as many components, and {known} were captured of {site.fan_in} inputs: "
            "capture with the same config, or lower the rank"
        )
    a = components.vectors[:rank]
    if whiten:
        a = a / jnp.maximum(components.energies[:rank, None], jnp.finfo(jnp.float32).tiny) ** 0.25
    return a.astype(dtype), jnp.zeros((rank, site.fan_out), dtype)


@register("eva-whitened", reads=("components",))
def _whitened(
    key: jax.Array, site: Site, rank: int, dtype: str, *, components: Components
) -> tuple[jax.Array, jax.Array]:
    return eva(key, site, rank, dtype, components=components, whiten=True)
