"""A base model to adapt: a `Transformer` trained on Python source once, then read from a cache."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.adapter.site import Sites
from lora_jax.errors import CheckpointError
from lora_jax.models import Transformer, transformer
from lora_jax.paths import named_leaves, rebuild
from lora_jax.report.terminal import Progress
from lora_jax.train.data import Corpus, batch
from lora_jax.train.loop import Schedule, train
from lora_jax.train.metrics import cross_entropy
from lora_jax.train.optimizer import Optimizer
from lora_jax.train.state import State, load_state, read_arrays, save_state, write_arrays
from lora_jax.train.step import Report


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a base is pre-trained: Muon for matrices, Adam for the rest, warm-up and cosine decay for both."""

    steps: int
    seq_len: int
    batch_size: int = 8
    warmup: int = 20
    learning_rate: float = 0.02
    adam_learning_rate: float = 0.005
    weight_decay: float = 0.1
    seed: int = 0


def cache_path(model: Transformer, recipe: Recipe, corpus: Corpus) -> Path:
    """Where a base is cached, under a name that depends on everything its weights depend on."""
    facts = {
        "model": asdict(replace(model.config, remat=False)),  # changes memory, not weights
        "code": sha256(Path(transformer.__file__).read_bytes()).hexdigest(),
        "recipe": asdict(recipe),
        "text": corpus.sha256,
    }
    digest = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return _cache_folder() / f"base-{digest[:20]}"


def _cache_folder() -> Path:
    if own := os.environ.get("LORA_JAX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_jax"


def load_cached(path: Path, like: Any) -> Any | None:
    """The parameters cached at `path`, or None if there are none that fit `like`."""
    try:
        return read_arrays(path, like) if path.exists() else None
    except CheckpointError:
        return None


def store(path: Path, variables: Any) -> None:
    """Cache parameters; another process that did the same at once does no harm.

    Raises:
      CheckpointError: the cache folder cannot be written to.
    """
    write_arrays(path, variables)


def pretrain(
    model: Transformer,
    sites: Sites,
    corpus: Corpus,
    recipe: Recipe,
    directory: Path,
    report: Callable[[int], Progress],
    say: Callable[[str], None] = print,
) -> Any:
    """Train a model from scratch.

    Args:
      model: the model.
      sites: its sites; they tell Muon which axes of a kernel are inputs and which are outputs.
      corpus: the text.
      recipe: how.
      directory: where states are written; a state found there is continued.
      report: makes a reporter, given the step to start at.
      say: is told what a person should know about states that are found.

    Returns:
      The variables.

    Raises:
      Interrupted: Ctrl-C was pressed or SIGTERM came; the state is on disk.
      TrainingError: the loss is not finite.
    """
    tx = _optimizer(recipe, sites)

    @jax.jit
    def step(variables: Any, state: Any, tokens: jax.Array, key: jax.Array) -> tuple[Any, Any, Report]:
        def loss_fn(variables: Any) -> jax.Array:
            return cross_entropy(model.apply(variables, tokens[:, :-1]), tokens).mean()

        loss, grads = jax.value_and_grad(loss_fn)(variables)
        updates, state = tx.update(grads, state, variables)
        report = Report(loss, jnp.float32(tokens.size), optax.tree.norm(grads))
        return optax.apply_updates(variables, updates), state, report

    key = jax.random.key(recipe.seed)
    variables = jax.jit(model.init)(key, jnp.zeros((1, recipe.seq_len), jnp.uint8))
    state = load_state(directory, State(variables, tx.init(variables)), say)
    batches = partial(_batch, corpus, recipe)
    schedule = Schedule(steps=recipe.steps, checkpoint_every=recipe.steps, eval_every=recipe.steps)
    return train(state, step, batches, key, schedule, partial(save_state, directory), report(state.step)).weights


def _batch(corpus: Corpus, recipe: Recipe, step: int) -> np.ndarray:
    return batch(corpus.train, recipe.seed, step, recipe.batch_size, recipe.seq_len)


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
