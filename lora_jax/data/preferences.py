"""Preferences: the prompt that two answers have in common, in each of the forms in which files have it."""

from itertools import takewhile
from typing import Any

from lora_jax.data.checks import check
from lora_jax.data.errors import BadLine


def with_prompt(chosen: Any, rejected: Any, prompt: Any, column: str = "prompt") -> dict[str, Any]:
    """The prompt and two answers to it, all texts or all lists of messages.

    Answers may be whole conversations: what both begin with is the prompt, whether it is there a second time or not.

    Args:
      chosen: the better answer, a text or messages.
      rejected: the other one.
      prompt: what the file has as the prompt, or None.
      column: what the file calls the prompt.

    Raises:
      BadLine: there is no prompt, or it does not fit the answers.

    Example:
      >>> question = {"role": "user", "content": "Q"}
      >>> yes, no = ({"role": "assistant", "content": text} for text in "YN")
      >>> with_prompt([question, yes], [question, no], None)["chosen"]
      [{'role': 'assistant', 'content': 'Y'}]
    """
    if prompt is not None:
        check("prompt", column, prompt)
    if isinstance(chosen, str) and prompt is None:
        raise BadLine(f"no {column!r}", "only whole conversations as lists of messages have it in them")
    if type(chosen) is not type(rejected) or (isinstance(chosen, str) and not isinstance(prompt, str)):
        raise BadLine("texts and messages", "prompt, chosen and rejected are all texts, or all lists of messages")
    if isinstance(chosen, list) and not isinstance(prompt, list):
        shared = _shared(chosen, rejected)
        chosen, rejected, prompt = chosen[len(shared) :], rejected[len(shared) :], _messages(shared, prompt, column)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _shared(chosen: list[Any], rejected: list[Any]) -> list[Any]:
    """Messages that both begin with, of which neither ends there."""
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _messages(shared: list[Any], prompt: str | None, column: str) -> list[Any]:
    """The prompt as messages: those that both answers begin with, or a message of the user's."""
    if not shared and prompt is None:
        raise BadLine(f"no {column!r}", "and chosen and rejected begin with different messages")
    if not shared:
        return [{"role": "user", "content": prompt}]
    if prompt is not None and prompt.strip() not in [str(message.get("content")).strip() for message in shared]:
        raise BadLine(f"{column!r} is not what the answers begin with", "it is none of the messages that both have")
    return shared
