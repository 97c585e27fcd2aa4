"""Tokenizers from files older than `tokenizer.json`: GPT-2's are built, of others it is told how to convert them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.text.errors import TokenizerError, extra

_GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "OPTTokenizer")
"""Classes that split text as GPT-2 does; others with the same files split it differently."""


def build(folder: Path, config: Mapping[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` from `vocab.json` and `merges.txt`.

    Args:
      folder: the model's directory.
      config: its `tokenizer_config.json`.

    Raises:
      TokenizerError: the files are damaged, or belong to another kind of tokenizer.
    """
    named = config.get("tokenizer_class") or "GPT2Tokenizer"
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    if named not in _GPT2 or not all(path.exists() for path in files):
        raise TokenizerError(_advice(folder, named))
    tokenizers = extra("tokenizers")
    try:
        model = tokenizers.models.BPE.from_file(*map(str, files))
    except Exception as error:  # The package raises no other class.
        raise TokenizerError(f"{files[0]} and {files[1]} are no vocabulary of GPT-2 ({error})") from error
    backend = tokenizers.Tokenizer(model)
    space = bool(config.get("add_prefix_space"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    end = "<|endoftext|>"
    if backend.token_to_id(end) is not None:
        backend.add_special_tokens([end])
    return backend


def _advice(folder: Path, named: str) -> str:
    held = ", ".join(sorted(path.name for path in folder.iterdir() if "token" in path.name or "vocab" in path.name))
    return (
        f"{folder} has no tokenizer.json, and that of a {named} is not built from {held}. With transformers installed "
        f'make it by: python -c "from transformers import AutoTokenizer as A; '
        f"A.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )
