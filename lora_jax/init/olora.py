"""OLoRA: start at the first columns of a QR decomposition of the weight."""

import jax
import jax.numpy as jnp

from lora_jax.adapter.registry import register
from lora_jax.adapter.site import Site
from lora_jax.svd import check_rank


@register("olora", reads=("weight",), away=True)
def olora(key: jax.Array, site: Site, rank: int, dtype: str, *, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """B orthonormal, A the rows of R that go with it, from `rank` columns of the weight only.

    PEFT's `init_lora_weights="olora"`, which decomposes the whole weight for the same factors, fails on `Conv1D`
    layers, and changes the base: see `LowRank`. As in PEFT the scale is not taken out of the product.

    Example:
      >>> site = Site(path="w", shape=(4, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> weight = jax.random.normal(jax.random.key(1), (4, 3))
      >>> a, b = olora(jax.random.key(0), site, 3, "float32", weight=weight)
      >>> bool(jnp.allclose(a.T @ b, weight, atol=1e-5)), bool(jnp.allclose(b @ b.T, jnp.eye(3), atol=1e-5))
      (True, True)

    References:
      Büyükakyüz, OLoRA, arXiv 2406.01775.
    """
    check_rank(weight, rank)
    # PyTorch's weight is (out, in): its first columns are what the first inputs contribute.
    basis = jnp.linalg.qr(weight[:rank].T)[0]
    rows = jnp.dot(weight, basis, precision=jax.lax.Precision.HIGHEST)
    return rows.T.astype(dtype), basis.T.astype(dtype)
