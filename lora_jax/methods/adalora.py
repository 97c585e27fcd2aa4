"""AdaLoRA: factors in the form of a singular value decomposition, whose least important terms are pruned."""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.factors import Array, over, times
from lora_jax.adapter.registry import Start, register_method
from lora_jax.adapter.updates import LowRank, pytree

DEVIATION = 0.02
"""Of both factors at the start, as in PEFT."""


@register_method("adalora", draws=False)
@pytree("site", "dropout")
@dataclass(frozen=True, kw_only=True)
class AdaLora(LowRank):
    """Factors with singular values between them: `W + scale · Σ_r value[r] · a[r] ⊗ b[r]`.

    Values start at zero. `lora_jax.optim.adalora` moves rank between the sites of an adapter while it trains: it sets
    the values of the least important terms to zero, in arrays, so that nothing is compiled again.
    `lora_jax.optim.orthogonality` is the penalty that keeps terms apart, and `lora_jax.methods.trim` leaves out pruned
    ones in the end.

    Attributes:
      a: `[*batch, rank, *in]`, trained; PEFT's `lora_A`.
      b: `[*batch, rank, *out]`, trained; PEFT's `lora_B`.
      values: `[*batch, rank]`, trained; PEFT's `lora_E`.
      scale, site, dropout: as in `LowRank`.

    Example:
      >>> import lora_jax as lora
      >>> params = {"w": jnp.ones((64, 32))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 64)))
      >>> config = lora.LoraConfig(method="adalora", rank=12, targets="w")
      >>> lora.init(jax.random.key(0), config, params, sites)["w"].values.shape
      (12,)

    References:
      Zhang et al., AdaLoRA, arXiv 2303.10512.
    """

    values: Array

    @classmethod
    def start(cls, given: Start) -> Self:
        """Normal factors, and values of zero."""
        site, rank = given.site, given.rank
        keys = jax.random.split(given.key)
        a, b = (
            DEVIATION * jax.random.normal(key, shape, given.dtype)
            for key, shape in zip(keys, (site.a_shape(rank), site.b_shape(rank)), strict=True)
        )
        values = jnp.zeros((*site.batch_shape, rank), given.dtype)
        return cls(a, b, given.scale, site, given.dropout, values=values)

    def trains(self) -> Self:
        """True on both factors and the values."""
        return replace(super().trains(), values=True)

    def axes(self) -> Self:
        """The site's axes along each array."""
        return replace(super().axes(), values=(*self.site.batch_axes, None))

    def pairs(self) -> tuple[tuple[Array, Array], ...]:
        """One pair: `a`, and `b` times the values, with the scale."""
        return ((self.a, times(self.scale, times(self.values, self.b))),)

    @property
    def active(self) -> Array:
        """`[*batch]`: how many terms are not pruned."""
        return (self.values != 0).sum(-1)


def trim(adapter: Adapter) -> Adapter:
    """Leave out what AdaLoRA pruned: plain low-rank factors, of the rank each site came to.

    `lora_jax.peft.save` writes the result as LoRA, which more programs read than PEFT's own type for AdaLoRA.

    Layers and experts of a stack keep as many terms as the one that has most of them.

    Args:
      adapter: with concrete arrays, as shapes depend on them; other updates stay as they are.

    Returns:
      An adapter that computes the same.

    Example:
      >>> from lora_jax.adapter.site import Site
      >>> site = Site(path="w", shape=(4, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> update = AdaLora(jnp.ones((3, 4)), jnp.ones((3, 3)), jnp.float32(1), site, values=jnp.float32([2, 0, 1]))
      >>> trim(Adapter({"w": update}))["w"].b[:, 0].tolist()
      [2.0, 1.0]
    """
    return Adapter({path: _trimmed(each) if isinstance(each, AdaLora) else each for path, each in adapter.items()})


def _trimmed(update: AdaLora) -> LowRank:
    plain, axis = update.low_rank(), len(update.site.batch_axes)
    kept = max(int(update.active.max(initial=0)), 1)
    order = jnp.argsort(update.values == 0, axis=-1, stable=True)[..., :kept]

    a, b = (jnp.take_along_axis(factor, over(order, factor), axis) for factor in (plain.a, plain.b))
    return replace(plain, a=a, b=b)
