"""What is trained: the next token, a class, or a preference; its losses while training and its score in evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lora_jax as lora
from lora_jax.methods.adalora import AdaLora
from lora_jax.models.classes import class_logits
from lora_jax.models.loss import token_losses
from lora_jax.train.step import Losses

Name = Literal["sft", "classify", "dpo"]
"""The tasks."""

_ORTHOGONAL = 0.5
"""Weight of AdaLoRA's penalty, as in PEFT."""


class Score(NamedTuple):
    """Sums over a batch, float32.

    Attributes:
      loss: of the losses.
      number: how many losses there are.
      correct: how many of them are of what the model would have chosen.
    """

    loss: jax.Array
    number: jax.Array
    correct: jax.Array


@dataclass(frozen=True)
class Task:
    """A task, for one model.

    Attributes:
      score: `(base, adapter, batch, key) -> Score`; without an adapter it is the base's, without a key nothing is
        dropped.
      plain: `(params, batch) -> Score`, what initialisers from data run; None where it takes both models.
      penalty: of the adapter, beside the losses; None for none.
    """

    score: Callable[..., Score]
    plain: Callable[[Any, Any], Score] | None = None
    penalty: Callable[[Any], jax.Array] | None = None

    @property
    def losses(self) -> Losses:
        """What a training step sums."""
        return lambda base, adapter, batch, key: self.score(base, adapter, batch, key)[:2]


def task(name: Name, model: Any, *, room: int | None = None, beta: float = 0.1, method: str = "lora") -> Task:
    """A task by its name.

    Args:
      name: `"sft"`, `"classify"` or `"dpo"`.
      model: of `lora_jax.models`; for classes of `lora_jax.models.with_classes`.
      room: how many trained tokens a batch holds at most; all by default.
      beta: of DPO: how dear it is to go away from the base.
      method: of the adapter.
    """
    penalty = _orthogonality if method == "adalora" else None
    if name == "dpo":
        return Task(_preferences(model, room, beta), None, penalty)
    plain = _classes(model) if name == "classify" else _next_tokens(model, room)
    adapted = lora.adapt(plain)

    def score(base: Any, adapter: Any, batch: Any, key: Any = None) -> Score:
        return plain(base, batch) if adapter is None else adapted(base, adapter, batch, lora_key=key)

    return Task(score, plain, penalty)


def _orthogonality(adapter: lora.Adapter) -> jax.Array:
    if not any(isinstance(update, AdaLora) for update in adapter.values()):
        return jnp.float32(0)
    return _ORTHOGONAL * lora.optim.orthogonality(adapter)


def _token_losses(model: Any, room: int | None, params: Any, batch: Any) -> tuple[Any, jax.Array]:
    """Losses of the tokens that are trained on, each predicted from those before it in its own segment."""
    trained = jnp.roll(batch.trained, -1, axis=1).at[:, -1].set(False)
    hidden = model.hidden(params, batch.tokens, positions=batch.positions, segments=batch.segments)
    targets = jnp.roll(batch.tokens, -1, axis=1)
    return token_losses(partial(model.head, params), hidden, targets, trained, positions=room), trained


def _next_tokens(model: Any, room: int | None) -> Callable[[Any, Any], Score]:
    def score(params: Any, batch: Any) -> Score:
        found, trained = _token_losses(model, room, params, batch)
        return Score(found.loss.sum(), trained.sum().astype(jnp.float32), found.correct.sum().astype(jnp.float32))

    return score


def _classes(model: Any) -> Callable[[Any, Any], Score]:
    def score(params: Any, batch: Any) -> Score:
        logits = class_logits(model, params, batch.tokens, batch.segments)
        # A row that fills the last batch up has no label.
        counts = batch.labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, batch.labels, 0))
        correct = (logits.argmax(-1) == batch.labels) & counts
        return Score(jnp.where(counts, losses, 0).sum(), *(x.sum().astype(jnp.float32) for x in (counts, correct)))

    return score


def _preferences(model: Any, room: int | None, beta: float) -> Callable[..., Score]:
    """Rafailov et al., DPO, arXiv 2305.18290: the reference is the base, the same program without the adapter."""

    def answers(params: Any, batch: Any) -> jax.Array:
        """`[rows]`: log probability of the answer in each row."""
        return -_token_losses(model, room, params, batch)[0].loss.sum(1)

    adapted = lora.adapt(answers)

    def score(base: Any, adapter: Any, batch: Any, key: Any = None) -> Score:
        rows = jax.tree.map(lambda one, other: jnp.concatenate([one, other]), batch.chosen, batch.rejected)
        reference = answers(base, rows)
        own = reference if adapter is None else adapted(base, adapter, rows, lora_key=key)
        chosen, rejected = jnp.split(own - reference, 2)
        counts = batch.chosen.trained.any(1)  # A row that fills the last batch up is no pair.
        losses = jnp.where(counts, -jax.nn.log_sigmoid(beta * (chosen - rejected)), 0)
        better = (chosen > rejected) & counts
        return Score(losses.sum(), *(each.sum().astype(jnp.float32) for each in (counts, better)))

    return score


@cache
def _compiled(score: Callable[..., Score]) -> Callable[..., Score]:
    return jax.jit(score)


def mean_score(score: Callable[..., Score], base: Any, adapter: Any, batches: Sequence[Any]) -> dict[str, float]:
    """Mean loss and accuracy over batches, every loss counting the same.

    Args:
      score: of a task.
      base: the parameters.
      adapter: or None for the base alone.
      batches: each with one part along its first axis.
    """
    run, sums = _compiled(score), [0.0, 0.0, 0.0]
    for batch in batches:
        found = run(base, adapter, jax.tree.map(lambda leaf: leaf[0], batch))
        sums = [total + float(each) for total, each in zip(sums, found, strict=True)]
    loss, count, correct = sums
    return {"loss": loss / max(count, 1), "accuracy": correct / max(count, 1)}
