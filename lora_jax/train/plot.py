"""The loss curve as an image."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora_jax.train.log import read_metrics


def plot_loss(metrics: Path, image: Path, title: str) -> None:
    """Draw training and held-out loss over steps, and the base model's held-out loss as a line.

    Args:
      metrics: the JSON lines of a run; its record at step 0 is the base model.
      image: the PNG to write.
      title: what was trained on what.
    """
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
