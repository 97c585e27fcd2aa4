"""Prompts: from the command line or a file, as the tokens that a model continues."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.data.errors import BadLine, DataError
from lora_jax.data.lines import json_lines
from lora_jax.errors import ConfigError, listed, nearest
from lora_jax.text.tokenizer import Tokenizer

_KEYS = ("prompt", "messages", "tools", "adapter")
_BESIDE = ("completion", "id")
"""What files for training and for evaluation have beside prompts, and is passed over."""


class Prompt(NamedTuple):
    """What is continued.

    Attributes:
      messages: a conversation; a text is one message of the user's.
      text: what the user gave, as it is shown.
      tools: JSON schemas of functions that the model may call.
      adapter: the adapter's name, or None for the base.
      chosen: whether the line said so.
      where: the line of the file, for errors; empty for none.
    """

    messages: Sequence[Mapping[str, Any]]
    text: str
    tools: Sequence[Any] | None = None
    adapter: str | None = None
    chosen: bool = False
    where: str = ""

    def tokens(self, tokenizer: Tokenizer, chat: bool) -> list[int]:
        """The tokens to continue.

        Args:
          tokenizer: of the model.
          chat: put it into the chat template; else the text as it is.
        """
        if not chat:
            return tokenizer.encode(self.text, special=True)
        return tokenizer.encode(tokenizer.render(self.messages, self.tools, generation_prompt=True))


def text_prompt(text: str) -> Prompt:
    """A text as a prompt.

    >>> text_prompt("Hello").messages
    [{'role': 'user', 'content': 'Hello'}]
    """
    return Prompt([{"role": "user", "content": text}], text)


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of JSON lines with `prompt` or `messages`, and in any of them `adapter`, a name or null for the base.

    An answer at the end of `messages`, as in files for training, is left out.

    Raises:
      DataError: the file cannot be read, or a line is none of these; its number is told.
    """
    found = []
    for number, line in json_lines(path):
        where = f"{path}:{number}"
        if isinstance(line, BadLine):
            raise DataError(f"{where}: {line}")
        found.append(_prompt(line, where))
    if not found:
        raise DataError(f'{path} is empty: each line is to hold an object like {{"prompt": "..."}}')
    return found


def _prompt(line: Mapping[str, Any], where: str) -> Prompt:
    if unknown := [key for key in line if key not in (*_KEYS, *_BESIDE)]:
        raise DataError(f"{where}: {unknown[0]!r} means nothing here; nearest: {nearest(unknown[0], _KEYS)}")
    if ("prompt" in line) == ("messages" in line):
        raise DataError(f"{where}: give either prompt or messages; this line has {listed(list(line)) or 'nothing'}")
    adapter = line.get("adapter")
    if not isinstance(adapter, str | None):
        raise DataError(f"{where}: adapter is {adapter!r}; give its name, or null for the base")
    messages = _messages(line.get("messages", line.get("prompt")), where)
    return Prompt(messages, _shown(messages), line.get("tools"), adapter, "adapter" in line, where)


def _messages(given: Any, where: str) -> Sequence[Mapping[str, Any]]:
    if isinstance(given, str):
        return text_prompt(given).messages
    if not isinstance(given, list) or not given or not all(isinstance(each, dict) and "role" in each for each in given):
        raise DataError(f"{where}: a prompt is a text, and messages are a list of objects with role and content")
    messages = given[:-1] if given[-1]["role"] == "assistant" else given
    if not messages:
        raise DataError(f"{where}: there is no message before the answer")
    return messages


def _shown(messages: Sequence[Mapping[str, Any]]) -> str:
    content = messages[-1].get("content")
    return content if isinstance(content, str) else str(content)


def assigned(prompts: Sequence[Prompt], adapters: Sequence[str], *, everywhere: bool = False) -> list[Prompt]:
    """Prompts with the adapter of each: the one that its line names, or the only one that there is.

    Args:
      prompts: of the command line or a file.
      adapters: names of those that were given.
      everywhere: continue each prompt with every adapter instead.

    Raises:
      ConfigError: a line names none of them, or none at all where there are several.

    Example:
      >>> [each.adapter for each in assigned([text_prompt("a")], ["one", "two"], everywhere=True)]
      ['one', 'two']
    """
    if everywhere:
        return [prompt._replace(adapter=name) for prompt in prompts for name in adapters or [None]]
    return list(_of_lines(prompts, adapters))


def _of_lines(prompts: Sequence[Prompt], adapters: Sequence[str]) -> Iterator[Prompt]:
    for prompt in prompts:
        if prompt.chosen and prompt.adapter is not None and prompt.adapter not in adapters:
            given = f"those given are {listed(adapters)}" if adapters else "none is given: --adapter NAME=PATH"
            raise ConfigError(f"{prompt.where}: there is no adapter {prompt.adapter!r}; {given}")
        if not prompt.chosen and len(adapters) > 1:
            raise ConfigError(f'{prompt.where}: name one of {listed(adapters)} in it, as "adapter": "{adapters[0]}"')
        yield prompt if prompt.chosen or not adapters else prompt._replace(adapter=adapters[0])
