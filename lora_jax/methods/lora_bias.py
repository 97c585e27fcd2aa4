"""PEFT's `lora_bias`: a bias on B, which amounts to a vector added to the bias of the layer."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp

from lora_jax.adapter.factors import Array, times, widened
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import Change, Update, pytree


@pytree("site")
@dataclass(frozen=True)
class Shift(Update):
    """A trained addition to a bias: the model sees `bias + scale · value`.

    PEFT's `lora_bias=True` puts a bias on B, so that a layer's output grows by `scale · (B(Ax) + c)`. That `c` belongs
    to the layer's own bias: here it is an update of it, with the scale of the factors beside it. A layer without a bias
    has no place for it; PEFT trains one there and cannot merge it.

    Attributes:
      value: shaped as the bias; trained.
      scale: float32, over the leading axes of the bias (scanned layers), not trained.
      site: the bias, of kind `full`; static.

    Example:
      >>> site = Site(path="bias", shape=(3,), dtype="float32", kind="full")
      >>> Shift(jnp.ones(3), jnp.float32(2.0), site).applied(jnp.zeros(3)).tolist()
      [2.0, 2.0, 2.0]
    """

    value: Array
    scale: Array
    site: Site
    notes: ClassVar[tuple[str, ...]] = ("scale",)

    def trains(self) -> "Shift":
        """True on the value."""
        return replace(self, value=True, scale=False)

    def axes(self) -> "Shift":
        """The bias's axes along each array."""
        axes = tuple(range(len(self.site.shape)))
        lanes = len(self.value.shape) - len(axes)
        return replace(self, value=axes, scale=axes[: len(self.scale.shape) - lanes])

    def change(self, weight: Array) -> Change:
        """The bias with the addition, rounded once to its dtype."""
        added = times(self.scale, widened(self.value))
        return Change((widened(weight) + added.astype(widened(weight).dtype)).astype(weight.dtype))

    def scaled(self, factor: Any) -> "Shift":
        """The same value with `scale * factor`."""
        return replace(self, scale=self.scale * jnp.asarray(factor, self.scale.dtype))
