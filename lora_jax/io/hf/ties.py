"""Tied tables: one table that is look-up and output head at once is recognised, kept one, or written as two."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lora_jax.errors import CheckpointError
from lora_jax.io.hf.changes import Change
from lora_jax.io.hf.folder import Checkpoint

_TABLES = re.compile(
    r"(.*\.)?(embed_tokens|wte|shared|word_embeddings?|embed_in|tok_embeddings|tokens_embed|embeddings)\.weight"
)
_HEADS = re.compile(
    r"(.*\.)?(lm_head|lm_head\.decoder|embed_out|proj_out|vocab_projector|generator_lm_head|cls\.predictions\.decoder)"
    r"\.weight"
)
_GENERATES = re.compile(r".*(ForCausalLM|LMHeadModel|DoubleHeadsModel|ForConditionalGeneration|ForMaskedLM)")
_MASKED = re.compile(r".*ForMaskedLM")
# Heads that are not called lm_head, by model_type.
_HEAD_OF = {
    "bert": "cls.predictions.decoder", "roberta": "lm_head.decoder", "xlm-roberta": "lm_head.decoder",
    "camembert": "lm_head.decoder", "distilbert": "vocab_projector", "electra": "generator_lm_head",
    "gpt_neox": "embed_out", "whisper": "proj_out",
}  # fmt: skip
# Encoder-decoders whose encoder and decoder share a table whatever tie_word_embeddings says.
_SHARES_ALWAYS = {"t5"}


class Tied(NamedTuple):
    """Names of the table and of the head, which the files may lack, and whether two tables can be written."""

    table: str
    head: str
    separable: bool


def tied_tables(base: Checkpoint) -> Tied | None:
    """The look-up table that is the output head too, or None.

    What `config.json` says decides; where it says nothing, a model that generates and has no head of its own is tied.
    """
    heads = [name for name in base.tensors if _HEADS.fullmatch(name)]
    said = _setting(base.config, "tie_word_embeddings")
    generates = any(_GENERATES.fullmatch(str(name)) for name in base.config.get("architectures") or ())
    if said is False or (said is None and heads) or not (generates or heads):
        return None
    table, known = _table(base)
    if table is None:
        return None
    masked = any(_MASKED.fullmatch(str(name)) for name in base.config.get("architectures") or ())
    kind = str(base.config.get("model_type"))
    default = _HEAD_OF.get(kind, "cls.predictions.decoder" if masked else "lm_head")
    alone = not base.config.get("is_encoder_decoder") or kind in _SHARES_ALWAYS
    head = heads[0] if heads else f"{default}.weight"
    return Tied(table, head, known and alone and not masked)


def _table(base: Checkpoint) -> tuple[str | None, bool]:
    """Name of the look-up table, and whether it is known by name and not only by its number of rows."""
    rows = _setting(base.config, "vocab_size")
    tall = [name for name, tensor in base.tensors.items() if len(tensor.shape) == 2 and tensor.shape[0] == rows]
    named = [name for name in base.tensors if _TABLES.fullmatch(name)]
    both = [name for name in named if name in tall]
    if both or named:
        return (both or named)[0], True
    return (tall[0], False) if len(tall) == 1 else (None, False)


def _setting(config: Mapping[str, Any], field: str) -> Any:
    text = config.get("text_config")
    return config.get(field, text.get(field) if isinstance(text, Mapping) else None)


def resolve_ties(
    base: Checkpoint, found: Mapping[str, Change], untie: bool
) -> tuple[dict[str, Change], dict[str, tuple[str, Change]], bool]:
    """Keep a tied table one table, or write two.

    Returns:
      The changes; new tensors that start as one of the base's, with its name and the change; and whether the config
      must say that the tables are no longer tied.

    Raises:
      CheckpointError: one table cannot hold the changes, and two are not asked for or not possible.
    """
    tied, changes = tied_tables(base), dict(found)
    table, head = (changes.pop(name, None) for name in tied[:2]) if tied else (None, None)
    if tied is None or (table is None and head is None):
        return changes, {}, False
    _check_shared(base, tied, table)
    if (table and head and table.same(head)) or (table and not head and not table.parts and table.shared):
        return changes | {name: table for name in tied[:2] if name in base.tensors}, {}, False
    _check_separable(base, tied, table, head, untie)
    table, head = table or Change(), head or Change()
    if table.shared and head.value is None and not head.rows:
        head = replace(head, value=table.value, rows=table.rows)
    changes[tied.table] = table
    if tied.head in base.tensors:
        return changes | {tied.head: head}, {}, True
    return changes, {tied.head: (tied.table, head)}, True


def _check_shared(base: Checkpoint, tied: Tied, table: Change | None) -> None:
    module = tied.table.removesuffix(".weight")
    if not table or not base.config.get("is_encoder_decoder") or module.rpartition(".")[2] != "shared":
        return
    if table.parts or (table.value is not None and not table.shared):
        raise CheckpointError(
            f"The adapter changes {module}, but encoder and decoder look tokens up in modules of their own, so PEFT's "
            "update acts nowhere but where the table is used by that name. No checkpoint gives what it computes."
        )


def _check_separable(base: Checkpoint, tied: Tied, table: Change | None, head: Change | None, untie: bool) -> None:
    if untie and tied.separable:
        return
    only = "the table alone" if head is None else "the head alone" if table is None else "each in its own way"
    way = (
        "--untie (untie=True) writes two tables and says so in the config; PEFT's own merge writes the sum into both "
        "and computes other logits."
        if tied.separable
        else "In this kind of model two tables cannot be written: its other weights are tied too, or its head is not "
        "known by name. Keep the adapter separate."
    )
    raise CheckpointError(
        f"{base.path} has one table for {tied.table} and {tied.head} (tie_word_embeddings), and the adapter changes "
        f"{only}. One table cannot hold both. {way}"
    )


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose head is a table of its own."""
    new = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, Mapping) and "tie_word_embeddings" in text:
        new["text_config"] = {**text, "tie_word_embeddings": False}
    return new


def is_table(name: str) -> bool:
    """Whether a tensor is a look-up table by its name."""
    return _TABLES.fullmatch(name) is not None


def is_head(name: str) -> bool:
    """Whether a tensor is an output head by its name."""
    return _HEADS.fullmatch(name) is not None
