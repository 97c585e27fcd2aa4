"""CorDA: factors from the decomposition of the weight as the inputs see it."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax import svd
from lora_jax.adapter.registry import register
from lora_jax.adapter.site import Site
from lora_jax.capture.captured import Inputs
from lora_jax.errors import ConfigError

_HIGHEST = jax.lax.Precision.HIGHEST


def corda(
    key: jax.Array,
    site: Site,
    rank: int,
    dtype: str,
    *,
    weight: jax.Array,
    scale: jax.Array,
    inputs: Inputs,
    keep: Literal["ipm", "kpm"] = "ipm",
) -> tuple[jax.Array, jax.Array]:
    """Factors from the singular value decomposition `C·W = P·S·Qᵀ`, where `C` is the second moment of the inputs.

    `scale · Aᵀ·B` is then the part of `C⁻¹·(C·W) = W` with the largest singular values (`"corda-ipm"`, instruction
    previewed: what the data use most is trained), or the smallest (`"corda-kpm"`, knowledge preserved). Its start is
    kept and taken off again, where PEFT subtracts it from the base and rounds. As in PEFT, `C` gets 0.01 of its mean
    diagonal added, doubled until it can be inverted.

    The product is PEFT's, the sizes of A and B are not: `C` is divided by its mean diagonal here, so that they do not
    depend on how many tokens were in a batch (white inputs give PiSSA). PEFT also divides the inputs of each batch by
    their largest value, a weighting of batches by their outliers.

    Args:
      key: unused.
      site: the site.
      rank: at most the smaller side of the matrix.
      dtype: of the factors.
      weight: `[fan_in, fan_out]`.
      scale: of the product.
      inputs: of one map.
      keep: `"ipm"` or `"kpm"`.

    Raises:
      ConfigError: the rank is too high.

    Example:
      >>> site = Site(path="w", shape=(3, 2), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> seen = Inputs(jnp.diag(jnp.array([1.0, 1.0, 4.0])), jnp.zeros(3), jnp.float32(9))
      >>> weight = jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
      >>> a, b = corda(jax.random.key(0), site, 1, "float32", weight=weight, scale=jnp.float32(2), inputs=seen)
      >>> jnp.round(2 * a.T @ b, 3).tolist()
      [[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]

    References:
      Yang et al., CorDA, arXiv 2406.05223.
    """
    if rank > min(weight.shape):
        raise ConfigError(f"init='corda-{keep}' has rank {rank}, and the matrix {weight.shape}: lower the rank")
    moment, inverse = _invertible(inputs.second / jnp.maximum(inputs.count, 1))
    seen = svd.exact(jnp.matmul(moment, weight, precision=_HIGHEST), rank, last=keep == "kpm")
    roots = jnp.sqrt(seen.values / scale)[:, None]
    a = roots * jnp.matmul(seen.left, inverse, precision=_HIGHEST)
    return a.astype(dtype), (roots * seen.right).astype(dtype)


def _invertible(moment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The second moment, with unit mean diagonal and as much added to it as it needs, and its inverse."""
    moment = moment / jnp.maximum(jnp.trace(moment) / len(moment), jnp.finfo(jnp.float32).tiny)
    eye = jnp.eye(len(moment), dtype=moment.dtype)

    def damped(damping: Any) -> tuple[jax.Array, jax.Array]:
        fixed = moment + damping * eye
        return fixed, jnp.linalg.inv(fixed)

    def poor(damping: Any) -> jax.Array:
        fixed, inverse = damped(damping)
        return jnp.linalg.norm(jnp.matmul(fixed, inverse, precision=_HIGHEST) - eye) >= 0.05

    return damped(jax.lax.while_loop(poor, lambda damping: 2 * damping, jnp.asarray(0.01, moment.dtype)))


for _keep in ("ipm", "kpm"):
    register(f"corda-{_keep}", reads=("weight", "scale", "inputs"), away=True)(partial(corda, keep=_keep))
