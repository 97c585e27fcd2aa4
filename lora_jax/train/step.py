"""One compiled training step: token-weighted gradients, summed over parts, and an update; the base is an argument."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.dtypes import promoted
from lora_jax.optim.frozen import combine, partition

Losses = Callable[[Any, Any, Any, Any], tuple[jax.Array, jax.Array]]
"""`(base, adapter, batch, key) -> (sum of the losses, number of the losses)`, both float32 scalars."""


class Report(NamedTuple):
    """What a step says about itself.

    Attributes:
      loss: mean over what was trained on.
      tokens: how many losses that is the mean of.
      norm: global norm of the gradient, before it is clipped.
    """

    loss: jax.Array
    tokens: jax.Array
    norm: jax.Array


def training_step(
    losses: Losses, tx: optax.GradientTransformation, penalty: Callable[[Any], jax.Array] | None = None
) -> Callable[..., tuple[Any, Any, Report]]:
    """Compile a step.

    A batch comes in parts, along the first axis of its arrays. Their gradients are added one after the other; the sum
    is divided by the number of losses in all parts, so that a step in parts is the step of one large batch.

    Args:
      losses: the objective.
      tx: the optimizer, as `lora_jax.optimizer` made it.
      penalty: of the adapter, added to the mean loss; it does not count in what is reported.

    Returns:
      `step(adapter, state, base, batch, key) -> (adapter, state, report)`; the first two arguments are donated.

    Example:
      >>> import lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> fn = lambda params, x: x @ params["w"]
      >>> sites = lora.find_sites(fn, params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> adapted, tx = lora.adapt(fn), lora.optimizer(optax.sgd(0.1), adapter)
      >>> def losses(base, adapter, x, key):
      ...     y = adapted(base, adapter, x, lora_key=key)
      ...     return jnp.square(y).sum(), jnp.float32(y.size)
      >>> step = training_step(losses, tx)
      >>> adapter, state, report = step(adapter, tx.init(adapter), params, jnp.ones((1, 2, 4)), jax.random.key(0))
      >>> float(report.loss), int(report.tokens)
      (16.0, 6)
    """

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(adapter: Any, state: Any, base: Any, batch: Any, key: jax.Array) -> tuple[Any, Any, Report]:
        train, fixed = partition(adapter)

        def part(train: Any, batch: Any, key: jax.Array) -> Any:
            def total(train: Any) -> tuple[jax.Array, jax.Array]:
                return losses(base, combine(train, fixed), batch, key)

            return jax.value_and_grad(total, has_aux=True)(train)

        (loss, count), grads = _summed(part, train, batch, key)
        count = jnp.maximum(count, 1)
        grads = jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), grads)
        if penalty is not None:
            more = jax.grad(lambda train, penalty=penalty: penalty(combine(train, fixed)))(train)
            grads = jax.tree.map(jnp.add, grads, more)
        norm = optax.tree.norm(grads)
        whole = combine(grads, jax.tree.map(jnp.zeros_like, fixed))
        updates, state = tx.update(whole, state, adapter)
        return optax.apply_updates(adapter, updates), state, Report(loss / count, count, norm)

    return step


def distinct(tree: Any) -> Any:
    """A tree in which no two leaves are one array, as none can be donated twice.

    >>> one = jnp.ones(2)
    >>> first, second = distinct((one, one))
    >>> first is one, second is one
    (True, False)
    """
    seen: set[int] = set()

    def own(leaf: Any) -> Any:
        known = id(leaf) in seen
        seen.add(id(leaf))
        return jnp.copy(leaf) if known else leaf

    return jax.tree.map(own, tree)


def _summed(part: Callable[..., Any], train: Any, batch: Any, key: jax.Array) -> Any:
    """The sum over the parts of a batch of `((loss, count), gradients)`."""
    parts = jax.tree.leaves(batch)[0].shape[0]
    if parts == 1:
        return part(train, jax.tree.map(lambda leaf: leaf[0], batch), jax.random.fold_in(key, 0))

    def add(total: Any, each: tuple[Any, jax.Array]) -> tuple[Any, None]:
        found = part(train, each[0], jax.random.fold_in(key, each[1]))
        return jax.tree.map(lambda total, leaf: total + leaf.astype(total.dtype), total, found), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, promoted(leaf.dtype, "float32")), train)
    nothing = (jnp.float32(0), jnp.float32(0)), zeros
    return jax.lax.scan(add, nothing, (batch, jnp.arange(parts)))[0]
