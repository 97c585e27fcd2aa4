"""Training runs on the built-in text task, with about as many trained numbers for every method."""

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import lora_jax as lora
from lora_jax.models import Transformer, TransformerConfig
from lora_jax.report.terminal import Progress
from lora_jax.train.data import Corpus, batch, python_source, python_topics, split, windows
from lora_jax.train.metrics import cross_entropy, evaluate
from lora_jax.train.pretrain import Recipe, cache_path, load_cached, pretrain, store

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
    model, base, sites, corpus = _task()
    options = STARTS[name]
    config = lora.LoraConfig(**{"alpha": 2 * options["rank"], **options})
    adapter = lora.init(jax.random.key(seed), config, base, sites)
    tx = lora.optimizer(_optimizer(name, options, steps), adapter)
    adapted = jax.jit(lora.adapt(model.apply))

    @jax.jit
    def step(adapter: Any, state: Any, tokens: Any) -> Any:
        def loss(adapter: Any) -> Any:
            total = cross_entropy(adapted(base, adapter, tokens[:, :-1]), tokens).mean()
            return total + 0.1 * lora.optim.orthogonality(adapter) if "adalora" in name else total

        updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    state, seconds = tx.init(adapter), []
    held_out = windows(corpus.held_out, LENGTH, 128)
    losses = [evaluate(lambda x: adapted(base, adapter, x), held_out).nats]
    for i in range(steps):
        began = time.perf_counter()
        adapter, state = jax.block_until_ready(
            step(adapter, state, jnp.asarray(batch(corpus.train, seed, i, SIZE, LENGTH)))
        )
        seconds.append(time.perf_counter() - began)
        if (i + 1) % max(steps // EVALUATIONS, 1) == 0 or i + 1 == steps:
            trained = adapter
            losses.append(evaluate(lambda x, trained=trained: adapted(base, trained, x), held_out).nats)
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


def _task() -> tuple[Transformer, Any, Any, Corpus]:
    """The built-in transformer, pre-trained on Python's sources once and then read from the cache, and English text."""
    model = Transformer(TransformerConfig())
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.uint8)
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)
    sites = lora.find_sites(model.apply, abstract, tokens)
    recipe = Recipe(steps=300, seq_len=LENGTH)
    source = split("Python's sources", python_source(), LENGTH)
    path = cache_path(model, recipe, source)
    base = load_cached(path, abstract)
    if base is None:
        with TemporaryDirectory() as folder:
            report = lambda step: Progress("pre-training", recipe.steps, step)  # noqa: E731
            base = pretrain(model, sites, source, recipe, Path(folder), report)
        store(path, base)
    return model, base, sites, split("Python's topics", python_topics(), LENGTH)


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
