"""Vocabularies that training resized: every table has the new number of rows, and so has the config."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.errors import CheckpointError
from lora_jax.io.hf.changes import Change
from lora_jax.io.hf.folder import Checkpoint
from lora_jax.io.hf.tensors import Tensor
from lora_jax.io.hf.ties import is_head, is_table, tied_tables

_SIZE = "vocab_size"
_BIASES = ("final_logits_bias", "cls.predictions.bias", "lm_head.bias")


class Vocabulary(NamedTuple):
    """The new number of tokens, and the tensors that have it."""

    size: int
    tables: frozenset[str]


def new_vocabulary(base: Checkpoint, changes: Mapping[str, tuple[Tensor, Change]]) -> Vocabulary | None:
    """What the adapters make of the vocabulary, or None if it stays.

    Args:
      base: the checkpoint.
      changes: by the name of the result's tensor, the base's that it starts as and the change.

    Raises:
      CheckpointError: some tables would have the new size, and others the old one.
    """
    tied = tied_tables(base)
    names = tied[:2] if tied else ()
    counting = {name: pair for name, pair in changes.items() if _counts(name, names)}
    sizes = {
        name: (tensor.shape[0], len(change.value))
        for name, (tensor, change) in counting.items() if change.value is not None and _resizes(tensor, change.value)
    }  # fmt: skip
    if not sizes:
        return None
    old, new = ({pair[place] for pair in sizes.values()} for place in (0, 1))
    tensors = base.tensors | {name: tensor for name, (tensor, _) in counting.items()}
    stale = [
        name for name in sorted(tensors.keys() - sizes.keys())
        if _counts(name, names) and _tokens(name, tensors[name]) in old
    ]  # fmt: skip
    if len(new) > 1 or stale:
        shown = ", ".join(f"{name}: {after} rows" for name, (_, after) in sorted(sizes.items()))
        other = f", while {' and '.join(stale)} would keep {min(old)}" if stale else ""
        raise CheckpointError(
            f"{base.path} has a vocabulary of {min(old)} tokens, and the adapter was trained with another one ({shown}"
            f"{other}). A model has one size for all of its tables: save every resized table with the adapter "
            "(modules_to_save, or save_embedding_layers=True in PEFT), or merge into the base that was resized."
        )
    return Vocabulary(new.pop(), frozenset(sizes))


def _counts(name: str, tied: tuple[str, ...]) -> bool:
    """Whether a tensor has a number, or a row, for each token."""
    return is_table(name) or is_head(name) or name in tied or _is_bias(name)


def _is_bias(name: str) -> bool:
    return name.endswith(_BIASES) or (name.endswith(".bias") and is_head(f"{name.removesuffix('.bias')}.weight"))


def _resizes(tensor: Tensor, value: np.ndarray) -> bool:
    """Whether a value has another number of rows, and is alike otherwise."""
    return bool(tensor.shape) and value.shape[1:] == tensor.shape[1:] and value.shape != tensor.shape


def _tokens(name: str, tensor: Tensor) -> int:
    """How many tokens a tensor counts."""
    return tensor.shape[-1 if _is_bias(name) else 0] if tensor.shape else 0


def resized_config(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The config of a model with so many tokens.

    >>> resized_config({"vocab_size": 9}, 11), resized_config({"text_config": {"vocab_size": 9}}, 11)
    ({'vocab_size': 11}, {'text_config': {'vocab_size': 11}})
    """
    text = config.get("text_config")
    new = dict(config)
    if isinstance(text, Mapping):
        new["text_config"] = {**text, _SIZE: size}
    if _SIZE in config or not isinstance(text, Mapping):
        new[_SIZE] = size
    return new
