"""The picture of a benchmark: what every mode takes beside the base, over ranks."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, ScalarFormatter, StrMethodFormatter

from lora_jax.bench.result import Benchmark, Row, batch_text, seconds_text

_STYLES = {"adapter": ("tab:gray", "s"), "separate": ("tab:blue", "o"), "merged": ("tab:green", "^")}
_NAMES = {"adapter": "adapter alone, B(Ax)", "separate": "separate, Wx + B(Ax)", "merged": "merged, (W + BA)x"}
_ROUTED = ("tab:orange", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


def plot(benchmark: Benchmark, image: Path) -> None:
    """Draw the ratio to the base over ranks: a panel for every number of tokens, a row of them for every case.

    Args:
      benchmark: the numbers.
      image: the PNG to write.
    """
    cases = [list(rows) for _, rows in groupby(benchmark.rows, lambda row: row.case)]
    panels = [[list(rows) for _, rows in groupby(rows, lambda row: row.tokens)] for rows in cases]
    height, width = len(panels), len(panels[0])
    figure = Figure(figsize=(max(3.6 * width, 8), 3.3 * height + 1.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(height, width, squeeze=False, sharex=True, sharey="row")
    for i, line in enumerate(panels):
        for j, rows in enumerate(line):
            _panel(grid[i][j], rows)
            grid[i][j].tick_params(labelleft=True, labelbottom=True)
        grid[i][0].set_ylabel("time / time of the base (lower is better)")
    settings = benchmark.settings
    what = f"LoRA beside its base: medians of {settings['rounds']} rounds with quartiles, {settings['dtype']}"
    figure.suptitle(f"{what}\n{_machine(benchmark.machine)}", fontsize=11)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(image)


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
        axes.fill_between(ranks, low, high, color=color, alpha=0.2, linewidth=0)
        label = _NAMES.get(mode, f"routed, {adapters} adapters in the bank")
        axes.plot(ranks, middle, color=color, marker=marker, markersize=4, linewidth=1.5, label=label)
    _ticks(axes, [row.rank for row in others])


def _lines(rows: Sequence[Row]) -> list[tuple[tuple[str, int | None], list[Row]]]:
    """Rows by mode and number of adapters, in the order of ranks."""
    keys = dict.fromkeys((row.mode, row.adapters) for row in rows)
    ordered = sorted(rows, key=lambda row: row.rank or 0)
    return [(key, [row for row in ordered if (row.mode, row.adapters) == key]) for key in keys]


def _ticks(axes: Any, ranks: Sequence[int | None]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({rank for rank in ranks if rank}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("rank")
    axes.grid(alpha=0.3)
