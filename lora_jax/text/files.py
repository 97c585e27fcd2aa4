"""`read_tokenizer`: a tokenizer from the files of a Hugging Face directory."""

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from lora_jax.jsonfile import read_object
from lora_jax.regular import unreadable
from lora_jax.text.errors import TokenizerError, extra
from lora_jax.text.slow import build
from lora_jax.text.tokenizer import Tokenizer

_WHOLE = "tokenizer.json"
_SLOW = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tekken.json")
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_CONFIGS = ("special_tokens_map.json", "tokenizer_config.json", "generation_config.json", "config.json")
_IDS = ("bos_token", "eos_token", "pad_token")


def read_tokenizer(directory: str | PathLike[str]) -> Tokenizer | None:
    """Read the tokenizer of a Hugging Face model directory.

    `tokenizer.json` says how text becomes tokens, both ends of a text included; `tokenizer_config.json` and
    `special_tokens_map.json` name the special tokens. The chat template is `chat_template.jinja`, or stands in the
    config. Generation ends at the tokens of `generation_config.json` too.

    Args:
      directory: with `tokenizer.json`, or with `vocab.json` and `merges.txt` of a GPT-2.

    Returns:
      The tokenizer, or None if the directory has no file of one.

    Raises:
      TokenizerError: a file is damaged, or is of a kind that is not read; the message says what to do.
      ImportError: tokenizers is not installed.

    Example:
      >>> import tempfile
      >>> read_tokenizer(tempfile.mkdtemp()) is None
      True
    """
    folder = Path(directory).expanduser()
    if not any((folder / name).exists() for name in (_WHOLE, *_SLOW)):
        return None
    special, config, *configs = (read_object(folder / name, TokenizerError) or {} for name in _CONFIGS)
    config = {**special, **config}
    backend = _backend(folder, config)
    _add_tokens(backend, config, folder)
    special = {name: text for name, text in _special(config, folder) if text}
    for name in _IDS:
        for token in _numbers(f"{name}_id", folder, *configs)[:1]:
            if name not in special and (text := backend.id_to_token(token)) is not None:
                special[name] = text
    if not (folder / _WHOLE).exists():
        _add_ends(backend, config, special)
    template, files = _templates(folder, config)
    files |= {name: folder / name for name in (_WHOLE, *_SLOW, *_BESIDE) if (folder / name).exists()}
    stops = _numbers("eos_token_id", folder, *configs)
    try:
        return Tokenizer(backend, special, template=template, eos_ids=stops, files=dict(sorted(files.items())))
    except TokenizerError as error:
        raise TokenizerError(f"{folder}: {error}") from None


def _backend(folder: Path, config: Mapping[str, Any]) -> Any:
    if not (folder / _WHOLE).exists():
        return build(folder, config)
    tokenizers, text = extra("tokenizers"), _text(folder / _WHOLE)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        # The package raises no class of its own, and where it panics not even an Exception.
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise TokenizerError(
            f"{folder / _WHOLE} is no tokenizer ({error}). Copy it again from where it came from, or upgrade tokenizers"
        ) from error


def _text(path: Path) -> str:
    kind = unreadable(path)
    if kind is not None:
        raise TokenizerError(f"{path} is {kind}, where a file belongs")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from error


def _special(config: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
    """Special tokens by name: a text, or an object with it."""
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            yield name, text
        elif name in _IDS and value is not None:
            raise TokenizerError(f"{folder}: {name} is {value!r}, where a text belongs, or an object with content")


def _add_tokens(backend: Any, config: Mapping[str, Any], folder: Path) -> None:
    """Tokens that only `tokenizer_config.json` has, which were added after `tokenizer.json` was written."""
    added = config.get("added_tokens_decoder") or {}
    path = folder / "tokenizer_config.json"
    try:
        tokens = sorted(
            (int(number), str(token["content"]), bool(token.get("special"))) for number, token in added.items()
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{path}: added_tokens_decoder is not numbers with tokens: {error!r}") from error
    for number, text, special in tokens:
        if backend.token_to_id(text) is None:
            backend.add_tokens([extra("tokenizers").AddedToken(text, special=special, normalized=not special)])
        found = backend.token_to_id(text)
        if found != number:
            raise TokenizerError(
                f"{path} says that {text!r} is token {number}, but by {_WHOLE} it is {found}. "
                "Give both files from one model"
            )


def _add_ends(backend: Any, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """What `add_bos_token` and `add_eos_token` say; where there is a `tokenizer.json`, that says it."""
    ends = [special.get(f"{end}_token") if config.get(f"add_{end}_token") else None for end in ("bos", "eos")]
    known = [(text, number) for text in ends if text and (number := backend.token_to_id(text)) is not None]
    begin, end = ([text] if text else [] for text in ends)
    backend.post_processor = extra("tokenizers.processors").TemplateProcessing(
        single=[*begin, "$A", *end], pair=[*begin, "$A", *end, *begin, "$B:1", *end], special_tokens=known
    )


def _templates(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Path]]:
    """Chat templates by name, and the files that hold them; a file goes before the config."""
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    if files:
        relative = {path.relative_to(folder).as_posix(): path for path in files.values()}
        return {name: _text(path) for name, path in files.items()}, relative
    held = config.get("chat_template") or {}
    if isinstance(held, str):
        return {"default": held}, {}
    try:
        return {str(each["name"]): str(each["template"]) for each in held}, {}
    except (KeyError, TypeError) as error:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor a list of name and template"
        ) from error


def _numbers(name: str, folder: Path, generation: Mapping[str, Any], model: Mapping[str, Any]) -> list[int]:
    """The tokens that `generation_config.json`, or else `config.json`, gives for `eos_token_id` and the like."""
    found = generation.get(name, model.get(name))
    numbers = [each for each in (found if isinstance(found, list) else [found]) if each is not None]
    if all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 2**31 for each in numbers):
        return numbers
    raise TokenizerError(f"{folder}: {name} is {found!r}, where the number of a token belongs, or a list of numbers")
