"""`encode_chat`: a conversation as tokens, and which of them are the assistant's."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_jax.text.errors import MessagesError, TemplateError
from lora_jax.text.template import Messages, Span, Template, Tools
from lora_jax.text.tokenizer import Tokenizer

Turns = Literal["all", "last"]


class Chat(NamedTuple):
    """A conversation as tokens.

    Attributes:
      tokens: `[time]`, int32.
      assistant: `[time]`, whether the assistant says this token.
    """

    tokens: NDArray[np.int32]
    assistant: NDArray[np.bool_]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None = None,
    *,
    turns: Turns = "all",
    start: int = 0,
    now: datetime | None = None,
) -> Chat:
    """Encode a conversation, and find what the assistant says in it.

    Templates with `{% generation %}` say it themselves. Of others each answer is what the text has more, up to its end,
    than the text before it with the generation prompt.

    Args:
      tokenizer: with a chat template.
      messages: each with `role`, and mostly `content`.
      tools: JSON schemas of functions that the model may call.
      turns: all that the assistant says, or only what it says `last`.
      start: number of messages at the beginning whose answers do not count.
      now: what templates that write a date take it to be; by default the present.

    Raises:
      TemplateError: there is no template, or it does not tell answers from the rest.
      MessagesError: the template refuses the conversation, or the assistant says nothing in it.

    Example:
      >>> from tokenizers import Tokenizer as Backend, models, pre_tokenizers
      >>> backend = Backend(models.WordLevel({"user": 0, "assistant": 1, "Hi": 2, "Ho": 3, ":": 4}, unk_token=":"))
      >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
      >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
      >>> template += "{% if add_generation_prompt %}assistant:{% endif %}"
      >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
      >>> encode_chat(Tokenizer(backend, template=template), chat)
      Chat(tokens=array([0, 4, 2, 1, 4, 3], dtype=int32), assistant=array([False, False, False, False, False,  True]))
    """
    text, spans = mark_chat(tokenizer, messages, tools, turns=turns, start=start, now=now)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    assistant = inside(encoding.offsets, spans)
    if not assistant.any():
        raise MessagesError("the assistant says nothing in the conversation: there is no token to train on")
    return Chat(np.asarray(encoding.ids, np.int32), assistant)


def mark_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None = None,
    *,
    turns: Turns = "all",
    start: int = 0,
    now: datetime | None = None,
) -> tuple[str, list[Span]]:
    """The text of a conversation, and where in it the assistant speaks: what `encode_chat` encodes.

    Returns:
      The text, and begin and end of each answer in it.

    Raises:
      TemplateError: there is no template, or it does not tell answers from the rest.
      MessagesError: the template refuses the conversation, or the assistant says nothing in it.
    """
    template = tokenizer.chat_template(bool(tools))
    now = now or datetime.now()
    text = template.render(messages, tools, now=now)
    asked = _asked(messages, turns, start)
    if not template.marks:
        spans = [_answer(template, text, messages, tools, turn, now) for turn in asked]
    else:
        spans = template.spans(messages, tools, now=now)
        if turns == "last" or start:
            first, _ = _answer(template, text, messages, tools, asked[0], now)
            spans = [span for span in spans if span[0] >= first]
    if not any(text[begin:end].strip() for begin, end in spans):
        raise MessagesError("the chat template leaves no text of the assistant's: there is nothing to train on")
    return text, spans


def _asked(messages: Messages, turns: Turns, start: int) -> list[int]:
    """Numbers of the messages that are wanted."""
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant" and i >= start]
    if not answers:
        roles = ", ".join(dict.fromkeys(str(message.get("role")) for message in messages[start:]))
        raise MessagesError(f"no message is the assistant's (the roles are {roles}): there is nothing to train on")
    return answers if turns == "all" else answers[-1:]


def _answer(template: Template, text: str, messages: Messages, tools: Tools | None, turn: int, now: datetime) -> Span:
    """Where message number `turn` is in the text of all messages."""
    try:
        before = template.render(messages[:turn], tools, generation_prompt=True, now=now)
        last = turn == len(messages) - 1
        whole = text if last else template.render(messages[: turn + 1], tools, now=now)
    except MessagesError as error:
        raise MessagesError(f"{error}. This was met up to message {turn + 1}, an answer") from error
    if not whole.startswith(before):
        raise TemplateError(_untold(turn, "what comes before it", before, whole))
    if not text.startswith(whole):
        raise TemplateError(_untold(turn, "it", whole, text))
    return len(before), len(whole)


def _untold(turn: int, what: str, alone: str, followed: str) -> str:
    """Why the place of an answer cannot be told, and what to do."""
    at = next(
        (i for i, (a, b) in enumerate(zip(alone, followed, strict=False)) if a != b), min(len(alone), len(followed))
    )
    return (
        f"the place of message {turn + 1}, an answer, cannot be told: the chat template writes {what} differently once "
        f"more follows ({alone[at : at + 20]!r} becomes {followed[at : at + 20]!r}). Train on the last answer of each "
        "conversation only (turns='last'), or write {% generation %} around answers in chat_template.jinja"
    )


def inside(offsets: Sequence[Span], spans: Iterable[Span]) -> NDArray[np.bool_]:
    """Which tokens have any of their text inside of spans.

    Args:
      offsets: of the tokens, in order.
      spans: begin and end of each, in the same text.

    Example:
      >>> inside([(0, 2), (2, 5), (5, 6)], [(4, 5)])
      array([False,  True, False])
    """
    ends = np.asarray(offsets, np.int64).reshape(-1, 2)
    found = np.zeros(len(ends), bool)
    for begin, end in spans:
        found |= (ends[:, 0] < end) & (ends[:, 1] > begin)
    return found
