"""Encoding: what is trained on, both ends of a text, what is cut off, and what is left out."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text.made import TEMPLATES, byte_level
from tokenizers import processors

from lora_jax.data import DataError, Example, Examples, Options, Pair, encode, marked, read_file, show
from lora_jax.text import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [{"role": "user", "content": "the Q"}, {"role": "assistant", "content": "the Ä"}]
LONGER = [*CHAT, {"role": "user", "content": "more"}, {"role": "assistant", "content": "B"}]


def tokenizer(template: str | None = None, bos: bool = False) -> Tokenizer:
    backend = byte_level()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(backend, SPECIAL, template=template and TEMPLATES[template])


def encoded(folder: Path, line: Any, its: Tokenizer, **options: Any) -> Examples:
    lines = line if isinstance(line, list) else [line]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return encode(read_file(folder / "data.jsonl"), its, Options(**options))


def shown(folder: Path, line: Any, its: Tokenizer, **options: Any) -> list[str]:
    return [marked(example, its) for example in encoded(folder, line, its, **options)]


PROMPT = {"prompt": "the Q", "completion": " the Ä"}


def test_ends_are_added_once_and_the_first_token_is_no_target(tmp_path: Path) -> None:
    assert shown(tmp_path, {"text": "the Ä"}, tokenizer()) == ["t[he Ä</s>]"]
    assert shown(tmp_path, {"text": "the Ä"}, tokenizer(bos=True)) == ["<s>[the Ä</s>]"]
    assert shown(tmp_path, {"text": "<s>the Ä</s>"}, tokenizer(bos=True)) == ["<s>[the Ä</s>]"]


def test_completions_are_trained_on_and_their_end(tmp_path: Path) -> None:
    assert shown(tmp_path, PROMPT, tokenizer(bos=True)) == ["<s>the Q[ the Ä</s>]"]
    assert shown(tmp_path, PROMPT, tokenizer(), train_on="everything") == ["t[he Q the Ä</s>]"]
    assert shown(tmp_path, {"prompt": "", "completion": "the Ä"}, tokenizer(bos=True)) == ["<s>[the Ä</s>]"]


def test_a_token_on_the_border_is_trained_on(tmp_path: Path) -> None:
    """As `Ġthe` is one token; the text is encoded as a whole."""
    assert shown(tmp_path, {"prompt": "Q ", "completion": "the"}, tokenizer()) == ["Q[ the</s>]"]


def test_prompts_are_put_into_the_chat_template_if_there_is_one(tmp_path: Path) -> None:
    its = tokenizer("mistral", bos=True)
    assert shown(tmp_path, PROMPT, its) == ["<s>[INST] the Q [/INST][  the Ä</s>]"]
    assert shown(tmp_path, PROMPT, its, chat=False) == ["<s>the Q[ the Ä</s>]"]


def test_conversations(tmp_path: Path) -> None:
    its, line = tokenizer("mistral", bos=True), {"messages": LONGER}
    both = "<s>[INST] the Q [/INST][ the Ä</s>][INST] more [/INST][ B</s>]"
    assert shown(tmp_path, line, its) == [both]
    assert shown(tmp_path, line, its, turns="last") == [both.replace("[ the Ä</s>]", " the Ä</s>")]
    everything = both.replace("][ ", "] ").replace("</s>]", "</s>").replace("<s>", "<s>[", 1) + "]"
    assert shown(tmp_path, line, its, train_on="everything") == [everything]


@pytest.mark.parametrize("template", ["mistral", "generation"])
def test_answers_within_the_prompt_are_not_trained_on(tmp_path: Path, template: str) -> None:
    line = {"prompt": LONGER[:3], "completion": LONGER[3:]}
    (text,) = shown(tmp_path, line, tokenizer(template))
    assert text.count("[ B</s>]" if template == "mistral" else "[B<|im_end|>]") == 1
    assert "[ the" not in text and "[the" not in text


def test_preferences_are_pairs(tmp_path: Path) -> None:
    line = {"prompt": "the Q", "chosen": " yes", "rejected": " no"}
    (pair,) = encoded(tmp_path, line, tokenizer())
    assert isinstance(pair, Pair)
    assert [marked(each, tokenizer()) for each in (pair.chosen, pair.rejected)] == ["the Q[ yes</s>]", "the Q[ no</s>]"]
    (talk,) = encoded(tmp_path, {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}, tokenizer("mistral"))
    assert marked(talk.rejected, tokenizer()) == "<s>[INST] the Q [/INST][ the Ä</s>]"


def test_classes_are_numbered_by_their_names(tmp_path: Path) -> None:
    its = tokenizer()
    its.backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    lines = [{"input": "the text", "label": label} for label in ("pos", "neg", "pos")]
    found = encoded(tmp_path, lines, its, length=4)
    assert found.labels == ("neg", "pos")
    assert "trained on" not in repr(found.counts)
    assert [each.label for each in found] == [1, 0, 1]
    assert its.decode(found[0].tokens, skip_special=False) == "<s>the</s>"
    assert (found.counts.truncated, found.counts.cut_off) == (3, 3 * (2 + len(its.encode("the text")) - 4))
    assert encoded(tmp_path, [{"input": "a", "label": n} for n in (10, 9)], its).labels == ("9", "10")
    with pytest.raises(DataError, match="texts in some lines and numbers in others: 1, 'a'"):
        encoded(tmp_path, [{"input": "a", "label": n} for n in (1, "a")], its)


def test_classes_to_evaluate_on_are_those_of_training(tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_text('{"input": "a", "label": "x"}\n{"input": "a", "label": "y"}')
    found = encode(read_file(tmp_path / "v.jsonl"), tokenizer(), labels=("w", "y"))
    assert ([each.label for each in found], dict(found.counts.dropped)) == (
        [1],
        {"a label that is none of the classes": 1},
    )


def test_each_answer_may_be_an_example(tmp_path: Path) -> None:
    """Then templates that take out what was thought before tell where it is."""
    thoughts = [CHAT[0], {"role": "assistant", "content": "<think>so</think>x"}, *LONGER[2:]]
    found = shown(tmp_path, {"messages": thoughts}, tokenizer("thinking"), turns="each")
    assert [text.partition("[")[2] for text in found] == ["<think>so</think>x<|im_end|>\n]", "B<|im_end|>\n]"]
    assert "so" not in found[1]


def test_answers_at_which_nothing_ends_are_counted(tmp_path: Path) -> None:
    line = {"messages": LONGER}
    assert encoded(tmp_path, line, tokenizer("mistral")).counts.endless == 0
    endless = encoded(tmp_path, line, tokenizer("chatml")).counts
    assert endless.endless == 1
    assert "answers without a token that ends them" in repr(endless)


def test_what_is_too_long_is_cut_off_and_counted(tmp_path: Path) -> None:
    found = encoded(tmp_path, [PROMPT, {"prompt": "Q", "completion": "A" * 50}], tokenizer(bos=True), length=20)
    assert [len(each) for each in found] == [len(tokenizer().encode("the Q the Ä")) + 2, 20]
    assert (found.counts.truncated, found.counts.cut_off) == (1, 53 - 20)
    assert found[1].tokens[-1] != 1
    assert (found.counts.tokens, found.counts.trained) == (
        sum(map(len, found)),
        sum(int(each.trained.sum()) for each in found),
    )


def test_an_example_with_nothing_to_train_on_is_left_out_and_named(tmp_path: Path) -> None:
    lines = [PROMPT, {"prompt": "x" * 50, "completion": "A"}]
    found = encoded(tmp_path, lines, tokenizer(), length=20)
    assert (len(found), dict(found.counts.dropped)) == (1, {"nothing to train on in 20 tokens": 1})
    assert found.counts.notes == [
        f"{tmp_path}/data.jsonl:2: nothing to train on in 20 tokens: the first that is trained on is number 51"
    ]
    assert "left out: nothing to train on in 20 tokens" in repr(found.counts)
    with pytest.raises(DataError, match=r"data\.jsonl:2: nothing to train on"):
        encoded(tmp_path, lines, tokenizer(), length=20, strict=True)
    with pytest.raises(DataError, match=r"none of the 1 examples .* can be trained on\. First of all: .*:1: nothing"):
        encoded(tmp_path, lines[1:], tokenizer(), length=20)


def test_a_long_text_becomes_examples_in_which_every_token_is_a_target_once(tmp_path: Path) -> None:
    text = "".join(map(chr, range(0x100, 0x180)))
    its = tokenizer(bos=True)
    whole = [0, *its.encode(text), 1]
    for length in (2, 3, 64, len(whole) - 1, len(whole), len(whole) + 1):
        found = encoded(tmp_path, {"text": text}, its, length=length)
        assert max(map(len, found)) <= length and min(map(len, found)) > 1
        targets = np.concatenate([each.tokens[each.trained] for each in found])
        assert [0, *targets.tolist()] == whole
        assert found.counts.split == (len(whole) > length)


def test_pieces_of_a_plain_text_do_not_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the Ä " * 200)
    found = encode(read_file(tmp_path / "a.txt"), tokenizer())
    assert not any(1 in each.tokens for each in found)


def test_conversations_that_the_template_refuses_are_left_out(tmp_path: Path) -> None:
    lines = [{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": CHAT[1:]}]
    found = encoded(tmp_path, lines, tokenizer("mistral"))
    assert (len(found), dict(found.counts.dropped)) == (1, {"refused by the chat template": 2})


def test_templates_that_do_not_tell_answers_stop_everything(tmp_path: Path) -> None:
    line = {"messages": [CHAT[0], {"role": "assistant", "content": "<think>so</think>x"}, *LONGER[2:]]}
    with pytest.raises(DataError, match=r"data\.jsonl:2: the place of message 2, an answer, cannot be told"):
        encoded(tmp_path, [{"messages": CHAT}, line], tokenizer("thinking"))
    with pytest.raises(DataError, match=r"data\.jsonl:1: .* no chat template"):
        encoded(tmp_path, {"messages": CHAT}, tokenizer())


@pytest.mark.parametrize("options", [{"length": 1}, {"train_on": "prompts"}, {"turns": "first"}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(options))):
        Options(**options)


def test_show_marks_what_is_trained_on_and_spells_out_control_bytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    its = tokenizer()
    ids = np.array(its.encode("a\x1b[2J\nthe ü"), np.int32)
    example = Example(ids, np.arange(len(ids)) >= len(ids) - 3, 7)
    show(example, its)
    assert capsys.readouterr().out == (
        f"Line 7, {len(ids)} tokens, of which the 3 in [brackets] are trained on:\n  a\\x1b[2J\n  the[ ü]\n"
    )
    monkeypatch.setattr(sys.modules["lora_jax.data.show"], "is_terminal", lambda stream: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(example, its)
    assert "in green are trained on:\n  a\\x1b[2J\n  the\x1b[1;32m ü\x1b[0m\n" in capsys.readouterr().out


def test_marks_within_a_character_lose_nothing() -> None:
    its = tokenizer()
    ids = np.array(its.encode("ü!"), np.int32)
    text = marked(Example(ids, np.array([False, True, True]), 1), its)
    assert text.endswith("!]")


def test_how_far_it_is_is_told(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": f"number {n}"}) + "\n" for n in range(1100)))
    told: list[int] = []
    assert len(encode(read_file(tmp_path / "d.jsonl"), tokenizer(), progress=told.append)) == 1100
    assert told == [512, 1024, 1100]
