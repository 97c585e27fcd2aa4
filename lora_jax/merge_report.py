"""How much of a merge survives the dtype of the base."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from rich.console import Group
from rich.table import Table

from lora_jax.adapter import Adapter
from lora_jax.fit import Placed, fit
from lora_jax.paths import named_leaves
from lora_jax.site import render
from lora_jax.updates import exact_sum, widened

WARN_BELOW = 0.9
"""Share of a delta that must survive rounding, or `merge_report` warns."""


@dataclass(frozen=True)
class MergeRow:
    """How one parameter takes a merge.

    Attributes:
      path: path of the parameter.
      dtype: its dtype.
      relative: norm of the delta over norm of the parameter.
      unchanged: share of the entries that rounding to nearest leaves as they were.
      survival: projection of the delta that is left after rounding onto the exact one; 1 when nothing is lost.
    """

    path: str
    dtype: str
    relative: float
    unchanged: float
    survival: float

    @property
    def warns(self) -> bool:
        """Whether too little survives."""
        return not self.survival >= WARN_BELOW


@dataclass(frozen=True, repr=False)
class MergeReport:
    """What `merge_report` returns: a table when printed, and its numbers as attributes.

    Attributes:
      rows: one `MergeRow` per adapted parameter.
    """

    rows: tuple[MergeRow, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Paths at which too little of the delta survives."""
        return tuple(row.path for row in self.rows if row.warns)

    def __rich__(self) -> Group:
        table = Table("path", "dtype", "|Δ|/|W|", "unchanged", "survives", "")
        for row in self.rows:
            numbers = (f"{row.relative:.2e}", f"{row.unchanged:.1%}", f"{row.survival:.3f}")
            table.add_row(row.path, row.dtype, *numbers, "⚠" if row.warns else "")
        advice = (
            f"⚠ Less than {WARN_BELOW:.0%} of the delta survives rounding to nearest at {len(self.warnings)} of "
            f'{len(self.rows)} parameters. Merge with rounding="stochastic", or into float32 parameters.'
        )
        return Group(table, advice) if self.warnings else Group(table)

    def __repr__(self) -> str:
        return render(self)


def merge_report(params: Any, adapters: Adapter | Sequence[Adapter]) -> MergeReport:
    """Measure how much of each delta a merge with rounding to nearest would keep.

    A bfloat16 number holds 8 significant bits, so a delta below 1/1000 of the parameter vanishes in most entries.
    The unmerged model does not lose it: there the delta meets activations, not weights. PEFT merges without a word.

    Args:
      params: the base's parameters.
      adapters: one adapter, or several whose deltas are added.

    Returns:
      An object that prints as a table and holds the numbers; `report.warnings` lists the paths at which less than
      0.9 of the delta survives.

    Raises:
      ParameterError: an adapter does not fit these parameters.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3), jnp.bfloat16)}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4), jnp.bfloat16))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> report = lora.merge_report(params, jax.tree.map(lambda leaf: leaf + 1e-4, adapter))
      >>> report.warnings
      ('w',)
    """
    leaves, _ = named_leaves(params)
    return MergeReport(tuple(_rows(fit(adapters, leaves), leaves)))


def _rows(found: Mapping[str, list[Placed]], leaves: Mapping[str, Any]) -> Iterable[MergeRow]:
    for path, placed in sorted(found.items()):
        weight, dtype = widened(leaves[path]), leaves[path].dtype
        exact = exact_sum(weight, [update for _, update in placed])
        delta, kept = exact - weight, widened(exact.astype(dtype)) - weight
        size = float(jnp.vdot(delta, delta))
        yield MergeRow(
            path=path,
            dtype=str(dtype),
            relative=float(jnp.linalg.norm(delta.ravel()) / jnp.linalg.norm(weight.ravel())),
            unchanged=float((kept == 0).mean()),
            survival=float(jnp.vdot(kept, delta)) / size if size else 1.0,
        )
