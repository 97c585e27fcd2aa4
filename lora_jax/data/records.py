"""`Record`: a line of a file as one of the kinds that can be trained on, told by its keys."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lora_jax.data.checks import check, tools_of
from lora_jax.data.counts import ReadCounts
from lora_jax.data.errors import BadLine, DataError
from lora_jax.data.preferences import with_prompt
from lora_jax.errors import nearest

Kind = Literal["text", "completion", "messages", "label", "preference"]

KEYS: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "label": ("input", "label"),
    "preference": ("chosen", "rejected"),
}
"""What a line of each kind must have."""

BESIDE: dict[Kind, tuple[str, ...]] = {
    "text": (), "completion": ("tools",), "messages": ("tools",), "label": (), "preference": ("prompt", "tools"),
}  # fmt: skip
"""What it may have beside: `tools` as a list, or as JSON in a text."""

_POSSIBLE = "text; prompt + completion; messages; input + label; prompt + chosen + rejected"


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
    known = {key for kinds in (KEYS, BESIDE) for names in kinds.values() for key in names}
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
    kinds: list[Kind] = [
        kind
        for kind, names in KEYS.items()
        if {*keys} <= {"tools", *names, *BESIDE[kind]} and all(keys.get(name, name) in found for name in names)
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
    values: dict[str, Any] = {}
    for name in KEYS[kind]:
        column = keys.get(name, name)
        if column not in found or found[column] is None:
            raise BadLine(f"no {column!r}", f"it has {', '.join(map(repr, found)) or 'nothing'}")
        values[name] = found[column]
        check(name, column, values[name])
    if kind == "preference":
        column = keys.get("prompt", "prompt")
        values = with_prompt(values["chosen"], values["rejected"], found.get(column), column)
    elif kind == "completion" and type(values["prompt"]) is not type(values["completion"]):
        raise BadLine("texts and messages", "prompt and completion are of one type: texts, or lists of messages")
    if "tools" in BESIDE[kind] and (tools := tools_of(found.get(keys.get("tools", "tools")))):
        values["tools"] = tools
    return Record(values, line)
