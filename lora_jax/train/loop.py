"""The training loop: steps, evaluations, checkpoints, and stopping in order."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax.errors import LoraError
from lora_jax.report.terminal import Progress
from lora_jax.train.data import Bytes
from lora_jax.train.state import State
from lora_jax.train.stop import deferred

Step = Callable[[Any, Any, Bytes, jax.Array], tuple[Any, Any, jax.Array]]
"""Maps weights, optimizer state, tokens and a random key to new weights, new optimizer state and the loss."""


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
    batches: Callable[[int], Bytes],
    key: jax.Array,
    schedule: Schedule,
    save: Callable[[State], None],
    reporter: Progress,
    record: Callable[[int, float], None] = lambda done, loss: None,
    evaluate: Callable[[int, Any], None] = lambda done, weights: None,
) -> State:
    """Train from wherever `state` is to the last step.

    Args:
      state: where to begin.
      step: the compiled training step; it may donate the weights and the optimizer's state.
      batches: maps the number of a step, from 0, to its tokens.
      key: `jax.random` key; each step gets one folded from it and the number of the step.
      schedule: when to do what.
      save: writes a state to disk.
      reporter: shows progress.
      record: called after each step with the steps done and the loss.
      evaluate: called with the steps done and the weights.

    Returns:
      The state after the last step, which is on disk too.

    Raises:
      TrainingError: a loss is not finite.
      Interrupted: Ctrl-C was pressed or SIGTERM came; the state is on disk.
    """
    with deferred() as stop, reporter.shown():
        for index in range(state.step, schedule.steps):
            step_key = jax.random.fold_in(key, index)
            weights, optimizer, mean = step(state.weights, state.optimizer, batches(index), step_key)
            done, loss = index + 1, float(mean)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {done}: try a lower learning rate or more warmup steps"
                )
            state = State(weights, optimizer, done)
            record(done, loss)
            reporter.update(done, f"loss {loss:.3f}")
            if schedule.evaluate(done):
                evaluate(done, state.weights)
            last = stop.number is not None
            if last or schedule.checkpoint(done):
                save(state)
            if last:
                break
        stop.message = f"stopped after step {state.step} of {schedule.steps}"
    return state
