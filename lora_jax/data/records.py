"""`Record`: a line of a file as one of the kinds that can be trained on, told by its keys."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lora_jax.data.counts import ReadCounts
from lora_jax.data.errors import BadLine, DataError
from lora_jax.errors import nearest

Kind = Literal["text", "completion", "messages", "label", "preference"]

KEYS: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "label": ("input", "label"),
    "preference": ("prompt", "chosen", "rejected"),
}
"""What a line of each kind has. `tools` may stand beside conversations, as a list or as JSON in a text."""

_TALKS = {"prompt", "completion", "chosen", "rejected"}
_POSSIBLE = "; ".join(" + ".join(keys) for keys in KEYS.values())


@dataclass(frozen=True, slots=True)
class Record:
    """An example as it was read.

    Attributes:
      values: by the keys of its kind, and `tools` if there are any.
      line: its number in the file, from 1.

    Example:
      >>> Record({"prompt": "1 + 1 =", "completion": " 2"}, line=7).values["completion"]
      ' 2'
    """

    values: Mapping[str, Any]
    line: int


@dataclass(frozen=True)
class Records(Sequence[Record]):
    """The examples of a file.

    Attributes:
      file: its path.
      kind: of all of them.
      records: in the order of the file.
      counts: what became of its lines.
      plain: whether they are pieces of one plain text, which neither begin nor end there.

    Example:
      >>> records = Records("a.jsonl", "text", (Record({"text": "one"}, 1),), ReadCounts("a.jsonl"))
      >>> len(records), records[0].line
      (1, 1)
    """

    file: str
    kind: Kind
    records: tuple[Record, ...]
    counts: ReadCounts
    plain: bool = False

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]


def check_keys(keys: Mapping[str, str], kind: Kind | None) -> None:
    """Refuse names of keys and kinds that there are not.

    Raises:
      DataError: names what there is.
    """
    known = {"tools", *(key for names in KEYS.values() for key in names)}
    for key in keys:
        if key not in known:
            raise DataError(f"keys: there is no key {key!r}. Nearest: {nearest(key, known)}")
    if kind is not None and kind not in KEYS:
        raise DataError(f"kind={kind!r} is none of {', '.join(get_args(Kind))}")


def detect(found: Mapping[str, Any], keys: Mapping[str, str]) -> Kind:
    """The kind of a file, from a line of it.

    Args:
      found: the object in the line.
      keys: what the file calls `prompt` and the others, if not so.

    Raises:
      BadLine: it is of none.
      DataError: it may be of several.

    Example:
      >>> detect({"question": "Q", "completion": "A"}, {"prompt": "question"})
      'completion'
    """
    named = {*keys} - {"tools"}
    kinds: list[Kind] = [
        kind
        for kind, names in KEYS.items()
        if named <= {*names} and all(keys.get(name, name) in found for name in names)
    ]
    if len(kinds) > 1:
        raise DataError(
            f"its keys are those of {' and of '.join(map(repr, kinds))}: say which with kind=, or with keys= "
            "what is meant"
        )
    if not kinds:
        theirs = ", ".join(map(repr, found)) or "none"
        raise BadLine("keys of no kind", f"it has {theirs}; possible are {_POSSIBLE}. Other names are given with keys=")
    return kinds[0]


def record(found: Mapping[str, Any], kind: Kind, keys: Mapping[str, str], line: int) -> Record:
    """A line as an example of its file's kind.

    Raises:
      BadLine: a key is missing, or what it holds is of another type.
    """
    values = {}
    for name in KEYS[kind]:
        column = keys.get(name, name)
        if column not in found or found[column] is None:
            raise BadLine(f"no {column!r}", f"it has {', '.join(map(repr, found)) or 'nothing'}")
        values[name] = found[column]
        _check(name, column, values[name])
    talks = [values[name] for name in KEYS[kind] if name in _TALKS]
    if len({type(each) for each in talks}) > 1:
        raise BadLine("texts and messages", f"{', '.join(KEYS[kind])} are of one type: texts, or lists of messages")
    if kind not in ("text", "label") and (tools := _tools(found.get(keys.get("tools", "tools")))):
        values["tools"] = tools
    return Record(values, line)


def _tools(given: Any) -> Any:
    """Tools as a list of objects; tables keep them as JSON in a text."""
    tools = given
    if isinstance(given, str):
        try:
            tools = json.loads(given or "null")
        except (ValueError, RecursionError) as error:
            raise BadLine("tools are not JSON", str(error)) from error
    if tools is not None and not _objects(tools):
        raise BadLine("tools are no list of objects", _type(tools))
    return tools


def _check(name: str, column: str, value: Any) -> None:
    """Refuse a value of the wrong type."""
    if name == "label":
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise BadLine(f"{column!r} is no text and no whole number", _type(value))
    elif name == "messages" or (name in _TALKS and isinstance(value, list)):
        _check_messages(column, value)
    elif not isinstance(value, str):
        raise BadLine(f"{column!r} is no text{' or messages' if name in _TALKS else ''}", _type(value))
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
