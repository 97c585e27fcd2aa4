"""What an adapter holds and how much of the model it trains."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lora_jax.adapter.adapter import Adapter, leaves_by_name
from lora_jax.adapter.checksum import warn_if_moved
from lora_jax.adapter.factors import is_traced
from lora_jax.adapter.updates import Update
from lora_jax.paths import is_array
from lora_jax.quantised.leaf import Quantised, has_quantised, is_quantised
from lora_jax.report.report import Report
from lora_jax.report.tables import Table, times


@dataclass(frozen=True)
class SummaryRow:
    """One adapted parameter.

    Attributes:
      path: path of the parameter.
      update: kind of update, e.g. `LowRank` or `Replace`.
      kind: kind of site, e.g. `dense` or `conv`.
      shape: shape of the parameter.
      stacked: sizes of the axes over which the parameter is a stack of independent weights.
      rank: number of rank-one terms; None for a parameter trained in full.
      scale: the scale, or the smallest and the largest of a stack; None without one, or when it has no value yet.
      trainable: numbers that train.
      parameters: numbers the update holds, scales and what is computed from the base left out.
      nbytes: bytes of the update's arrays.
    """

    path: str
    update: str
    kind: str
    shape: tuple[int, ...]
    stacked: tuple[int, ...]
    rank: int | None
    scale: tuple[float, float] | None
    trainable: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, repr=False)
class Summary(Report):
    """What `summary` returns: a table when printed, and its numbers as attributes.

    Attributes:
      rows: one `SummaryRow` per adapted parameter, by path.
      base: numbers in the base's parameters; None if they were not given.
      stored: by format or dtype of the base's parameters how many there are, and their bytes; empty unless some are
        quantised.
    """

    rows: tuple[SummaryRow, ...]
    base: int | None = None
    stored: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def trainable(self) -> int:
        """Numbers that train."""
        return sum(row.trainable for row in self.rows)

    @property
    def parameters(self) -> int:
        """Numbers the adapter holds, scales and what is computed from the base left out."""
        return sum(row.parameters for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter's arrays."""
        return sum(row.nbytes for row in self.rows)

    @property
    def line(self) -> str | None:
        """PEFT's line, or None if the base's parameters were not given."""
        return None if self.base is None else _line(self.trainable, self.base + self.parameters)

    def table(self) -> Table:
        """A row for every parameter, totals, and PEFT's line."""
        headers = ("path", "update", "kind", "shape", "stacked", "rank", "scale", "parameters", "bytes")
        rows = []
        for row in self.rows:
            sizes = (times(row.shape), times(row.stacked), "" if row.rank is None else str(row.rank))
            numbers = (_scale(row.scale), f"{row.parameters:,d}", f"{row.nbytes:,d}")
            rows.append((row.path, row.update, row.kind, *sizes, *numbers))
        total = (f"{len(self.rows)} adapted parameters", *[""] * 6, f"{self.parameters:,d}", f"{self.nbytes:,d}")
        held = [
            f"{name} {count} parameter{'s' * (count > 1)} ({nbytes:,} bytes)"
            for name, (count, nbytes) in self.stored.items()
        ]
        notes = ([self.line] if self.line else []) + ([f"base: {', '.join(held)}"] if held else [])
        return Table(headers, rows, total, notes=notes, words=range(1, 5))


def summary(adapter: Adapter, params: Any = None) -> Summary:
    """Tabulate what an adapter holds.

    Args:
      adapter: the adapter; arrays or `jax.ShapeDtypeStruct`.
      params: the base's parameters, for the share of the model that trains.

    Returns:
      An object that prints as a table (with PEFT's line below it when `params` is given) and holds the numbers.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> info = lora.summary(adapter, params)
      >>> info.rows[0].path, info.rows[0].rank, info.trainable, info.nbytes
      ('w', 2, 14, 60)
      >>> info.line
      'trainable params: 14 || all params: 26 || trainable%: 53.8462'
    """
    warn_if_moved([adapter])
    rows = tuple(_row(path, update) for path, update in adapter.items())
    leaves = [] if params is None else jax.tree.leaves(params, is_leaf=is_quantised)
    return Summary(rows, None if params is None else _size(leaves), _stored(leaves))


def _stored(leaves: list[Any]) -> dict[str, tuple[int, int]]:
    """What the base's parameters are held as; of a base without quantised ones nothing is said."""
    found: dict[str, tuple[int, int]] = {}
    for leaf in filter(is_array, leaves if has_quantised(leaves) else []):
        name = leaf.format if isinstance(leaf, Quantised) else str(leaf.dtype)
        nbytes = leaf.nbytes if isinstance(leaf, Quantised) else leaf.size * leaf.dtype.itemsize
        count, total = found.get(name, (0, 0))
        found[name] = count + 1, total + nbytes
    return found


def trainable_line(adapter: Adapter, params: Any) -> str:
    """PEFT's line on how much trains: `trainable params: ... || all params: ... || trainable%: ...`.

    As in PEFT, `all params` counts the base and the adapter, so a parameter trained in full counts twice. Scales
    are no parameters.

    Args:
      adapter: the adapter; arrays or `jax.ShapeDtypeStruct`.
      params: the base's parameters.

    Returns:
      The line, as `PeftModel.print_trainable_parameters` prints it.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> print(lora.trainable_line(adapter, params))
      trainable params: 14 || all params: 26 || trainable%: 53.8462
    """
    info = summary(adapter, params)
    return _line(info.trainable, info.parameters + (info.base or 0))


def _line(trainable: int, total: int) -> str:
    share = 100 * trainable / total if total else 0.0
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"


def _row(path: str, update: Update) -> SummaryRow:
    leaves = jax.tree.leaves(update)
    marked = zip(leaves, jax.tree.leaves(update.trains()), strict=True)
    scale: Any = getattr(update, "scale", None)
    return SummaryRow(
        path=path,
        update=type(update).__name__,
        kind=update.site.kind,
        shape=update.site.shape,
        stacked=update.site.batch_shape,
        rank=getattr(update, "rank", None),
        scale=_extremes(scale),
        trainable=_size([leaf for leaf, trains in marked if trains]),
        parameters=_size([leaf for name, leaf in leaves_by_name(update) if name not in update.notes]),
        nbytes=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
    )


def _extremes(scale: Any) -> tuple[float, float] | None:
    if scale is None or isinstance(scale, jax.ShapeDtypeStruct) or is_traced(scale):
        return None
    values = np.asarray(scale, np.float64)
    return float(values.min()), float(values.max())


def _size(leaves: list[Any]) -> int:
    return sum(leaf.size for leaf in leaves if is_array(leaf))


def _scale(scale: tuple[float, float] | None) -> str:
    if scale is None:
        return ""
    low, high = scale
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
