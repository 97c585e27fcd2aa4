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

    Example:
      >>> Chat(np.array([5, 6], np.int32), np.array([False, True])).assistant
      array([False,  True])
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
      >>> from lora_jax.text import byte_tokenizer
      >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
      >>> template += "{% if add_generation_prompt %}<assistant>{% endif %}"
      >>> talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
      >>> tokenizer = byte_tokenizer(template)
      >>> chat = encode_chat(tokenizer, talk)
      >>> tokenizer.decode(chat.tokens), tokenizer.decode(chat.tokens[chat.assistant])
      ('<user>Hi<assistant>Ho', 'Ho')
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

    Example:
      >>> from lora_jax.text import byte_tokenizer
      >>> template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
      >>> mark_chat(byte_tokenizer(template), [{"role": "assistant", "content": "Ho"}])
      ('Ho', [(0, 2)])
    """
    talk = _Talk(tokenizer.chat_template(bool(tools)), messages, tools, now or datetime.now())
    asked = _asked(messages, turns, start)
    spans = _marked(talk, asked) if talk.template.marks else [_answer(talk, turn) for turn in asked]
    if not any(talk.text[begin:end].strip() for begin, end in spans):
        raise MessagesError("the chat template leaves no text of the assistant's: there is nothing to train on")
    return talk.text, spans


class _Talk:
    """A conversation and its text."""

    def __init__(self, template: Template, messages: Messages, tools: Tools | None, now: datetime):
        self.template, self.messages, self._tools, self._now = template, messages, tools, now
        self.text = self.first(len(messages))

    def first(self, count: int, generation_prompt: bool = False) -> str:
        """The text of the first messages."""
        given = self.messages[:count]
        return self.template.render(given, self._tools, generation_prompt=generation_prompt, now=self._now)

    def blocks(self) -> list[Span]:
        """Where the template has `{% generation %}`."""
        return self.template.spans(self.messages, self._tools, now=self._now)


def _asked(messages: Messages, turns: Turns, start: int) -> list[int]:
    """Numbers of the messages that are wanted."""
    answers = [i for i in _answers(messages) if i >= start]
    if not answers:
        roles = ", ".join(dict.fromkeys(str(message.get("role")) for message in messages[start:]))
        raise MessagesError(f"no message is the assistant's (the roles are {roles}): there is nothing to train on")
    return answers if turns == "all" else answers[-1:]


def _answers(messages: Messages) -> list[int]:
    return [i for i, message in enumerate(messages) if message.get("role") == "assistant"]


def _marked(talk: _Talk, asked: list[int]) -> list[Span]:
    """The blocks of the template that belong to the messages that are wanted."""
    spans, answers = talk.blocks(), _answers(talk.messages)
    if asked == answers:
        return spans
    if len(spans) == len(answers):
        return spans[-len(asked) :]
    first, _ = _answer(talk, asked[0])
    return [span for span in spans if span[0] >= first]


def _answer(talk: _Talk, turn: int) -> Span:
    """Where message number `turn` is in the text of all messages."""
    try:
        before = talk.first(turn, generation_prompt=True)
        whole = talk.text if turn == len(talk.messages) - 1 else talk.first(turn + 1)
    except MessagesError as error:
        raise MessagesError(f"{error}. This was met up to message {turn + 1}, an answer") from error
    if not whole.startswith(before):
        prompt, answer = _parting(before, whole)
        raise TemplateError(
            f"the place of message {turn + 1}, an answer, cannot be told: the chat template ends the prompt for it by "
            f"{prompt!r}, where the answer itself has {answer!r}. Let answers begin as their prompt ends, or "
            "write {% generation %} around answers in chat_template.jinja"
        )
    if not talk.text.startswith(whole):
        # Some templates end the last message with the token that ends a text.
        whole = whole.removesuffix(talk.template.special.get("eos_token", ""))
    if not talk.text.startswith(whole):
        alone, followed = _parting(whole, talk.text)
        raise TemplateError(
            f"the place of message {turn + 1}, an answer, cannot be told: the chat template writes it differently once "
            f"others follow ({alone!r} becomes {followed!r}). Train on the last answer of each conversation only "
            "(turns='last'), or write {% generation %} around answers in chat_template.jinja"
        )
    return len(before), len(whole)


def _parting(one: str, other: str) -> tuple[str, str]:
    """How two texts go on where they part, for an error."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[at : at + 20], other[at : at + 20]


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
