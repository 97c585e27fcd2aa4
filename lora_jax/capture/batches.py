"""Batches as given by the caller: any iterable, gone through once or several times, with or without a bar."""

from collections.abc import Iterable, Iterator, Sized
from itertools import chain
from typing import Any

import jax
from rich.progress import track

from lora_jax.errors import ConfigError
from lora_jax.paths import is_array


def open_batches(
    batches: Iterable[Any], passes: int, title: str | bool
) -> tuple[tuple[Any, ...], Iterator[Iterator[tuple[Any, ...]]]]:
    """The first batch, and for every pass an iterator over all of them.

    Args:
      batches: the caller's batches.
      passes: how often to go through them.
      title: of a progress bar; False for none.
    """
    stream = iter(batches)
    if passes < 1 or (passes > 1 and stream is batches):
        raise ConfigError(f"passes={passes} needs a collection of batches, such as a list, and at least one pass")
    first = next(stream, None)
    if first is None:
        raise ConfigError("batches is empty: give at least one tuple of arguments")
    total = len(batches) if isinstance(batches, Sized) else None

    def rounds() -> Iterator[Iterator[tuple[Any, ...]]]:
        for number in range(passes):
            source = iter(batches) if number else chain([first], stream)
            shown = track(source, description=str(title), total=total) if title else source
            yield map(_arguments, shown)

    return _arguments(first), rounds()


def _arguments(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def split(tree: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """The arrays of a tree, and the rest of it as a hashable value, for `jax.jit`; `joined` is the inverse."""
    leaves, treedef = jax.tree.flatten(tree)
    return [leaf for leaf in leaves if is_array(leaf)], (
        treedef,
        *(None if is_array(leaf) else leaf for leaf in leaves),
    )


def joined(arrays: list[Any], rest: tuple[Any, ...]) -> Any:
    """The tree that was `split`."""
    given, (treedef, *others) = iter(arrays), rest
    return jax.tree.unflatten(treedef, [next(given) if leaf is None else leaf for leaf in others])
