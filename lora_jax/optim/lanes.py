"""Sweeps and populations: one optimizer for a stack of adapters, with hyperparameters and an early stop for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapter.factors import Array
from lora_jax.adapter.stack import lanes_of
from lora_jax.errors import ConfigError
from lora_jax.optim.frozen import optimizer


class LanesState(NamedTuple):
    """State of `lanes`; every array in it has the axis of lanes in front.

    Attributes:
      hyperparams: by name, one value for each lane. Others may be put in their place between steps.
      inner: the lanes' own optimizer states.
    """

    hyperparams: dict[str, Array]
    inner: Any


def lanes(
    build: Callable[..., optax.GradientTransformation], **hyperparams: Any
) -> optax.GradientTransformationExtraArgs:
    """Train a stack of adapters, a sweep or a population, each as if it were alone.

    A lane is one adapter of the stack (`Adapter.stack`), with everything that belongs to it. Each has the optimizer
    that `build` makes of its own hyperparameters, restricted to what trains as by `lora_jax.optimizer`. What looks at a
    whole tree, such as clipping by global norm, sees one lane.

    `update` takes `active`, a boolean for every lane. Where it is False, the lane's state stays and its update changes
    no bit of it, not even if its gradients are not finite. Its arithmetic goes on: lanes are stopped without compiling
    anything. Further extra arguments, such as optax's `value`, have an axis of lanes too.

    Args:
      build: maps hyperparameters by name, each a scalar array inside `jax.vmap`, to an optax transformation.
      **hyperparams: for each name a value for every lane. Without any, `build` makes the same optimizer for all.

    Returns:
      An optax transformation for what `Adapter.stack` returns.

    Raises:
      ConfigError: a hyperparameter is not one number for each lane; of a wrong number of lanes, in `init`.
      ParameterError: in `init`, the adapter is not a stack, or nothing in it trains.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> stacked = lora.Adapter.stack([adapter] * 3)
      >>> tx = lora.optim.lanes(optax.adamw, learning_rate=[1e-3, 1e-2, 1e-2], weight_decay=[0.0, 0.0, 0.1])
      >>> state, gradients = tx.init(stacked), jax.tree.map(jnp.ones_like, stacked)
      >>> updates, state = tx.update(gradients, state, stacked, active=jnp.array([True, True, False]))
      >>> [round(float(lane), 4) for lane in updates["w"].b[:, 0, 0]]
      [-0.001, -0.01, -0.0]
    """
    values = {name: _one_each(name, value) for name, value in hyperparams.items()}

    def init(params: Any) -> LanesState:
        count = lanes_of(params)
        for name, value in values.items():
            if len(value) != count:
                raise ConfigError(f"{name} has {len(value)} values, but the adapter has {count} lanes; give one each")
        start = lambda given, lane: optimizer(build(**given), lane).init(lane)  # noqa: E731
        return LanesState(values, jax.vmap(start, axis_size=count)(values, params))

    def update(
        updates: Any, state: Any, params: Any = None, *, active: Any = None, **extra: Any
    ) -> tuple[Any, LanesState]:
        def lane(given: Any, own: Any, active: Any, updates: Any, params: Any, extra: Any) -> tuple[Any, Any]:
            new = optimizer(build(**given), updates).update(updates, own, params, **extra)
            held = jax.tree.map(lambda leaf: -jnp.zeros_like(leaf), new[0]), own
            return jax.tree.map(lambda new, old: jnp.where(active, new, old), new, held)

        going = jnp.ones(lanes_of(updates), bool) if active is None else jnp.asarray(active)
        made, inner = jax.vmap(lane)(state.hyperparams, state.inner, going, updates, params, extra)
        return made, LanesState(state.hyperparams, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _one_each(name: str, value: Any) -> Array:
    array = jnp.asarray(value)
    if array.ndim != 1:
        raise ConfigError(f"{name}={value!r} is not a sequence of numbers, one for each lane")
    return array
