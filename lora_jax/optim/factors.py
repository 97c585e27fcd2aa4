"""What an optax transformation sees of an adapter: updates in a tree, some of whose leaves a mask may hide."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from lora_jax.adapter.updates import is_update
from lora_jax.errors import ParameterError


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
