"""Training an adapter beside a frozen base: batches, evaluation, metrics, states and the best so far."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from lora_jax.processes import written_by_the_first
from lora_jax.report.tables import scaled
from lora_jax.report.terminal import Progress
from lora_jax.train import mesh as meshes
from lora_jax.train.best import Best
from lora_jax.train.board import Board
from lora_jax.train.loop import train
from lora_jax.train.metrics import Metrics, read_metrics
from lora_jax.train.options import TrainingOptions
from lora_jax.train.state import State, load_state, read_arrays, save_state, write_arrays
from lora_jax.train.step import Report, distinct, training_step
from lora_jax.train.tasks import Task, mean_score
from lora_jax.train.watch import Throughput, peak_memory

_BEST = "best"


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Everything that training needs.

    Attributes:
      task: what is trained.
      base: the frozen parameters.
      batches: maps the number of a step to what is trained on; the rows of all parts of a step at once.
      named: says which examples are in the batch of a step.
      held_out: to evaluate on; none if nothing is held out.
      options: how.
      key: `jax.random` key for dropout.
      mesh: of the devices, or None for one.
      states: where states are written; a state found there is continued.
      metrics: where metrics are written.
      board: where TensorBoard's files are written, or None.
      report: makes a reporter, given the step to start at.
      say: is told what a person should know about states that are found.
    """

    task: Task
    base: Any
    batches: Callable[[int], Any]
    named: Callable[[int], str]
    held_out: tuple[Any, ...]
    options: TrainingOptions
    key: jax.Array
    mesh: Any
    states: Path
    metrics: Path
    board: Path | None
    report: Callable[[int], Progress]
    say: Callable[[str], None]

    def train(self, adapter: Any) -> tuple[lora.Adapter, lora.Adapter | None, Best]:
        """Train an adapter; the base is only read.

        Returns:
          The adapter after the last step, the one that was best on held-out data if that is another, and the best
          evaluation.

        Raises:
          Interrupted: Ctrl-C was pressed or SIGTERM came; the state is on disk.
          TrainingError: a loss is not finite.
        """
        how = self.options.how
        tx = how.transformation(adapter)
        fresh = State(*distinct((adapter, meshes.everywhere(tx.init(adapter), self.mesh))))
        state = load_state(self.states, fresh, self.say)
        weights, optimizer = meshes.like((state.weights, state.optimizer), (fresh.weights, fresh.optimizer))
        state = State(weights, optimizer, state.step)
        log = _Log(self, state.step, adapter)
        step = training_step(self.task.losses, tx, self.task.penalty)
        last = train(
            state,
            lambda adapter, optimizer, batch, key: step(adapter, optimizer, self.base, batch, key),
            lambda index: self._parts(log.counted(self.batches(index))),
            self.key,
            self.options.when,
            log.save,
            self.report(state.step),
            log.record,
            lambda: log.best.over,
            self.named,
        )
        log.close()
        return how.evaluated(last.optimizer, last.weights), log.best_adapter(last), log.best

    def evaluate(self, adapter: lora.Adapter | None, most: int | None = None) -> dict[str, float]:
        """Means over the held-out data, or over the first batches of them; of the base if there is no adapter."""
        batches = [self._parts(each, 1) for each in self.held_out[:most]]
        return mean_score(self.task.score, self.base, adapter, batches)

    def _parts(self, batch: Any, parts: int | None = None) -> Any:
        """A batch with the parts of a step along the first axis, on the devices."""
        count = parts or self.options.accumulate
        parted = jax.tree.map(lambda leaf: leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:]), batch)
        return meshes.spread(parted, self.mesh)


class _Log:
    """What is written down while training."""

    def __init__(self, trainer: Trainer, step: int, fresh: lora.Adapter):
        self._trainer, self._how = trainer, trainer.options.how
        self._metrics: Metrics | None = None
        self._writes = jax.process_index() == 0
        self._rates = np.asarray(jax.vmap(self._how.rate)(np.arange(trainer.options.steps)))
        written_by_the_first(trainer.metrics, lambda: self._open(step))
        self.best = Best(read_metrics(trainer.metrics), trainer.options.patience)
        self._board = Board(trainer.board, step) if trainer.board is not None and self._writes else None
        self._speed, self._tokens = Throughput(), 0
        self._base = trainer.evaluate(None) if step == 0 and trainer.held_out else {}
        self._like = fresh

    def _open(self, step: int) -> None:
        self._metrics = Metrics(self._trainer.metrics, step)

    def counted(self, batch: Any) -> Any:
        """Note how many tokens a batch holds, trained on or not: that is what speed is told in."""
        leaves = [batch] if hasattr(batch, "segments") else list(batch)
        self._tokens = sum(int((np.asarray(each.segments) > 0).sum()) for each in leaves)
        return batch

    def record(self, state: State, report: Report) -> str:
        """Write a line of metrics, evaluated or not; what is to be shown."""
        trainer = self._trainer
        values = {name: float(value) for name, value in report._asdict().items()}
        values["tokens"] = int(values["tokens"])
        values["learning_rate"] = float(self._rates[state.step - 1])
        if trainer.held_out and trainer.options.when.evaluate(state.step):
            values |= self._evaluated(state)
        if state.step == 1:
            values |= {f"base_eval_{name}": value for name, value in self._base.items()}
        if self._metrics is not None:
            self._metrics.write(state.step, values)
        if self._board is not None:
            self._board.write(state.step, values)
        return self._shown(values)

    def _evaluated(self, state: State) -> dict[str, float]:
        adapter = self._how.evaluated(state.optimizer, state.weights)
        found = {f"eval_{name}": value for name, value in self._trainer.evaluate(adapter).items()}
        if self.best.seen(state.step, found["eval_loss"]):
            write_arrays(self._trainer.states / _BEST, {"adapter": adapter})
        return found

    def _shown(self, values: dict[str, Any]) -> str:
        speed = self._speed.seen(self._tokens)
        parts = [f"loss {values['loss']:.3f}"]
        parts += [f"held out {values['eval_loss']:.3f}"] if "eval_loss" in values else []
        parts += [f"{speed:,.0f} tokens/s"] if speed else []
        parts += [f"peak {scaled(memory, 'B')}"] if (memory := peak_memory()) else []
        return ", ".join(parts)

    def save(self, state: State) -> None:
        """Write a state."""
        if self._metrics is not None:
            self._metrics.flush()  # First: a state on disk says that everything up to its step is there.
        save_state(self._trainer.states, state)

    def best_adapter(self, last: State) -> lora.Adapter | None:
        """The best adapter, if it is not that of the last step."""
        if self.best.step in (None, last.step):
            return None
        found = read_arrays(self._trainer.states / _BEST, {"adapter": self._like})
        return meshes.like(found["adapter"], self._like)

    def close(self) -> None:
        """Finish what is open."""
        if self._board is not None:
            self._board.close()
