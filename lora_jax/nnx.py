"""NNX models as functions of their parameters, and of the state that a call changes."""

from collections.abc import Callable
from typing import Any, Literal, overload
from weakref import ref

import jax
from flax import nnx

from lora_jax.errors import ParameterError, listed

__all__ = ["functional"]


@overload
def functional(model: nnx.Module, *, state: Literal[False] = False) -> tuple[Callable[..., Any], nnx.State]: ...


@overload
def functional(model: nnx.Module, *, state: Literal[True]) -> tuple[Callable[..., Any], nnx.State, nnx.State]: ...


def functional(model: nnx.Module, *, state: bool = False) -> Any:
    """Split an NNX model into a pure function and its parameters, and its state if asked for.

    State is what is no `nnx.Param`: batch statistics, caches, random streams. Without `state=True` it is that of
    `model` now, at every call, and what a call changes in it is dropped: for models without any, and for evaluation.
    With it, the function takes the state and returns the new one, as the model's own calls would leave it.

    Modes are those of `model` now. A later `model.eval()` or `model.train()` is refused at the next trace, as a
    compiled function could not follow it: call `functional` once for each mode. `docs/state.md` does.

    Args:
      model: the model; it is left as it is.
      state: whether the function takes and returns state.

    Returns:
      `fn(params, *args, **kwargs)`, which calls the model, and `params`, the state of its parameters; with
      `state=True`, `fn(params, state, *args, **kwargs) -> (out, new_state)`, `params` and `state`.
      Write values back, merged ones for instance, with `nnx.update(model, params)`.

    Raises:
      ParameterError: in a call, the mode of the model is another than it was.

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
    alive, modes = ref(model), _modes(model)

    def call(params: nnx.State, state: nnx.State, *args: Any, **kwargs: Any) -> tuple[Any, nnx.State]:
        _check_modes(alive(), modes)
        copy = nnx.merge(graph, params, state, copy=True)
        out = copy(*args, **kwargs)
        _, _, new = nnx.split(copy, nnx.Param, ...)
        return out, new

    def frozen(params: nnx.State, *args: Any, **kwargs: Any) -> Any:
        return call(params, rest, *args, **kwargs)[0]

    return (call, params, rest) if state else (frozen, params)


def _modes(model: nnx.Module) -> dict[tuple[str, str], bool]:
    """The switches of every module, `deterministic` and the like, by its path and their name."""
    modules = (("/".join(map(str, path)), each) for path, each in nnx.iter_modules(model))
    return {
        (path, name): value
        for path, module in modules
        for name, value in vars(module).items()
        if isinstance(value, bool) and not name.startswith("_")
    }


def _check_modes(model: nnx.Module | None, before: dict[tuple[str, str], bool]) -> None:
    if model is None:
        return
    now = _modes(model)
    changed = [key for key, value in before.items() if now.get(key, value) != value]
    if changed:
        shown = listed([f"{'/'.join(filter(None, key))}={now[key]}" for key in changed])
        raise ParameterError(
            f"The mode of the model was changed after lora_jax.nnx.functional(model) ({shown}), and this function is "
            "the model's as it was. Call functional again after model.eval() or model.train(), once for each mode, "
            "or give it a copy: functional(nnx.clone(model))."
        )
