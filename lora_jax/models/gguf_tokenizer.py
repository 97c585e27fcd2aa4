"""The tokenizer in a GGUF file: byte-level BPE, cut into words as the file says, or SentencePiece."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lora_jax.errors import CheckpointError
from lora_jax.models.gguf_sentencepiece import sentencepiece
from lora_jax.text.tokenizer import Tokenizer

_INSTALL = 'Tokenizers need the package tokenizers: pip install "lora_jax[text]"'

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}"
_QWEN_2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_TAIL}"

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Types of tokens in GGUF that are found in a text before it is cut into words; all but the last are special."""

_NAMES = {
    "bos_token_id": "bos_token", "eos_token_id": "eos_token", "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
}  # fmt: skip


def read_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes.

    Args:
      metadata: of `read_gguf`.

    Raises:
      CheckpointError: the file has no tokenizer, or one of a kind that is not known here.
      ImportError: the package tokenizers is not installed.

    Example:
      >>> from lora_jax.models.gguf import read_gguf
      >>> read_tokenizer(read_gguf("SmolLM2-135M-Instruct.Q4_1.gguf").metadata)  # doctest: +SKIP
      Tokenizer(49,152 tokens, chat templates: default)
    """
    try:
        from tokenizers import AddedToken
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    given = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    if given.get("model") not in _KINDS:
        raise CheckpointError(
            f"a tokenizer of the kind {given.get('model')!r} is not known; there are {' and '.join(_KINDS)}"
        )
    backend, tokens = _KINDS[given["model"]](given), given["tokens"]
    kinds = given.get("token_type", [1] * len(tokens))
    for kind, special in ((_UNKNOWN, True), (_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, its in zip(tokens, kinds, strict=True) if its == kind]
        backend.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
    special = {hf: tokens[given[name]] for name, hf in _NAMES.items() if given.get(name) is not None}
    # llama.cpp begins texts of a SentencePiece vocabulary that does not say otherwise.
    if given.get("add_bos_token", given["model"] == "llama") and "bos_token" in special:
        _begin(backend, special["bos_token"])
    ends = [given[name] for name in ("eos_token_id", "eot_token_id") if given.get(name) is not None]
    return Tokenizer(backend, special, template=metadata.get("tokenizer.chat_template"), eos_ids=ends)


def _begin(backend: Any, bos: str) -> None:
    """Let texts begin with the beginning token."""
    from tokenizers.processors import TemplateProcessing

    index = backend.token_to_id(bos)
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, index)]
    )


def _byte_level(given: Mapping[str, Any]) -> Any:
    """Byte-level BPE of the file's tokens and merges."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.decoders import ByteLevel
    from tokenizers.models import BPE
    from tokenizers.normalizers import NFC

    words = _words(given)
    vocabulary = {token: index for index, token in enumerate(given.get("tokens", []))}
    merges = [tuple(merge.split(" ", 1)) for merge in given.get("merges", [])]
    if not vocabulary or not merges:
        raise CheckpointError("the file has no tokenizer: tokenizer.ggml.tokens or merges are missing")
    backend: Any = Backend(BPE(vocabulary, merges, ignore_merges=given["pre"] == "llama-bpe"))
    backend.pre_tokenizer, backend.decoder = words(), ByteLevel()
    if given["pre"] == "qwen2":
        backend.normalizer = NFC()
    return backend


_KINDS = {"gpt2": _byte_level, "llama": sentencepiece}
"""By `tokenizer.ggml.model`."""


def _words(given: Mapping[str, Any]) -> Callable[[], Any]:
    """How the file's tokenizer cuts a text into words."""
    name = given.get("pre")
    known = {
        "gpt-2": _plain, "smollm": _digits, "starcoder": _digits,
        "llama-bpe": partial(_split, _LLAMA_3), "qwen2": partial(_split, _QWEN_2),
    }  # fmt: skip
    if name not in known:
        raise CheckpointError(f"words are cut as in {name!r}, which is not known; there are {', '.join(known)}")
    return known[name]


def _plain() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel(add_prefix_space=False)


def _digits() -> Any:
    """Every digit is a word."""
    from tokenizers.pre_tokenizers import Digits, Sequence

    return Sequence([Digits(individual_digits=True), _plain()])


def _split(pattern: str) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    cut: Any = Split(Regex(pattern), behavior="isolated")
    return Sequence([cut, ByteLevel(add_prefix_space=False, use_regex=False)])
