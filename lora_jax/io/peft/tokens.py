"""Trained rows of look-up tables in a PEFT adapter: their tensors, and the numbers that its config has for them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.errors import CheckpointError

SUFFIX = ".token_adapter.trainable_tokens_delta"
"""What follows the name of a table's module in the key of its trained rows."""

_TOKENS = re.compile(r"(\.token_adapter)?\.trainable_tokens_delta$")


def tokens_by_module(saved: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Trained rows by the module that holds the table.

    >>> list(tokens_by_module({"wte.token_adapter.trainable_tokens_delta": np.ones((1, 2)), "up.bias": np.ones(3)}))
    ['wte']
    """
    return {_TOKENS.sub("", name): rows for name, rows in saved.items() if _TOKENS.search(name)}


def whole_tensors(saved: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that are not trained rows."""
    return {name: value for name, value in saved.items() if not _TOKENS.search(name)}


def table_name(name: str) -> str:
    """The tensor of the base that one of an adapter's belongs to."""
    return _TOKENS.sub(".weight", name)


def token_indices(where: str, config: Mapping[str, Any], module: str, rows: np.ndarray) -> tuple[int, ...]:
    """Numbers of the rows that an adapter trains of a module's table.

    Raises:
      CheckpointError: the config does not have one for each of them.
    """
    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        given = next((ids for key, ids in given.items() if module == key or module.endswith(f".{key}")), None)
    numbers = tuple(given) if isinstance(given, Sequence) else ()
    known = all(isinstance(number, int) and number >= 0 for number in numbers)
    if rows.ndim != 2 or len(numbers) != len(rows) or not numbers or not known:
        raise CheckpointError(
            f"{where}: {module} has trained rows of shape {rows.shape}, and trainable_token_indices={given!r} must "
            "name one row number for each"
        )
    return numbers
