"""PEFT's `"orthogonal"`: both factors random, their product zero."""

import jax
import jax.numpy as jnp

from lora_jax.adapter.registry import register
from lora_jax.adapter.site import Site
from lora_jax.errors import ConfigError


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
    at_least = jnp.promote_types(dtype, jnp.float32)
    rows, a_key, b_key = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(rows, (rank, rank), at_least))
    return _spanned(a_key, q[0::2], site.fan_in), _spanned(b_key, q[1::2], site.fan_out)


def _spanned(key: jax.Array, rows: jax.Array, size: int) -> jax.Array:
    weights = jax.random.normal(key, (rows.shape[0], size), rows.dtype) / 10
    return jnp.matmul(rows.T, weights, precision=jax.lax.Precision.HIGHEST)
