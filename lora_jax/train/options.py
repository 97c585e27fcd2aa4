"""Options that training verbs share, in groups; `lora-jax` shows the strings below the fields as help."""

import math
from dataclasses import dataclass
from typing import Any

import optax

from lora_jax.config.config import LoraConfig
from lora_jax.errors import LoraError
from lora_jax.paths import ALL_LINEAR
from lora_jax.train.loop import Schedule


class OptionError(LoraError, ValueError):
    """An option that is out of range, or that does not go with another."""


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What is adapted and how."""

    rank: int = 8
    """Rank of the low-rank updates."""
    alpha: float | None = None
    """The updates are scaled by alpha / rank; None makes alpha 2 * rank."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Names of what to adapt, such as `query value`; all-linear is every linear layer but the output head."""
    dropout: float = 0.0
    """Probability of dropping an element of an update's input in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    method: str = "lora"
    """The variant of LoRA: lora, dora, lora-fa, lora-xs, vera or adalora."""
    init: str = "default"
    """How the factors start: default, gaussian, orthogonal, pissa, pissa_niter_4, olora or milora."""

    @property
    def config(self) -> LoraConfig:
        """The options as the library takes them.

        Raises:
          ConfigError: one is out of range.
        """
        return LoraConfig(
            rank=self.rank,
            alpha=self.alpha,
            targets=ALL_LINEAR if self.targets == (ALL_LINEAR,) else self.targets,
            dropout=self.dropout,
            rslora=self.rslora,
            method=self.method,
            init=self.init,
        )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How the adapter is trained."""

    steps: int = 200
    """Fine-tuning steps."""
    batch_size: int = 8
    """Sequences per step."""
    seq_len: int = 256
    """Bytes per sequence, in pre-training too."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW; it decays to a tenth of it along a cosine."""
    warmup: int = 10
    """Steps over which the learning rate rises to its peak."""
    weight_decay: float = 0.01
    """AdamW's weight decay of the factors."""
    seed: int = 0
    """Seed of the factors, the batches, dropout and the samples."""
    eval_every: int = 25
    """Steps between evaluations on held-out text."""
    checkpoint_every: int = 50
    """Steps between states written to disk; Ctrl-C writes one too."""

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
          OptionError: something is.
        """
        for name in ("steps", "batch_size", "seq_len", "learning_rate", "eval_every", "checkpoint_every"):
            require(name, getattr(self, name), above=0)
        for name in ("warmup", "weight_decay", "seed"):
            require(name, getattr(self, name), least=0)

    @property
    def schedule(self) -> Schedule:
        """When the loop does what."""
        return Schedule(steps=self.steps, checkpoint_every=self.checkpoint_every, eval_every=self.eval_every)

    @property
    def rate(self) -> optax.Schedule:
        """The learning rate as a function of the step."""
        return warmup_cosine(self.learning_rate, self.warmup, self.steps, 0.1)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW, with gradients clipped to a global norm of 1."""
        adamw = optax.adamw(self.rate, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def require(name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf) -> None:
    """Refuse an option outside its range, or not finite.

    Raises:
      OptionError: it is.

    Example:
      >>> try:
      ...     require("batch_size", 0, above=0)
      ... except OptionError as error:
      ...     print(error)
      --batch-size must be above 0, got 0
    """
    if not math.isfinite(value) or value <= above or value < least:
        rule = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
        raise OptionError(f"{flag(name)} must be {rule}, got {value}")


def flag(name: str) -> str:
    """An option's name as it is typed."""
    return f"--{name.replace('_', '-')}"


def warmup_cosine(peak: float, warmup: int, steps: int, end: float) -> optax.Schedule:
    """Rise to `peak` over `warmup` steps, then decay to `end * peak` at `steps`; a longer warm-up is cut to the run."""
    rise = min(warmup, steps)
    decay = optax.cosine_decay_schedule(peak, max(steps - rise, 1), end)
    return optax.join_schedules([optax.linear_schedule(peak / (rise + 1), peak, max(rise, 1)), decay], [rise])
