"""Rows of reports: one linear map each, named by its parameter and its place in the stack, and grouped by layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TypeVar

from lora_jax.paths import alike, layer_number
from lora_jax.report.tables import Table


@dataclass(frozen=True, eq=False)
class Row:
    """One linear map.

    Attributes:
      path: path of the parameter, or of a module in PEFT's format its name.
      entry: its place along the stacked axes (layers, experts); empty if it is no stack.
    """

    path: str
    entry: tuple[int, ...]

    @property
    def name(self) -> str:
        """Path and place, as `layers/up[3]`."""
        return self.path + (f"[{', '.join(map(str, self.entry))}]" if self.entry else "")

    @property
    def group(self) -> str:
        """The path with `*` for the number of a layer, which rows of all layers share."""
        return alike(self.path)

    @property
    def position(self) -> tuple[int, ...]:
        """The number of the layer in the path, if there is one, and the place in the stack."""
        number = layer_number(self.path)
        return self.entry if number is None else (number, *self.entry)


_Row = TypeVar("_Row", bound=Row)


def grouped(rows: Iterable[_Row]) -> dict[str, list[_Row]]:
    """Rows by their group, each in the order of layers."""
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return {group: sorted(found, key=lambda row: row.position) for group, found in groups.items()}


def short_table(
    rows: Sequence[_Row],
    columns: Mapping[str, Callable[[_Row], float | None]],
    spelled: Mapping[str, str],
    note: Callable[[_Row], str] = lambda row: "",
) -> Table:
    """A line for every group, with the mean of each number and, where it varies, the least and the largest.

    Args:
      rows: to be grouped.
      columns: the number of a row by the header of its column; None where the row has none.
      spelled: format of the numbers by header.
      note: a remark on a row; a last column has those of each group, if there are any.
    """
    noted, lines = any(note(row) for row in rows), []
    for group, found in grouped(rows).items():
        values = {header: [value for row in found if (value := number(row)) is not None]
                  for header, number in columns.items()}  # fmt: skip
        ranges = [_range(each, spelled[head]) for head, each in values.items()]
        remarks = "; ".join(dict.fromkeys(remark for row in found if (remark := note(row))))
        lines.append((group, str(len({row.name for row in found})), *ranges, *[remarks] * noted))
    return Table(("parameter", "weights", *columns, *[""] * noted), lines, words=[len(columns) + 2] * noted)


def _range(values: Sequence[float], spelled: str) -> str:
    if not values:
        return ""
    middle, low, high = (format(value, spelled) for value in (mean(values), min(values), max(values)))
    return middle if low == high else f"{middle} [{low}, {high}]"


def number(value: float | None, spelled: str) -> str:
    """A number as a table shows it; nothing for None."""
    return "" if value is None else format(value, spelled)


def left_out_lines(left_out: Mapping[str, str]) -> list[str]:
    """What a report says about what it has no rows for: one line, or none."""
    why = "; ".join(f"{path} ({why})" for path, why in left_out.items())
    return [f"Left out: {why}"] if why else []
