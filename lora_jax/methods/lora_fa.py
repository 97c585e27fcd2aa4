"""LoRA-FA: A is frozen, so that the input of a layer need not be kept for the backward pass."""

from dataclasses import dataclass, replace
from typing import Self

from lora_jax.adapter.registry import Start, register_method
from lora_jax.adapter.updates import LowRank, pytree
from lora_jax.errors import ConfigError


@register_method("lora-fa")
@pytree("site", "dropout")
@dataclass(frozen=True)
class FrozenA(LowRank):
    """Low-rank factors of which only B trains: the model sees what it does with `LowRank`.

    The gradient of B needs `A·x`, which is rank-sized, and no gradient needs `x`. PEFT has this as an optimizer
    (`create_lorafa_optimizer`); its correction of B's gradient is `lora_jax.optim.lora_fa`. In a PEFT file it is LoRA.

    A look-up table's A starts at zero, and would leave B without a gradient: it is refused.

    Attributes:
      a: `[*batch, rank, *in]`, not trained.
      b, scale, site, dropout, a_start, b_start: as in `LowRank`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> config = lora.LoraConfig(method="lora-fa", rank=2, targets="w")
      >>> adapter = lora.init(jax.random.key(0), config, params, sites)
      >>> lora.summary(adapter).trainable, adapter["w"].b.size
      (6, 6)

    References:
      Zhang et al., LoRA-FA, arXiv 2308.03303.
    """

    @classmethod
    def start(cls, given: Start) -> Self:
        """Factors from the config's initialiser."""
        if given.site.kind == "embedding":
            raise ConfigError("LoRA-FA freezes A, which starts at zero for a look-up table; leave it out with exclude=")
        return super().start(given)

    def trains(self) -> Self:
        """True on B alone."""
        return replace(super().trains(), a=False)
