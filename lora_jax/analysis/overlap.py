"""How much two adapters share: the directions they read and write, and the signs of what they add."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import Update
from lora_jax.analysis.pictures import draw_overlap
from lora_jax.analysis.rows import (
    Directions,
    Row,
    decomposed,
    left_out_lines,
    number,
    part_of,
    short_table,
    why_without_factors,
)
from lora_jax.compose.factors import Part, gathered, product
from lora_jax.errors import ParameterError, listed
from lora_jax.report.report import Report
from lora_jax.report.tables import Table


@dataclass(frozen=True, eq=False)
class OverlapRow(Row):
    """Two updates of one linear map.

    Attributes:
      path: path of the parameter.
      entry: its place along the stacked axes.
      inputs: `[rank, rank]`: at `[i - 1, j - 1]` the overlap φ of what the first `i` singular directions of one and the
        first `j` of the other read, from 0 (orthogonal) to 1 (the smaller contains nothing else). Ranks are those of
        the updates, so that an update of zero has none.
      outputs: the same of what they write.
      chance: what random directions of these ranks have in common, of inputs and of outputs.
      cosine: of the angle between both updates as vectors; None if one is zero.
      opposed: share of the entries where the signs of both differ, of those that both change; likewise.
      opposed_energy: the same, but entries count by their squares: the mean of both updates' shares; likewise.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    chance: tuple[float, float]
    cosine: float | None = None
    opposed: float | None = None
    opposed_energy: float | None = None

    @property
    def input_overlap(self) -> float | None:
        """φ of the inputs at full ranks; None if an update is zero."""
        return float(self.inputs[-1, -1]) if self.inputs.size else None

    @property
    def output_overlap(self) -> float | None:
        """φ of the outputs at full ranks; None if an update is zero."""
        return float(self.outputs[-1, -1]) if self.outputs.size else None


@dataclass(frozen=True, repr=False, eq=False)
class Overlap(Report):
    """What `overlap` returns: a table when printed, a picture, and its numbers as attributes.

    Attributes:
      rows: an `OverlapRow` per linear map that both adapters change.
      left_out: why a parameter has none, by path.
    """

    rows: tuple[OverlapRow, ...]
    left_out: Mapping[str, str]

    def summary(self) -> Table:
        """A shorter table: all layers of a parameter in one line, with the mean and the range of each number."""
        columns = {
            "inputs φ": lambda row: row.input_overlap,
            "outputs φ": lambda row: row.output_overlap,
            "cosine": lambda row: row.cosine,
            "opposed energy": lambda row: row.opposed_energy,
        }
        return short_table(self.rows, columns, dict.fromkeys(columns, ".2f") | {"opposed energy": ".0%"})

    def plot(self, path: str | PathLike[str], title: str = "Two adapters") -> None:
        """Write a PNG: overlaps, cosine and opposed signs by parameter and layer, and overlaps by number of directions.

        Args:
          path: the file; one that exists is replaced.
          title: what the adapters are.

        Raises:
          ParameterError: one of the updates is zero at every parameter, so that there is nothing to draw.
          ImportError: matplotlib is not installed.
        """
        draw_overlap(path, title, self.rows)

    def table(self) -> Table:
        """A row for every linear map."""
        headers = (
            "parameter", "ranks", "inputs φ", "(chance)", "outputs φ", "(chance)", "cosine", "signs opposed",
            "by energy",
        )  # fmt: skip
        rows = []
        for row in self.rows:
            found = ((row.input_overlap, row.chance[0]), (row.output_overlap, row.chance[1]))
            shared = [number(each, ".3f") for pair in found for each in pair]
            rest = (number(row.cosine, ".3f"), number(row.opposed, ".1%"), number(row.opposed_energy, ".1%"))
            rows.append((row.name, " × ".join(map(str, row.inputs.shape)), *shared, *rest))
        return Table(headers, rows, notes=left_out_lines(self.left_out))


def overlap(first: Adapter, second: Adapter) -> Overlap:
    """How much two adapters of one model share, at every parameter, layer and expert.

    Three things: the overlap of the directions that both read, and of those that both write, which decides whether they
    act on the same inputs and outputs at all; the cosine between both updates, which is positive where they do the
    same; and the share of entries, and of their energy, with opposite signs, which a sum of both cancels and methods
    like TIES elect. Of updates that have nothing to do with each other half of the signs are opposed.

    Directions are singular vectors of `ΔW`, where the paper takes those of `A` alone: they do not depend on how the
    factors share a product. All but the signs comes from factors; for those, one matrix of the weight's size is formed
    for each adapter at a time. Entries are counted as they are, while TIES drops small ones first; by energy those
    hardly count. Of DoRA it is the factors inside of its norm that are compared.

    Args:
      first: an adapter, of any ranks and methods.
      second: another one.

    Returns:
      An object that prints as a table, writes a picture (`.plot(path)`) and holds the numbers, and by path the reasons
      why a parameter was left out.

    Raises:
      ParameterError: they have no parameter with factors in common, or were made for different models.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((8, 6))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 8)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> adapter = jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(1), leaf.shape), adapter)
      >>> row, = lora.analysis.overlap(adapter, lora.scale(adapter, -2.0)).rows
      >>> round(row.input_overlap, 5), round(row.output_overlap, 5), round(row.cosine, 5), row.opposed
      (1.0, 1.0, -1.0, 1.0)

    References:
      Hu et al., LoRA, arXiv 2106.09685, section 7.2. Yadav et al., TIES-Merging, arXiv 2306.01708.
    """
    one, other = gathered(first), gathered(second)
    left_out = {path: "in the first only" for path in one if path not in other}
    left_out |= {path: "in the second only" for path in other if path not in one}
    rows: list[OverlapRow] = []
    for path in sorted(set(one) & set(other)):
        why = why_without_factors(one[path]) or why_without_factors(other[path])
        if why is None:
            rows += _rows(path, one[path], other[path])
        else:
            left_out[path] = why
    if not rows:
        raise ParameterError(
            f"The adapters have no parameter with factors in common: the first adapts {listed(list(first), count=3)}, "
            f"the second {listed(list(second), count=3)}"
        )
    return Overlap(tuple(rows), dict(sorted(left_out.items())))


def _rows(path: str, one: Update, other: Update) -> Iterator[OverlapRow]:
    _check_alike(path, one.site, other.site)
    signs = jax.tree.map(np.asarray, _signs(part_of(path, one), part_of(path, other)))
    pairs = zip(decomposed(path, one), decomposed(path, other), strict=True)
    for i, ((entry, found), (_, against)) in enumerate(pairs):
        mine, theirs = found.real, against.real
        inputs, outputs = mine.left @ theirs.left.T, mine.right @ theirs.right.T
        ranks = (len(mine.values), len(theirs.values))
        chance = (max(ranks) / one.site.fan_in, max(ranks) / one.site.fan_out)
        row = OverlapRow(path, entry, _shared(inputs), _shared(outputs), chance)
        if min(ranks):
            cosine = _cosine(mine, theirs, inputs * outputs)
            row = OverlapRow(path, entry, row.inputs, row.outputs, chance, cosine, *(float(each[i]) for each in signs))
        yield row


def _shared(cosines: np.ndarray) -> np.ndarray:
    """φ for every number of directions, from the cosines between all of them."""
    rows, columns = cosines.shape
    least = np.minimum.outer(np.arange(1, rows + 1), np.arange(1, columns + 1))
    return np.clip(np.square(cosines).cumsum(0).cumsum(1) / least, 0, 1)


def _cosine(mine: Directions, theirs: Directions, met: np.ndarray) -> float:
    sizes = np.linalg.norm(mine.values) * np.linalg.norm(theirs.values)
    return float(mine.values @ met @ theirs.values / sizes)


class _Signs(NamedTuple):
    """Shares of what has opposite signs: of entries, and of energy."""

    entries: jax.Array
    energy: jax.Array


@jax.jit
def _signs(first: Part, second: Part) -> _Signs:
    def one(pair: tuple[Part, Part]) -> _Signs:
        deltas = [product(part.a.T, part.scale * part.b) for part in pair]
        signs = jnp.sign(deltas[0]) * jnp.sign(deltas[1])
        squares = [jnp.square(each) for each in deltas]
        energy = [jnp.sum(each, where=signs < 0) / _positive(each.sum()) for each in squares]
        return _Signs((signs < 0).sum() / _positive((signs != 0).sum()), (energy[0] + energy[1]) / 2)

    return jax.lax.map(one, (first, second))


def _positive(value: jax.Array) -> jax.Array:
    return jnp.where(value > 0, value, 1)


def _check_alike(path: str, one: Site, other: Site) -> None:
    facts = [(site.shape, site.in_axes, site.out_axes, site.batch_axes) for site in (one, other)]
    if facts[0] != facts[1]:
        raise ParameterError(
            f"{path!r} is of another kind in each adapter: shape, input, output and stacked axes are {facts[0]} in one "
            f"and {facts[1]} in the other. They were trained on different models."
        )
