"""Singular values of what an adapter adds, and what follows from them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.by_path import check_parameters
from lora_jax.adapter.factors import Array, matrices, widened
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, Update, exact_sum
from lora_jax.analysis.pictures import draw_spectra
from lora_jax.analysis.rows import Row, decomposed, number, remark, short_table, why_without_factors
from lora_jax.compose.factors import gathered
from lora_jax.paths import named_leaves
from lora_jax.report.report import Report
from lora_jax.report.tables import Table


@dataclass(frozen=True, eq=False)
class SpectrumRow(Row):
    """The update of one linear map, or of a whole parameter where it has no factors.

    Attributes:
      path: path of the parameter.
      entry: its place along the stacked axes.
      update: kind of update, e.g. `LowRank`.
      values: singular values of `ΔW`, scale included, descending; those that are nothing but rounding are zero. None
        without factors.
      relative: `|ΔW| / |W|`, Frobenius norms; None without the base. Of DoRA, gains and what is trained in full it is
        that of the whole change.
      note: what the values do not tell; empty if nothing.
    """

    update: str
    values: np.ndarray | None = None
    relative: float | None = None
    note: str = ""

    @property
    def rank(self) -> int | None:
        """Number of singular values that are not zero; at most the rank the factors have room for."""
        return None if self.values is None else int(np.count_nonzero(self.values))

    @property
    def effective_rank(self) -> float | None:
        """`exp` of the entropy of the values as shares of their sum: how many directions there are, small ones less."""
        if self.values is None or not self.rank:
            return None if self.values is None else 0.0
        shares = self.values[self.values > 0] / self.values.sum()
        return float(np.exp(-np.sum(shares * np.log(shares))))

    @property
    def stable_rank(self) -> float | None:
        """Squared Frobenius norm over squared spectral norm: how many directions share most of the energy."""
        if self.values is None or not self.rank:
            return None if self.values is None else 0.0
        return float(np.sum(np.square(self.values / self.values[0])))

    @property
    def spectral(self) -> float | None:
        """Spectral norm of `ΔW`: its largest singular value."""
        return None if self.values is None else float(self.values.max(initial=0))

    @property
    def norm(self) -> float | None:
        """Frobenius norm of `ΔW`."""
        return None if self.values is None else float(np.linalg.norm(self.values))


@dataclass(frozen=True, repr=False, eq=False)
class Spectra(Report):
    """What `spectra` returns: a table when printed, a picture, and its numbers as attributes.

    Attributes:
      rows: a `SpectrumRow` per linear map, and per parameter without factors.
    """

    rows: tuple[SpectrumRow, ...]

    def noted(self, notes: Mapping[str, str]) -> "Spectra":
        """The same with notes by path; for one that has no row, a row with the note alone."""
        rows = [replace(row, note=notes.get(row.path, row.note)) for row in self.rows]
        missing = notes.keys() - {row.path for row in rows}
        return Spectra((*rows, *(SpectrumRow(path, (), "", note=notes[path]) for path in sorted(missing))))

    def summary(self) -> Table:
        """A shorter table: all layers of a parameter in one line, with the mean and the range of each number."""
        columns = {
            "rank": lambda row: row.rank,
            "effective rank": lambda row: row.effective_rank,
            "|ΔW|": lambda row: row.norm,
            "|ΔW|/|W|": lambda row: row.relative,
        }
        if all(row.relative is None for row in self.rows):
            del columns["|ΔW|/|W|"]
        spelled = dict.fromkeys(columns, ".3g") | {"effective rank": ".2f"}
        return short_table(self.rows, columns, spelled, lambda row: row.note)

    def plot(self, path: str | PathLike[str], title: str = "Updates of an adapter") -> None:
        """Write a PNG: effective rank and size by parameter and layer, and all singular values.

        Args:
          path: the file; one that exists is replaced.
          title: what the adapter is.

        Raises:
          ParameterError: nothing has factors, so that there is nothing to draw.
          ImportError: matplotlib is not installed.
        """
        draw_spectra(path, title, self.rows)

    def table(self) -> Table:
        """A row for every linear map, and for every parameter without factors."""
        based = any(row.relative is not None for row in self.rows)
        noted = any(row.note for row in self.rows)
        headers = ("parameter", "update", "rank", "effective", "stable", "σ₁", "|ΔW|", *["|ΔW|/|W|"] * based)
        rows = []
        for row in self.rows:
            rank = "" if row.values is None else f"{row.rank} of {len(row.values)}"
            ranks = (rank, number(row.effective_rank, ".2f"), number(row.stable_rank, ".2f"))
            sizes = (number(row.spectral, ".3g"), number(row.norm, ".3g"))
            more = [number(row.relative, ".2e")] * based + [row.note] * noted
            rows.append((row.name, row.update, *ranks, *sizes, *more))
        return Table((*headers, *[""] * noted), rows, words=[1, *[len(headers)] * noted])


def spectra(adapter: Adapter, params: Any = None) -> Spectra:
    """Singular values of every update of an adapter, its ranks, and its size.

    They come from a QR of the factors and a decomposition of the rank's size, so no array of the weight's size is
    formed; layers and experts of a stack have a row each. Scales are in them, and starts of PiSSA and OLoRA are taken
    off. Of DoRA it is the factors inside of its norm that are analysed, which a note says; `relative` is that of the
    whole change. Parameters and rows trained in full, and biases, have no factors: one row each, which says so.

    Args:
      adapter: what to look at.
      params: the base's parameters, for `|ΔW|/|W|`.

    Returns:
      An object that prints as a table, writes a picture (`.plot(path)`) and holds the numbers.

    Raises:
      ParameterError: the adapter does not fit these parameters, or is a stack of adapters.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((3, 8, 4))}  # three layers
      >>> fn = lambda params, x: jax.lax.scan(lambda x, w: (x @ w @ w.T, None), x, params["w"])[0]
      >>> sites = lora.find_sites(fn, params, jnp.ones((2, 8)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> report = lora.analysis.spectra(jax.tree.map(lambda leaf: leaf + 0.1, adapter), params)
      >>> [(row.name, row.rank, row.values.shape) for row in report.rows]
      [('w[0]', 1, (2,)), ('w[1]', 1, (2,)), ('w[2]', 1, (2,))]
      >>> all(row.effective_rank == 1.0 and 0 < row.relative < 1 for row in report.rows)
      True

    References:
      Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    leaves = {} if params is None else named_leaves(params)[0]
    if params is not None:
        check_parameters(adapter, leaves)
    whole = gathered(adapter)
    return Spectra(tuple(row for path, update in whole.items() for row in _rows(path, update, leaves.get(path))))


def _rows(path: str, update: Update, weight: Any) -> Iterator[SpectrumRow]:
    kind, why = type(update).__name__, why_without_factors(update)
    known = None if weight is None else gathered(jnp.asarray(weight))
    if why is not None:
        yield SpectrumRow(path, (), kind, None, _whole_change(update, known), why)
        return
    changes = None if known is None or _is_its_factors(update) else _changes(update, known)
    sizes = None if known is None else _sizes(update.site, known)
    for i, (entry, found) in enumerate(decomposed(path, update)):
        change = np.linalg.norm(found.values) if changes is None else changes[i]
        relative = None if sizes is None else _ratio(float(change), float(sizes[i]))
        yield SpectrumRow(path, entry, kind, found.values, relative, remark(update))


def _is_its_factors(update: Update) -> bool:
    """Whether an update adds what its factors do, and nothing else."""
    return not update.reads_base or (isinstance(update, LowRank) and not remark(update))


def _sizes(site: Site, value: Array) -> np.ndarray:
    """The norm of every linear map of a site."""
    return np.asarray(jnp.linalg.norm(matrices(site, widened(value)), axis=(1, 2)))


def _changes(update: Update, weight: Array) -> np.ndarray:
    return _sizes(update.site, exact_sum(weight, [update]) - widened(weight))


def _whole_change(update: Update, weight: Array | None) -> float | None:
    if weight is None:
        return None
    change = exact_sum(weight, [update]) - widened(weight)
    return _ratio(*(float(jnp.linalg.norm(each.ravel())) for each in (change, widened(weight))))


def _ratio(change: float, size: float) -> float:
    return change / size if size else (float("inf") if change else 0.0)
