"""Stacks of adapters: several of one form in the same arrays, along one more axis in front.

Each place along that axis is a lane: one adapter of a sweep, or of a population, whose members are trained together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapter.updates import Update
from lora_jax.errors import ParameterError, listed

_STACK = "Stack adapters with lora.Adapter.stack(adapters)"


def check_alike(adapters: Sequence[Mapping[str, Update]]) -> None:
    """Refuse adapters that cannot share arrays.

    Raises:
      ParameterError: there is none, or one differs from the first in more than the values of its arrays.
    """
    if not adapters:
        raise ParameterError("adapters is empty: there is nothing to stack")
    for number, other in enumerate(adapters[1:], 1):
        _check_paths(adapters[0], other, number)
        for path, update in adapters[0].items():
            _check_update(path, update, other[path], number)


def _check_paths(first: Mapping[str, Update], other: Mapping[str, Update], number: int) -> None:
    apart = sorted(set(first) ^ set(other))
    if apart:
        inside, outside = (0, number) if apart[0] in first else (number, 0)
        raise ParameterError(
            f"Adapters of different targets cannot be stacked: adapter {inside} adapts {apart[0]!r} and adapter "
            f"{outside} does not. Leave it out with adapter.without({apart[0]!r}), or give each choice of targets a "
            "stack of its own"
        )


def _check_update(path: str, first: Update, other: Update, number: int) -> None:
    one, two = _form(first), _form(other)
    apart = [name for name in dict.fromkeys([*one, *two]) if one.get(name) != two.get(name)]
    if apart:
        what = listed([f"{name} ({one.get(name)} and {two.get(name)})" for name in apart])
        raise ParameterError(
            f"Adapters 0 and {number} cannot be stacked: at {path!r} they differ in {what}. Only values of arrays may "
            "differ (factors, scales); give each method, rank, dropout and dtype a stack of its own"
        )


def _form(update: Any) -> dict[str, Any]:
    """What two updates share if one program can run both: all but the values of their arrays."""
    site = {f"site.{field.name}": getattr(update.site, field.name) for field in fields(update.site)}
    own = {field.name: jax.tree.map(_fact, getattr(update, field.name)) for field in fields(update)}
    return {"kind": type(update).__name__, **site, **{name: fact for name, fact in own.items() if name != "site"}}


def _fact(leaf: Any) -> Any:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" if hasattr(leaf, "ndim") else leaf


def lanes_of(adapter: Mapping[str, Update]) -> int:
    """Number of lanes in a stack.

    Raises:
      ParameterError: the adapter is not a stack, or its arrays have different numbers of lanes.
    """
    counts = {_lanes(path, leaf): path for path, update in adapter.items() for leaf in jax.tree.leaves(update)}
    if len(counts) != 1:
        found = listed([f"{count} at {path!r}" for count, path in counts.items()]) or "no arrays"
        raise ParameterError(f"An adapter is not a stack of lanes: its arrays have {found} in front. {_STACK}")
    for path, update in adapter.items():
        _check_lane(path, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), update))
    return next(iter(counts))


def _lanes(path: str, leaf: Any) -> int:
    if not jnp.ndim(leaf):
        raise ParameterError(f"An adapter is not a stack of lanes: {path!r} has an array without axes. {_STACK}")
    return leaf.shape[0]


def _check_lane(path: str, lane: Update) -> None:
    """Compare the axes of one lane's arrays with those its site asks for: a stack of layers is no stack of lanes."""

    def check(axes: tuple[int | None, ...], leaf: Any) -> None:
        if len(axes) != leaf.ndim:
            raise ParameterError(
                f"An adapter is not a stack of lanes: {path!r} has an array of {leaf.ndim + 1} axes, where one lane's "
                f"has {len(axes)} and a stack's {len(axes) + 1}. {_STACK}"
            )

    jax.tree.map(check, lane.axes(), lane, is_leaf=lambda node: isinstance(node, tuple))
