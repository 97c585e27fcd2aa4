"""Chat templates: the text of a conversation, what in it is the assistant's, and templates that do not tell."""

from datetime import datetime
from typing import Any

import pytest
from text.made import TEMPLATES, byte_level

from lora_jax.text import MessagesError, TemplateError, Tokenizer, encode_chat, mark_chat
from lora_jax.text.template import Template

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
NOW = datetime(2026, 1, 31)
TWO = [
    {"role": "user", "content": "the first"},
    {"role": "assistant", "content": "  one "},
    {"role": "user", "content": "the second"},
    {"role": "assistant", "content": "two, Ünder"},
]


def tokenizer(template: str) -> Tokenizer:
    return Tokenizer(byte_level(), SPECIAL, template=TEMPLATES.get(template, template))


def said(template: str, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    text, spans = mark_chat(tokenizer(template), messages, now=NOW, **options)
    return [text[begin:end] for begin, end in spans]


SAID = {
    "chatml": ["  one <|im_end|>\n", "two, Ünder<|im_end|>\n"],
    "llama3": ["one<|eot_id|>", "two, Ünder<|eot_id|>"],
    "mistral": ["   one </s>", " two, Ünder</s>"],
    "gemma": ["one<end_of_turn>\n", "two, Ünder<end_of_turn>\n"],
    "generation": ["  one <|im_end|>", "two, Ünder<|im_end|>"],
    "thinking": ["  one <|im_end|>\n", "two, Ünder<|im_end|>\n"],
}


@pytest.mark.parametrize("template", SAID)
def test_what_the_assistant_says(template: str) -> None:
    assert said(template, TWO) == SAID[template]
    assert said(template, TWO, turns="last") == SAID[template][-1:]


@pytest.mark.parametrize("template", SAID)
def test_tokens_and_mask(template: str) -> None:
    """All tokens together are the text, those that are marked are the answers, and the beginning is there once."""
    chat = encode_chat(tokenizer(template), TWO, now=NOW)
    assert (str(chat.tokens.dtype), str(chat.assistant.dtype)) == ("int32", "bool")
    decode = tokenizer(template).decode
    assert decode(chat.tokens, skip_special=False) == tokenizer(template).render(TWO, now=NOW)
    assert decode(chat.tokens[chat.assistant], skip_special=False) == "".join(SAID[template])
    assert (chat.tokens == 0).sum() == ("bos_token" in TEMPLATES[template])


def test_generation_blocks_and_prefixes_agree() -> None:
    """But for the line break after the end of a turn, which the blocks leave out."""
    chatml = "".join(TEMPLATES["generation"].replace("{%- generation %}", "").split("{% endgeneration %}"))
    assert not Template(chatml).marks
    assert [text.rstrip("\n") for text in said(chatml, TWO)] == said("generation", TWO)


def test_tools_and_a_call() -> None:
    tools = [{"type": "function", "function": {"name": "sum", "parameters": {"x": "<b>&'ü"}}}]
    call = {"type": "function", "function": {"name": "sum", "arguments": {"x": [1, 2]}}}
    messages = [TWO[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    text, spans = mark_chat(
        tokenizer("llama3"), [*messages, {"role": "assistant", "content": "It is 3"}], tools, now=NOW
    )
    assert "<b>&'ü" in text
    assert [text[begin:end] for begin, end in spans] == [
        '{"name": "sum", "parameters": {"x": [1, 2]}}<|eot_id|>',
        "It is 3<|eot_id|>",
    ]


def test_the_date_is_that_of_the_call() -> None:
    assert "Today Date: 31 Jan 2026" in tokenizer("llama3").render(TWO, now=NOW)
    assert datetime.now().strftime("%Y") in tokenizer("llama3").render(TWO)


def test_generation_blocks_in_macros_and_captured_text() -> None:
    macro = (
        "{% macro say(text) %}<{% generation %}{{ text }}{% endgeneration %}>{% endmacro %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ say(m.content) }}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    assert said(macro, TWO) == ["  one ", "two, Ünder"]
    captured = "{% set x %}{% generation %}" + macro.partition("{% for")[1] + macro.partition("{% for")[2]
    captured = captured.replace("{{ say(m.content) }}", "{{ m.content }}") + "{% endgeneration %}{% endset %}{{ x }}"
    assert "".join(said(captured, TWO)) == "".join(message["content"] for message in TWO)


def test_blocks_whose_text_is_changed_are_refused() -> None:
    changed = "{% set x %}{% generation %} {{ messages[0].content }} {% endgeneration %}{% endset %}{{ x | trim }}"
    with pytest.raises(TemplateError, match="works on the text of its own"):
        said(changed, TWO)


def test_names_set_in_a_generation_block_stay_in_it() -> None:
    scope = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert Template(scope).render(TWO) == "21"


def test_a_prompt_that_answers_do_not_begin_with_names_both() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    with pytest.raises(TemplateError, match=r"message 2, .*ends the prompt for it by 'A:', .* has '  one '\."):
        said(template, TWO)


def test_the_token_that_ends_a_text_may_be_after_the_last_message_only() -> None:
    ended = TEMPLATES["chatml"] + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    assert said(ended, TWO) == ["  one <|im_end|>\n", "two, Ünder<|im_end|>\n</s>"]


def test_thoughts_may_have_any_of_their_names() -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }}{% endfor %}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert Template(template).render([{"role": "assistant", name: "so", "content": "x"}]) == "so|so|x"
    assert Template(template).render([{"role": "assistant", "thinking": None, "content": "x"}]) == "||x"


def test_blocks_belong_to_answers_in_order_or_by_their_place() -> None:
    assert said("generation", TWO, start=2) == SAID["generation"][1:]
    two_blocks = TEMPLATES["generation"].replace(
        "{{- message.content }}", "{{- message.content }}{% endgeneration %}{% generation %}"
    )
    assert said(two_blocks, TWO, turns="last") == ["two, Ünder", "<|im_end|>"]


UNTOLD = {
    "thinking": (
        [{**TWO[0]}, {"role": "assistant", "content": "<think>so</think>one"}, *TWO[2:]],
        "message 2, an answer",
    ),
}


@pytest.mark.parametrize("template", UNTOLD)
def test_a_template_that_does_not_tell_answers_from_the_rest_names_the_turn(template: str) -> None:
    messages, message = UNTOLD[template]
    with pytest.raises(TemplateError, match=message) as raised:
        said(template, messages)
    assert not isinstance(raised.value, MessagesError)
    assert "turns='last'" in str(raised.value)


def test_the_last_turn_can_be_told_where_earlier_ones_cannot() -> None:
    assert said("thinking", UNTOLD["thinking"][0], turns="last") == SAID["thinking"][-1:]


REFUSED: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "no assistant": ("chatml", TWO[:1], "no message is the assistant's"),
    "alternation": ("mistral", [TWO[0], TWO[0], TWO[1]], "Roles must alternate"),
    "role": ("gemma", [{"role": "system", "content": "x"}, *TWO], "No system role"),
    "no content": ("chatml", [TWO[0], {"role": "assistant"}], "has no attribute 'content'"),
    "nothing said": (
        "generation",
        [TWO[0], {"role": "user", "content": "x"}, {"role": "assistant", "content": ""}],
        "",
    ),
    "no blocks reached": (
        "{% if x %}{% generation %}{% endgeneration %}{% endif %}",
        TWO,
        "no text of the assistant's",
    ),
    "no characters": ("generation", [{"role": "user", "content": "\ufdd0"}, TWO[1]], "U\\+FDD0"),
    "division": ("{{ 1 // 0 }}", TWO, "by zero"),
}


@pytest.mark.parametrize("case", [name for name in REFUSED if name != "nothing said"])
def test_conversations_that_are_refused(case: str) -> None:
    template, messages, message = REFUSED[case]
    with pytest.raises(MessagesError, match=message):
        encode_chat(tokenizer(template), messages, now=NOW)


def test_an_empty_answer_still_ends() -> None:
    assert said("generation", REFUSED["nothing said"][1]) == ["<|im_end|>"]


@pytest.mark.parametrize(
    "attack", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"]
)
def test_templates_run_in_a_sandbox(attack: str) -> None:
    with pytest.raises(MessagesError, match=r"unsafe|not safely"):
        tokenizer(attack).render(TWO)


def test_a_template_that_is_not_jinja_names_the_line() -> None:
    with pytest.raises(TemplateError, match="not Jinja, line 2"):
        tokenizer("x\n{% for %}").render(TWO)


def test_a_tokenizer_without_a_template_says_what_to_do() -> None:
    with pytest.raises(TemplateError, match=r"no chat template.*chat_template\.jinja"):
        Tokenizer(byte_level(), SPECIAL).render(TWO)
