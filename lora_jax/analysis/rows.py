"""What the reports share: a row for every linear map, grouped by layer, and the SVD of what an adapter adds to it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from lora_jax.adapter.updates import Replace, Update
from lora_jax.compose.factors import Part, has_factors, joined, plain_factors, significant, stacked
from lora_jax.errors import ParameterError
from lora_jax.methods import Dora, Gained, Rows, Shift
from lora_jax.paths import alike, layer_number
from lora_jax.report.tables import Table
from lora_jax.svd import Triplets


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


class Directions(NamedTuple):
    """`Σ_r values[r] · left[r] ⊗ right[r]` on the host, values descending.

    Attributes:
      left: `[rank, fan_in]`, orthonormal: what an update reads.
      values: `[rank]`; those that are nothing but rounding are zero.
      right: `[rank, fan_out]`, orthonormal: what it writes.
    """

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray

    @property
    def real(self) -> "Directions":
        """Those whose value is not zero."""
        rank = int(np.count_nonzero(self.values))
        return Directions(*(each[:rank] for each in self))


def why_without_factors(update: Update) -> str | None:
    """Why an update has no singular triplets; None if it has."""
    if has_factors(update):
        return None
    known = {Replace: "trained in full", Rows: "rows trained in full", Shift: "added to a bias"}
    return next((why for kind, why in known.items() if isinstance(update, kind)), "no low-rank factors")


def remark(update: Update) -> str:
    """What the factors of an update are not the whole of; empty if they are."""
    if isinstance(update, Dora):
        return "inside DoRA's norm"
    return "beside a gain" if isinstance(update, Gained) else ""


def part_of(path: str, update: Update) -> Part:
    """The factors of an update that has some, as stacks of matrices.

    Raises:
      ParameterError: their shapes are not those of one adapter for the site.
    """
    plain: Any = jax.eval_shape(plain_factors, update)
    if plain.a.shape != plain.site.a_shape(plain.rank):
        raise ParameterError(
            f"{path!r} has an A of shape {plain.a.shape} where its site has {plain.site.a_shape(plain.rank)}. "
            "Of stacked adapters take one: adapter.unstack()[0]"
        )
    return stacked(update)


def decomposed(path: str, update: Update) -> Iterator[tuple[tuple[int, ...], Directions]]:
    """Singular triplets of what an update adds, scale included, for each linear map of its stack with its place."""
    part = part_of(path, update)
    if part.a.shape[1] == 0:  # All terms of AdaLoRA may be pruned.
        nothing = Directions(np.zeros((0, update.site.fan_in)), np.zeros(0), np.zeros((0, update.site.fan_out)))
        yield from ((entry, nothing) for entry in np.ndindex(update.site.batch_shape))
        return
    found = jax.tree.map(np.asarray, _decomposed(part))
    for i, entry in enumerate(np.ndindex(update.site.batch_shape)):
        yield entry, Directions(*(each[i] for each in found))


@jax.jit
def _decomposed(parts: Part) -> Triplets:
    return jax.vmap(lambda part: significant(*joined([part])))(parts)
