"""The pictures of the four reports: heat maps with a line for every parameter and a column for every layer, curves.

matplotlib belongs to the extra `[cli]`, so it is imported only when something is drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from math import ceil
from os import PathLike
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from lora_jax.analysis.rows import Row, grouped
from lora_jax.errors import ParameterError, listed

_INSTALL = 'Pictures need matplotlib: pip install "lora_jax[cli]"'
_TICKS = 16
"""Columns of a heat map that get a label each; of more, some do."""

_WRITTEN = 10
"""Columns of a heat map up to which numbers are written into it."""

_PANELS = 12
"""Panels of their own for the parameters; of more, the first ones."""


class Shade(NamedTuple):
    """How a number becomes a colour.

    Attributes:
      label: what the number is, with its unit; stands at the colour bar.
      colours: name of a colour map.
      low: the number at its lower end; None for the smallest.
      high: the number at its upper end; None for the largest.
      spelled: format of the numbers that are written into cells.
    """

    label: str
    colours: str = "viridis"
    low: float | None = None
    high: float | None = None
    spelled: str = ".2g"


def new_figure(width: float, height: float, title: str) -> Any:
    """An empty picture, in inches.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontweight="bold", parse_math=False)
    return figure


def write(figure: Any, path: str | PathLike[str]) -> None:
    """Write a picture as PNG, whatever the name of the file ends in."""
    figure.savefig(path, format="png")


def check_any(rows: Sequence[Any], what: str) -> None:
    """Refuse to draw nothing.

    Raises:
      ParameterError: there are no rows.
    """
    if not rows:
        raise ParameterError(f"There is nothing to draw: {what}")


def labels(groups: Sequence[str]) -> list[str]:
    """Names of groups for an axis, without the components that all of them begin and end with.

    >>> labels(["params/layers/q/kernel", "params/layers/k/kernel"]), labels(["a.up", "a.up.gate"]), labels(["up"])
    (['q', 'k'], ['up', 'up/gate'], ['up'])
    """
    parts = [group.replace(".", "/").split("/") for group in groups]
    if len(parts) < 2:
        return list(groups)
    rest = [each[_shared(parts) :] for each in parts]
    last = _shared([each[::-1] for each in rest])
    return ["/".join(each[: len(each) - last]) for each in rest]


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many components all names begin with, of each at least one left out."""
    same = takewhile(lambda each: len(set(each)) == 1, zip(*(each[:-1] for each in parts), strict=False))
    return sum(1 for _ in same)


def layers_of(rows: Sequence[Row]) -> tuple[list[tuple[int, ...]], str]:
    """All places of rows in order, and what they count."""
    positions = sorted({row.position for row in rows})
    deep = max(len(position) for position in positions)
    return positions, ["", "layer, or place in the stack", "layer · place in the stack"][min(deep, 2)]


def height_of(groups: int) -> float:
    """Inches for a heat map of so many lines."""
    return 1.2 + 0.3 * max(groups, 4)


def heat_map(
    figure: Any, axes: Any, rows: Sequence[Any], value: Callable[[Any], float | None], title: str, shade: Shade
) -> None:
    """Draw a number of each row, a line for every parameter and a column for every layer; grey where there is none."""
    groups, (positions, counted) = grouped(rows), layers_of(rows)
    field = np.full((len(groups), len(positions)), np.nan)
    for line, found in enumerate(groups.values()):
        for row in found:
            number = value(row)
            known = number is not None and np.isfinite(number)
            field[line, positions.index(row.position)] = number if known else np.nan
    axes.set_facecolor("lightgray")
    drawn = axes.imshow(field, cmap=shade.colours, vmin=shade.low, vmax=shade.high, aspect="auto", interpolation="none")
    figure.colorbar(drawn, ax=axes, label=shade.label)
    axes.set_title(title)
    axes.set_yticks(range(len(groups)), labels(list(groups)))
    tick_layers(axes.xaxis, positions)
    axes.set_xlabel(counted)
    if len(positions) <= _WRITTEN:
        _write_numbers(axes, drawn, field, shade.spelled)


def tick_layers(axis: Any, positions: Sequence[tuple[int, ...]]) -> None:
    """Label an axis along layers, a few of them if they are many."""
    step = ceil(len(positions) / _TICKS)
    names = ["·".join(map(str, each)) for each in positions[::step]]
    axis.set_ticks(range(0, len(positions), step), labels=names)


def _write_numbers(axes: Any, drawn: Any, field: np.ndarray, spelled: str) -> None:
    """Every number in its cell, black or white, whichever stands out."""
    for (line, column), number in np.ndenumerate(field):
        if np.isfinite(number):
            red, green, blue, _ = drawn.cmap(drawn.norm(number))
            colour = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            text = format(number, ".0f" if 100 <= abs(number) < 1e5 else spelled)
            axes.text(column, line, text, ha="center", va="center", color=colour, fontsize=8)


def panels(figure: Any, count: int, **settings: Any) -> Any:
    """A grid of axes over whole numbers, at most four in a line; those left over are not shown."""
    columns = min(max(count, 2), 4)
    found = figure.subplots(ceil(count / columns), columns, squeeze=False, **settings).ravel()
    for axes in found[count:]:
        axes.set_visible(False)
    for axes in found[max(count - columns, 0) : count]:
        axes.tick_params(labelbottom=True)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return found[:count]


def panel_height(count: int) -> float:
    """Inches for a grid of so many panels."""
    return 1 + 2.3 * ceil(count / 4)


def panel_groups(rows: Sequence[Any]) -> tuple[Iterator[tuple[str, list[Any]]], int, str]:
    """The groups that get panels with their labels, how many those are, and a remark on those that get none."""
    groups = grouped(rows)
    shown = list(groups)[:_PANELS]
    rest = list(groups)[_PANELS:]
    remark = f"; not shown: {listed(rest, count=3)}" if rest else ""
    return zip(labels(list(groups))[:_PANELS], (groups[each] for each in shown), strict=True), len(shown), remark


def layer_colours(count: int) -> Any:
    """Colours for so many layers, from the first to the last."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    if count == 1:
        return ScalarMappable(BoundaryNorm([-0.5, 0.5, 1.5], 256), colormaps["viridis"])
    return ScalarMappable(BoundaryNorm(np.arange(count + 1) - 0.5, 256), colormaps["viridis"])


_SHARE = Shade("φ: 0 orthogonal, 1 the same", low=0, high=1, spelled=".2f")

_LEAST = 0.001
"""The smallest error on a logarithmic axis, in percent."""

_SHOWN = {
    "INT8": ("INT8", "rounded", "tab:blue", "o"),
    "SVD in the bytes of INT8": ("INT8", "truncated", "tab:blue", "D"),
    "INT4": ("INT4", "rounded", "tab:orange", "o"),
    "NF4": ("NF4", "rounded", "tab:green", "o"),
    "SVD in the bytes of INT4 and NF4": ("NF4", "truncated", "tab:red", "D"),
}
"""What is compared, with colour and marker."""


def draw_spectra(path: str | PathLike[str], title: str, rows: Sequence[Any]) -> None:
    """Effective rank and size by parameter and layer, and the singular values of each; see `Spectra.plot`."""
    rows = [row for row in rows if row.values is not None]
    check_any(rows, "no update has low-rank factors")
    based = all(row.relative is not None for row in rows)
    groups, count, remark = panel_groups(rows)
    upper, lower = height_of(len(grouped(rows))), panel_height(count)
    figure = new_figure(13, upper + lower, title)
    top, bottom = figure.subfigures(2, 1, height_ratios=[upper, lower])
    left, right = top.subplots(1, 2, sharey=True)
    most = max(len(row.values) for row in rows)
    ranked = Shade(f"directions (of {most})", low=0, spelled=".1f")
    heat_map(top, left, rows, lambda row: row.effective_rank, "Effective rank: directions in use", ranked)
    if based:
        part = Shade("percent of |W|", "magma", low=0)
        relative = lambda row: 100 * row.relative  # noqa: E731
        heat_map(top, right, rows, relative, "Size of the update beside its weight, |ΔW|/|W|", part)
    else:
        size = Shade("Frobenius norm", "magma", low=0)
        heat_map(top, right, rows, lambda row: row.norm, "Size of the update, |ΔW|", size)
    _draw_values(bottom, rows, groups, count, remark)
    write(figure, path)


def _draw_values(figure: Any, rows: Sequence[Any], groups: Any, count: int, remark: str) -> None:
    """A panel for every parameter with a line for every layer, all on the same logarithmic axis."""
    figure.suptitle(f"Singular values of ΔW: a flat line uses all of its rank, a steep one few directions{remark}")
    positions, counted = layers_of(rows)
    colours = layer_colours(len(positions))
    found = panels(figure, count, sharex=True, sharey=True)
    for axes, (label, group) in zip(found, groups, strict=True):
        for row in group:
            values = row.values[row.values > 0]
            colour = colours.to_rgba(positions.index(row.position))
            axes.plot(range(1, len(values) + 1), values, marker=".", linewidth=1, color=colour)
        axes.set_title(label, fontsize=10)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.supxlabel("number of the singular value")
    figure.supylabel("singular value (units of W)")
    if len(positions) > 1:
        bar = figure.colorbar(colours, ax=list(found), label=counted)
        tick_layers(bar.ax.yaxis, positions)


def draw_overlap(path: str | PathLike[str], title: str, rows: Sequence[Any]) -> None:
    """Overlaps, cosine and opposed signs by parameter and layer; see `Overlap.plot`."""
    check_any([row for row in rows if row.inputs.size], "one of the updates is zero at every parameter")
    upper = height_of(len(grouped(rows)))
    figure = new_figure(13, 2 * upper + 4.2, title)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2 * upper, 4.2])
    axes = top.subplots(2, 2, sharey=True)
    angle = Shade("cosine", "RdBu", low=-1, high=1, spelled=".2f")
    opposed = Shade("percent of the energy", "RdBu_r", low=0, high=100, spelled=".0f")
    signs = lambda row: None if row.opposed_energy is None else 100 * row.opposed_energy  # noqa: E731
    reads, writes = (
        f"Directions both {verb}; by chance {_range([row.chance[side] for row in rows])}"
        for side, verb in enumerate(("read", "write"))
    )
    heat_map(top, axes[0, 0], rows, lambda row: row.input_overlap, reads, _SHARE)
    heat_map(top, axes[0, 1], rows, lambda row: row.output_overlap, writes, _SHARE)
    heat_map(top, axes[1, 0], rows, lambda row: row.cosine, "Angle between updates: 1 the same, 0 unrelated", angle)
    heat_map(top, axes[1, 1], rows, signs, "Opposite signs, which a sum cancels; 50 by chance", opposed)
    _draw_directions(bottom, rows)
    write(figure, path)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _draw_directions(figure: Any, rows: Sequence[Any]) -> None:
    """The mean over all weights of φ for the first directions of each, up to the ranks that all have."""
    known = [row for row in rows if row.inputs.size]
    ranks = [min(row.inputs.shape[axis] for row in known) for axis in (0, 1)]
    whose = "the first i directions of one and the first j of the other"
    figure.suptitle(f"Overlap of {whose}, mean of {len(known)} weights")
    for axes, name in zip(figure.subplots(1, 2), ("inputs", "outputs"), strict=True):
        mean = np.mean([getattr(row, name)[: ranks[0], : ranks[1]] for row in known], axis=0)
        edges = (0.5, ranks[1] + 0.5, ranks[0] + 0.5, 0.5)
        drawn = axes.imshow(mean, vmin=0, vmax=1, extent=edges, aspect="auto", interpolation="none")
        axes.set(title=f"of the {name}", xlabel="j, directions of the second", ylabel="i, directions of the first")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(drawn, ax=axes, label="φ, from 0 to 1")


def draw_intruders(path: str | PathLike[str], title: str, rows: Sequence[Any]) -> None:
    """The number of intruders by parameter and layer, and every vector's similarity; see `Intruders.plot`."""
    check_any(rows, "the adapter changes no linear map")
    groups, count, remark = panel_groups(rows)
    upper, lower = height_of(len(grouped(rows))), panel_height(count)
    figure = new_figure(13, upper + lower, title)
    top, bottom = figure.subfigures(2, 1, height_ratios=[upper, lower])
    left, right = top.subplots(1, 2, sharey=True)
    most, threshold = max(len(row.similarity) for row in rows), rows[0].threshold
    heat_map(
        top, left, rows, lambda row: float(len(row.numbers)), f"Intruders among the {most} strongest singular vectors",
        Shade("number", "magma", low=0, high=most, spelled=".0f"),
    )  # fmt: skip
    similar = Shade("cosine to the nearest of W", low=0, high=1, spelled=".2f")
    heat_map(top, right, rows, lambda row: float(row.similarity.min()), "Least similarity among them", similar)
    bottom.suptitle(f"Similarity of each singular vector of W+ΔW to the nearest one of W; red: an intruder{remark}")
    _draw_similarities(bottom, rows, groups, count, (most, threshold))
    write(figure, path)


def _draw_similarities(figure: Any, rows: Sequence[Any], groups: Any, count: int, facts: tuple[int, float]) -> None:
    """A panel for every parameter: a line for every layer, a column for every vector."""
    (positions, counted), (most, threshold) = layers_of(rows), facts
    found, drawn = panels(figure, count, sharex=True, sharey=True), None
    for axes, (label, group) in zip(found, groups, strict=True):
        field = np.full((len(positions), most), np.nan)
        for row in group:
            field[positions.index(row.position), : len(row.similarity)] = row.similarity
        edges = (0.5, most + 0.5, len(positions) - 0.5, -0.5)
        axes.set_facecolor("lightgray")
        drawn = axes.imshow(field, vmin=0, vmax=1, extent=edges, aspect="auto", interpolation="none")
        lines, columns = np.nonzero(field < threshold)
        axes.plot(columns + 1, lines, linestyle="none", marker="x", color="red", markersize=5)
        axes.set_title(label, fontsize=10)
        tick_layers(axes.yaxis, positions)
    figure.supxlabel("number of the singular vector, strongest first")
    figure.supylabel(counted)
    figure.colorbar(drawn, ax=list(found), label="cosine to the nearest of W")


def draw_rounding(
    path: str | PathLike[str], title: str, rows: Sequence[Any], fractions: Sequence[float], inputs: str
) -> None:
    """Errors of weights and of outputs by parameter, and how they are spread over entries; see `Rounding.plot`."""
    check_any(rows, "no sites were given")
    groups = grouped(rows)
    upper = 4 + 0.06 * max(map(len, labels(list(groups))))
    figure = new_figure(13, upper + 4.2, title)
    top, bottom = figure.subfigures(2, 1, height_ratios=[upper, 4.2])
    left, right = top.subplots(1, 2, sharey=True)
    _draw_errors(left, groups, "total", "Error of the weight, |error|/|W|")
    _draw_errors(right, groups, "outputs", f"Error of the outputs, |error·x|/|Wx|, for {inputs} inputs")
    left.set_ylabel(f"relative error (percent, {_LEAST} if less)")
    top.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    bottom.suptitle("How the squared error is spread over entries: the higher a line, the fewer of them hold it")
    for axes, kind, name in zip(
        bottom.subplots(1, 2, sharey=True), ("rounded", "truncated"), ("Rounding", "Truncation"), strict=True
    ):
        _draw_spread(axes, rows, kind, fractions)
        axes.set(title=f"{name}: mean and range of all weights", xlabel="percent of the entries, worst first")
    bottom.axes[0].set_ylabel("percent of the squared error")
    write(figure, path)


def _draw_errors(axes: Any, groups: Any, what: str, title: str) -> None:
    """A column for every parameter, with a dot for every layer: formats side by side, truncation beside each."""
    for place, (label, (form, kind, colour, marker)) in enumerate(_SHOWN.items()):
        dots = [
            (column + (place - 2) / 6, max(100 * error, _LEAST))
            for column, found in enumerate(groups.values())
            for row in found
            if row.form == form and (error := getattr(getattr(row, kind), what)) is not None
        ]
        x, y = zip(*dots, strict=True) if dots else ((), ())
        fill = colour if kind == "rounded" else "none"
        axes.scatter(x, y, marker=marker, s=22, edgecolors=colour, facecolors=fill, alpha=0.8, label=label)
    names = labels(list(groups))
    axes.set_xticks(range(len(groups)), names, rotation=0 if sum(map(len, names)) < 60 else 60)
    for column in range(1, len(groups)):
        axes.axvline(column - 0.5, color="lightgray", linewidth=0.8)
    axes.set(title=title, yscale="log", xlim=(-0.5, len(groups) - 0.5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", alpha=0.3)


def _draw_spread(axes: Any, rows: Sequence[Any], kind: str, fractions: Sequence[float]) -> None:
    """The share of the squared error in the worst entries, beside what uniform and normal errors have."""
    shares = 100 * np.asarray(fractions)
    for label, (form, _, colour, _) in ((label, shown) for label, shown in _SHOWN.items() if shown[1] == kind):
        held = 100 * np.stack([getattr(row, kind).held for row in rows if row.form == form])
        axes.fill_between(shares, held.min(0), held.max(0), color=colour, alpha=0.15)
        axes.plot(shares, held.mean(0), color=colour, label=label)
    axes.plot(shares, [100 * (1 - (1 - each) ** 3) for each in fractions], "k:", label="errors uniform up to a bound")
    axes.plot(shares, [100 * _of_normal(each) for each in fractions], "k--", label="normal errors")
    axes.set(xscale="log", ylim=(0, 100))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _of_normal(share: float) -> float:
    """How much of the square of normal numbers is in so many of them, the largest first."""
    normal = NormalDist()
    if share >= 1:
        return 1.0
    least = normal.inv_cdf(1 - share / 2)
    return share + 2 * least * normal.pdf(least)
