"""Options that training verbs share, in groups; `lora-jax` shows the strings below the fields as help."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from lora_jax.config.config import LoraConfig
from lora_jax.data.example import TrainOn, Turns
from lora_jax.data.records import Kind
from lora_jax.errors import LoraError
from lora_jax.paths import ALL_LINEAR
from lora_jax.train.loop import Schedule
from lora_jax.train.optimizer import Optimizer, Shape


class OptionError(LoraError, ValueError):
    """An option that is out of range, or that does not go with another."""


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What is adapted and how."""

    rank: int = 8
    """Rank of the low-rank updates."""
    alpha: float | None = None
    """The scale is alpha / rank; 2 * rank by default."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Names of what to adapt, such as `q_proj v_proj`, or one regex of whole paths; all-linear is every linear layer
    but the output head."""
    exclude: tuple[str, ...] = ()
    """Names of what not to adapt, or one regex."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers to adapt; all of them if there are none."""
    layers_pattern: tuple[str, ...] = ()
    """Names that the number of a layer follows, where paths have several numbers."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks for some, such as `q_proj=16 layers.0.mlp=4`."""
    alpha_pattern: tuple[str, ...] = ()
    """Other alphas for some, likewise."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dropout: float = 0.0
    """Probability of dropping an element of an update's input in training."""
    method: str = "lora"
    """The variant of LoRA: lora, dora, lora-fa, lora-xs, vera, adalora or alora."""
    init: str = "default"
    """How the factors start: default, gaussian, orthogonal, pissa, pissa_niter_4, olora or milora; or from the first
    batches: eva, corda-kpm, corda-ipm or lora-ga."""
    init_batches: int = 8
    """Batches that an initialiser which starts from data sees."""
    train: tuple[str, ...] = ()
    """Names of parameters, or of modules with all they hold, that are trained in full."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained in full."""
    lora_bias: bool = False
    """Put a bias on B too."""
    trainable_tokens: tuple[str, ...] = ()
    """Rows of the look-up table that are trained: their numbers, or `embed_tokens=5,7` where there are several."""
    projection_seed: int = 0
    """Seed of VeRA's frozen projections."""
    invocation_tokens: tuple[int, ...] = ()
    """The tokens after which an adapter of method alora acts."""
    experts: tuple[str, ...] = ("shared",)
    """Whether experts of one product share A: shared, own, or names of those that do not."""
    parts: tuple[str, ...] = ()
    """Parts of fused kernels with an A of their own, such as `c_attn.q=0:768 c_attn.v=1536:2304`."""
    param_dtype: str = "float32"
    """Dtype of what trains."""

    @property
    def config(self) -> LoraConfig:
        """The options as the library takes them.

        Raises:
          ConfigError: one is out of range.
          OptionError: one is spelled as none can be.
        """
        experts: Any = self.experts[0] if self.experts in (("shared",), ("own",)) else self.experts
        return LoraConfig(
            rank=self.rank,
            alpha=self.alpha,
            targets=ALL_LINEAR if self.targets == (ALL_LINEAR,) else _regex_or_names(self.targets),
            exclude=_regex_or_names(self.exclude),
            layers=self.layers or None,
            layers_pattern=self.layers_pattern,
            rank_pattern=_pairs("rank_pattern", self.rank_pattern, int),
            alpha_pattern=_pairs("alpha_pattern", self.alpha_pattern, float),
            rslora=self.rslora,
            dropout=self.dropout,
            method=self.method,
            init=self.init,
            train=self.train,
            bias=self.bias,
            lora_bias=self.lora_bias,
            trainable_tokens=_tokens(self.trainable_tokens),
            seed=self.projection_seed,
            invocation_tokens=self.invocation_tokens,
            experts=experts,
            parts=_parts(self.parts),
            param_dtype=self.param_dtype,
        )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How the adapter is trained."""

    steps: int = 100
    """Steps of the optimizer."""
    batch: int = 4
    """Rows per step, or per part of a step with --accumulate."""
    length: int = 512
    """Tokens per row; examples are packed into rows and see each other in none."""
    lr: float | None = None
    """Peak learning rate: 2e-4, or 3e-3 for the built-in model."""
    accumulate: int = 1
    """Parts of a step that are computed one after the other: every trained token counts the same."""
    optimizer: str = "adamw"
    """Any optimizer of optax or optax.contrib by its name: adamw, lion, adafactor, sgd, schedule_free_adamw, ..."""
    optimizer_options: tuple[str, ...] = ()
    """Its other arguments, such as `b2=0.95 eps=1e-6`."""
    schedule: Shape = "cosine"
    """How the learning rate goes on after the warm-up."""
    warmup: int = 10
    """Steps over which the learning rate rises to its peak."""
    final_lr: float = 0.1
    """Part of the peak that is left in the end."""
    weight_decay: float | None = None
    """Weight decay: 0.01 where the optimizer has one."""
    clip: float = 1.0
    """Largest norm of all gradients together; 0 for any."""
    precondition: Literal["none", "riemannian", "lora-fa"] = "none"
    """What makes steps independent of how a product is split into its factors."""
    lora_plus: float = 1.0
    """How many times faster B learns than A."""
    rate_pattern: tuple[str, ...] = ()
    """Factors of the learning rate for some, such as `lm_head=0.1`."""
    target_rank: int | None = None
    """Mean rank that method adalora prunes to."""
    seed: int = 0
    """Seed of the factors, the batches, dropout and the samples."""
    eval_every: int = 25
    """Steps between evaluations on held-out data."""
    eval_batches: int = 8
    """Batches per evaluation, at most."""
    patience: int | None = None
    """Evaluations without a new best after which the run ends."""
    checkpoint_every: int = 50
    """Steps between states written to disk; Ctrl-C writes one too."""

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
          OptionError: something is.
        """
        above = ("steps", "batch", "length", "accumulate", "lora_plus", "eval_every", "eval_batches")
        for name in (*above, "checkpoint_every"):
            require(name, getattr(self, name), above=0)
        for name in ("warmup", "clip", "final_lr", "seed"):
            require(name, getattr(self, name), least=0)
        for name in ("weight_decay", "patience", "target_rank", "lr"):
            if (value := getattr(self, name)) is not None:
                require(name, value, **{"lr": {"above": 0}, "weight_decay": {"least": 0}}.get(name, {"least": 1}))
        require("length", self.length, least=2)

    @property
    def when(self) -> Schedule:
        """When the loop does what."""
        return Schedule(steps=self.steps, checkpoint_every=self.checkpoint_every, eval_every=self.eval_every)

    @property
    def how(self) -> Optimizer:
        """The optimizer.

        Raises:
          OptionError: an option is spelled as none can be.
        """
        return Optimizer(
            name=self.optimizer,
            options=_pairs("optimizer_options", self.optimizer_options, _number),
            peak=2e-4 if self.lr is None else self.lr,
            shape=self.schedule,
            warmup=self.warmup,
            steps=self.steps,
            final=self.final_lr,
            decay=self.weight_decay,
            clip=self.clip,
            precondition=self.precondition,
            lora_plus=self.lora_plus,
            rate_pattern=_pairs("rate_pattern", self.rate_pattern, float),
            target_rank=self.target_rank,
        )


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How data are read."""

    keys: tuple[str, ...] = ()
    """What the file calls its keys, such as `prompt=question completion=answer`."""
    kind: Kind | None = None
    """What its lines are, where their keys leave it open."""
    strict: bool = False
    """Stop at a bad line, and at an example that has to be left out; otherwise they are counted and told."""
    held_out: float = 0.05
    """Share of the examples, or their number, to evaluate on, where there is no valid.jsonl; 0 for none."""
    train_on: TrainOn = "answers"
    """Train on answers only, or on everything."""
    turns: Turns = "all"
    """Train on all that the assistant says, or only on what it says last."""
    template: Literal["auto", "yes", "no"] = "auto"
    """Whether prompts and completions are written by the chat template; auto does so where the model has one."""
    date: str | None = None
    """The day for chat templates that write it, such as 2026-01-31; by default the one on which the run begins."""

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
          OptionError: something is.
        """
        require("held_out", self.held_out, least=0)
        try:
            _ = self.now, self.renamed
        except OptionError:
            raise
        except ValueError:
            raise OptionError(f"--date must be a day such as 2026-01-31, not {self.date!r}") from None

    @property
    def renamed(self) -> dict[str, str]:
        """What the file calls its keys, by what they are called here.

        Raises:
          OptionError: one is spelled as none can be.
        """
        found = {}
        for each in self.keys:
            name, mark, column = each.partition("=")
            if not (name and mark and column):
                raise OptionError(f"--keys takes KEY=NAME, such as prompt=question, not {each!r}")
            found[name] = column
        return found

    @property
    def in_template(self) -> bool | None:
        """`template` as `lora_jax.data` takes it."""
        return {"auto": None, "yes": True, "no": False}[self.template]

    @property
    def now(self) -> datetime:
        """`date` as `lora_jax.data` takes it."""
        return datetime.fromisoformat(self.date) if self.date else datetime.now()


def require(name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf) -> None:
    """Refuse an option outside its range, or not finite.

    Raises:
      OptionError: it is.

    Example:
      >>> try:
      ...     require("batch", 0, above=0)
      ... except OptionError as error:
      ...     print(error)
      --batch must be above 0, got 0
    """
    if not math.isfinite(value) or value <= above or value < least:
        rule = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
        raise OptionError(f"{flag(name)} must be {rule}, got {value}")


def flag(name: str) -> str:
    """An option's name as it is typed."""
    return f"--{name.replace('_', '-')}"


def _regex_or_names(given: tuple[str, ...]) -> Any:
    """One regex, which has a letter that no name has, or names."""
    return given[0] if len(given) == 1 and re.search(r"[\\^$*+?()\[\]{}|]", given[0]) else given


def _pairs(name: str, given: Sequence[str], convert: Callable[[str], Any]) -> dict[str, Any]:
    """`NAME=VALUE`, several times."""
    found = {}
    for each in given:
        key, mark, value = each.rpartition("=")
        try:
            if not (key and mark):
                raise ValueError
            found[key] = convert(value)
        except ValueError:
            raise OptionError(f"{flag(name)} takes NAME=NUMBER, not {each!r}") from None
    return found


def _number(value: str) -> Any:
    """True, False, an integer or a float."""
    words = {"true": True, "false": False}
    if value.lower() in words:
        return words[value.lower()]
    return int(value) if re.fullmatch(r"-?\d+", value) else float(value)


def _tokens(given: Sequence[str]) -> Any:
    """Numbers, or numbers by the name of their table."""
    try:
        if all("=" in each for each in given):
            named = (each.split("=", 1) for each in given)
            return {name: tuple(map(int, numbers.split(","))) for name, numbers in named}
        return tuple(map(int, given))
    except ValueError:
        raise OptionError(f"--trainable-tokens takes numbers, or TABLE=5,7, not {' '.join(given)!r}") from None


def _parts(given: Sequence[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """`KERNEL.PART=FROM:TO`, several times."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for each in given:
        if (match := re.fullmatch(r"(.+)[./]([^./]+)=(\d+):(\d+)", each)) is None:
            raise OptionError(f"--parts takes KERNEL.PART=FROM:TO, such as c_attn.q=0:768, not {each!r}")
        kernel, part, start, end = match.groups()
        found.setdefault(kernel, {})[part] = (int(start), int(end))
    return found
