"""Random starts: PEFT's `True`, `"gaussian"` and `"orthogonal"`."""

import jax
import jax.numpy as jnp

from lora_jax.adapter.registry import register
from lora_jax.adapter.site import Site
from lora_jax.dtypes import promoted
from lora_jax.errors import ConfigError


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


@register("orthogonal")
def orthogonal(key: jax.Array, site: Site, rank: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    """A and B random, in orthogonal halves of the rank space, so that both get a gradient at once.

    With Q a random orthogonal rank × rank matrix, A is spanned by every other row of Q and B by the rows
    between. The product is zero up to float32 rounding (about 1e-7), not bitwise. Differs from PEFT: every kind of
    site has it (PEFT refuses convolutions and falls back silently on look-ups), and the factors are at least
    float32 whatever `param_dtype` says, because rounding them to bfloat16 makes the product nonzero.

    Raises:
      ConfigError: the rank is odd.

    Example:
      >>> site = Site(path="w", shape=(16, 8), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> a, b = orthogonal(jax.random.key(0), site, 4, "float32")
      >>> a.shape, b.shape, bool(abs(a.T @ b).max() < 1e-6)
      ((4, 16), (4, 8), True)
    """
    if rank % 2:
        raise ConfigError(
            f"init='orthogonal' needs an even rank, not {rank}; change rank or rank_pattern, or use init='default'"
        )
    at_least = promoted(dtype, jnp.float32)
    rows, a_key, b_key = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(rows, (rank, rank), at_least))
    return _spanned(a_key, q[0::2], site.fan_in), _spanned(b_key, q[1::2], site.fan_out)


def _spanned(key: jax.Array, rows: jax.Array, size: int) -> jax.Array:
    weights = jax.random.normal(key, (rows.shape[0], size), rows.dtype) / 10
    return jnp.matmul(rows.T, weights, precision=jax.lax.Precision.HIGHEST)
