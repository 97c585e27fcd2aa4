"""What a composition keeps and loses at every parameter."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import jax

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.factors import Array
from lora_jax.adapter.updates import Update
from lora_jax.compose.compose import Composed, composed, effect
from lora_jax.compose.fuse import plain_factors, sizes
from lora_jax.errors import listed
from lora_jax.report.report import Report, plain_value
from lora_jax.report.tables import Table


@dataclass(frozen=True)
class ComposeRow:
    """One parameter of a composition.

    Attributes:
      path: path of the parameter.
      update: kind of update, e.g. `LowRank` or `Replace`.
      ranks: of the updates it is made of; None where there are no factors.
      rank: of what they became; likewise.
      norm: Frobenius norm of the product of the new factors; likewise.
      lost: share of the energy (squared norm) of what the method makes that the rank left no room for.
      deviation: norm of the difference to the weighted sum, over the norm of that; 0 for an exact sum.
    """

    path: str
    update: str
    ranks: tuple[int, ...] | None = None
    rank: int | None = None
    norm: float | None = None
    lost: float | None = None
    deviation: float | None = None


@dataclass(frozen=True, repr=False)
class ComposeReport(Report):
    """What `compose_report` returns: a table when printed, and its numbers as attributes.

    Attributes:
      adapter: the composition.
      rows: one `ComposeRow` per parameter.
    """

    adapter: Adapter
    rows: tuple[ComposeRow, ...]

    @property
    def worst(self) -> ComposeRow | None:
        """The row that lost most of its energy; None if nothing has factors."""
        known = [row for row in self.rows if row.lost is not None]
        return max(known, key=lambda row: row.lost or 0.0, default=None)

    def summary(self) -> Table:
        """A shorter table: parameters whose paths differ in numbers only, such as those of all layers, in one line."""
        groups: dict[str, list[ComposeRow]] = {}
        for row in self.rows:
            groups.setdefault(re.sub(r"\d+", "*", row.path), []).append(row)
        headers = ("path", "update", "parameters", "ranks", "rank", "energy lost", "at most", "off the sum")
        rows = [(path, found[0].update, str(len(found)), *_averages(found)) for path, found in groups.items()]
        return Table(headers, rows, words=(1,))

    def table(self) -> Table:
        """A row for every parameter."""
        headers = ("path", "update", "ranks", "rank", "|Δ|", "energy lost", "off the sum")
        rows = [(row.path, row.update, *_numbers(row)) for row in self.rows]
        lost = "" if self.worst is None else f"at most {self.worst.lost:.2%}"
        return Table(headers, rows, (f"{len(self.rows)} parameters", "", "", "", "", lost, ""), words=(1,))

    def as_dict(self) -> dict[str, Any]:
        """The rows, and the worst of them; the adapter itself is none."""
        return {"rows": plain_value(self.rows), "worst": plain_value(self.worst)}


def compose_report(
    adapters: Sequence[Adapter], weights: Sequence[Any] | Array | None = None, **settings: Any
) -> ComposeReport:
    """Compose adapters, and measure what was lost.

    Args:
      adapters: as for `lora_jax.compose`.
      weights: likewise.
      **settings: likewise.

    Returns:
      An object that prints as a table and holds the numbers, and the adapter as `report.adapter`.

    Raises:
      ConfigError: as `lora_jax.compose` does.
      ParameterError: likewise.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> start = lambda seed: lora.init(jax.random.key(seed), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> trained = lambda leaf: leaf + jax.random.normal(jax.random.key(2), leaf.shape)
      >>> one, other = (jax.tree.map(trained, start(seed)) for seed in range(2))
      >>> row, = lora.compose_report([one, other], method="svd", rank=3).rows
      >>> row.ranks, row.rank, row.lost < 1e-6, row.deviation < 1e-5
      ((2, 2), 3, True, True)
      >>> report = lora.compose_report([one, other], method="svd", rank=1)
      >>> report.worst.path, report.worst.lost > 0.01, report.adapter["w"].rank
      ('w', True, 1)
    """
    made = composed(adapters, weights, **settings)
    adapter = Adapter({path: each.update for path, each in made.items()})
    return ComposeReport(adapter, tuple(_row(path, each) for path, each in made.items()))


def _row(path: str, made: Composed) -> ComposeRow:
    kind = type(made.update).__name__
    if made.fused is None:
        return ComposeRow(path, kind)
    updates = [each.update for each in made.given]
    norm, total, off = map(float, sizes(made.update, updates, [effect(each) for each in made.given]))
    whole, lost = float(made.fused.whole), float(made.fused.lost)
    return ComposeRow(
        path, kind, tuple(_rank(update) for update in updates), _rank(made.update), norm,
        lost / whole if whole else 0.0, off / total if total else 0.0,
    )  # fmt: skip


def _rank(update: Update) -> int:
    return jax.eval_shape(plain_factors, update).rank


def _averages(rows: Sequence[ComposeRow]) -> list[str]:
    known = [row for row in rows if row.ranks is not None]
    if not known:
        return [""] * 5
    ranks = sorted({" + ".join(map(str, row.ranks or ())) for row in known})
    lost, off = ([getattr(row, name) or 0.0 for row in known] for name in ("lost", "deviation"))
    rank = "/".join(sorted({str(row.rank) for row in known}))
    return [listed(ranks, "/", 2), rank, f"{mean(lost):.2%}", f"{max(lost):.2%}", f"{mean(off):.2e}"]


def _numbers(row: ComposeRow) -> list[str]:
    if row.ranks is None:
        return [""] * 5
    return [
        " + ".join(map(str, row.ranks)), str(row.rank), f"{row.norm:.4g}", f"{row.lost:.2%}", f"{row.deviation:.2e}",
    ]  # fmt: skip
