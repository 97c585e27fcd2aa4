"""Tokenizers as directories hold them: which files are read, what they say, and how wrong ones are refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from text.made import byte_level, directory, write
from tokenizers import processors

from lora_jax.errors import LoraError
from lora_jax.text import Tokenizer, TokenizerError, read_tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def read(folder: Path) -> Tokenizer:
    found = read_tokenizer(folder)
    assert found is not None
    return found


def test_a_directory_without_tokenizer_files_has_none(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": {"model_type": "llama"}, "tokenizer_config.json": SPECIAL})
    assert read_tokenizer(tmp_path) is None


def test_special_tokens_and_round_trip(tmp_path: Path) -> None:
    tokenizer = read(directory(tmp_path, SPECIAL))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.eos_ids == (1,)
    text = "Größe: 3 µm\n\t<s> and </s>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert tokenizer.decode(tokenizer.encode(text)) == "Größe: 3 µm\n\t and "
    assert tokenizer.vocab_size == tokenizer.backend.get_vocab_size()
    assert tokenizer.template is None
    assert "no chat template" in repr(tokenizer)


def test_padding_and_truncation_of_the_file_are_off(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = read(directory(tmp_path, SPECIAL, backend=backend))
    assert tokenizer.decode(tokenizer.encode("more than three")) == "more than three"


@pytest.mark.parametrize("ends", ["", "<s>", "</s>", "<s></s>"])
def test_ends_of_a_text_are_those_of_the_file(tmp_path: Path, ends: str) -> None:
    """Whatever `add_bos_token` says beside it."""
    backend = byte_level()
    begin, end = (["<s>"] if "<s>" in ends else []), (["</s>"] if "</s>" in ends else [])
    known = [(token, backend.token_to_id(token)) for token in begin + end]
    backend.post_processor = processors.TemplateProcessing(single=[*begin, "$A", *end], special_tokens=known)
    tokenizer = read(directory(tmp_path, {**SPECIAL, "add_bos_token": not begin}, backend=backend))
    plain = tokenizer.encode("hello")
    assert tokenizer.encode("hello", special=True) == [*([0] * len(begin)), *plain, *([1] * len(end))]
    assert tokenizer.adds_bos == bool(begin)


def test_special_tokens_may_be_objects_and_in_the_map(tmp_path: Path) -> None:
    folder = directory(tmp_path, {"eos_token": {"content": "</s>", "__type": "AddedToken"}})
    write(folder, {"special_tokens_map.json": {"bos_token": {"content": "<s>"}}})
    tokenizer = read(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, None)


def test_generation_stops_at_the_tokens_of_the_generation_config(tmp_path: Path) -> None:
    folder = directory(tmp_path, SPECIAL)
    write(folder, {"config.json": {"eos_token_id": 1}, "generation_config.json": {"eos_token_id": [7, 1, 9]}})
    assert read(folder).eos_ids == (1, 7, 9)


def test_numbers_name_the_special_tokens_where_nothing_else_does(tmp_path: Path) -> None:
    folder = directory(tmp_path, {})
    write(folder, {"config.json": {"bos_token_id": 0, "eos_token_id": [1, 5]}})
    tokenizer = read(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (0, 1, (1, 5))
    assert tokenizer.special == {"bos_token": "<s>", "eos_token": "</s>"}


def test_tokens_that_only_the_config_has_are_added(tmp_path: Path) -> None:
    size = byte_level().get_vocab_size()
    added = {str(size): {"content": "<|new|>", "special": True}}
    tokenizer = read(directory(tmp_path, {**SPECIAL, "eos_token": "<|new|>", "added_tokens_decoder": added}))
    assert tokenizer.eos_id == size
    assert tokenizer.encode("a<|new|>")[-1] == size


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": "default"},
        {"chat_template": [{"name": "default", "template": "default"}, {"name": "tool_use", "template": "tools"}]},
    ],
)
def test_templates_of_the_config(tmp_path: Path, config: dict[str, Any]) -> None:
    tokenizer = read(directory(tmp_path, {**SPECIAL, **config}))
    user = [{"role": "user", "content": "Hi"}]
    assert tokenizer.template == "default"
    assert tokenizer.render(user) == "default"
    assert tokenizer.render(user, tools=[{}]) == ("tools" if "tool_use" in tokenizer.templates else "default")


def test_template_files_go_before_the_config(tmp_path: Path) -> None:
    folder = directory(tmp_path, {**SPECIAL, "chat_template": "config"})
    (folder / "additional_chat_templates").mkdir()
    write(folder, {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools"})
    tokenizer = read(folder)
    assert tokenizer.templates == {"tool_use": "tools", "default": "file"}
    assert {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"} < {*tokenizer.files}
    copied = read_copy(tokenizer, tmp_path / "copy")
    assert copied.templates == tokenizer.templates


def read_copy(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    names = tokenizer.save(folder)
    assert sorted(names) == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return read(folder)


def test_a_tokenizer_made_of_parts_is_saved_and_read(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level(), SPECIAL, template={"default": "one", "tool_use": "two"}, eos_ids=[5])
    assert tokenizer.eos_ids == (1, 5)
    copied = read_copy(tokenizer, tmp_path / "copy")
    assert copied.encode("Hällo") == tokenizer.encode("Hällo")
    assert (copied.templates, copied.special) == (tokenizer.templates, {**tokenizer.special})


def test_files_of_gpt2(tmp_path: Path) -> None:
    """Built from its vocabulary and merges it is what tokenizer.json would be."""
    from tokenizers.implementations import ByteLevelBPETokenizer

    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator(
        ["the theme of the thesis, then"] * 20, special_tokens=["<|endoftext|>"], show_progress=False
    )
    theirs.save_model(str(tmp_path))
    tokenizer = read(tmp_path)
    text = "the thesis,  then Ünder<|endoftext|>"
    assert tokenizer.encode(text) == theirs.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert set(tokenizer.files) == {"vocab.json", "merges.txt"}
    write(tmp_path, {"tokenizer_config.json": {"bos_token": "<|endoftext|>", "add_bos_token": True}})
    assert read(tmp_path).encode(text, special=True) == [0, *tokenizer.encode(text, special=True)]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "truncated": ({"tokenizer.json": '{"version": "1.0", "model"'}, "tokenizer.json is no tokenizer"),
    "latin1": ({"tokenizer.json": b"\xff\xfe{}"}, "cannot read"),
    "config": ({"tokenizer_config.json": "{"}, "tokenizer_config.json is not readable as JSON"),
    "list": ({"tokenizer_config.json": "[]"}, "holds a list"),
    "deep": ({"tokenizer_config.json": "[" * 100_000}, "is not readable as JSON"),
    "added": ({"tokenizer_config.json": {"added_tokens_decoder": {"x": 1}}}, "added_tokens_decoder"),
    "moved": ({"tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": "</s>"}}}}, "'</s>' is token 9"),
    "unknown": ({"tokenizer_config.json": {"eos_token": "<end>"}}, "eos_token is '<end>', which is not in the vocabul"),
    "huge": ({"config.json": {"eos_token_id": 2**70}}, "eos_token_id is 1180591620717411303424"),
    "special": ({"tokenizer_config.json": {"eos_token": ["</s>"]}}, r"eos_token is \['</s>'\], where a text belongs"),
    "eos": ({"generation_config.json": {"eos_token_id": "1"}}, "eos_token_id is '1'"),
    "template": ({"tokenizer_config.json": {"chat_template": [1]}}, "chat_template is neither"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files_are_named(tmp_path: Path, case: str) -> None:
    files, message = BAD[case]
    directory(tmp_path, SPECIAL)
    write(tmp_path, files)
    with pytest.raises(TokenizerError, match=message) as raised:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert isinstance(raised.value, LoraError)


def test_a_file_at_which_the_package_panics_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    held = json.loads(byte_level().to_str())
    held["model"]["continuing_subword_prefix"] = "longer than what is merged"
    directory(tmp_path, SPECIAL)
    write(tmp_path, {"tokenizer.json": held})
    with pytest.raises(TokenizerError, match="is no tokenizer"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.model": b"\n\x0e"},
        {"vocab.json": {}, "merges.txt": "", "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"}},
        {"vocab.txt": "[CLS]\n"},
    ],
)
def test_older_files_name_how_to_convert_them(tmp_path: Path, files: dict[str, Any]) -> None:
    write(tmp_path, files)
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json.*save_pretrained"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("package", ["tokenizers", "jinja2"])
def test_a_missing_package_names_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    folder = directory(tmp_path, {**SPECIAL, "chat_template": "x"})
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "lora_jax\[text\]"'):
        read(folder).render([{"role": "user", "content": "Hi"}])


def test_the_config_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    folder = directory(tmp_path, {})
    write(folder, {"tokenizer_config.json": b"\xef\xbb\xbf" + json.dumps(SPECIAL).encode()})
    assert read(folder).eos_id == 1
