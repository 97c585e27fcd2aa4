"""What a benchmark found: its rows, as tables, JSON, a picture, and files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jax.publish import place, publish
from lora_jax.report.report import Report
from lora_jax.report.tables import Tables, scaled

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from collections.abc import Sequence


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


def digits_text(ratio: float) -> str:
    """A ratio with three digits.

    >>> digits_text(1.234), digits_text(12.34)
    ('1.23', '12.3')
    """
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def batch_text(tokens: int, examples: int) -> str:
    """What a batch holds, in words.

    Example:
      >>> batch_text(64, 64), batch_text(64, 1)
      ('64 tokens', '64 tokens in 1 example')
    """
    cut = "" if examples == tokens else f" in {counted(examples, 'example')}"
    return counted(tokens, "token") + cut


def counted(count: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "token"), counted(2, "token")
    ('1 token', '2 tokens')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def seconds_text(seconds: float) -> str:
    """A time with its unit.

    Example:
      >>> seconds_text(0.00123), seconds_text(4.2e-5)
      ('1.23 ms', '42.0 µs')
    """
    size, unit = next(((size, unit) for size, unit in ((1, "s"), (1e-3, "ms")) if seconds >= size), (1e-6, "µs"))
    return f"{seconds / size:#.3g}".rstrip(".") + f" {unit}"


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

        Raises:
          CheckpointError: something is there already, or the disk is full, read-only or broken.
        """
        publish(place(path), self._write)

    def _write(self, folder: Path) -> None:
        (folder / "bench.json").write_text(self.json(), encoding="utf-8")
        (folder / "bench.md").write_text(self.report().markdown() + "\n", encoding="utf-8")
        draw(self.rows, self.settings, self.machine).savefig(folder / "bench.png")


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


_STYLES = {"adapter": ("tab:gray", "s"), "separate": ("tab:blue", "o"), "merged": ("tab:green", "^")}
_NAMES = {"adapter": "adapter alone, B(Ax)", "separate": "separate, Wx + B(Ax)", "merged": "merged, (W + BA)x"}
_ROUTED = ("tab:orange", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


def draw(measured: Sequence[Row], settings: Mapping[str, Any], machine: Mapping[str, str]) -> "Figure":
    """Draw the ratio to the base over ranks: a panel for every number of tokens, a row of them for every case."""
    # Not at the top: numbers and tables need no matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = [list(rows) for _, rows in groupby(measured, lambda row: row.case)]
    panels = [[list(rows) for _, rows in groupby(rows, lambda row: row.tokens)] for rows in cases]
    height, width = len(panels), len(panels[0])
    figure = Figure(figsize=(max(3.6 * width, 7), 3.3 * height + 1.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(height, width, squeeze=False, sharex=True, sharey="row")
    for i, line in enumerate(panels):
        for j, rows in enumerate(line):
            _panel(grid[i][j], rows)
            _ticks(grid[i][j], line)
        grid[i][0].set_ylabel("time / time of the base (lower is better)")
    what = f"LoRA beside its base: medians of {settings['rounds']} rounds with quartiles, {settings['dtype']}"
    figure.suptitle(f"{what}\n{_machine(machine)}", fontsize=11)
    columns = 4 if width > 2 else 2
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=9)
    return figure


def _machine(facts: Mapping[str, str]) -> str:
    device = "" if facts["device"].endswith("cpu") else f", {facts['device']}"
    return f"{facts['processor']}, {facts['cores']} cores{device}, jax {facts['jax']}"


def _panel(axes: Any, rows: Sequence[Row]) -> None:
    base, *others = rows
    batch = batch_text(base.tokens, base.examples)
    axes.set_title(f"{base.case}\n{batch}, base: {seconds_text(base.seconds)}", fontsize=10)
    axes.axhline(1, color="black", linestyle="--", linewidth=1, label="base, Wx")
    banks = sorted({row.adapters for row in others if row.adapters is not None})
    for (mode, adapters), found in _lines(others):
        color, marker = _STYLES.get(mode, (_ROUTED[banks.index(adapters) % len(_ROUTED)] if adapters else "", "D"))
        ranks, middle = [row.rank for row in found], [row.ratio for row in found]
        low, high = zip(*(row.ratio_quartiles for row in found), strict=True)
        axes.fill_between(ranks, low, high, color=color, alpha=0.15, linewidth=0)
        axes.vlines(ranks, low, high, color=color, alpha=0.5, linewidth=1)
        label = _NAMES.get(mode, f"routed, {adapters} adapters in the bank")
        axes.plot(ranks, middle, color=color, marker=marker, markersize=4, linewidth=1.5, label=label)


def _lines(rows: Sequence[Row]) -> list[tuple[tuple[str, int | None], list[Row]]]:
    """Rows by mode and number of adapters, in the order of ranks."""
    keys = dict.fromkeys((row.mode, row.adapters) for row in rows)
    ordered = sorted(rows, key=lambda row: row.rank or 0)
    return [(key, [row for row in ordered if (row.mode, row.adapters) == key]) for key in keys]


def _ticks(axes: Any, line: Sequence[Sequence[Row]]) -> None:
    """Numbers along the axes of a panel, as for all in its line."""
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter, StrMethodFormatter

    rows = [row for rows in line for row in rows]
    low, high = min(row.ratio_quartiles[0] for row in rows), max(row.ratio_quartiles[1] for row in rows)
    marks = (1, 2, 5) if high > 5 * low else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row.rank for row in rows if row.rank}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=marks))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("rank")
    axes.tick_params(labelleft=True, labelbottom=True)
    axes.grid(alpha=0.3)
