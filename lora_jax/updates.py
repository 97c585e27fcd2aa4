"""What an adapter holds at one parameter: low-rank factors, or a full replacement, and their algebra."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp

from lora_jax.site import Site

Array: TypeAlias = jax.Array


class Update(ABC):
    """What an adapter holds at one parameter.

    A new kind of update is a frozen dataclass registered as a pytree that implements these members;
    the engine and `merge` need nothing else.
    """

    site: Site

    @abstractmethod
    def trains(self) -> Self:
        """The same update with each leaf replaced by whether it trains."""

    @abstractmethod
    def scaled(self, factor: Any) -> Self:
        """The update with its effect multiplied by `factor`."""

    def base(self, weight: Array) -> Array:
        """The array the low-rank terms are added to: the frozen parameter, unless replaced."""
        return weight

    def factors(self) -> tuple[Array, Array] | None:
        """Factors `a` and `b` of the low-rank term with the scale folded into `b`, or None."""
        return None

    def delta(self) -> Array | None:
        """The low-rank term in the parameter's own layout, in float32 at full precision, or None."""
        pair = self.factors()
        if pair is None:
            return None
        batch, into, out = (list(axes) for axes in (self.site.batch_axes, self.site.in_axes, self.site.out_axes))
        rank = len(self.site.shape)
        a, b = map(widened, pair)
        return jnp.einsum(
            a, [*batch, rank, *into], b, [*batch, rank, *out], list(range(rank)), precision=jax.lax.Precision.HIGHEST
        )

    def applied(self, weight: Array) -> Array:
        """The parameter as the adapted model sees it, in float32 (or wider if `weight` is)."""
        base, delta = widened(self.base(weight)), self.delta()
        return base if delta is None else base + delta.astype(base.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["a", "b", "scale"], meta_fields=["site", "dropout"])
@dataclass(frozen=True)
class LowRank(Update):
    """Low-rank factors of one parameter: the model sees `W + scale · Σ_r a[r] ⊗ b[r]`.

    Attributes:
      a: `[*batch, rank, *in]`, trained; PEFT's `lora_A` as it is stored.
      b: `[*batch, rank, *out]`, trained; PEFT's `lora_B` with the rank axis first.
      scale: `[*batch]` float32, not trained; `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA. It is
        an array so that changing it never recompiles.
      site: where the update belongs; static.
      dropout: probability of dropping an element of the input of A; static.

    Example:
      >>> site = Site(path="w", shape=(4, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> update = LowRank(jnp.ones((2, 4)), jnp.ones((2, 3)), jnp.float32(0.5), site)
      >>> update.rank, update.delta().shape, float(update.delta()[0, 0])
      (2, (4, 3), 1.0)

    References:
      Hu et al., LoRA, arXiv 2106.09685.
    """

    a: Array
    b: Array
    scale: Array
    site: Site
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        """Number of rank-one terms."""
        return self.a.shape[len(self.site.batch_axes)]

    def trains(self) -> "LowRank":
        """True on both factors, False on the scale."""
        return replace(self, a=True, b=True, scale=False)

    def factors(self) -> tuple[Array, Array]:
        """`a`, and `b` times the scale: the scale costs `rank · out` products, not one per activation."""
        lift = self.scale.reshape(self.scale.shape + (1,) * (self.b.ndim - self.scale.ndim))
        return self.a, self.b * lift.astype(self.b.dtype)

    def scaled(self, factor: Any) -> "LowRank":
        """The same factors with `scale * factor`."""
        return replace(self, scale=self.scale * jnp.asarray(factor, self.scale.dtype))


@partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["site"])
@dataclass(frozen=True)
class Replace(Update):
    """A parameter trained in full: the model sees `value`, cast to the parameter's dtype.

    PEFT's `modules_to_save`, and its trained biases.

    Attributes:
      value: the parameter, shaped as in the base; trained.
      site: where the update belongs, of kind `full` unless it is a linear site too; static.

    Example:
      >>> update = Replace(jnp.ones(3), Site(path="bias", shape=(3,), dtype="bfloat16", kind="full"))
      >>> update.base(jnp.zeros(3, jnp.bfloat16)).dtype  # the model sees what it saw before
      dtype(bfloat16)
    """

    value: Array
    site: Site

    def trains(self) -> "Replace":
        """True on the value."""
        return replace(self, value=True)

    def base(self, weight: Array) -> Array:
        """The trained value, cast to the dtype of the frozen parameter it stands for."""
        return self.value.astype(weight.dtype)

    def scaled(self, factor: Any) -> "Replace":
        """Refused: a replaced parameter has no size relative to the base."""
        raise TypeError(
            f"{self.site.path} is trained in full and has no scale; "
            f"leave it out with adapter.without({self.site.path!r}) before scaling by {factor!r}"
        )


def widened(value: Any) -> Array:
    """The array in float32, or as it is if that is wider."""
    return jnp.asarray(value, jnp.float32 if value.dtype.itemsize < 4 else value.dtype)


def is_traced(value: Any) -> bool:
    """Whether an array has no contents yet, because it is inside `jit`, `grad` or `vmap`."""
    try:
        # Only an array with contents has a place; asking a tracer for its own raises.
        return isinstance(value, jax.Array) and value.is_fully_addressable is None
    except jax.errors.ConcretizationTypeError:
        return True


def is_update(node: Any) -> bool:
    """Whether `node` is an update (for `is_leaf` arguments)."""
    return isinstance(node, Update)


def map_updates(fn: Callable[[Any], Any], tree: Any, other: Callable[[Any], Any]) -> Any:
    """Map `fn` over the updates in a tree and `other` over every remaining leaf."""
    return jax.tree.map(lambda node: fn(node) if is_update(node) else other(node), tree, is_leaf=is_update)
