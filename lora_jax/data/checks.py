"""What a line may hold under each key: types of texts, classes, messages and tools."""

import json
from typing import Any

from lora_jax.data.errors import BadLine

TALKS = {"prompt", "completion", "chosen", "rejected"}
"""Keys that hold a text or a list of messages."""


def tools_of(given: Any) -> Any:
    """Tools as a list of objects, or None; tables keep them as JSON in a text.

    Raises:
      BadLine: they are neither.

    Example:
      >>> tools_of('[{"name": "f"}]')
      [{'name': 'f'}]
    """
    tools = given
    if isinstance(given, str):
        try:
            tools = json.loads(given or "null")
        except (ValueError, RecursionError) as error:
            raise BadLine("tools are not JSON", str(error)) from error
    if tools is not None and not _objects(tools):
        raise BadLine("tools are no list of objects", _type(tools))
    return tools


def check(name: str, column: str, value: Any) -> None:
    """Refuse a value of the wrong type.

    Args:
      name: what it is: `prompt`, `label`, ...
      column: what the file calls it.
      value: as it was read.

    Raises:
      BadLine: it is of another type, or empty.
    """
    if name == "label":
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise BadLine(f"{column!r} is no text and no whole number", _type(value))
    elif name == "messages" or (name in TALKS and isinstance(value, list)):
        _check_messages(column, value)
    elif not isinstance(value, str):
        raise BadLine(f"{column!r} is no text{' or messages' if name in TALKS else ''}", _type(value))
    elif not value and name != "prompt":
        raise BadLine(f"{column!r} is empty")


def _check_messages(column: str, value: Any) -> None:
    if not _objects(value):
        raise BadLine(f"{column!r} is no list of messages", _type(value))
    if not value:
        raise BadLine(f"{column!r} is empty")
    for number, message in enumerate(value, 1):
        if not isinstance(message.get("role"), str):
            raise BadLine(
                "a message without a role", f"message {number} of {column!r} has {', '.join(map(repr, message))}"
            )
        content = message.get("content")
        parts = _objects(content) and all(isinstance(part.get("text"), str) for part in content)
        if not (content is None or isinstance(content, str) or parts):
            raise BadLine("a message whose content is no text", f"message {number} of {column!r}")


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _type(value: Any) -> str:
    return f"it is a {type(value).__name__}"
