"""Layers of a stack: an update cut along the leading axis of its parameter, to be worked on one layer at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import Update


def stacked(updates: Sequence[Update]) -> bool:
    """Whether the leading axis of the parameter that these updates are for is one of layers or experts."""
    return all(update.site.batch_axes[:1] == (0,) for update in updates)


def unstack(update: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Update]]:
    """The arrays of an update that differ from layer to layer, layers first, and the update of one layer's slices.

    Example:
      >>> from lora_jax.adapter.updates import LowRank
      >>> axes = {"in_axes": (1,), "out_axes": (2,), "batch_axes": (0,)}
      >>> site = Site(path="w", shape=(5, 4, 3), dtype="float32", kind="dense", **axes)
      >>> arrays, layer = unstack(LowRank(jnp.ones((5, 2, 4)), jnp.ones((5, 2, 3)), jnp.ones(5), site))
      >>> layer([array[0] for array in arrays]).delta().shape
      (4, 3)
    """
    leaves, treedef = jax.tree.flatten(update)
    axes = jax.tree.leaves(update.axes(), is_leaf=lambda node: isinstance(node, tuple))
    moves = [0 in each for each in axes]
    known = list(zip(leaves, axes, moves, strict=True))

    def layer(slices: Sequence[Any]) -> Update:
        rest = iter(slices)
        own = jax.tree.unflatten(treedef, [next(rest) if moving else leaf for leaf, _, moving in known])
        return own.of_layer(layer_site(update.site))

    return [jnp.moveaxis(leaf, each.index(0), 0) for leaf, each, moving in known if moving], layer


def nameless(update: Any) -> Any:
    """The update without its path, so that parameters alike share a program; one that has to raise keeps it."""
    return update if update.waits else replace(update, site=replace(update.site, path=""))


def layer_site(site: Site) -> Site:
    """The site of one layer of a stack."""
    into, out, batch = (
        tuple(axis - 1 for axis in axes if axis) for axes in (site.in_axes, site.out_axes, site.batch_axes)
    )
    channel = None if site.channel_axis is None else site.channel_axis - 1
    return replace(
        site, shape=site.shape[1:], in_axes=into, out_axes=out, batch_axes=batch, channel_axis=channel
    )  # fmt: skip
