"""The picture of a benchmark: what every mode takes beside the base, over ranks."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter, StrMethodFormatter

from lora_jax.bench.rows import Row, batch_text, seconds_text

_STYLES = {"adapter": ("tab:gray", "s"), "separate": ("tab:blue", "o"), "merged": ("tab:green", "^")}
_NAMES = {"adapter": "adapter alone, B(Ax)", "separate": "separate, Wx + B(Ax)", "merged": "merged, (W + BA)x"}
_ROUTED = ("tab:orange", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


def draw(measured: Sequence[Row], settings: Mapping[str, Any], machine: Mapping[str, str]) -> Figure:
    """Draw the ratio to the base over ranks: a panel for every number of tokens, a row of them for every case."""
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
