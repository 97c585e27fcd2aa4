"""Bringing adapters and parameters together: updates by path, checked against the parameters they are for."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.adapter import Adapter
from lora_jax.errors import ParameterError, nearest
from lora_jax.site import Site
from lora_jax.updates import Replace, Update


class Placed(NamedTuple):
    """An update, and the position of its adapter among those given."""

    slot: int
    update: Update


def adapter_list(adapters: Adapter | Sequence[Adapter]) -> list[Adapter]:
    """One adapter or a sequence of them, as a list.

    Raises:
      TypeError: something else was given.
    """
    given = [adapters] if isinstance(adapters, Adapter) else adapters
    if isinstance(given, Sequence) and all(isinstance(each, Adapter) for each in given):
        return list(given)
    raise TypeError(f"Expected an Adapter or a sequence of them, got {_described(adapters)}")


def fit(adapters: Adapter | Sequence[Adapter], leaves: Mapping[str, Any]) -> dict[str, list[Placed]]:
    """Collect the updates of one or several adapters by path, checked against the parameters.

    Args:
      adapters: one adapter or a sequence of them.
      leaves: the parameters by path.

    Raises:
      ParameterError: a path is missing, a shape differs, or a parameter is trained in full twice.
      TypeError: something else than adapters was given.
    """
    found: dict[str, list[Placed]] = {}
    for slot, adapter in enumerate(adapter_list(adapters)):
        for path, update in adapter.items():
            _check_parameter(path, update, leaves)
            found.setdefault(path, []).append(Placed(slot, update))
    _check_arrays([(path, update) for path, placed in found.items() for _, update in placed], leaves)
    for path, placed in found.items():
        if sum(isinstance(update, Replace) for _, update in placed) > 1:
            raise ParameterError(
                f"{path!r} is trained in full by more than one adapter, and two values cannot be added. "
                f"Leave it out of all but one: adapter.without({path!r})"
            )
    return found


def _check_parameter(path: str, update: Update, leaves: Mapping[str, Any]) -> None:
    if path not in leaves:
        raise ParameterError(
            f"The adapter adapts {path!r}, which these parameters do not have; nearest: {nearest(path, leaves)}. "
            "Pass the tree the adapter was made for, at the same level (with or without 'params')."
        )
    leaf, site = leaves[path], update.site
    if np.shape(leaf) != site.shape:
        raise ParameterError(
            f"{path!r} has shape {np.shape(leaf)}, but the adapter was made for shape {site.shape}: "
            "these are not the parameters it was trained on."
        )


def _check_arrays(given: Sequence[tuple[str, Update]], leaves: Mapping[str, Any]) -> None:
    """Compare what every update makes of its arrays with what its site needs, in one abstract evaluation of all."""

    def parts(updates: Sequence[Update], bases: Sequence[Any]) -> list[Any]:
        return [update.factors() or update.base(base) for update, base in zip(updates, bases, strict=True)]

    made = jax.eval_shape(parts, [update for _, update in given], [leaves[path] for path, _ in given])
    for (path, update), part in zip(given, made, strict=True):
        _check_shapes(path, update.site, [array.shape for array in jax.tree.leaves(part)])


def _check_shapes(path: str, site: Site, made: list[tuple[int, ...]]) -> None:
    wanted = [site.shape]
    if len(made) > 1:
        rank = made[0][len(site.batch_axes)] if len(made[0]) > len(site.batch_axes) else 0
        wanted = [site.a_shape(rank), site.b_shape(rank)]
    if made != wanted:
        raise ParameterError(
            f"The update at {path!r} has arrays of shapes {made} where its site needs {wanted}. "
            "If adapters were stacked (by jax.vmap, say), take one of them: jax.tree.map(lambda leaf: leaf[0], adapter)"
        )


def _described(given: Any) -> str:
    if isinstance(given, Sequence) and not isinstance(given, str):
        return f"a {type(given).__name__} of {', '.join(type(each).__name__ for each in given)}"
    return f"a {type(given).__name__}"
