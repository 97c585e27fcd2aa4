"""The training loop: steps, what follows each of them, checkpoints, and stopping in order."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax.errors import LoraError
from lora_jax.report.terminal import Progress
from lora_jax.train.state import State
from lora_jax.train.step import Report
from lora_jax.train.stop import deferred

Step = Callable[[Any, Any, Any, jax.Array], tuple[Any, Any, Report]]
"""Maps weights, optimizer state, a batch and a random key to new weights, new optimizer state and a report."""


class TrainingError(LoraError, RuntimeError):
    """Training cannot go on."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a run does what: `steps` in total, and the steps between states on disk and between evaluations."""

    steps: int
    checkpoint_every: int
    eval_every: int

    def checkpoint(self, done: int) -> bool:
        """Whether to write the state after `done` steps."""
        return done % self.checkpoint_every == 0 or done == self.steps

    def evaluate(self, done: int) -> bool:
        """Whether to evaluate after `done` steps."""
        return done % self.eval_every == 0 or done == self.steps


def train(
    state: State,
    step: Step,
    batches: Callable[[int], Any],
    key: jax.Array,
    schedule: Schedule,
    save: Callable[[State], None],
    reporter: Progress,
    record: Callable[[State, Report], str] = lambda state, report: f"loss {float(report.loss):.3f}",
    over: Callable[[], bool] = lambda: False,
    named: Callable[[int], str] = lambda index: "",
) -> State:
    """Train from wherever `state` is to the last step, or until it is over.

    Args:
      state: where to begin.
      step: the compiled training step; it may donate the weights and the optimizer's state.
      batches: maps the number of a step, from 0, to its batch.
      key: `jax.random` key; each step gets one folded from it and the number of the step.
      schedule: when to do what.
      save: writes a state to disk.
      reporter: shows progress.
      record: called after each step with the state and what the step said; what it returns is shown.
      over: whether to stop early; asked after each step and before the first.
      named: says which examples are in the batch of a step, for the error about its loss.

    Returns:
      The state after the last step, which is on disk too.

    Raises:
      TrainingError: a loss is not finite.
      Interrupted: Ctrl-C was pressed or SIGTERM came; the state is on disk.
    """
    with deferred() as stop, reporter.shown():
        while state.step < schedule.steps and not over():
            index = state.step
            weights, optimizer, report = step(
                state.weights, state.optimizer, batches(index), jax.random.fold_in(key, index)
            )
            _check(report, index, named)
            state = State(weights, optimizer, index + 1)
            reporter.update(state.step, record(state, report))
            last = stop.number is not None
            if last or over() or schedule.checkpoint(state.step):
                save(state)
            if last:
                break
        stop.message = f"stopped after step {state.step} of {schedule.steps}"
    return state


def _check(report: Report, index: int, named: Callable[[int], str]) -> None:
    """Refuse a loss or a gradient that is not finite."""
    for what, value in (("loss", float(report.loss)), ("norm of the gradient", float(report.norm))):
        if not math.isfinite(value):
            where = f", whose batch holds {examples}" if (examples := named(index)) else ""
            raise TrainingError(
                f"the {what} is {value} at step {index + 1}{where}: try a lower learning rate, more warm-up steps, or "
                "look at these examples"
            )
