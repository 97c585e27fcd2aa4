"""Freezing: an optimizer that keeps state for, and changes, only what trains."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapter.adapter import trainable
from lora_jax.adapter.updates import is_update
from lora_jax.errors import ParameterError


def optimizer(tx: optax.GradientTransformation, tree: Any) -> optax.GradientTransformationExtraArgs:
    """Restrict an optax optimizer to what `lora_jax.trainable` marks.

    Frozen leaves get no optimizer state and an update that changes no bit of them, `-0.0` included, so one
    optimizer serves an `Adapter` alone and a combined tree such as `{"params": base, "lora": adapter}`. Anything
    in `tx` that looks at the whole tree, such as clipping by global norm or weight decay, sees only what trains.

    It fits wherever optax does: plain loops, `flax.training.train_state.TrainState`, and `nnx.Optimizer` with the
    adapter held in a variable (`model.lora = nnx.LoRAParam(adapter)`, `wrt=nnx.LoRAParam`), in graph and tree mode.
    Which leaves train is read off the tree given to `init` and `update`, so another adapter of another shape
    works too.

    A transformation in `tx` that must know frozen leaves, as `lora_jax.optim.lora_fa` must know scales, gets the whole
    tree as optax's extra argument `unmasked_params`.

    Differs from PEFT, which marks frozen parameters with `requires_grad=False` and leaves the filtering to the user.

    Args:
      tx: any optax transformation.
      tree: the tree that will be trained (or one like it; `jax.ShapeDtypeStruct` leaves are fine). It is only
        checked.

    Returns:
      An optax transformation for trees like `tree`.

    Raises:
      ParameterError: `tree` holds no adapter, or an adapter in which nothing trains.

    Note:
      An update of zero is still an addition. XLA folds it away under `jit`; outside, backends that flush subnormal
      numbers do so to those of the base. In a combined tree, give the base to your loss through
      `jax.lax.stop_gradient`, or `jax.grad` computes gradients of it for nothing.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> tree = {"params": params, "lora": adapter}
      >>> tx = lora.optimizer(optax.adam(0.1), tree)
      >>> state = tx.init(tree)
      >>> sum(leaf.size for leaf in jax.tree.leaves(state))  # a count, and two moments of a and b
      29
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, tree), state, tree)
      >>> bool((optax.apply_updates(tree, updates)["params"]["w"] == params["w"]).all())
      True
    """
    masked = optax.masked(tx, trainable)
    _check(tree)

    def init(params: Any) -> optax.OptState:
        # nnx.Optimizer hands over boxed variables here and plain arrays in `update`.
        nnx = sys.modules.get("flax.nnx")
        return masked.init(nnx.as_pure(params) if nnx else params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        extra = {"unmasked_params": params, **extra}
        updates, state = masked.update(updates, state, params, **extra)
        return jax.tree.map(lambda trains, leaf: leaf if trains else _nothing(leaf), trainable(updates), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _nothing(leaf: Any) -> jax.Array:
    """The update that changes no bit: adding 0.0 would turn -0.0 into 0.0, adding -0.0 keeps both."""
    if leaf.dtype == jax.dtypes.float0:  # the gradient of an integer parameter
        return jnp.zeros(leaf.shape, bool)
    return -jnp.zeros_like(leaf)


def _check(tree: Any) -> None:
    if not any(is_update(node) for node in jax.tree.leaves(tree, is_leaf=is_update)):
        raise ParameterError(
            f"No adapter found in a tree of type {type(tree).__name__}, so nothing would train. Pass the Adapter that "
            'lora_jax.init returned, or a tree that holds one, such as {"params": params, "lora": adapter}.'
        )
    if not any(jax.tree.leaves(trainable(tree))):
        raise ParameterError(
            "The adapter holds nothing that trains: it is empty, or all of its leaves are frozen. "
            "Print it to see its updates."
        )
