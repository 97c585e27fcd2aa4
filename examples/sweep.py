"""Train eight adapters at once: four learning rates with two seeds, stopped one by one where they no longer learn.

All lanes share every product with the base, so a step costs what one adapter costs on as many tokens. Expected output,
in two minutes on two CPU cores, the first minute for a base model that later runs read from the cache: a table of the
lanes, their curves in sweep-out/sweep.png, and the best adapter in sweep-out/adapter. Needs the extra [cli].
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import lora_jax as lora
from lora_jax.report.terminal import Progress
from lora_jax.train import builtin
from lora_jax.train.pretrain import Recipe
from lora_jax.train.texts import python_topics, rows_at_random, rows_evenly, split

LENGTH, SIZE, HELD_OUT = 128, 2, 32
"""Bytes per sequence; sequences per lane and step; sequences to evaluate on."""


class Lane(NamedTuple):
    """What makes a lane different from the others."""

    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"learning rate {self.learning_rate:g}, seed {self.seed}"


class Course:
    """Held-out losses of all lanes, and which lanes go on."""

    def __init__(self, lanes: int, patience: int, least: float = 1e-3) -> None:
        self.steps: list[int] = []
        self.losses: list[np.ndarray] = []
        self.stopped = np.full(lanes, -1)
        self._best, self._since = np.full(lanes, np.inf), np.zeros(lanes, int)
        self._patience, self._least = patience, least

    @property
    def active(self) -> np.ndarray:
        """Whether each lane still learns."""
        return self.stopped < 0

    @property
    def best(self) -> int:
        """The lane with the lowest loss."""
        return int(np.where(np.isfinite(self.losses[-1]), self.losses[-1], np.inf).argmin())

    def add(self, step: int, losses: np.ndarray) -> None:
        """Stop a lane whose loss is not finite, or that has not improved for as many evaluations as its patience."""
        self.steps.append(step)
        self.losses.append(losses)
        improved = losses < self._best - self._least
        self._since = np.where(improved, 0, self._since + 1)
        self._best = np.where(improved, losses, self._best)
        ends = self.active & (~np.isfinite(losses) | (self._since >= self._patience))
        self.stopped[ends] = step


def main(
    steps: int = 150,
    eval_every: int = 15,
    patience: int = 3,
    rank: int = 8,
    learning_rates: tuple[float, ...] = (3e-4, 2e-3, 1e-2, 1e-1),
    seeds: tuple[int, ...] = (0, 1),
    pretrain_steps: int = 300,
    out: Path = Path("sweep-out"),
) -> Course:
    """Train one adapter for every learning rate and seed, all of them in one step; returns what was measured.

    Args:
      steps: training steps.
      eval_every: steps between evaluations on held-out text.
      patience: evaluations without improvement after which a lane stops.
      rank: rank of all adapters.
      learning_rates: peak learning rates.
      seeds: seeds of factors and batches.
      pretrain_steps: steps of pre-training the base model.
      out: folder for the picture and the best adapter.
    """
    console = Console()
    model = builtin.base(Recipe(steps=pretrain_steps))
    sites = lora.find_sites(model.apply, model.params, jax.ShapeDtypeStruct((1, LENGTH), jnp.int32))
    lanes = [Lane(rate, seed) for rate in learning_rates for seed in seeds]
    config = lora.LoraConfig(rank=rank)
    adapters = lora.Adapter.stack([lora.init(jax.random.key(lane.seed), config, model.params, sites) for lane in lanes])
    adapted = lora.adapt(model.apply)

    def loss_fn(adapter: lora.Adapter, tokens: jax.Array) -> jax.Array:
        logits = adapted(model.params, adapter, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    course, reporter = Course(len(lanes), patience), Progress(f"training {len(lanes)} adapters", steps)
    with reporter.shown():
        adapters = train(loss_fn, adapters, lanes, steps, eval_every, course, reporter)
    out.mkdir(parents=True, exist_ok=True)
    lora.save(out / "adapter", adapters.unstack()[course.best], params=model.params, overwrite=True)
    plot(lanes, course, out / "sweep.png")
    console.print(table(lanes, course))
    console.print(f"The best adapter is in {out / 'adapter'}, the curves are in {out / 'sweep.png'}.")
    return course


def train(
    loss_fn: Callable[[lora.Adapter, jax.Array], jax.Array],
    adapters: lora.Adapter,
    lanes: list[Lane],
    steps: int,
    eval_every: int,
    course: Course,
    reporter: Progress,
) -> lora.Adapter:
    """Train a stack of adapters until the last step, or until no lane goes on."""
    english, end = split(python_topics())
    held_out = jnp.asarray(rows_evenly(end, HELD_OUT, LENGTH))
    evaluate = jax.jit(jax.vmap(loss_fn, in_axes=(0, None)))
    step, state = training_step(loss_fn, adapters, lanes, steps)
    course.add(0, np.asarray(evaluate(adapters, held_out)))
    for done in range(1, steps + 1):
        tokens = np.stack([rows_at_random(english, lane.seed, done, SIZE, LENGTH) for lane in lanes])
        adapters, state = step(adapters, state, tokens, course.active)
        if done % eval_every == 0 or done == steps:
            course.add(done, np.asarray(evaluate(adapters, held_out)))
        lowest = course.losses[-1][course.best]
        reporter.update(done, f"best held-out loss {lowest:.3f}, {course.active.sum()} lanes going")
        if not course.active.any():
            break
    return adapters


def training_step(
    loss_fn: Callable[[lora.Adapter, jax.Array], jax.Array], adapters: lora.Adapter, lanes: list[Lane], steps: int
) -> tuple[Callable[..., tuple[lora.Adapter, Any]], Any]:
    """One step of all lanes, each with its own learning rate, and the optimizers' first state."""

    def build(peak: jax.Array) -> optax.GradientTransformation:
        adamw = optax.adamw(optax.cosine_decay_schedule(peak, steps, 0.1))
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)

    tx = lora.optim.lanes(build, peak=[lane.learning_rate for lane in lanes])

    @jax.jit
    def step(adapters: lora.Adapter, state: Any, tokens: jax.Array, active: jax.Array) -> tuple[lora.Adapter, Any]:
        gradients = jax.vmap(jax.grad(loss_fn))(adapters, tokens)
        updates, state = tx.update(gradients, state, adapters, active=active)
        return optax.apply_updates(adapters, updates), state

    return step, tx.init(adapters)


def table(lanes: list[Lane], course: Course) -> Table:
    """The lanes, how they ended, and the best of them."""
    shown = Table("lane", "learning rate", "seed", "held-out loss", "stopped at", "")
    for column in shown.columns[:5]:
        column.justify = "right"
    for i, lane in enumerate(lanes):
        stopped = "" if course.active[i] else f"step {course.stopped[i]}"
        mark = "best" if i == course.best else ""
        shown.add_row(str(i), f"{lane.learning_rate:g}", str(lane.seed), f"{course.losses[-1][i]:.4f}", stopped, mark)
    return shown


def plot(lanes: list[Lane], course: Course, image: Path) -> None:
    """Draw the held-out losses of all lanes: a colour for each learning rate, a line style for each seed."""
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = np.array(course.steps), np.array(course.losses)
    colours = {rate: f"C{i}" for i, rate in enumerate(dict.fromkeys(lane.learning_rate for lane in lanes))}
    styles = {seed: ("-", "--", ":", "-.")[i % 4] for i, seed in enumerate(dict.fromkeys(lane.seed for lane in lanes))}
    start, lowest = losses[0].mean(), losses[-1][course.best]
    top = start + max(start - lowest, 0.1)  # a lane that diverges leaves the picture
    for i, lane in enumerate(lanes):
        shown = steps <= course.stopped[i] if course.stopped[i] >= 0 else np.full(len(steps), True)
        look = {"color": colours[lane.learning_rate], "linestyle": styles[lane.seed]}
        axes.plot(steps[shown], losses[shown, i], **look, label=f"{lane}: {losses[-1][i]:.3f}")
        if not course.active[i]:
            end = steps[shown][-1], np.fmin(losses[shown, i][-1], top)
            axes.plot(*end, "x", color=colours[lane.learning_rate], markersize=9, clip_on=False)
    axes.axhline(start, color="tab:gray", linewidth=1, label=f"base ({start:.3f})")
    axes.plot([], [], "x", color="tab:gray", markersize=9, label="stopped (at the top: diverged)")
    axes.set_ylim(lowest - 0.1 * (top - lowest), top)
    axes.set(title=f"{len(lanes)} adapters in one training step", xlabel="step", ylabel="held-out loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper right")
    figure.savefig(image)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
