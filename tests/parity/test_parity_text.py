"""Tokens, rendered conversations and assistant masks against transformers, from the same directory."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from text.made import TEMPLATES, byte_level, directory
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, processors

from lora_jax.text import Tokenizer, encode_chat, read_tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEXTS = ["hello there", "  the  Größe:\n\t3 µm 🙂", "<s>inside</s> the<|im_end|>\n", "", " ", "日本語のテキスト"]
TOOLS = [{"type": "function", "function": {"name": "sum", "description": "<ü>", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"x": [1, 2.5], "y": "ü"}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": " Ho\n"}],
    "two": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho 🙂 the end"},
        {"role": "user", "content": "the\n\nnext"},
        {"role": "assistant", "content": "日本"},
    ],
    "system": [{"role": "system", "content": "Sys"}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}],
    "call": [
        {"role": "user", "content": "Hi", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3"},
    ],
}  # fmt: skip
REFUSED = {("mistral", "system"), ("gemma", "system"), ("mistral", "call"), ("chatml", "call"), ("thinking", "call")}
CALLS = {"llama3"}
"""Templates that render tools."""


def sentencepiece_like() -> Backend:
    """Bytes as fallback, a space for the beginning, and a template that adds both ends: Llama 2's layout."""
    pieces = {token: i for i, token in enumerate(("<unk>", "<s>", "</s>", "<pad>", "<|im_end|>"))}
    pieces |= {f"<0x{byte:02X}>": len(pieces) + byte for byte in range(256)}
    for piece in "▁ abcdefghijklmnopqrstuvwxyzHG:":
        pieces.setdefault(piece, len(pieces))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    for left, right in merges:
        pieces[left + right] = len(pieces)
    backend = Backend(models.BPE(vocab=pieces, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>", "<|im_end|>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


KINDS = {"bytes": byte_level, "sentencepiece": sentencepiece_like}


def both(folder: Path, config: dict[str, Any], backend: Backend | None = None) -> tuple[Tokenizer, Any]:
    directory(folder, {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL, **config}, backend=backend)
    ours = read_tokenizer(folder)
    assert ours is not None
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True, "add_eos_token": True}])
def test_tokens(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    ours, theirs = both(tmp_path, config, KINDS[kind]())
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        for special in (False, True):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, special=special) == ids
            for skip in (False, True):
                assert ours.decode(ids, skip_special=skip) == theirs.decode(
                    ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )


def test_saved_tokenizers_are_loaded_by_transformers(tmp_path: Path) -> None:
    made = Tokenizer(byte_level(), SPECIAL, template=TEMPLATES["chatml"])
    made.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(TEXTS[1]) == made.encode(TEXTS[1])
    assert theirs.apply_chat_template(CHATS["two"], tokenize=False) == made.render(CHATS["two"])


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_rendered_conversations(tmp_path: Path, template: str, chat: str, prompt: bool) -> None:
    ours, theirs = both(tmp_path, {"chat_template": TEMPLATES[template]})
    tools = TOOLS if template in CALLS else None
    if (template, chat) in REFUSED:
        for render in (ours.render, theirs.apply_chat_template):
            with pytest.raises(Exception, match=r"role|Roles|content|split"):
                render(CHATS[chat], tools)
        return
    text = theirs.apply_chat_template(CHATS[chat], tools, tokenize=False, add_generation_prompt=prompt)
    assert ours.render(CHATS[chat], tools, generation_prompt=prompt) == text
    ids = theirs.apply_chat_template(CHATS[chat], tools, add_generation_prompt=prompt, return_dict=True)["input_ids"]
    assert ours.encode(text) == list(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", ["one", "two", "system"])
def test_assistant_masks(tmp_path: Path, kind: str, chat: str) -> None:
    ours, theirs = both(tmp_path, {"chat_template": TEMPLATES["generation"]}, KINDS[kind]())
    found = theirs.apply_chat_template(CHATS[chat], return_dict=True, return_assistant_tokens_mask=True)
    tokens, assistant = encode_chat(ours, CHATS[chat], now=datetime(2026, 1, 31))
    assert tokens.tolist() == list(found["input_ids"])
    assert assistant.astype(int).tolist() == list(found["assistant_masks"])
