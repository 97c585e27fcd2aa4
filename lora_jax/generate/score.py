"""Scores of a model on examples: what the right answer costs it, and how often it would give that answer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.apply import adapt
from lora_jax.data.example import Example
from lora_jax.models.classes import class_logits
from lora_jax.models.load import Model
from lora_jax.models.loss import TokenLosses, token_losses


@dataclass(frozen=True)
class Score:
    """What a model makes of examples; all of it is of the tokens that are trained on, or of classes.

    Attributes:
      examples: how many there are.
      tokens: how many of their tokens are targets; of classes how many examples.
      loss: nats per target, of which perplexity is the exponential.
      accuracy: share of targets that are the most probable token after the true text before them.
      exact: share of examples in which all targets are, so that greedy generation gives the answer as it is.
    """

    examples: int
    tokens: int
    loss: float
    accuracy: float
    exact: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where it is too large for a number."""
        return exp(self.loss) if self.loss < 700 else float("inf")


class _Rows(NamedTuple):
    """Some examples as matrices `[batch, time]`; missing ones are rows in which nothing is a target."""

    tokens: np.ndarray
    trained: np.ndarray
    segments: np.ndarray
    places: tuple[int, ...]


def score(
    model: Model,
    examples: Sequence[Example],
    adapter: Adapter | None = None,
    *,
    batch: int = 8,
    progress: Callable[[int, float], None] = lambda done, loss: None,
) -> Score:
    """Score a model, alone or with an adapter.

    Args:
      model: of `lora_jax.models.load`.
      examples: of `lora_jax.data.encode`.
      adapter: None for the base.
      batch: examples at once; results do not depend on it but for rounding.
      progress: is told how many examples are done, and their loss.
    """

    def losses(params: Any, tokens: jax.Array, trained: jax.Array, *, positions: int) -> TokenLosses:
        hidden = model.hidden(params, tokens[:, :-1])
        return token_losses(
            lambda each: model.head(params, each), hidden, tokens[:, 1:], trained[:, 1:], positions=positions
        )

    program = _program(losses, model, adapter, static_argnames="positions")
    loss, right, exact, tokens, done = 0.0, 0, 0, 0, 0
    for rows in _batches(examples, batch):
        found = program(rows.tokens, jnp.asarray(rows.trained), positions=_room(int(rows.trained.sum())))
        correct = np.asarray(found.correct)
        loss += float(np.asarray(found.loss, np.float64).sum())
        right += int(correct.sum())
        tokens += int(rows.trained.sum())
        exact += int((correct.sum(1) == rows.trained.sum(1))[: len(rows.places)].sum())
        done += len(rows.places)
        progress(done, loss / max(tokens, 1))
    return Score(len(examples), tokens, loss / tokens, right / tokens, exact / len(examples))


def score_classes(
    model: Model,
    examples: Sequence[Example],
    adapter: Adapter | None = None,
    *,
    batch: int = 8,
    progress: Callable[[int, float], None] = lambda done, loss: None,
) -> Score:
    """Score a model for classes, alone or with an adapter.

    Args:
      model: with a head for classes.
      examples: with labels.
      adapter: None for the base.
      batch: examples at once.
      progress: is told how many examples are done, and their loss.
    """
    program = _program(partial(class_logits, model), model, adapter)
    loss, right, done = 0.0, 0, 0
    for rows in _batches(examples, batch):
        logits = program(rows.tokens, jnp.asarray(rows.segments))
        shares = np.asarray(jax.nn.log_softmax(logits), np.float64)
        for row, place in enumerate(rows.places):
            label = examples[place].label
            loss, right = loss - shares[row, label], right + int(shares[row].argmax() == label)
        done += len(rows.places)
        progress(done, loss / done)
    return Score(done, done, loss / done, right / done, right / done)


def _program(fn: Callable[..., Any], model: Model, adapter: Adapter | None, **options: Any) -> Callable[..., Any]:
    """`fn` compiled, with the model's parameters, and the adapter if there is one."""
    # An adapter is an argument, and no part of the program.
    if adapter is None:
        return partial(jax.jit(fn, **options), model.params)
    return partial(jax.jit(adapt(fn), **options), model.params, adapter)


def _batches(examples: Sequence[Example], batch: int) -> Iterator[_Rows]:
    """Examples of like lengths together, in few different shapes."""
    order = sorted(range(len(examples)), key=lambda place: len(examples[place]))
    for start in range(0, len(order), batch):
        places = tuple(order[start : start + batch])
        time = _room(max(len(examples[place]) for place in places)) + 1
        tokens, segments = np.zeros((2, batch, time), np.int32)
        trained = np.zeros((batch, time), bool)
        for row, place in enumerate(places):
            each = examples[place]
            tokens[row, : len(each)], trained[row, : len(each)] = each.tokens, each.trained
            segments[row, : len(each)] = 1
        yield _Rows(tokens, trained, segments, places)


def _room(count: int) -> int:
    """Room for so many, in steps of which there are few: 32, 64, 96, 128, 192, 256, 384, ..."""
    power = max(32, 1 << (count - 1).bit_length())
    return power * 3 // 4 if power > 64 and count <= power * 3 // 4 else power
