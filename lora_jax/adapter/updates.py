"""Updates: what an adapter holds at one parameter. LoRA's factors, a parameter trained in full, and their protocol."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp

from lora_jax.adapter.factors import Array, aligned, joined, outer, times, widened
from lora_jax.adapter.registry import Start, register_method
from lora_jax.adapter.serialization import exportable_dataclass
from lora_jax.adapter.site import Site
from lora_jax.errors import ParameterError

_Class = TypeVar("_Class", bound=type)


def pytree(*static: str) -> Callable[[_Class], _Class]:
    """Class decorator that makes a dataclass a pytree, the named fields in its structure and the others its leaves."""

    def register(cls: _Class) -> _Class:
        names = [field.name for field in fields(cls)]
        jax.tree_util.register_dataclass(cls, [name for name in names if name not in static], list(static))
        exportable_dataclass(cls, static)
        return cls

    return register


class Change(NamedTuple):
    """What an update makes of a parameter: `gain · base + Σ a ⊗ b`, a sum that the engine does not form.

    Attributes:
      base: shaped as the parameter; the frozen parameter itself, unless it is replaced.
      factors: pairs of `[*batch, rank, *in]` and `[*batch, rank, *out]`, with every scale folded in.
      gain: `[*batch, *out]` float32, what the base is multiplied by; None for one.
    """

    base: Array
    factors: tuple[tuple[Array, Array], ...] = ()
    gain: Array | None = None


class Update(ABC):
    """What an adapter holds at one parameter.

    A new kind of update is a frozen dataclass, made a `pytree`, that implements these members; the engine, `merge`, the
    optimizers and `save` need nothing else.

    Attributes:
      site: where the update belongs; static.
      dropout: probability of dropping an element of the input of the first factor; static.
      notes: names of fields that are no parameters: scales, and what is computed from the base.
      reads_base: whether the change depends on the parameter's value, which another update must not have replaced.
      waits: why it does not act on every input, and what makes it act, for messages; empty if it does.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> sites = lora.find_sites(lambda params, x: x @ params["w"], params, x)
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> update = adapter["w"]
      >>> isinstance(update, lora.Update), update.site.path, update.trains().a, update.trains().scale
      (True, 'w', True, False)
    """

    site: Site
    dropout: float = 0.0
    notes: ClassVar[tuple[str, ...]] = ()
    reads_base: ClassVar[bool] = False
    waits: ClassVar[str] = ""

    @abstractmethod
    def change(self, weight: Array) -> Change:
        """What the update makes of the frozen parameter; differentiable in the leaves that train."""

    @abstractmethod
    def trains(self) -> Self:
        """The same update with each leaf replaced by whether it trains."""

    @abstractmethod
    def axes(self) -> Self:
        """The same update with each array replaced by the site's axes along its own; None for an axis of its own."""

    def of_layer(self, site: Site) -> Self:
        """The update as that of one layer of its stack, whose site has an axis less; whatever counts axes moves."""
        own: Any = self
        return replace(own, site=site)

    @abstractmethod
    def scaled(self, factor: Any) -> Self:
        """The update with its effect multiplied by `factor`."""

    def absorbed(self, weight: Array) -> tuple[Array, Self]:
        """The parameter, and the update on it that does the same, with what is frozen in the update taken into it."""
        return weight, self

    def low_rank(self) -> "LowRank | None":
        """Plain factors that do the same; None if there are none, as for a gain or a replaced value."""
        return None

    def applied(self, weight: Array) -> Array:
        """The parameter as the adapted model sees it, in float32 (or wider if `weight` is)."""
        return exact_sum(weight, [self])


@register_method("lora")
@pytree("site", "dropout")
@dataclass(frozen=True)
class LowRank(Update):
    """Low-rank factors of one parameter: the model sees `W + scale · Σ_r a[r] ⊗ b[r]`.

    An initialiser that starts away from zero (PiSSA, OLoRA) leaves the factors it started from beside those that
    train, and the model sees `W + scale · Σ_r (a[r] ⊗ b[r] - a_start[r] ⊗ b_start[r])`: the base as it is, and shared,
    where PEFT subtracts the start from the base and rounds it. `lora_jax.absorb` does that, for a cheaper step.

    Attributes:
      a: `[*batch, rank, *in]`, trained; PEFT's `lora_A` as it is stored.
      b: `[*batch, rank, *out]`, trained; PEFT's `lora_B` with the rank axis first.
      scale: `[*batch]` float32, not trained; `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA. It is
        an array so that changing it never recompiles.
      site: where the update belongs; static.
      dropout: probability of dropping an element of the input of A; static.
      a_start, b_start: like `a` and `b`, not trained; None for a start at zero.

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
    a_start: Array | None = None
    b_start: Array | None = None
    notes: ClassVar[tuple[str, ...]] = ("scale",)

    @classmethod
    def start(cls, given: Start) -> Self:
        """Factors from the config's initialiser."""
        a, b, *start = given.factors()
        return cls(a, b, given.scale, given.site, given.dropout, *start)

    @property
    def rank(self) -> int:
        """Number of rank-one terms that train."""
        return self.a.shape[len(self.site.batch_axes)]

    def trains(self) -> Self:
        """True on both factors, False on the rest."""
        return replace(jax.tree.map(lambda leaf: False, self), a=True, b=True)

    def axes(self) -> Self:
        """The site's axes along each array."""
        batch, into, out = self.site.batch_axes, self.site.in_axes, self.site.out_axes
        known = {"a": (*batch, None, *into), "b": (*batch, None, *out), "scale": batch}
        known |= {"a_start": known["a"], "b_start": known["b"]} if self.a_start is not None else {}
        return replace(self, **known)

    def pairs(self) -> tuple[tuple[Array, Array], ...]:
        """Pairs of factors, scale and sign in the second: it costs `rank · out` products, not one per activation."""
        trained = self.a, times(self.scale, self.b)
        if self.a_start is None or self.b_start is None:
            return (trained,)
        return trained, (self.a_start, times(-self.scale, self.b_start))

    def change(self, weight: Array) -> Change:
        """The parameter plus the pairs of factors."""
        return Change(weight, self.pairs())

    def low_rank(self) -> "LowRank":
        """Plain factors that do the same, all terms in one pair; of DoRA, those inside of its norm."""
        pairs = replace(self, scale=jnp.ones_like(self.scale)).pairs()
        return LowRank(*joined(self.site, pairs), self.scale, self.site, self.dropout)

    def delta(self) -> Array:
        """What is added, in the parameter's own layout, in float32 at full precision."""
        deltas = [outer(self.site, *pair) for pair in self.pairs()]
        return sum(deltas[1:], deltas[0])

    def absorbed(self, weight: Array) -> tuple[Array, Self]:
        """The parameter without the start, in its own dtype, and the factors alone."""
        if self.a_start is None or self.b_start is None:
            return weight, self
        _, start = self.pairs()
        rest = widened(weight) + outer(self.site, *start).astype(widened(weight).dtype)
        return rest.astype(weight.dtype), replace(self, a_start=None, b_start=None)

    def scaled(self, factor: Any) -> Self:
        """The same factors with `scale * factor`."""
        return replace(self, scale=self.scale * jnp.asarray(factor, self.scale.dtype))


@pytree("site")
@dataclass(frozen=True)
class Replace(Update):
    """A parameter trained in full: the model sees `value`, cast to the parameter's dtype.

    PEFT's `modules_to_save`, and its trained biases.

    Attributes:
      value: the parameter, shaped as in the base; trained.
      site: where the update belongs, of kind `full` unless it is a linear site too; static.

    Example:
      >>> update = Replace(jnp.ones(3), Site(path="bias", shape=(3,), dtype="bfloat16", kind="full"))
      >>> update.change(jnp.zeros(3, jnp.bfloat16)).base.dtype  # the model sees what it saw before
      dtype(bfloat16)
    """

    value: Array
    site: Site

    def trains(self) -> "Replace":
        """True on the value."""
        return replace(self, value=True)

    def axes(self) -> "Replace":
        """The parameter's axes along the value."""
        return replace(self, value=tuple(range(len(self.site.shape))))

    def change(self, weight: Array) -> Change:
        """The trained value, cast to the dtype of the frozen parameter it stands for."""
        return Change(self.value.astype(weight.dtype))

    def scaled(self, factor: Any) -> "Replace":
        """Refused: a replaced parameter has no size relative to the base."""
        raise unscalable(self.site.path, "is trained in full", factor)


def unscalable(path: str, why: str, factor: Any) -> TypeError:
    """The error for an update whose effect has no size."""
    return TypeError(
        f"{path} {why} and has no scale; leave it out with adapter.without({path!r}) before scaling by {factor!r}"
    )


def held(update: Update) -> Update:
    """The update with gradients stopped at the leaves that do not train, so that none is computed for them."""
    return jax.tree.map(lambda leaf, train: leaf if train else jax.lax.stop_gradient(leaf), update, update.trains())


def combined(weight: Array, updates: Sequence[Update]) -> tuple[Array, Array | None, list[Change]]:
    """What several updates make of a parameter together, in any order.

    The effects of low-rank updates add up; with gains that is `(1 + Σ (gain_i - 1)) · W + Σ_i a_i ⊗ b_i`. A value that
    replaces the parameter comes first.

    Returns:
      The base, the gain on it (None for one), and the change that each update makes.

    Raises:
      ParameterError: an update does not act on every input, so that no parameter can express it.
    """
    for update in updates:
        if update.waits:
            raise ParameterError(f"{update.site.path} has {update.waits}")
    changes: dict[int, Change] = {}
    for i, update in sorted(enumerate(updates), key=lambda item: not isinstance(item[1], Replace)):
        changes[i] = update.change(weight)
        weight = changes[i].base
    gains = [change.gain for change in changes.values() if change.gain is not None]
    gain = None if not gains else gains[0] + sum(each - 1 for each in gains[1:])
    return weight, gain, [changes[i] for i in range(len(updates))]


def exact_sum(weight: Array, updates: Sequence[Update]) -> Array:
    """The adapted parameter in float32 (or wider if `weight` is), before rounding: deltas are added up first."""
    base, gain, changes = combined(widened(weight), updates)
    if gain is not None:
        base = base * aligned(updates[0].site, gain).astype(base.dtype)
    deltas = [outer(updates[0].site, *pair).astype(base.dtype) for change in changes for pair in change.factors]
    return base + sum(deltas[1:], deltas[0]) if deltas else base


def is_update(node: Any) -> bool:
    """Whether `node` is an update (for `is_leaf` arguments)."""
    return isinstance(node, Update)


def map_updates(fn: Callable[[Any], Any], tree: Any, other: Callable[[Any], Any]) -> Any:
    """Map `fn` over the updates in a tree and `other` over every remaining leaf."""
    return jax.tree.map(lambda node: fn(node) if is_update(node) else other(node), tree, is_leaf=is_update)
