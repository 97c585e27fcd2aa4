"""Freezing: an optimizer that keeps state for, and changes, only what trains; and a tree parted into both."""

import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
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

    Extra arguments of optax are passed on: trees like `tree`, gradients for instance, are masked too, and functions of
    such trees (`value_fn` of a line search, `grad_fn` of SAM) get them whole. So `optax.lbfgs`, `optax.contrib.sam` and
    wrappers take the steps that they take on the factors alone.

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
    masked = optax.masked(tx, trainable, mask_compatible_extra_args=True)
    _check(tree)

    def init(params: Any) -> optax.OptState:
        # nnx.Optimizer hands over boxed variables here and plain arrays in `update`.
        nnx = sys.modules.get("flax.nnx")
        return masked.init(nnx.as_pure(params) if nnx else params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        extra = {name: _of_masked(each, params) if callable(each) else each for name, each in extra.items()}
        token = _UNMASKED.set(params)
        try:
            updates, state = masked.update(updates, state, params, **extra)
        finally:
            _UNMASKED.reset(token)
        return jax.tree.map(lambda trains, leaf: leaf if trains else _nothing(leaf), trainable(updates), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


_UNMASKED: ContextVar[Any] = ContextVar("unmasked", default=None)
"""The whole tree, while an optimizer runs that sees a part. No extra argument: many transformations refuse those."""


def unmasked(params: Any) -> Any:
    """The tree that `lora_jax.optimizer` was given, for a transformation in it that must know frozen leaves, as scales.

    Args:
      params: what the transformation was given, and what is returned outside of `lora_jax.optimizer`.
    """
    whole = _UNMASKED.get()
    return params if whole is None else whole


def _of_masked(fn: Callable[..., Any], whole: Any) -> Callable[..., Any]:
    """A function of trees like `whole` as one of masked trees."""
    mask, structure = trainable(whole), jax.tree.structure(whole)
    masked = jax.tree.structure(_masked(whole, mask))

    def filled(value: Any) -> Any:
        if jax.tree.structure(value) != masked:
            return value
        return jax.tree.map(lambda trains, leaf, part: part if trains else leaf, mask, whole, value)

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = fn(*map(filled, args), **{name: filled(each) for name, each in kwargs.items()})
        return _masked(result, mask) if jax.tree.structure(result) == structure else result

    return call


def _masked(tree: Any, mask: Any) -> Any:
    return jax.tree.map(lambda trains, leaf: leaf if trains else optax.MaskedNode(), mask, tree)


def partition(tree: Any) -> tuple[Any, Any]:
    """Part a tree into what trains and what does not, as `equinox.partition` does.

    For optimizers and trainers that take a tree of parameters as it is, and would decay a scale or the frozen start of
    PiSSA with the rest: give them the first part, and `combine` both in the loss. `optimizer` does the same inside.

    Args:
      tree: an `Adapter`, or any tree that holds some, such as `{"params": base, "lora": adapter}`.

    Returns:
      Two trees like `tree`: what trains, with None for everything else, and everything else, with None for what trains.

    Raises:
      ParameterError: `tree` holds no adapter, or an adapter in which nothing trains.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> fn = lambda params, x: x @ params["w"]
      >>> sites = lora.find_sites(fn, params, x)
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> train, fixed = lora.partition(adapter)
      >>> loss = lambda train: lora.adapt(fn)(params, lora.combine(train, fixed), x).sum()
      >>> tx = optax.adamw(1e-3, weight_decay=0.1)  # as it is
      >>> updates, state = tx.update(jax.grad(loss)(train), tx.init(train), train)
      >>> adapter = lora.combine(optax.apply_updates(train, updates), fixed)
      >>> float(adapter["w"].scale)
      2.0
    """
    _check(tree)
    mask = trainable(tree)
    train = jax.tree.map(lambda trains, leaf: leaf if trains else None, mask, tree)
    return train, jax.tree.map(lambda trains, leaf: None if trains else leaf, mask, tree)


def combine(train: Any, fixed: Any) -> Any:
    """The inverse of `partition`: one tree again of what trains and what does not.

    Args:
      train: what trains, as `partition` returned it or as it was trained since.
      fixed: the rest, as `partition` returned it.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> train, fixed = lora.partition(adapter)
      >>> jax.tree.leaves(train["w"].scale), lora.combine(train, fixed)["w"].scale.tolist()
      ([], 2.0)
    """
    return jax.tree.map(lambda one, other: other if one is None else one, train, fixed, is_leaf=lambda x: x is None)


def schedule_free_eval_params(state: Any, tree: Any) -> Any:
    """The averaged weights of `optax.contrib.schedule_free` inside `lora_jax.optimizer`, for evaluation and merging.

    `optax.contrib.schedule_free_eval_params` for a tree that does not train whole.

    Args:
      state: of `lora_jax.optimizer(tx, tree)`, where `tx` is `schedule_free` or wraps it.
      tree: the adapter, or the tree that holds it, as trained so far.

    Returns:
      A tree like `tree`.

    Raises:
      ParameterError: there is no state of `schedule_free` in `state`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> tx = lora.optimizer(optax.contrib.schedule_free_sgd(0.1), adapter)
      >>> averaged = lora.optim.schedule_free_eval_params(tx.init(adapter), adapter)
      >>> bool(jnp.allclose(averaged["w"].a, adapter["w"].a))
      True
    """
    found = [node for node in jax.tree.leaves(state, is_leaf=_is_schedule_free) if _is_schedule_free(node)]
    if not found:
        raise ParameterError(
            f"There is no state of optax.contrib.schedule_free in a {type(state).__name__}: give the state of "
            "lora_jax.optimizer(optax.contrib.schedule_free(...), tree), and leave the weights alone otherwise."
        )
    mask = trainable(tree)
    averaged = optax.contrib.schedule_free_eval_params(found[0], _masked(tree, mask))
    return jax.tree.map(lambda trains, leaf, part: part if trains else leaf, mask, tree, averaged)


def _is_schedule_free(node: Any) -> bool:
    return isinstance(node, optax.contrib.ScheduleFreeState)


def _nothing(leaf: Any) -> jax.Array:
    """The update that changes no bit: adding 0.0 would turn -0.0 into 0.0, adding -0.0 keeps both."""
    if leaf.dtype == jax.dtypes.float0:  # the gradient of an integer parameter
        return jnp.zeros(leaf.shape, bool)
    return -jnp.zeros_like(leaf)


def _check(tree: Any) -> None:
    if not updates_in(tree):
        raise ParameterError(
            f"No adapter found in a tree of type {type(tree).__name__}, so nothing would train. Pass the Adapter that "
            'lora_jax.init returned, or a tree that holds one, such as {"params": params, "lora": adapter}.'
        )
    if not any(jax.tree.leaves(trainable(tree))):
        raise ParameterError(
            "The adapter holds nothing that trains: it is empty, or all of its leaves are frozen. "
            "Print it to see its updates."
        )


def is_masked(node: Any) -> bool:
    """Whether an optax mask took away what was here."""
    return isinstance(node, optax.MaskedNode)


def has_factors(node: Any) -> bool:
    """Whether a node is an update with factors `a` and `b`, of whatever kind."""
    return is_update(node) and hasattr(node, "a") and hasattr(node, "b")


def updates_in(tree: Any) -> list[Any]:
    """The updates of all adapters in a tree."""
    return [node for node in jax.tree.leaves(tree, is_leaf=is_update) if is_update(node)]


def check_factors(name: str, tree: Any) -> None:
    """Refuse a tree that the transformation `name` would leave as it is.

    Raises:
      ParameterError: no update in the tree has low-rank factors.
    """
    if not any(map(has_factors, updates_in(tree))):
        raise ParameterError(
            f"{name} finds no low-rank factors in a tree of type {type(tree).__name__}, so it would do nothing. Give "
            'it gradients of an Adapter, or of a tree that holds one, such as {"params": params, "lora": adapter}.'
        )


def map_trained(fn: Callable[[str, Any], Any], update: Any, other: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """Map `fn(field, leaf)` over the trained leaves of an update, `other` over its frozen ones; masked ones stay."""

    def mapped(keys: Any, trains: bool, leaf: Any) -> Any:
        if is_masked(leaf):
            return leaf
        return fn(jax.tree_util.keystr(keys, simple=True), leaf) if trains else other(leaf)

    return jax.tree_util.tree_map_with_path(mapped, update.trains(), update)
