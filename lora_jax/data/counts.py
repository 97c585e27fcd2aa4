"""Counts of what was read and encoded, so that nothing is left out in silence."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from lora_jax.data.errors import BadLine, DataError
from lora_jax.errors import listed
from lora_jax.report.report import Report
from lora_jax.report.tables import Table

_TOLD = 5


class _Counts(Report):
    """Counts of what a file holds, with the first notes about what was left out of it."""

    file: str
    notes: list[str]

    def _leave_out(self, counter: Counter[str], line: int, error: BadLine, strict: bool, advice: str) -> None:
        note = f"{self.file}:{line}: {error}"
        if strict:
            raise DataError(f"{note}. {advice}")
        counter[error.reason] += 1
        if len(self.notes) < _TOLD:
            self.notes.append(note)


@dataclass(repr=False)
class ReadCounts(_Counts):
    """What became of the lines of a file.

    Attributes:
      file: its path.
      kind: what its lines are.
      read: lines that are not blank; of a plain text the pieces it was cut into.
      kept: lines that are examples.
      bad: how many others there are, by what is wrong with them.
      passed_over: keys of the file that are not read.
      notes: the first of them, with their numbers.

    Example:
      >>> ReadCounts("a.jsonl", "text", read=3, kept=2, bad=Counter({"not JSON": 1})).table()
      ┏━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━┓
      ┃ lines of a.jsonl (text) ┃ number ┃
      ┡━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━┩
      │ read                    │      3 │
      │ kept                    │      2 │
      │ left out: not JSON      │      1 │
      └─────────────────────────┴────────┘
    """

    file: str
    kind: str = ""
    read: int = 0
    kept: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    passed_over: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def refuse(self, line: int, error: BadLine, strict: bool) -> None:
        """Count a bad line, or raise if there may be none.

        Raises:
          DataError: `strict`, naming file and line.
        """
        advice = "Correct the line, or leave bad lines out by not being strict"
        self._leave_out(self.bad, line, error, strict, advice)

    def table(self) -> Table:
        """A row for each count."""
        rows = [("read", f"{self.read:,}"), ("kept", f"{self.kept:,}"), *_left_out(self.bad)]
        over = [f"Keys that are not read: {listed([repr(key) for key in self.passed_over])}"] * bool(self.passed_over)
        return Table((f"lines of {self.file} ({self.kind})", "number"), rows, notes=[*over, *self.notes])


@dataclass(repr=False)
class EncodeCounts(_Counts):
    """What became of examples when they were encoded.

    Attributes:
      file: where they are from.
      examples: that can be trained on; a long text gives several.
      tokens: in all of these.
      trained: how many of the tokens are trained on.
      longest: tokens of the longest of these.
      truncated: examples of which the end was cut off.
      cut_off: tokens that this took.
      split: texts that were too long, and became several examples.
      endless: whole examples whose answer holds no token at which generation stops, so that it would go on.
      dropped: examples that were left out, by reason.
      notes: the first of them, with the numbers of their lines.

    Example:
      >>> EncodeCounts("a.jsonl", examples=2, tokens=10, trained=4).as_dict()["trained"]
      4
    """

    file: str
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    truncated: int = 0
    cut_off: int = 0
    split: int = 0
    endless: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def refuse(self, line: int, error: BadLine, strict: bool) -> None:
        """Count an example that is left out, or raise if none may be.

        Raises:
          DataError: `strict`, naming file and line.
        """
        advice = "Change the example, or leave such examples out by not being strict"
        self._leave_out(self.dropped, line, error, strict, advice)

    def table(self) -> Table:
        """A row for each count."""
        share = f" ({self.trained / max(self.tokens, 1):.1%})"
        rows = [
            ("examples", f"{self.examples:,}"),
            ("tokens", f"{self.tokens:,}"),
            *[("trained on", f"{self.trained:,}{share}")] * bool(self.trained),
            ("longest", f"{self.longest:,}"),
            ("truncated", f"{self.truncated:,}"),
            ("tokens cut off", f"{self.cut_off:,}"),
            ("long texts split", f"{self.split:,}"),
            *[("answers without a token that ends them", f"{self.endless:,}")] * bool(self.endless),
            *_left_out(self.dropped),
        ]
        return Table((f"examples of {self.file}", "number"), rows, notes=self.notes)


def _left_out(bad: Counter[str]) -> Iterable[tuple[str, str]]:
    return ((f"left out: {reason}", f"{bad[reason]:,}") for reason in sorted(bad))
