"""Losses in nats per byte, and the metrics of a run: on disk as JSON lines, and drawn as a loss curve."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


class Metrics:
    """One JSON object per line, each with the number of steps completed.

    Opening drops what was written after `step`, so a resumed run goes on as if it had never stopped.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> metrics = Metrics(path)
      >>> metrics.write(1, {"train/loss": 2.5})
      >>> read_metrics(path)
      [{'step': 1, 'train/loss': 2.5}]
    """

    def __init__(self, path: Path, step: int = 0):
        self._path = path
        kept = [record for record in read_metrics(path) if step and record["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(map(_line, kept)))
        partial.replace(path)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append a record."""
        with self._path.open("a") as file:
            file.write(_line({"step": step, **values}))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics file; a last line that was cut short is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def plot_loss(metrics: Path, image: Path, title: str) -> None:
    """Draw training and held-out loss over steps, and the base model's held-out loss as a line.

    Args:
      metrics: the JSON lines of a run; its record at step 0 is the base model.
      image: the PNG to write.
      title: what was trained on what.
    """
    # Not at the top: whoever reads metrics needs no matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    train = [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]
    held_out = [(record["step"], record["eval/loss"]) for record in records if "eval/loss" in record]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.35, linewidth=1, label="adapted, training batch")
    axes.plot(*zip(*held_out, strict=True), color="tab:blue", marker="o", markersize=4, label="adapted, held out")
    axes.axhline(held_out[0][1], color="tab:gray", linestyle="--", label=f"base, held out ({held_out[0][1]:.3f})")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image)
