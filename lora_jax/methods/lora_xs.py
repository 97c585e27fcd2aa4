"""LoRA-XS: a small square matrix between the frozen leading singular directions of the weight."""

from dataclasses import dataclass, replace
from typing import Self

import jax.numpy as jnp

from lora_jax import svd
from lora_jax.adapter.factors import Array, times
from lora_jax.adapter.registry import Start, register_method
from lora_jax.adapter.updates import LowRank, pytree


@register_method("lora-xs", draws=False)
@pytree("site", "dropout")
@dataclass(frozen=True, kw_only=True)
class LoraXS(LowRank):
    """A trained `rank × rank` core between frozen factors: `W + scale · Σ_rq core[r, q] · a[r] ⊗ b[q]`.

    `a` holds the leading left singular vectors of the weight times its singular values, `b` the right ones. The core
    starts at zero, so that the model starts as the base; the paper draws it from a normal distribution with deviation
    1e-5. PEFT has no LoRA-XS; `lora.peft.save` writes it as LoRA, with the core multiplied into B.

    Attributes:
      a: `[*batch, rank, *in]`, not trained.
      b: `[*batch, rank, *out]`, not trained.
      core: `[*batch, rank, rank]`, trained.
      scale, site, dropout: as in `LowRank`.

    Example:
      >>> import jax, lora_jax as lora
      >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 64)))
      >>> config = lora.LoraConfig(method="lora-xs", rank=4, targets="w")
      >>> lora.summary(lora.init(jax.random.key(0), config, params, sites)).trainable
      16

    References:
      Bałazy et al., LoRA-XS, arXiv 2405.17604.
    """

    core: Array

    @classmethod
    def start(cls, given: Start) -> Self:
        """The singular directions of the weight, and a core of zeros."""
        site, rank = given.site, given.rank
        found = svd.of_site(site, given.weight(), rank)
        a = (found.left * found.values[..., None]).reshape(site.a_shape(rank))
        b = found.right.reshape(site.b_shape(rank))
        core = jnp.zeros((*site.batch_shape, rank, rank), given.dtype)
        return cls(a.astype(core.dtype), b.astype(core.dtype), given.scale, site, given.dropout, core=core)

    def trains(self) -> Self:
        """True on the core alone."""
        return replace(super().trains(), a=False, b=False, core=True)

    def axes(self) -> Self:
        """The site's axes along each array."""
        return replace(super().axes(), core=(*self.site.batch_axes, None, None))

    def pairs(self) -> tuple[tuple[Array, Array], ...]:
        """One pair: `a`, and the core times `b`, with the scale."""
        batch = list(range(len(self.site.batch_axes)))
        r, q = len(batch), len(batch) + 1
        out = [q + 1 + i for i in range(len(self.site.out_axes))]
        mixed = jnp.einsum(self.core, [*batch, r, q], self.b, [*batch, q, *out], [*batch, r, *out])
        return ((self.a, times(self.scale, mixed)),)
