"""NNX models as functions of their parameters."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

__all__ = ["functional"]


def functional(model: nnx.Module) -> tuple[Callable[..., Any], nnx.State]:
    """Split an NNX model into a pure function and its parameters.

    The recipe in full, for models that need more (another method, other state passed along): `nnx.split` the
    model by `nnx.Param`, and `nnx.merge` it again inside the function that `adapt` gets.

    State that is no `nnx.Param` (batch statistics, caches, random streams) is that of `model` now, at every call;
    what a call changes in it is dropped. So call `model.eval()` before, unless dropout should
    repeat itself.

    Args:
      model: the model; it is left as it is.

    Returns:
      `fn(params, *args, **kwargs)`, which calls the model, and `params`, the state of its parameters.
      Write parameters back, merged ones for instance, with `nnx.update(model, params)`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> from flax import nnx
      >>> from lora_jax.nnx import functional
      >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
      >>> fn, params = functional(model)
      >>> sites = lora.find_sites(fn, params, x)
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="kernel"), params, sites)
      >>> bool((lora.adapt(fn)(params, adapter, x) == model(x)).all())
      True
    """
    graph, *states = nnx.split(model, nnx.Param, ...)
    # nnx.split hands out the model's own Variables; without copies, updating the model would change them too.
    params, rest = jax.tree.map(lambda leaf: leaf, states)

    def fn(params: nnx.State, *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(graph, params, rest, copy=True)(*args, **kwargs)

    return fn, params
