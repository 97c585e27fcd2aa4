"""The tokenizer in a GGUF file: byte-level BPE of its tokens and merges, cut into words as the file says."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lora_jax.errors import CheckpointError

_INSTALL = 'Tokenizers need the package tokenizers: pip install "lora_jax[text]"'

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}"
_QWEN_2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_TAIL}"

_SPECIAL, _USER_DEFINED = 3, 4
"""Types of tokens in GGUF that are found in a text before it is cut into words."""

_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def read_tokenizer(metadata: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Build the tokenizer that a GGUF file describes.

    Args:
      metadata: of `read_gguf`.

    Returns:
      A `tokenizers.Tokenizer`, and what `tokenizer_config.json` would say: `chat_template`, `add_bos_token`, and the
      special tokens.

    Raises:
      CheckpointError: the file has no tokenizer, or one of a kind that is not known here.
      ImportError: the package tokenizers is not installed.

    Example:
      >>> from lora_jax.models.gguf import read_gguf
      >>> tokenizer, config = read_tokenizer(read_gguf("model.gguf").metadata)  # doctest: +SKIP
      >>> tokenizer.encode("Hello").tokens, config["eos_token"]  # doctest: +SKIP
      (['Hello'], '<|im_end|>')
    """
    try:
        from tokenizers import AddedToken, Tokenizer
        from tokenizers.decoders import ByteLevel
        from tokenizers.models import BPE
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    given = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    words = _words(given)
    tokens = given.get("tokens", [])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in given.get("merges", [])]
    if not tokens or not merges:
        raise CheckpointError("the file has no tokenizer: tokenizer.ggml.tokens or merges are missing")
    tokenizer: Any = Tokenizer(BPE(vocabulary, merges, ignore_merges=given["pre"] == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = words(), ByteLevel()
    if given["pre"] == "qwen2":
        from tokenizers.normalizers import NFC

        tokenizer.normalizer = NFC()
    kinds = given.get("token_type", [1] * len(tokens))
    for kind, special in ((_SPECIAL, True), (_USER_DEFINED, False)):
        added = [token for token, its in zip(tokens, kinds, strict=True) if its == kind]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
    config = _config(given, tokens) | {"chat_template": metadata.get("tokenizer.chat_template")}
    _begin(tokenizer, config)
    return tokenizer, config


def _config(given: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    named = {hf: given.get(f"{name}_token_id") for name, hf in _NAMES.items()}
    config: dict[str, Any] = {name: tokens[index] for name, index in named.items() if index is not None}
    return config | {"add_bos_token": bool(given.get("add_bos_token", False))}


def _begin(tokenizer: Any, config: Mapping[str, Any]) -> None:
    """Let texts begin with the beginning token where the file says so."""
    bos = config.get("bos_token")
    if config["add_bos_token"] and bos:
        from tokenizers.processors import TemplateProcessing

        index = tokenizer.token_to_id(bos)
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, index)]
        )


def _words(given: Mapping[str, Any]) -> Callable[[], Any]:
    """How the file's tokenizer cuts a text into words."""
    model, name = given.get("model"), given.get("pre")
    known = {
        "gpt-2": _plain, "smollm": _digits, "starcoder": _digits,
        "llama-bpe": partial(_split, _LLAMA_3), "qwen2": partial(_split, _QWEN_2),
    }  # fmt: skip
    if model != "gpt2":
        raise CheckpointError(f"a tokenizer of the kind {model!r} is not known; there is gpt2 (byte-level BPE)")
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
