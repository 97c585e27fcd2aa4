"""Adapters and the parameters they are for: the updates of one or several by path, checked against the parameters."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.adapter import Adapter, leaves_by_name
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import Change, Replace, Update
from lora_jax.errors import ParameterError, nearest
from lora_jax.quantised.leaf import abstract

_Shapes: TypeAlias = list[tuple[int, ...]]


class NumberedUpdate(NamedTuple):
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


def updates_by_path(
    adapters: Adapter | Sequence[Adapter], leaves: Mapping[str, Any]
) -> dict[str, list[NumberedUpdate]]:
    """Collect the updates of one or several adapters by path, checked against the parameters.

    Args:
      adapters: one adapter or a sequence of them.
      leaves: the parameters by path.

    Raises:
      ParameterError: a path is missing, a shape differs, or a parameter is trained in full twice.
      TypeError: something else than adapters was given.
    """
    found: dict[str, list[NumberedUpdate]] = {}
    for number, adapter in enumerate(adapter_list(adapters)):
        for path, update in adapter.items():
            _check_parameter(path, update, leaves)
            found.setdefault(path, []).append(NumberedUpdate(number, update))
    _check_arrays([(path, update) for path, updates in found.items() for _, update in updates], leaves)
    for path, updates in found.items():
        if sum(isinstance(update, Replace) for _, update in updates) > 1:
            raise ParameterError(
                f"{path!r} is trained in full by more than one adapter, and two values cannot be added. "
                f"Leave it out of all but one: adapter.without({path!r})"
            )
        if any(isinstance(update, Replace) for _, update in updates):
            _check_reads_base(path, updates)
    return found


def check_parameters(adapters: Adapter | Sequence[Adapter], leaves: Mapping[str, Any]) -> None:
    """Refuse parameters that adapters are not for; see `updates_by_path`."""
    updates_by_path(adapters, leaves)


def _check_reads_base(path: str, updates: Sequence[NumberedUpdate]) -> None:
    for _, update in updates:
        if update.reads_base:
            raise ParameterError(
                f"{path!r} is trained in full by one adapter, and has a {type(update).__name__} in another that was "
                f"made for the base's own value. Leave it out of one of them: adapter.without({path!r})"
            )


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
    """Compare what every update makes of its parameter with what its site needs, in one abstract evaluation of all."""
    shapes: list[tuple[Site, _Shapes]] = []

    def note(updates: Sequence[Update], bases: Sequence[Any]) -> None:
        for update, base in zip(updates, bases, strict=True):
            shapes.append((update.site, _shapes(_change(update, base))))

    jax.eval_shape(note, [update for _, update in given], [abstract(leaves[path]) for path, _ in given])
    for site, made in shapes:
        _check_shapes(site, made)


def _change(update: Update, base: Any) -> Change:
    try:
        return update.change(base)
    except (TypeError, ValueError) as error:
        given = {name: jnp.shape(leaf) for name, leaf in leaves_by_name(update)}
        raise _misshapen(update.site, f"arrays of shapes {given}, which do not fit together ({error})") from None


def _shapes(change: Change) -> _Shapes:
    """Shapes of the base, of each factor, and of the gain if there is one."""
    return [jnp.shape(each) for each in (change.base, *sum(change.factors, ()), change.gain) if each is not None]


def _check_shapes(site: Site, made: _Shapes) -> None:
    """Compare the shapes in a change with those of its site."""
    base, *rest = made
    pairs, gains = list(zip(rest[::2], rest[1::2], strict=False)), rest[len(rest) // 2 * 2 :]
    ranks = [a[len(site.batch_axes)] if len(a) > len(site.batch_axes) else 0 for a, _ in pairs]
    factors = [shape for rank in ranks for shape in (site.a_shape(rank), site.b_shape(rank))]
    wanted = [site.shape, *factors, *(site.batch_shape + site.sizes(site.out_axes) for _ in gains)]
    if [base, *rest] != wanted:
        raise _misshapen(site, f"arrays of shapes {made} where its site needs {wanted}")


def _misshapen(site: Site, problem: str) -> ParameterError:
    return ParameterError(
        f"The update at {site.path!r} has {problem}. "
        "If adapters were stacked, run them under jax.vmap, or take one of them: adapter.unstack()[0]"
    )


def _described(given: Any) -> str:
    if isinstance(given, Sequence) and not isinstance(given, str):
        return f"a {type(given).__name__} of {', '.join(type(each).__name__ for each in given)}"
    return f"a {type(given).__name__}"
