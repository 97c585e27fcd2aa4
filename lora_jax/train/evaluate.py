"""Losses in nats per byte, for training and on held-out text."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.report.tables import Table
from lora_jax.train.data import Bytes


@dataclass(frozen=True)
class Loss:
    """A mean loss over held-out text.

    Example:
      >>> round(Loss(nats=2.0794415).bits, 3)
      3.0
    """

    nats: float
    """Nats per byte."""

    @property
    def bits(self) -> float:
        """Bits per byte."""
        return self.nats / math.log(2)


@jax.jit
def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean loss of each sequence in nats per byte.

    Args:
      logits: `[batch, time, 256]`, predicted from `tokens[:, :-1]`.
      tokens: `[batch, time + 1]`.

    Returns:
      `[batch]`.
    """
    labels = tokens[:, 1:].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(-1)


def evaluate(predict: Callable[[Bytes], jax.Array], sequences: Bytes, size: int = 16) -> Loss:
    """Average a model's loss over sequences.

    Args:
      predict: the compiled model: maps `[size, time]` bytes to logits; called with that one shape only.
      sequences: `[count, time + 1]`.
      size: sequences per call; the last call is filled up with repetitions, which do not count.
    """
    filled = np.resize(sequences, (-(-len(sequences) // size) * size, sequences.shape[1]))
    losses = [cross_entropy(predict(part[:, :-1]), part) for part in np.split(filled, len(filled) // size)]
    return Loss(float(np.concatenate(losses)[: len(sequences)].mean(dtype=np.float64)))


def losses_table(losses: Mapping[str, tuple[Loss, Loss]]) -> Table:
    """Held-out losses of base and adapted model, by text."""
    headers = ("held-out text", "base nats/byte", "adapted nats/byte", "base bits/byte", "adapted bits/byte")
    rows = [
        (name, f"{base.nats:.4f}", f"{adapted.nats:.4f}", f"{base.bits:.4f}", f"{adapted.bits:.4f}")
        for name, (base, adapted) in losses.items()
    ]
    return Table(headers, rows)
