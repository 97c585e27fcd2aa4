"""Optimizers by their names in optax, with a schedule, clipping, and what is made for adapters around them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import optax
import optax.contrib

import lora_jax as lora
from lora_jax.errors import ConfigError, nearest

Shape = Literal["cosine", "linear", "constant"]
"""How a learning rate goes on after the warm-up."""

_DECAY = 0.01
_OTHER = {
    "dpsgd",
    "galore",
    "lbfgs",
    "momo",
    "momo_adam",
    "noisy_sgd",
    "optimistic_adam",
    "rprop",
    "schedule_free",
    "sm3",
    "sophia",
}
"""Those that need a constant rate, or more than gradients: losses, gradients of each example, another optimizer."""
_AVERAGED = "schedule_free"


def names() -> tuple[str, ...]:
    """What `Optimizer(name=...)` takes: optax's and optax.contrib's functions of a learning rate.

    >>> {"adamw", "lion", "adafactor", "sgd", "prodigy"} <= set(names())
    True
    """
    return tuple(sorted(_found()))


def _found() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """optax's own wins where both have a name."""
    found: dict[str, Any] = {}
    for module in (optax.contrib, optax):
        for name, value in vars(module).items():
            known = inspect.isfunction(value) and "learning_rate" in _arguments(value)
            if known and name not in _OTHER and not name.startswith(("_", "scale_by_")):
                found[name] = value
    return found


def _arguments(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer of an adapter.

    Attributes:
      name: of optax's.
      options: further arguments of that function.
      peak: the learning rate after the warm-up.
      shape: how it goes on.
      warmup: steps over which it rises; no more than there are.
      steps: in all.
      final: part of the peak at the last step; a constant one has no end.
      decay: of the weights; None is 0.01 where the optimizer decays weights.
      clip: largest norm of all gradients together; 0 for any.
      precondition: `"riemannian"`, `"lora-fa"`, or `"none"`.
      lora_plus: how many times faster B learns than A.
      rate_pattern: factors of the rate by name.
      target_rank: what AdaLoRA's budget shrinks to; None prunes nothing.

    Example:
      >>> from lora_jax.train.optimizer import Optimizer
      >>> rate = Optimizer(name="lion", peak=1.0, warmup=4, steps=10).rate
      >>> [round(float(rate(step)), 2) for step in (0, 4, 10)]
      [0.2, 1.0, 0.1]
    """

    name: str = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)
    peak: float = 2e-4
    shape: Shape = "cosine"
    warmup: int = 0
    steps: int = 1
    final: float = 0.1
    decay: float | None = None
    clip: float = 1.0
    precondition: str = "none"
    lora_plus: float = 1.0
    rate_pattern: Mapping[str, float] = field(default_factory=dict)
    target_rank: int | None = None

    @property
    def rate(self) -> optax.Schedule:
        """The learning rate as a function of the step."""
        rise = min(self.warmup, self.steps)
        after = {
            "cosine": lambda: optax.cosine_decay_schedule(self.peak, max(self.steps - rise, 1), self.final),
            "linear": lambda: optax.linear_schedule(self.peak, self.peak * self.final, max(self.steps - rise, 1)),
            "constant": lambda: optax.constant_schedule(self.peak),
        }[self.shape]()
        first = optax.linear_schedule(self.peak / (rise + 1), self.peak, max(rise, 1))
        return optax.join_schedules([first, after], [rise])

    def transformation(self, adapter: Any) -> optax.GradientTransformationExtraArgs:
        """The optax transformation for a tree like `adapter`; frozen leaves get no state.

        Raises:
          ConfigError: there is no such optimizer, or it has no such option.
          LoraError: what is made for adapters does not go with this one.
        """
        base = lora.optim.lora_fa(self._base()) if self.precondition == "lora-fa" else self._base()
        parts = [
            *([optax.clip_by_global_norm(self.clip)] if self.clip else []),
            *([lora.optim.riemannian()] if self.precondition == "riemannian" else []),
            base,
            *([lora.optim.lora_plus(self.lora_plus)] if self.lora_plus != 1 else []),
            *([lora.optim.rate_pattern(dict(self.rate_pattern))] if self.rate_pattern else []),
        ]
        tx: Any = optax.chain(*parts)
        if self.target_rank is not None:
            early, late = self.steps // 10, self.steps // 3
            tx = lora.optim.adalora(tx, target_rank=self.target_rank, total_steps=self.steps, warmup=early, final=late)
        return lora.optimizer(tx, adapter)

    def evaluated(self, state: Any, adapter: Any) -> Any:
        """What is evaluated and saved: the adapter, or the mean that a schedule-free optimizer keeps beside it."""
        if not self.name.startswith(_AVERAGED):
            return adapter
        return lora.optim.schedule_free_eval_params(state, adapter)

    def _base(self) -> optax.GradientTransformation:
        known = _found()
        if self.name not in known:
            close = nearest(self.name, known)
            raise ConfigError(f"there is no optimizer {self.name!r} (nearest: {close}): there are {', '.join(names())}")
        function, options = known[self.name], dict(self.options)
        takes = _arguments(function)
        if "weight_decay" in takes:
            options.setdefault("weight_decay", _DECAY if self.decay is None else self.decay)
        elif self.decay:
            with_decay = ", ".join(name for name, each in sorted(known.items()) if "weight_decay" in _arguments(each))
            raise ConfigError(
                f"{self.name} decays no weights, so weight_decay={self.decay} means nothing: {with_decay} do"
            )
        if unknown := sorted(set(options) - set(takes)):
            raise ConfigError(f"{self.name} has no option {', '.join(unknown)}: there are {', '.join(takes)}")
        return function(learning_rate=self.rate, **options)
