"""The texts of an example, and where in them is what is trained on: before any of it is tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_jax.data.errors import BadLine, DataError
from lora_jax.data.example import Options
from lora_jax.data.records import Record, Records
from lora_jax.text import MessagesError, TemplateError, Tokenizer, mark_chat


@dataclass(frozen=True, slots=True)
class Marked:
    """A text and what of it is trained on.

    Attributes:
      text: as it is encoded.
      spans: begin and end of each part that is trained on; None for everything.
      begins: whether the token that begins a text goes before it.
      ends: whether the token that ends one goes after it.
    """

    text: str
    spans: Sequence[tuple[int, int]] | None
    begins: bool = True
    ends: bool = True


def marks(record: Record, records: Records, tokenizer: Tokenizer, options: Options) -> tuple[Marked, ...]:
    """The texts of an example: mostly one; of a preference both answers, of a conversation maybe several.

    Raises:
      BadLine: the chat template refuses the conversation.
      DataError: there is no chat template, or it does not tell answers from the rest.
    """
    values = record.values
    try:
        if records.kind in ("text", "label"):
            return (Marked(values["text" if records.kind == "text" else "input"], None, ends=not records.plain),)
        if records.kind == "messages":
            return tuple(
                _chat(values["messages"][:end], start, values.get("tools"), tokenizer, options)
                for start, end in _parts(values["messages"], options)
            )
        answers = ("completion",) if records.kind == "completion" else ("chosen", "rejected")
        return tuple(_answered(values, answer, tokenizer, options) for answer in answers)
    except MessagesError as error:
        raise BadLine("refused by the chat template", str(error)) from error
    except TemplateError as error:
        raise DataError(f"{records.file}:{record.line}: {error}") from error


def _parts(messages: Sequence[Any], options: Options) -> list[tuple[int, int]]:
    """The first messages that are taken as an example, up to which number, and from which on answers count."""
    if options.turns != "each":
        return [(0, len(messages))]
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    return [(i, i + 1) for i in answers] or [(0, len(messages))]


def _answered(values: Any, answer: str, tokenizer: Tokenizer, options: Options) -> Marked:
    """A prompt and the answer to it, as a conversation or one after the other."""
    prompt, answered = values["prompt"], values[answer]
    if isinstance(prompt, list):
        return _chat([*prompt, *answered], len(prompt), values.get("tools"), tokenizer, options)
    templated = tokenizer.template is not None if options.chat is None else options.chat
    if templated:
        talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answered}]
        return _chat(talk, 1, values.get("tools"), tokenizer, options)
    text = prompt + answered
    return Marked(text, None if options.train_on == "everything" else [(len(prompt), len(text))])


def _chat(messages: list[Any], start: int, tools: Any, tokenizer: Tokenizer, options: Options) -> Marked:
    """A conversation in the chat template, which has both ends in it."""
    if options.train_on == "everything":
        text, spans = tokenizer.render(messages, tools, now=options.now), None
    else:
        turns = "last" if options.turns == "last" else "all"
        text, spans = mark_chat(tokenizer, messages, tools, turns=turns, start=start, now=options.now)
    return Marked(text, spans, begins=False, ends=False)
