"""What a benchmark found, as tables, as JSON, and as files."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from lora_jax.bench.rows import Row, batch_text, counted, digits_text, seconds_text
from lora_jax.report.report import Report
from lora_jax.report.tables import Tables, scaled

_COLUMNS = ("mode", "form", "rank", "time", "/ base (quartiles)", "FLOPs", "bytes", "temporary")


@dataclass(frozen=True, repr=False)
class Benchmark(Report):
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
        return self.to_json() + "\n"

    def report(self) -> Tables:
        """Tables, one for every case and number of tokens."""
        report, how = Tables(self.machine), f"{self.settings['dtype']}, {self.settings['rounds']} rounds"
        for (case, tokens, examples), rows in groupby(self.rows, lambda row: (row.case, row.tokens, row.examples)):
            sections = [[_cells(row) for row in section] for _, section in groupby(rows, lambda row: row.rank)]
            lines = [cells for section in sections for cells in (*section, [])]
            report.add(f"{case}, {batch_text(tokens, examples)}, {how}", _COLUMNS, lines[:-1])
        return report

    def table(self) -> Tables:
        """The same."""
        return self.report()

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
            draw(self.rows, self.settings, self.machine).savefig(beside / "bench.png")
            os.rename(beside, where)


def _cells(row: Row) -> list[str]:
    low, high = row.ratio_quartiles
    against = "1" if row.mode == "base" else f"{digits_text(row.ratio)} ({digits_text(low)} to {digits_text(high)})"
    return [
        row.mode if row.adapters is None else f"{row.mode}, {counted(row.adapters, 'adapter')}",
        row.form,
        "" if row.rank is None else str(row.rank),
        seconds_text(row.seconds),
        against,
        scaled(row.flops, ""),
        scaled(row.bytes, "B"),
        scaled(row.temporary_bytes, "B"),
    ]
