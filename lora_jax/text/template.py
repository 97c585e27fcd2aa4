"""Chat templates: a directory's Jinja program, run in a sandbox, makes one text of a conversation."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

from lora_jax.text.errors import MessagesError, TemplateError, extra

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

# Not characters, by Unicode's own definition: they stand around what `{% generation %}` encloses, wherever a template
# puts it (a macro, a captured block), and are gone from the text that is returned.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class Template:
    """A chat template, compiled once.

    The text is that of transformers' `apply_chat_template`: the same sandbox, filters and functions.

    Args:
      source: the Jinja program.
      special: what it is given beside the messages: `bos_token`, `eos_token` and others, by name.

    Attributes:
      marks: whether it says itself which text is generated, by `{% generation %}`.
      special: the same.

    Raises:
      TemplateError: it is not Jinja.
      ImportError: jinja2 is not installed.

    Example:
      >>> template = Template("{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}")
      >>> template.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])
      '<user>Hi<assistant>Ho'
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None):
        jinja2 = extra("jinja2")
        try:
            tree = _environment(True).parse(source)
            self._plain, self._marked = (_environment(marked).from_string(source) for marked in (False, True))
        except (jinja2.TemplateError, RecursionError) as error:
            number = getattr(error, "lineno", None)
            line = "" if number is None else f", line {number}"
            raise TemplateError(f"the chat template is not Jinja{line}: {error}") from error
        self.marks = any(data.data == _OPEN for data in tree.find_all(jinja2.nodes.TemplateData))
        self.special = dict(special or {})

    def render(
        self,
        messages: Messages,
        tools: Tools | None = None,
        *,
        generation_prompt: bool = False,
        now: datetime | None = None,
    ) -> str:
        """The conversation as one text.

        Args:
          messages: each with `role`, and mostly `content`; fields that are None are left out. What was thought before
            an answer may be `reasoning_content`, `thinking` or `reasoning`.
          tools: JSON schemas of functions that the model may call.
          generation_prompt: end with what begins an answer.
          now: what templates that write a date take it to be; by default the present.

        Raises:
          MessagesError: the template refuses the conversation, or fails on it.
        """
        return self._run(self._plain, messages, tools, generation_prompt, now)

    def spans(self, messages: Messages, tools: Tools | None = None, *, now: datetime | None = None) -> list[Span]:
        """Where in the text of `render` the template has `{% generation %}`: begin and end of each block.

        Raises:
          MessagesError: the template refuses the conversation, or fails on it.
          TemplateError: the template changes what it encloses.
        """
        if any(mark in json.dumps([*messages, tools], ensure_ascii=False, default=str) for mark in (_OPEN, _CLOSE)):
            raise MessagesError("the conversation holds U+FDD0 or U+FDD1, which are not characters: remove them")
        now = now or datetime.now()
        text, spans = _split(self._run(self._marked, messages, tools, False, now))
        if text != self.render(messages, tools, now=now):
            raise TemplateError(
                "the chat template works on the text of its own {% generation %} blocks, so that their places are "
                "lost: write them around what is printed, not around what is computed with"
            )
        return spans

    def _run(
        self, program: Any, messages: Messages, tools: Tools | None, generation_prompt: bool, now: datetime | None
    ) -> str:
        given = list(map(_message, messages))
        try:
            return program.render(
                **self.special, messages=given, tools=tools or None, documents=None,
                add_generation_prompt=generation_prompt, strftime_now=(now or datetime.now()).strftime,
            )  # fmt: skip
        except Exception as error:  # A template is a program of somebody else's, and fails as programs do.
            raise MessagesError(
                f"the chat template refuses the conversation: {error or type(error).__name__}"
            ) from error


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without fields that are None, and with what was thought under each of the names that templates know."""
    held = {key: value for key, value in message.items() if value is not None}
    thought = next((held[key] for key in ("reasoning_content", "thinking", "reasoning") if key in held), None)
    return held if thought is None else {"thinking": thought, **held, "reasoning_content": thought}


def _split(text: str) -> tuple[str, list[Span]]:
    """A text without marks, and where they stood; of blocks in blocks the inner ones end the outer."""
    pieces, spans, length = [], [], 0
    for i, part in enumerate(text.split(_OPEN)):
        inside, closed, after = part.partition(_CLOSE)
        after = after.replace(_CLOSE, "")
        if i and closed and inside:
            spans.append((length, length + len(inside)))
        pieces += [inside, after]
        length += len(inside) + len(after)
    return "".join(pieces), spans


@cache
def _environment(marked: bool) -> Any:
    """What transformers gives templates: its sandbox, its whitespace, its functions; with marks if asked for."""
    jinja2, sandbox = extra("jinja2"), extra("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation(marked), "jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def _generation(marked: bool) -> type:
    """The extension of Jinja behind `{% generation %}`."""
    nodes, ext = extra("jinja2.nodes"), extra("jinja2.ext")

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)
            if not marked:
                return body
            begin, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_OPEN, _CLOSE))
            return [begin, body, end]

    return Generation


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is; Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
