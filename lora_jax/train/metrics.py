"""The metrics of a run: on disk as JSON lines, and drawn as a loss curve."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from lora_jax.errors import CheckpointError
from lora_jax.publish import flush, publish_file, unwritable


class Metrics:
    """One JSON object per line, each with the number of steps completed.

    Opening drops what was written after `step`, so a resumed run goes on as if it had never stopped.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> metrics = Metrics(path)
      >>> metrics.write(1, {"loss": 2.5})
      >>> read_metrics(path)
      [{'step': 1, 'loss': 2.5}]
    """

    def __init__(self, path: Path, step: int = 0):
        self._path = path
        kept = [record for record in read_metrics(path) if step and record["step"] <= step]
        publish_file(path, "".join(map(_line, kept)).encode())

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append a record.

        Raises:
          CheckpointError: the disk is full, read-only or broken.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line({"step": step, **values}))
        except OSError as error:
            raise unwritable(self._path, error) from None

    def flush(self) -> None:
        """Have the disk write all records.

        Raises:
          CheckpointError: it cannot.
        """
        try:
            flush(self._path)
        except OSError as error:
            raise unwritable(self._path, error) from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics file; a last line that was cut short is left out.

    Raises:
      CheckpointError: a line is no record.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [_record(path, number, line) for number, line in enumerate(lines, 1) if line.endswith(b"\n")]


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise CheckpointError(
            f"{path}, line {number}, is no record of a run's losses: remove the line to go on without it"
        )
    return record


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def plot_loss(metrics: Path, image: Path, title: str) -> None:
    """Draw training and held-out loss over steps, and the base model's held-out loss as a line.

    Args:
      metrics: the JSON lines of a run. What is missing is not drawn.
      image: the PNG to write.
      title: what was trained on what.
    """
    # Not at the top: whoever reads metrics needs no matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    train = [(record["step"], record["loss"]) for record in records if "loss" in record]
    held_out = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.35, linewidth=1, label="adapted, training batch")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:blue", marker="o", markersize=4, label="adapted, held out")
    for base in (record["base_eval_loss"] for record in records if "base_eval_loss" in record):
        axes.axhline(base, color="tab:gray", linestyle="--", label=f"base, held out ({base:.3f})")
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    drawn = BytesIO()
    figure.savefig(drawn)
    publish_file(image, drawn.getvalue())
