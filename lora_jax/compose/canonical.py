"""An adapter in its canonical form: at every parameter a sum of orthogonal rank-one terms, strongest first."""

from dataclasses import replace

import jax.numpy as jnp

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.factors import over
from lora_jax.adapter.updates import Update
from lora_jax.compose.fuse import decomposed, gathered, has_factors
from lora_jax.methods import AdaLora, Dora, Gained


def canonical(adapter: Adapter) -> Adapter:
    """Rewrite an adapter as `Σ_i d_i · u_i ⊗ v_i` at every parameter, with orthonormal `u` and `v` and `d` descending.

    That is the singular value decomposition of each update, from a QR of its factors and an SVD of the rank's size. It
    does not depend on how the factors were scaled, rotated or started, so that terms of several adapters compare.

    Args:
      adapter: left untouched.

    Returns:
      An adapter that computes the same. Factors become `AdaLora`, with `v` in `a`, `u` in `b`, `d` in `values` and a
      scale of one. DoRA stays DoRA, with `d · u` in `b`, and what has no factors stays as it is.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> adapter = jax.tree.map(lambda leaf: leaf + 0.5, adapter)
      >>> update = lora.canonical(adapter)["w"]
      >>> bool(jnp.allclose(update.a @ update.a.T, jnp.eye(2), atol=1e-6)), bool(update.values[0] >= update.values[1])
      (True, True)
      >>> bool(jnp.allclose(update.delta(), adapter["w"].delta(), atol=1e-5))
      True
    """
    return Adapter({path: _canonical(update) for path, update in gathered(adapter).items()})


def _canonical(update: Update) -> Update:
    if isinstance(update, Gained) or not has_factors(update):
        return update
    found, site = decomposed(update), update.site
    one = jnp.ones(site.batch_shape, jnp.float32)
    if isinstance(update, Dora):
        b = found.right * over(found.values, found.right)
        return replace(update, a=found.left, b=b, scale=one, a_start=None, b_start=None)
    return AdaLora(found.left, found.right, one, site, update.dropout, values=found.values)
