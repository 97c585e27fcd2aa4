"""Training an adapter beside a frozen base."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import lora_jax as lora
from lora_jax.report.terminal import Progress
from lora_jax.train.data import Bytes, Corpus, batch, windows
from lora_jax.train.loop import train
from lora_jax.train.metrics import Metrics, cross_entropy, evaluate
from lora_jax.train.options import TrainingOptions
from lora_jax.train.state import State, load_state, save_state

EVALUATED = 64
"""Held-out sequences per evaluation."""

Apply = Callable[..., jax.Array]
"""A compiled model: parameters (base, or base and adapter) and tokens to logits."""


def finetune(
    adapted: Apply,
    base: Any,
    adapter: lora.Adapter,
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
      metrics_path: where metrics are written; the record at step 0 is the base.
      report: makes a reporter, given the step to start at.
      say: is told what a person should know about states that are found.

    Returns:
      The trained adapter.

    Raises:
      Interrupted: Ctrl-C was pressed or SIGTERM came; the state is on disk.
      TrainingError: a loss is not finite.
    """
    start: Any = adapter
    tx = lora.optimizer(options.optimizer, start)
    rates = np.asarray(jax.vmap(options.rate)(np.arange(options.steps)))
    held_out = windows(corpus.held_out, options.seq_len, EVALUATED)
    state = load_state(directory, State(start, tx.init(start)), say)
    metrics = Metrics(metrics_path, state.step)

    @jax.jit
    def step(adapter: Any, opt_state: Any, base: Any, tokens: Bytes, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss_fn(adapter: Any) -> jax.Array:
            return cross_entropy(adapted(base, adapter, tokens[:, :-1], lora_key=key), tokens).mean()

        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    def record(done: int, loss: float) -> None:
        metrics.write(done, {"train/loss": loss, "train/learning_rate": float(rates[done - 1])})

    def evaluated(done: int, adapter: Any) -> None:
        loss = evaluate(partial(adapted, base, adapter), held_out)
        metrics.write(done, {"eval/loss": loss.nats, "eval/bits_per_byte": loss.bits})

    def save(state: State) -> None:
        metrics.flush()  # First: a state on disk says that everything up to its step is there.
        save_state(directory, state)

    if state.step == 0:
        evaluated(0, adapter)
    return train(
        state,
        lambda adapter, opt_state, tokens, key: step(adapter, opt_state, base, tokens, key),
        lambda index: batch(corpus.train, options.seed, index, options.batch_size, options.seq_len),
        key,
        options.schedule,
        save,
        report(state.step),
        record,
        evaluated,
    ).weights
