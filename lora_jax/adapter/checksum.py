"""Checksums of what does not train: how a scale or a frozen start that an optimizer moved is found out.

Weight decay and `jax.tree.map` reach every leaf of a tree, also those that must not change. So an adapter has one more
leaf: of every update, the sum of the squares of what is frozen in it. Whoever makes an adapter computes it anew.
Whatever moves all leaves alike breaks it: half the scale has a quarter of the square, and half the checksum.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.factors import is_traced
from lora_jax.adapter.updates import Update
from lora_jax.errors import listed
from lora_jax.paths import is_array

TOLERANCE = 1e-5
"""Relative error of a checksum in float32, whatever the order of the sum."""

_SMALL = 2**16


def checksum(updates: Mapping[str, Update]) -> Any:
    """`[*lanes, updates]` float32: what is frozen in every update, squared and summed.

    None if nothing is frozen, if the leaves are no arrays, or if they have different lanes; abstract if they are.

    Example:
      >>> from lora_jax.adapter.site import Site
      >>> from lora_jax.adapter.updates import LowRank
      >>> site = Site(path="w", shape=(4, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> checksum({"w": LowRank(jnp.ones((2, 4)), jnp.ones((2, 3)), jnp.float32(3.0), site)}).tolist()
      [9.0]
    """
    frozen = [_frozen(update) for update in updates.values()]
    leaves = [leaf for each in frozen for leaf, _ in each]
    if len({leaf.shape[: len(leaf.shape) - own] for each in frozen for leaf, own in each}) != 1:
        return None
    if not all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves):
        return jax.eval_shape(lambda: _sums([[(jnp.zeros(a.shape, a.dtype), n) for a, n in each] for each in frozen]))
    return _sums(frozen)


def moved(updates: Mapping[str, Update], made: Any) -> list[str]:
    """Paths of the updates whose frozen values are not those that the checksum `made` was computed from.

    Not checked are values that are not known, as under `jit`, and adapters of which every leaf was cast.
    """
    now = checksum(updates)
    known = all(isinstance(each, (jax.Array, np.ndarray)) and not is_traced(each) for each in (made, now))
    if not known or made.shape != now.shape or made.dtype != np.float32:
        return []
    narrow = max((float(jnp.finfo(leaf.dtype).eps) for leaf in _all_frozen(updates)), default=0.0)
    before, after = (np.asarray(each, np.float64).reshape(-1, len(updates)) for each in (made, now))
    with np.errstate(invalid="ignore"):  # What is infinite or NaN is for `merge` to refuse.
        off = np.abs(after - before) > (TOLERANCE + 4 * narrow) * np.maximum(np.abs(before), np.abs(after))
    return [path for path, wrong in zip(updates, off.any(0), strict=True) if wrong]


def warn_if_moved(adapters: Iterable[Any]) -> None:
    """Warn, once for all and by name, of frozen values that were moved since an adapter was made."""
    paths = sorted({path for adapter in adapters for path in moved(adapter, adapter.checksum)})
    if paths:
        warnings.warn(
            f"What is frozen at {listed(paths)} (a scale, or the start of an initialiser) is not what it was made as: "
            "an optimizer or jax.tree.map moved every leaf of the adapter. Train with lora_jax.optimizer(tx, adapter), "
            "or give other trainers the first part of lora_jax.partition(adapter); to change a scale: lora_jax.scale.",
            stacklevel=3,
        )


def _frozen(update: Update) -> list[tuple[Any, int]]:
    """The leaves that do not train, and how many axes each has beside those of lanes."""
    if not isinstance(update, Update):  # a prefix of a tree: one thing in the place of all of its arrays
        return []
    leaves, trains = jax.tree.leaves(update), jax.tree.leaves(update.trains())
    axes = jax.tree.leaves(update.axes(), is_leaf=lambda node: isinstance(node, tuple))
    known = zip(leaves, trains, axes, strict=True)
    frozen = [(leaf, own) for leaf, train, own in known if not train and is_array(leaf)]
    return [
        (leaf, len(own) if isinstance(own, tuple) else len(leaf.shape))
        for leaf, own in frozen
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]


def _all_frozen(updates: Mapping[str, Update]) -> list[Any]:
    return [leaf for update in updates.values() for leaf, _ in _frozen(update)]


def _sums(frozen: list[list[tuple[Any, int]]]) -> jax.Array | np.ndarray:
    lanes = next(leaf.shape[: leaf.ndim - own] for each in frozen for leaf, own in each)
    sums = [sum([_squares(*one) for one in each], np.float32(0)) for each in frozen]
    stacked = np if all(isinstance(each, (np.ndarray, np.generic)) for each in sums) else jnp
    found = stacked.stack([stacked.broadcast_to(each, lanes) for each in sums], -1)
    # An adapter of NumPy's arrays has nothing of JAX's: no device is needed to hold it.
    on_host = all(isinstance(leaf, np.ndarray) for each in frozen for leaf, _ in each)
    return found if on_host else jnp.asarray(found)


def _squares(leaf: Any, own: int) -> Any:
    """Summed over the leaf's own axes; on the host where that costs nothing, so that nothing is compiled for it."""
    axes = tuple(range(leaf.ndim - own, leaf.ndim))
    if isinstance(leaf, np.ndarray) or (not is_traced(leaf) and leaf.is_fully_addressable and leaf.size <= _SMALL):
        with np.errstate(all="ignore"):
            return np.square(np.abs(np.asarray(leaf).astype(np.complex128))).sum(axes).astype(np.float32)
    return jnp.square(jnp.abs(leaf).astype(jnp.float32)).sum(axes)
