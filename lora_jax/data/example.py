"""`Example`: tokens, and which of them are trained on; and the options that decide it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lora_jax.data.counts import EncodeCounts
from lora_jax.data.errors import DataError
from lora_jax.data.records import Kind

TrainOn = Literal["answers", "everything"]
Turns = Literal["all", "last", "each"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How examples become tokens.

    Attributes:
      length: tokens of an example at most; what is beyond is cut off, and a long text becomes several examples.
      train_on: completions and what the assistant says, or everything.
      turns: all that the assistant says, or only what it says last; or each answer in an example of its own, which ends
        with it, as the model meets it when it answers.
      chat: whether prompts and completions are put into the chat template; by default if the tokenizer has one.
      strict: raise at the first example that has to be left out, instead of counting it.
      now: what templates that write a date take it to be.

    Raises:
      DataError: an option is out of range.

    Example:
      >>> Options(length=512).train_on
      'answers'
    """

    length: int = 1024
    train_on: TrainOn = "answers"
    turns: Turns = "all"
    chat: bool | None = None
    strict: bool = False
    now: datetime = field(default_factory=datetime.now)

    def __post_init__(self) -> None:
        if self.length < 2:
            raise DataError(f"length={self.length} must be at least 2: a token, and one that is predicted from it")
        for name, values in (("train_on", get_args(TrainOn)), ("turns", get_args(Turns))):
            if getattr(self, name) not in values:
                raise DataError(f"{name}={getattr(self, name)!r} is none of {', '.join(map(repr, values))}")


@dataclass(frozen=True, slots=True)
class Example:
    """One text as tokens.

    Attributes:
      tokens: `[time]`, int32.
      trained: `[time]`, whether a token is a target, which is predicted from those before it; never the first.
      line: where it is from.
      label: the number of its class; -1 if it has none.

    Example:
      >>> len(Example(np.array([7, 8], np.int32), np.array([False, True]), line=1))
      2
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    line: int
    label: int = -1

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
      chosen: the prompt with the better answer.
      rejected: the prompt with the other one.

    Example:
      >>> better, other = (Example(np.array([7, n], np.int32), np.array([False, True]), 1) for n in (8, 9))
      >>> Pair(better, other).rejected.tokens
      array([7, 9], dtype=int32)
    """

    chosen: Example
    rejected: Example


def texts_of(item: Example | Pair) -> tuple[Example, ...]:
    """The texts of an item: itself, or both answers of a pair."""
    return (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)


@dataclass(frozen=True)
class Examples(Sequence[Any]):
    """Examples of one kind: an `Example` each, or a `Pair` of preferences.

    Attributes:
      kind: what they were read as.
      items: in the order of the file.
      counts: what became of the examples that were read.
      labels: names of the classes, in the order of their numbers; empty if there are none.

    Example:
      >>> one = Example(np.array([7, 8], np.int32), np.array([False, True]), 1)
      >>> len(Examples("text", (one, one), EncodeCounts("a.jsonl")))
      2
    """

    kind: Kind
    items: tuple[Example, ...] | tuple[Pair, ...]
    counts: EncodeCounts
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]
