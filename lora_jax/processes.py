"""Programs of several processes write as one process does: arrays are gathered, and the first process writes them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lora_jax.errors import CheckpointError

_LONGEST = 4096
"""Bytes of a path, at most."""


def gathered(tree: Any) -> Any:
    """The tree with arrays of NumPy for those that are spread over processes, whole in each of them.

    Every process of the program calls it. Arrays of which this process has everything stay as they are.

    Example:
      >>> import jax.numpy as jnp
      >>> type(gathered({"a": np.ones(3)})["a"]).__name__
      'ndarray'
    """
    return jax.tree.map(_whole, tree)


def written_by_the_first(where: Any, write: Callable[[], None]) -> None:
    """Have the first process write, and the others wait for it; every process of the program calls it.

    Args:
      where: the path, for the error.
      write: writes; nothing in it may wait for the other processes.

    Raises:
      CheckpointError: the first process failed, in all others. In the first its own error is raised.
    """
    if jax.process_count() == 1:
        write()
        return
    failed: BaseException | None = None
    if jax.process_index() == 0:
        try:
            write()
        except BaseException as error:  # The others wait for an answer, whatever it is.
            failed = error
    done = bool(multihost_utils.broadcast_one_to_all(np.asarray(failed is None)))
    if failed is not None:
        raise failed
    if not done:
        raise CheckpointError(f"{where} was not written: the error of the first process of this program says why")


def said_by_the_first(text: str) -> str:
    """What the first process passed to it, in all of them.

    Example:
      >>> said_by_the_first("/tmp/a")
      '/tmp/a'
    """
    if jax.process_count() == 1:
        return text
    padded = np.zeros(_LONGEST, np.uint8)
    padded[: len(text.encode())] = np.frombuffer(text.encode(), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().rstrip(b"\0").decode()


def _whole(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
