"""Pre-training of the built-in model: the whole of a small decoder, on the source of Python's standard library."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax.adapter.site import Sites
from lora_jax.paths import named_leaves, rebuild
from lora_jax.report.terminal import Progress
from lora_jax.train.loop import Schedule, train
from lora_jax.train.optimizer import Optimizer
from lora_jax.train.state import State, load_state, save_state
from lora_jax.train.step import Report
from lora_jax.train.texts import rows_at_random


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a base is pre-trained: Muon for matrices, Adam for the rest, warm-up and cosine decay for both."""

    steps: int = 200
    length: int = 256
    batch: int = 8
    warmup: int = 20
    learning_rate: float = 0.02
    adam_learning_rate: float = 0.005
    weight_decay: float = 0.1
    seed: int = 0


def pretrain(
    model: Any,
    text: bytes,
    recipe: Recipe,
    directory: Path,
    report: Callable[[int], Progress],
    say: Callable[[str], None] = print,
) -> Any:
    """Train all parameters of a model of bytes.

    Args:
      model: of `lora_jax.models`; its parameters are where it begins.
      text: the bytes, each of which is the token of its number.
      recipe: how.
      directory: where states are written; a state found there is continued.
      report: makes a reporter, given the step to start at.
      say: is told what a person should know about states that are found.

    Returns:
      The parameters.

    Raises:
      Interrupted: Ctrl-C was pressed or SIGTERM came; the state is on disk.
      TrainingError: the loss is not finite.
    """
    sites = lora.find_sites(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), np.int32))
    tx = _optimizer(recipe, sites)

    @jax.jit
    def step(params: Any, state: Any, tokens: jax.Array, key: jax.Array) -> tuple[Any, Any, Report]:
        def loss_fn(params: Any) -> jax.Array:
            logits = model.apply(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        report = Report(loss, jnp.float32(tokens.size), optax.tree.norm(grads))
        return optax.apply_updates(params, updates), state, report

    state = load_state(directory, State(model.params, tx.init(model.params)), say)
    data = np.frombuffer(text, np.uint8)
    schedule = Schedule(steps=recipe.steps, checkpoint_every=recipe.steps, eval_every=recipe.steps)
    key = jax.random.key(recipe.seed)
    save = partial(save_state, directory)
    return train(state, step, partial(_batch, data, recipe), key, schedule, save, report(state.step)).weights


def _batch(data: np.ndarray, recipe: Recipe, step: int) -> np.ndarray:
    """Rows from random places, as a function of the seed and the step alone."""
    return rows_at_random(data, recipe.seed, step, recipe.batch, recipe.length + 1)


def _optimizer(recipe: Recipe, sites: Sites) -> optax.GradientTransformation:
    def matrices(variables: Any) -> Any:
        leaves, treedef = named_leaves(variables)
        return rebuild(treedef, {path: _matrix(sites, path) for path in leaves})

    def rate(peak: float) -> optax.Schedule:
        return Optimizer(peak=peak, warmup=recipe.warmup, steps=recipe.steps, final=0.05).rate

    return optax.contrib.muon(
        rate(recipe.learning_rate),
        ns_steps=4,
        weight_decay=recipe.weight_decay,
        adam_learning_rate=rate(recipe.adam_learning_rate),
        muon_weight_dimension_numbers=matrices,
    )


def _matrix(sites: Sites, path: str) -> optax.contrib.MuonDimensionNumbers | None:
    site = sites.get(path)
    if site is None or site.kind != "dense":
        return None
    return optax.contrib.MuonDimensionNumbers(site.in_axes, site.out_axes)
