"""A checkpoint's tensors by the names of the model's parameters: prefixes, older spellings, what nothing reads."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax.errors import CheckpointError
from lora_jax.io.hf.tensors import Tensor
from lora_jax.jsonfile import read_object
from lora_jax.models.config import DecoderConfig
from lora_jax.models.encoder_config import ENCODERS, EncoderConfig
from lora_jax.models.tensors import SCORE

# Masks and frequencies that older versions of transformers stored.
_BUFFERS = re.compile(r"(.*\.)?(attn|attention)\.(bias|masked_bias)|.*\.rotary_emb\.inv_freq|.*\bposition_ids")
# Heads for training encoders on masked tokens.
_MASKED_HEADS = ("cls.", "lm_head.")
_OLD_NORMS = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}


def decoder_tensors(where: Path, stored: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """The tensors of a decoder.

    Raises:
      CheckpointError: there is a head beside a table that is said to be the head too.
    """
    root, head = f"{config.modules.root}.", f"{SCORE if config.labels else config.modules.head}.weight"
    tensors = _without_buffers(stored)
    if not any(name.startswith(root) for name in tensors):
        # The Hub's GPT-2, and models that were saved without their head.
        tensors = {name if name == head else root + name: each for name, each in tensors.items()}
    if config.tied and not config.labels and head in tensors:
        _check_tied(where, tensors.pop(head), tensors.get(f"{root}{config.modules.table}.weight"))
    return tensors


def encoder_tensors(
    where: Path, stored: Mapping[str, Tensor], config: EncoderConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of an encoder, and those of heads for masked tokens.

    Raises:
      CheckpointError: texts are not embedded by their mean.
    """
    _check_pooling(where)
    prefix, found, beside = f"{ENCODERS[config.family]}.", dict[str, Tensor](), dict[str, Tensor]()
    for name, each in _without_buffers(stored).items():
        for old, new in _OLD_NORMS.items():
            name = name.replace(old, new)
        if name.startswith(_MASKED_HEADS):
            beside[name] = each
            continue
        name = name.removeprefix(prefix)
        found[f"{config.root}.{name}" if config.root and not name.startswith("classifier.") else name] = each
    return found, beside


def _without_buffers(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: each for name, each in stored.items() if not _BUFFERS.fullmatch(name)}


def _check_tied(where: Path, head: Tensor, table: Tensor | None) -> None:
    """A head that is stored although it is tied must be the table, or the config is wrong."""
    if table is None or head[2:4] != table[2:4] or not _same(head, table):
        raise CheckpointError(
            f"{where}: {head.name} is another table than that of the tokens, but tie_word_embeddings says that they "
            "are one. Set it to false in config.json if the head is its own."
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return all(np.array_equal(*pair) for pair in zip(one.pieces(), other.pieces(), strict=True))


def _check_pooling(where: Path) -> None:
    """What sentence-transformers says of how texts are embedded."""
    file = where / "1_Pooling" / "config.json"
    said = read_object(file)
    if said is None:
        return
    others = [name for name, value in said.items() if name.startswith("pooling_mode_") and value is True]
    if others != ["pooling_mode_mean_tokens"]:
        raise CheckpointError(f"{file} embeds texts by {', '.join(others) or 'nothing known'}; only their mean is read")
