"""Training runs on the built-in text task, with about as many trained numbers for every method."""

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import lora_jax as lora
from lora_jax.train import builtin
from lora_jax.train.texts import python_topics, rows_at_random, rows_evenly, split

LENGTH, SIZE, EVALUATIONS = 128, 8, 6

STARTS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8},
    "lora, rslora": {"rank": 8, "alpha": 16, "rslora": True},
    "lora+ (ratio 16)": {"rank": 8},
    "lora, pissa": {"rank": 8, "init": "pissa"},
    "lora, olora": {"rank": 8, "init": "olora"},
    "dora": {"rank": 8, "method": "dora"},
    "lora-fa": {"rank": 15, "method": "lora-fa"},
    "lora-xs": {"rank": 52, "method": "lora-xs"},
    "adalora (12 to 8)": {"rank": 12, "method": "adalora"},
    "vera": {"rank": 128, "method": "vera"},
}
"""What is compared. Ranks make trained numbers about equal; VeRA, whose vectors are small, has all the rank it may."""


class Run(NamedTuple):
    """One training run.

    Attributes:
      rank: of the factors.
      trainable: numbers that train.
      nbytes: of the adapter's arrays.
      seconds: median of a training step.
      losses: held out, before training and at equal distances until its end.
    """

    rank: int
    trainable: int
    nbytes: int
    seconds: float
    losses: list[float]


def learn(name: str, steps: int, seed: int) -> Run:
    """Train one of `STARTS` on English text."""
    model, (english, end), options = builtin.base(), split(python_topics()), STARTS[name]
    sites = lora.find_sites(model.apply, model.params, jax.ShapeDtypeStruct((1, LENGTH), jnp.int32))
    config = lora.LoraConfig(**{"alpha": 2 * options["rank"], **options})
    adapter = lora.init(jax.random.key(seed), config, model.params, sites)
    tx = lora.optimizer(_optimizer(name, options, steps), adapter)
    adapted = lora.adapt(model.apply)

    def mean_loss(adapter: Any, tokens: Any) -> Any:
        logits = adapted(model.params, adapter, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(adapter: Any, state: Any, tokens: Any) -> Any:
        def loss(adapter: Any) -> Any:
            total = mean_loss(adapter, tokens)
            return total + 0.1 * lora.optim.orthogonality(adapter) if "adalora" in name else total

        updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    state, seconds, evaluate = tx.init(adapter), [], jax.jit(mean_loss)
    held_out = jnp.asarray(rows_evenly(end, 128, LENGTH + 1))
    losses = [float(evaluate(adapter, held_out))]
    for i in range(steps):
        began = time.perf_counter()
        tokens = jnp.asarray(rows_at_random(english, seed, i, SIZE, LENGTH + 1))
        adapter, state = jax.block_until_ready(step(adapter, state, tokens))
        seconds.append(time.perf_counter() - began)
        if (i + 1) % max(steps // EVALUATIONS, 1) == 0 or i + 1 == steps:
            losses.append(float(evaluate(adapter, held_out)))
    info = lora.summary(adapter)
    return Run(config.rank, info.trainable, info.nbytes, median(seconds), losses)


def _optimizer(name: str, options: Mapping[str, Any], steps: int) -> optax.GradientTransformation:
    """AdamW at the rate that suits the method: those with few numbers or small factors need larger steps."""
    rates = {"vera": 3e-2, "lora+ (ratio 16)": 1e-3}
    peak = rates.get(name, 4e-3)
    adamw: Any = optax.adamw(optax.cosine_decay_schedule(peak, steps, 0.1))
    if name.startswith("lora+"):
        adamw = optax.chain(adamw, lora.optim.lora_plus(ratio=16))
    if name.startswith("adalora"):
        target = options["rank"] * 2 // 3
        adamw = lora.optim.adalora(adamw, target_rank=target, total_steps=steps, warmup=steps // 10, final=steps // 3)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def plot(results: Mapping[str, list[Run]], image: Path) -> None:
    """Draw held-out losses over training, the mean of the seeds and their range."""
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, runs) in enumerate(results.items()):
        losses = np.array([run.losses for run in runs])
        share = np.linspace(0, 100, losses.shape[1])
        label = f"{name}: {mean(losses[:, -1]):.3f} ({runs[0].trainable:,} numbers)"
        axes.plot(share, losses.mean(0), color=f"C{i % 10}", label=label)
        axes.fill_between(share, losses.min(0), losses.max(0), color=f"C{i % 10}", alpha=0.15, linewidth=0)
    axes.set(title="Adapting a byte-level transformer from Python to English", xlabel="training done (%)")
    axes.set_ylabel("held-out loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend(title="held-out loss in the end", fontsize="small")
    figure.savefig(image)
