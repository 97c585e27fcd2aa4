"""Training an adapter beside a frozen base."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax.report.terminal import Progress
from lora_jax.train.best import Best
from lora_jax.train.data import Bytes, Corpus, batch, windows
from lora_jax.train.loop import train
from lora_jax.train.metrics import Metrics, cross_entropy, evaluate, read_metrics
from lora_jax.train.options import TrainingOptions
from lora_jax.train.state import State, load_state, save_state
from lora_jax.train.step import Report, distinct, training_step

EVALUATED = 64
"""Held-out sequences per evaluation."""

Apply = Callable[..., jax.Array]
"""A compiled model: parameters (base, or base and adapter) and tokens to logits."""


def finetune(
    adapted: Apply,
    base: Any,
    adapter: Any,
    corpus: Corpus,
    options: TrainingOptions,
    key: jax.Array,
    directory: Path,
    metrics_path: Path,
    report: Callable[[int], Progress],
    say: Callable[[str], None] = print,
) -> lora.Adapter:
    """Train an adapter; the base is only read.

    Args:
      adapted: the adapted model.
      base: its frozen parameters.
      adapter: where to begin.
      corpus: the text.
      options: how.
      key: `jax.random` key for dropout.
      directory: where states are written; a state found there is continued.
      metrics_path: where metrics are written; the first record holds the base's held-out loss too.
      report: makes a reporter, given the step to start at.
      say: is told what a person should know about states that are found.

    Returns:
      The trained adapter.

    Raises:
      Interrupted: Ctrl-C was pressed or SIGTERM came; the state is on disk.
      TrainingError: a loss is not finite.
    """
    how = options.how
    tx = how.transformation(adapter)
    rates = np.asarray(jax.vmap(how.rate)(np.arange(options.steps)))
    held_out = windows(corpus.held_out, options.length, EVALUATED)
    state = load_state(directory, State(*distinct((adapter, tx.init(adapter)))), say)
    metrics = Metrics(metrics_path, state.step)
    best = Best(read_metrics(metrics_path), options.patience)

    def losses(base: Any, adapter: Any, tokens: Bytes, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        each = cross_entropy(adapted(base, adapter, tokens[:, :-1], lora_key=key), tokens)
        count = jnp.float32(tokens.size - len(tokens))
        return each.mean() * count, count

    def evaluated(state: State) -> float:
        weights = how.evaluated(state.optimizer, state.weights)
        return evaluate(partial(adapted, base, weights), held_out).nats

    def record(state: State, report: Report) -> str:
        values = {name: float(value) for name, value in report._asdict().items()}
        values["learning_rate"] = float(rates[state.step - 1])
        if options.when.evaluate(state.step):
            values["eval_loss"] = evaluated(state)
            best.seen(state.step, values["eval_loss"])
        if state.step == 1:
            values["base_eval_loss"] = start
        metrics.write(state.step, values)
        return f"loss {values['loss']:.3f}"

    def save(state: State) -> None:
        metrics.flush()  # First: a state on disk says that everything up to its step is there.
        save_state(directory, state)

    def batches(index: int) -> Bytes:
        rows = options.batch * options.accumulate
        tokens = batch(corpus.train, options.seed, index, rows, options.length)
        return tokens.reshape(options.accumulate, options.batch, -1)

    start = evaluated(state) if state.step == 0 else 0.0
    step = training_step(losses, tx)
    last = train(
        state,
        lambda adapter, opt_state, tokens, key: step(adapter, opt_state, base, tokens, key),
        batches,
        key,
        options.when,
        save,
        report(state.step),
        record,
        lambda: best.over,
    )
    return how.evaluated(last.optimizer, last.weights)
