"""VeRA: two trained vectors around random projections that are never stored, and shared by layers of one shape."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lora_jax.adapter.factors import Array, over, times
from lora_jax.adapter.registry import Start, register_method
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import Change, LowRank, Update, pytree
from lora_jax.errors import ConfigError

D_START = 0.1
"""PEFT's `d_initial`."""


@register_method("vera", draws=False)
@pytree("site", "seed", "dropout")
@dataclass(frozen=True)
class Vera(Update):
    """Vector-based random matrix adaptation: `W + scale · Σ_r d[r] · A[r] ⊗ (B[r] · b)`.

    A and B are drawn from the seed wherever they are used, so that an adapter holds two vectors per weight. Sites of
    one shape have the same, and so have the layers of a stack, and XLA draws them once. PEFT slices both out of a pair
    of the largest sizes, which PyTorch draws, and has no scale: `alpha=rank` is its own. As nothing else draws what
    PyTorch does, an adapter that is read from PEFT's file holds its A and B, one pair per site.

    Attributes:
      d: `[*batch, rank]`, trained, 0.1 at the start; PEFT's `vera_lambda_d`.
      b: `[*batch, *out]`, trained, zero at the start; PEFT's `vera_lambda_b`.
      scale: `[*batch]` float32, not trained.
      site: where the update belongs; static.
      seed: of A and B; static.
      dropout: probability of dropping an element of the input of A; static.
      given_a, given_b: `[rank, *in]` and `[rank, *out]`, not trained: A and B, or None where the seed draws them.

    Example:
      >>> import lora_jax as lora
      >>> params = {"w": jnp.ones((64, 32))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 64)))
      >>> config = lora.LoraConfig(method="vera", rank=16, targets="w", seed=7)
      >>> lora.summary(lora.init(jax.random.key(0), config, params, sites)).trainable
      48

    References:
      Kopiczko et al., VeRA, arXiv 2310.11454.
    """

    d: Array
    b: Array
    scale: Array
    site: Site
    seed: int
    dropout: float = 0.0
    given_a: Array | None = None
    given_b: Array | None = None
    notes: ClassVar[tuple[str, ...]] = ("scale",)

    @classmethod
    def start(cls, given: Start) -> Self:
        """Vectors as in PEFT."""
        site = given.site
        if site.kind == "embedding":
            raise ConfigError("VeRA has no form for look-up tables; leave this one out with exclude=")
        d = jnp.full((*site.batch_shape, given.rank), D_START, given.dtype)
        b = jnp.zeros(site.batch_shape + site.sizes(site.out_axes), given.dtype)
        return cls(d, b, given.scale, site, given.seed, given.dropout)

    @property
    def rank(self) -> int:
        """Number of rank-one terms."""
        return self.d.shape[-1]

    def trains(self) -> Self:
        """True on both vectors."""
        return replace(jax.tree.map(lambda leaf: False, self), d=True, b=True)

    def axes(self) -> Self:
        """The site's axes along each array."""
        site, batch = self.site, self.site.batch_axes
        known: dict[str, Any] = {"d": (*batch, None), "b": (*batch, *site.out_axes), "scale": batch}
        if self.given_a is not None:
            known |= {"given_a": (None, *site.in_axes), "given_b": (None, *site.out_axes)}
        return replace(self, **known)

    def change(self, weight: Array) -> Change:
        """The parameter plus the projections, with the vectors in B."""
        first, second = self.projections()
        batch, rank = self.site.batch_shape, len(self.site.batch_axes)
        a = jnp.broadcast_to(first, (*batch, *first.shape))
        b = jnp.broadcast_to(second, (*batch, *second.shape)) * jnp.expand_dims(self.b, rank)
        b = times(self.scale, b * over(self.d, b))
        return Change(weight, ((a.astype(b.dtype), b),))

    def low_rank(self) -> LowRank:
        """Plain factors that do the same: the projections, with the vectors in B."""
        ((a, b),) = replace(self, scale=jnp.ones_like(self.scale)).change(self.scale).factors
        return LowRank(a, b, self.scale, self.site, self.dropout)

    def scaled(self, factor: Any) -> Self:
        """The same vectors with `scale * factor`."""
        return replace(self, scale=self.scale * jnp.asarray(factor, self.scale.dtype))

    def projections(self) -> tuple[Array, Array]:
        """A and B, `[rank, *in]` and `[rank, *out]`, which all weights of the site share."""
        if self.given_a is None or self.given_b is None:
            return self._drawn(0), self._drawn(1)
        return self.given_a, self.given_b

    def _drawn(self, which: int) -> Array:
        """`[rank, *in]` or `[rank, *out]`, uniform with PEFT's bounds (Kaiming's for the fan of each)."""
        site, rank = self.site, self.rank
        axes, fan = ((site.in_axes, site.fan_in), (site.out_axes, rank))[which]
        key = jax.random.fold_in(jax.random.key(self.seed), which)
        bound = (6 / max(fan, 1)) ** 0.5
        return jax.random.uniform(key, (rank, *site.sizes(axes)), minval=-bound, maxval=bound)
