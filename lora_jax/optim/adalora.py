"""AdaLoRA's budget: rank moves to the sites that need it while the adapter trains, and nothing is compiled again."""

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapter.factors import Array
from lora_jax.adapter.updates import is_update
from lora_jax.config.checks import positive_int, probability
from lora_jax.errors import ConfigError, ParameterError
from lora_jax.methods.adalora import AdaLora

Terms = dict[str, dict[str, Array]]
"""By the place of an update in the tree: an array like each of its `a`, `b` and `values`."""


class AdaloraState(NamedTuple):
    """State of `adalora`.

    Attributes:
      inner: of the base optimizer.
      step: number of updates so far.
      sensitivity: running mean of `|w · gradient|` for each trained number.
      uncertainty: running mean of how far each was from that mean.
      kept: for every update which terms are not pruned, `[*batch, rank]`.
    """

    inner: Any
    step: Array
    sensitivity: Terms
    uncertainty: Terms
    kept: dict[str, Array]


def adalora(
    tx: optax.GradientTransformation,
    *,
    target_rank: int,
    total_steps: int,
    warmup: int = 0,
    final: int = 0,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """Prune the least important terms of AdaLoRA updates, down to a budget that shrinks with the cube of time left.

    After each step of `tx`, the importance of a term is that of its singular value plus the mean ones of its two
    vectors: sensitivity times uncertainty, both running means. Every `every` steps the values of the terms below
    the budget become zero; pruned terms still get gradients and may come back, until the budget is final. All of it is
    part of the optimizer's state and of the update, so training loops need no other call, unlike PEFT's
    `update_and_allocate`, and masks are arrays.

    Args:
      tx: the optimizer of what trains.
      target_rank: terms per weight in the end, on average; every layer and expert of a stack counts as one.
      total_steps: updates in all.
      warmup: updates before anything is pruned (PEFT `tinit`).
      final: updates at the end with the final budget (PEFT `tfinal`).
      every: updates between prunings (PEFT `deltaT`).
      beta1: decay of the running mean of sensitivities.
      beta2: decay of the running mean of uncertainties.

    Returns:
      An optax transformation for `lora_jax.optimizer`; `update` needs `params`.

    Raises:
      ConfigError: a number is out of range, or nothing is left between warm-up and end.
      ParameterError: in `init`, for a tree without AdaLoRA updates, or a budget above its ranks.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
      >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 8))}
      >>> fn, x = lambda params, x: x @ params["w"], jnp.eye(8)
      >>> sites = lora.find_sites(fn, params, x)
      >>> config = lora.LoraConfig(method="adalora", rank=4, targets="w")
      >>> adapter = lora.init(jax.random.key(1), config, params, sites)
      >>> tx = lora.optimizer(lora.optim.adalora(optax.adam(0.1), target_rank=2, total_steps=10), adapter)
      >>> state = tx.init(adapter)
      >>> loss = lambda adapter: jnp.square(lora.adapt(fn)(params, adapter, x)).sum()
      >>> for _ in range(10):
      ...     updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
      ...     adapter = optax.apply_updates(adapter, updates)
      >>> adapter["w"].active.tolist(), lora.methods.trim(adapter)["w"].rank
      (2, 2)

    References:
      Zhang et al., AdaLoRA, arXiv 2303.10512.
    """
    schedule = _Schedule(target_rank, total_steps, warmup, final, every)
    decays = probability("beta1", beta1), probability("beta2", beta2)
    base = optax.with_extra_args_support(tx)

    def init(params: Any) -> AdaloraState:
        found = _found(params)
        zeros = {place: jax.tree.map(jnp.zeros_like, _terms(update)) for place, update in found.items()}
        kept = {place: jnp.ones(update.values.shape, bool) for place, update in found.items()}
        schedule.check(kept)
        return AdaloraState(base.init(params), jnp.zeros((), jnp.int32), zeros, zeros, kept)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, AdaloraState]:
        if params is None:
            raise ParameterError("adalora reads the values of the factors: call tx.update(gradients, state, params)")
        gradients = updates
        updates, inner = base.update(gradients, state.inner, params, **extra)
        step, found = state.step + 1, _found(params)
        after = {place: jax.tree.map(jnp.add, _terms(found[place]), _terms(u)) for place, u in _found(updates).items()}
        past = state.sensitivity, state.uncertainty
        means = _smoothed(after, gradients, past, decays)
        ranks, doubts = jax.tree.map(partial(jnp.where, step < schedule.end), means, past)
        scores = {place: _scores(ranks[place], doubts[place], found[place]) for place in found}
        prunes, kept = schedule.pruning(step, scores, state.kept)
        updates = _pruned(updates, found, prunes, kept)
        return updates, AdaloraState(inner, step, ranks, doubts, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def orthogonality(tree: Any) -> Array:
    """How far AdaLoRA's vectors are from orthonormal: the mean of `‖P·Pᵀ - I‖` over both factors of every weight.

    Add it to the loss, times 0.5 (PEFT's `orth_reg_weight`), so that the singular values rank the terms.

    Args:
      tree: an `Adapter`, or any tree that holds some.

    Returns:
      A float32 scalar.

    Raises:
      ParameterError: there is no AdaLoRA update in the tree.

    Example:
      >>> import lora_jax as lora
      >>> params = {"w": jnp.ones((64, 32))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 64)))
      >>> config = lora.LoraConfig(method="adalora", rank=4, targets="w")
      >>> adapter = lora.init(jax.random.key(0), config, params, sites)
      >>> bool(1.8 < lora.optim.orthogonality(adapter) < 2)  # small vectors: nearly ‖I‖
      True

    References:
      Zhang et al., AdaLoRA, arXiv 2303.10512, equation 4.
    """
    norms = [_distance(factor, len(u.site.batch_axes)) for u in _found(tree).values() for factor in (u.a, u.b)]
    return jnp.concatenate(norms).mean()


class _Schedule(NamedTuple):
    """How many terms there are at each step."""

    target_rank: int
    total_steps: int
    warmup: int
    final: int
    every: int

    @property
    def end(self) -> int:
        """The step at which the budget is final."""
        return self.total_steps - self.final

    def check(self, kept: dict[str, Array]) -> None:
        """Refuse numbers that leave no time or no rank to prune."""
        for name in ("target_rank", "total_steps", "every"):
            positive_int(name, getattr(self, name))
        if not 0 <= self.warmup < self.end <= self.total_steps:
            raise ConfigError(
                f"warmup={self.warmup} and final={self.final} leave nothing of total_steps={self.total_steps}"
            )
        if self.budget(kept) >= sum(each.size for each in kept.values()):
            raise ParameterError(
                f"target_rank={self.target_rank} is not below the ranks there are, so nothing would be pruned: start "
                "with a higher rank (PEFT starts with 1.5 times the target)"
            )

    def budget(self, kept: dict[str, Array]) -> int:
        """Terms in the end."""
        return self.target_rank * sum(prod(each.shape[:-1]) for each in kept.values())

    def pruning(self, step: Array, scores: dict[str, Array], kept: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Whether pruned terms are set to zero now, and which are kept."""
        flat = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))
        target = self.budget(kept)
        left = 1 - (step - self.warmup) / (self.end - self.warmup)
        budget = jnp.floor((flat.size - target) * left**3 + target).astype(jnp.int32)
        out = flat.size - budget
        limit = jnp.where(out > 0, flat[jnp.clip(out - 1, 0, flat.size - 1)], -jnp.inf)
        chooses = ((step > self.warmup) & (step % self.every == 0) & (step < self.end)) | (step == self.end)
        kept = {place: jnp.where(chooses, score > limit, kept[place]) for place, score in scores.items()}
        return chooses | (step > self.end), kept


def _found(tree: Any) -> dict[str, AdaLora]:
    """The AdaLoRA updates in a tree, by their place in it."""
    entries, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_update)
    found = {jax.tree_util.keystr(keys): node for keys, node in entries if isinstance(node, AdaLora)}
    if not found:
        raise ParameterError(
            f"No AdaLoRA update in a tree of type {type(tree).__name__}: start the adapter with "
            'LoraConfig(method="adalora")'
        )
    return found


def _terms(update: AdaLora) -> dict[str, Array]:
    return {"a": update.a, "b": update.b, "values": update.values}


def _smoothed(
    after: Terms, gradients: Any, past: tuple[Terms, Terms], decays: tuple[float, float]
) -> tuple[Terms, Terms]:
    """Running means of the sensitivity, and of its distance from that mean."""
    slow, fast = decays
    slopes = {place: _terms(update) for place, update in _found(gradients).items()}
    now = jax.tree.map(lambda value, slope: jnp.abs(value * slope), after, slopes)
    mean = jax.tree.map(lambda old, new: slow * old + (1 - slow) * new, past[0], now)
    away = jax.tree.map(lambda old, new, mean: fast * old + (1 - fast) * jnp.abs(new - mean), past[1], now, mean)
    return mean, away


def _scores(sensitivity: dict[str, Array], uncertainty: dict[str, Array], update: AdaLora) -> Array:
    """`[*batch, rank]`: the importance of each term."""
    stacked = update.values.ndim
    each = jax.tree.map(jnp.multiply, sensitivity, uncertainty)
    return each["values"] + sum(each[name].mean(range(stacked, each[name].ndim)) for name in "ab")


def _pruned(updates: Any, found: dict[str, AdaLora], prunes: Array, kept: dict[str, Array]) -> Any:
    """Updates that take the values of pruned terms to zero."""

    def pruned(keys: Any, update: Any) -> Any:
        place = jax.tree_util.keystr(keys)
        if place not in found:
            return update
        gone = prunes & ~kept[place]
        return replace(update, values=jnp.where(gone, -found[place].values, update.values))

    return jax.tree_util.tree_map_with_path(pruned, updates, is_leaf=is_update)


def _distance(factor: Array, stacked: int) -> Array:
    """The Frobenius norm of `P·Pᵀ - I` for each entry of a stack; its gradient is zero where it is."""
    rows = factor.reshape(prod(factor.shape[:stacked]), factor.shape[stacked], -1)
    away = jnp.einsum("nri,nsi->nrs", rows, rows) - jnp.eye(rows.shape[1])[None]
    squared = jnp.square(away).sum((1, 2))
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)
