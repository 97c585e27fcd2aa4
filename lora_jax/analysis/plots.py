"""Pictures of reports: heat maps with a line for every parameter and a column for every layer, and the like.

matplotlib belongs to the extra `[cli]`, so it is imported only when something is drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from math import ceil
from os import PathLike
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
