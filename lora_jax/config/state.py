"""What in a tree of variables is state and no parameter: collections of linen, variables of NNX, indices of Equinox.

State is what a program writes: running statistics, caches, random streams. Training it would fight the program.
"""

import sys
from collections.abc import Collection, Iterable
from typing import Any

import jax

from lora_jax.paths import named_leaves

PARAMS = "params"
_NNX = ("BatchStat", "Cache", "Intermediate", "Perturbation", "RngState")


def collections_beside(paths: Collection[str]) -> set[str]:
    """Paths in the collections that stand beside linen's `params`: `batch_stats`, `cache`, a state of one's own.

    Example:
      >>> sorted(collections_beside(["params/fc/kernel", "batch_stats/norm/mean"]))
      ['batch_stats/norm/mean']
      >>> collections_beside(["fc/kernel", "norm/mean"])
      set()
    """
    roots = {_root(path) for path in paths} - {None}
    return {path for path in paths for root in roots if root is not None and _is_beside(root, path)}


def state_paths(tree: Any) -> set[str]:
    """Paths of the leaves that are known to be state by their types: variables of NNX, state indices of Equinox.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
      >>> sorted(state_paths(nnx.state(model)))
      ['mean', 'var']
    """
    kinds = tuple(_kinds())
    if not kinds:
        return set()
    entries, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, kinds))
    held = {jax.tree_util.keystr(keys, simple=True, separator="/") for keys, node in entries if isinstance(node, kinds)}
    return {path for path in named_leaves(tree)[0] if any(path == name or path.startswith(f"{name}/") for name in held)}


def _kinds() -> Iterable[type]:
    """Classes of state, of those frameworks that the program has imported."""
    nnx, equinox = sys.modules.get("flax.nnx"), sys.modules.get("equinox")
    if nnx is not None:
        yield from (getattr(nnx, name) for name in _NNX if hasattr(nnx, name))
    if equinox is not None:
        yield equinox.nn.StateIndex
        yield equinox.nn.State


def _root(path: str) -> str | None:
    """What stands before the first component `params`, with its `/`."""
    before, found, _ = f"/{path}".partition(f"/{PARAMS}/")
    return before.removeprefix("/") + "/" * bool(before) if found else None


def _is_beside(root: str, path: str) -> bool:
    return path.startswith(root) and not path.startswith(f"{root}{PARAMS}/")
