"""What a benchmark found, as tables, as JSON, and as files."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Group

from lora_jax.adapter.site import render
from lora_jax.bench.tables import Report

_COLUMNS = ("mode", "form", "rank", "time", "/ base (quartiles)", "FLOPs", "bytes", "temporary")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mode at one rank, of one case, on one number of tokens.

    Attributes:
      case: the weight or model.
      tokens: number of tokens.
      examples: what they are cut into; the tokens of an example meet the same adapter.
      mode: `base`, `adapter`, `separate`, `merged` or `routed`.
      form: how the thin products are carried out: `factored` or `merged` of separate, `rows`, `mask` or `blocks` of
        routed, several with `and` between them; else empty.
      rank: of the adapters; None for the base.
      adapters: number in the bank; None where there is none.
      seconds: median time of a call.
      ratio: median, over the rounds, of this time divided by that of the base in the same round.
      ratio_quartiles: the lower and the upper one of that.
      flops: operations, as XLA counts them; None where a backend does not say, as the next two.
      bytes: bytes read and written, as XLA counts them: by every operation that is left, as though there were no
        caches.
      temporary_bytes: memory allocated beside arguments and results.
      times: seconds of every round.
    """

    case: str
    tokens: int
    examples: int
    mode: str
    form: str
    rank: int | None
    adapters: int | None
    seconds: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    flops: int | None
    bytes: int | None
    temporary_bytes: int | None
    times: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Benchmark:
    """What `measure` returns: tables when printed, and its numbers.

    Attributes:
      settings: what was varied, the fields of `Settings` by name.
      machine: what was measured on and with: processor, cores, device, versions.
      rows: one for every program; those of the same case and tokens follow each other, the base first.
    """

    settings: Mapping[str, Any]
    machine: Mapping[str, str]
    rows: tuple[Row, ...]

    def json(self) -> str:
        """All numbers: an object with `settings`, `machine` and `rows`, whose keys are the attributes of `Row`."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def report(self) -> Report:
        """Tables, one for every case and number of tokens."""
        report, how = Report(self.machine), f"{self.settings['dtype']}, {self.settings['rounds']} rounds"
        for (case, tokens, examples), rows in groupby(self.rows, lambda row: (row.case, row.tokens, row.examples)):
            sections = [[_cells(row) for row in section] for _, section in groupby(rows, lambda row: row.rank)]
            lines = [cells for section in sections for cells in (*section, [])]
            report.add(f"{case}, {batch_text(tokens, examples)}, {how}", _COLUMNS, lines[:-1])
        return report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `bench.json`, `bench.md` and `bench.png` into a new directory, which appears when it is complete.

        Needs matplotlib: `pip install "lora_jax[cli]"`.
        """
        # Not at the top: numbers and tables need no matplotlib.
        from lora_jax.bench.plot import draw

        where = Path(path).absolute()
        where.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=where.parent, prefix=f".{where.name}-") as folder:
            beside = Path(folder) / "bench"
            beside.mkdir()
            (beside / "bench.json").write_text(self.json())
            (beside / "bench.md").write_text(self.report().markdown() + "\n")
            draw(self).savefig(beside / "bench.png")
            os.rename(beside, where)

    def __rich__(self) -> Group:
        return self.report().__rich__()

    def __repr__(self) -> str:
        return render(self)


def _cells(row: Row) -> list[str]:
    low, high = row.ratio_quartiles
    against = "1" if row.mode == "base" else f"{_digits(row.ratio)} ({_digits(low)} to {_digits(high)})"
    return [
        row.mode if row.adapters is None else f"{row.mode}, {_counted(row.adapters, 'adapter')}",
        row.form,
        "" if row.rank is None else str(row.rank),
        seconds_text(row.seconds),
        against,
        _scaled(row.flops, ""),
        _scaled(row.bytes, "B"),
        _scaled(row.temporary_bytes, "B"),
    ]


def _digits(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def batch_text(tokens: int, examples: int) -> str:
    """What a batch holds, in words.

    Example:
      >>> batch_text(64, 64), batch_text(64, 1)
      ('64 tokens', '64 tokens in 1 example')
    """
    cut = "" if examples == tokens else f" in {_counted(examples, 'example')}"
    return _counted(tokens, "token") + cut


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def seconds_text(seconds: float) -> str:
    """A time with its unit.

    Example:
      >>> seconds_text(0.00123), seconds_text(4.2e-5)
      ('1.23 ms', '42.0 µs')
    """
    size, unit = next(((size, unit) for size, unit in ((1, "s"), (1e-3, "ms")) if seconds >= size), (1e-6, "µs"))
    return f"{seconds / size:#.3g}".rstrip(".") + f" {unit}"


def _scaled(count: int | None, unit: str) -> str:
    """A count in thousands, millions or more; empty if it is not known."""
    if count is None:
        return ""
    sizes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    size, prefix = next(((size, prefix) for size, prefix in sizes if count >= size), (1, ""))
    number = f"{count:d}" if size == 1 else f"{count / size:#.3g}".rstrip(".")
    return f"{number} {prefix}{unit}".rstrip()
