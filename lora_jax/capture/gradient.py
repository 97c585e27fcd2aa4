"""The gradient of a loss by selected parameters, averaged over batches."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.capture.batches import joined, split
from lora_jax.capture.captured import Statistic
from lora_jax.capture.statistics import Gradient
from lora_jax.errors import ParameterError
from lora_jax.paths import named_leaves, rebuild


def mean_gradients(
    fn: Callable[..., Any], params: Any, rounds: Iterable[Iterable[tuple[Any, ...]]], paths: Sequence[str]
) -> dict[str, Statistic]:
    """The mean over batches of the gradient by each of the parameters; nothing else is differentiated."""
    leaves, _ = named_leaves(params)
    step, total, count = gradient_step(fn, paths), {path: jnp.zeros(leaves[path].shape) for path in paths}, 0
    for batches in rounds:
        for batch in batches:
            total, count = step(total, *split((params, batch))), count + 1
    return {path: Gradient(value / count, jnp.float32(count)) for path, value in total.items()}


def gradient_step(fn: Callable[..., Any], paths: Sequence[str]) -> Callable[..., Any]:
    """A compiled function that adds the gradient of a batch to a sum, in place."""

    def loss(chosen: dict[str, Any], params: Any, batch: tuple[Any, ...]) -> Any:
        leaves, treedef = named_leaves(params)
        value = fn(rebuild(treedef, {path: chosen.get(path, leaf) for path, leaf in leaves.items()}), *batch)
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ParameterError(
                f"The function returns {jax.tree.map(jnp.shape, value)}, and a gradient is that of a scalar loss: "
                "capture a function of (params, *batch) that returns one"
            )
        return value

    @partial(jax.jit, static_argnames="rest", donate_argnames="total")
    def step(total: dict[str, Any], arrays: list[Any], rest: tuple[Any, ...]) -> dict[str, Any]:
        params, batch = joined(arrays, rest)
        leaves, _ = named_leaves(params)
        found = jax.grad(loss)({path: leaves[path] for path in paths}, params, batch)
        return {path: total[path] + grad.astype(jnp.float32) for path, grad in found.items()}

    return step
