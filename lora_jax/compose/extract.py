"""The adapter nearest to a full fine-tune: a truncated singular value decomposition of every parameter's difference."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import svd
from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.by_path import check_parameters
from lora_jax.adapter.factors import Array, matrices, widened
from lora_jax.adapter.site import Site, Sites, full_site
from lora_jax.adapter.updates import LowRank, Replace
from lora_jax.config.config import LoraConfig
from lora_jax.config.selection import select
from lora_jax.errors import ConfigError, ParameterError, nearest
from lora_jax.paths import is_array, named_leaves
from lora_jax.report.report import Report
from lora_jax.report.tables import Table

ITERATIONS = 4
"""Of the subspace iteration, where a matrix is so large that only its first singular triplets are computed."""

_NOISE = 1e-6
"""What singular values of float32 matrices may be, relative to the largest, where there is nothing but rounding."""


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """How many singular values are kept: as few as `energy` and `error` allow, and no more than `rank`.

    Attributes:
      rank: the most terms of one weight.
      energy: the share of the squared norm of a difference to keep.
      error: the largest norm of what is left out, over the norm of the difference.

    Raises:
      ConfigError: none is given, or one is out of range.

    Example:
      >>> Truncation(energy=0.9).count(np.array([3.0, 0.5, 0.1]))
      1
      >>> Truncation(error=0.1).count(np.array([3.0, 0.5, 0.1]))
      2
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be kept."""
        if self.rank is None and self.energy is None and self.error is None:
            raise ConfigError("extract needs rank=, energy= or error= to know how much to keep")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank={self.rank!r} must be at least 1")
        for name in ("energy", "error"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name}={value!r} must be above 0 and at most 1")

    def count(self, values: np.ndarray) -> int:
        """How many of the singular values of one matrix, in descending order, are kept."""
        squares = np.square(values.astype(np.float64))
        left = np.append(squares[::-1].cumsum()[::-1], 0)  # squared error after each number of terms
        allowed = [np.inf if bound is None else bound * left[0] for bound in self._bounds()]
        needed = int(np.argmax(left <= min(allowed) + 1e-12 * left[0])) if min(allowed) < np.inf else len(values)
        return min(needed, len(values) if self.rank is None else self.rank, int((values > _NOISE * values[0]).sum()))

    def _bounds(self) -> tuple[float | None, float | None]:
        return None if self.energy is None else 1 - self.energy, None if self.error is None else self.error**2

    def triplets(self, matrix: Array) -> svd.Triplets:
        """The singular triplets to choose from: all, or the first ones of a large matrix if `rank` alone decides."""
        most = min(matrix.shape)
        few = self.rank if self.energy is None and self.error is None else None
        if few is not None and 4 * (few + svd.OVERSAMPLING) < most:
            return svd.randomised(jax.random.key(0), matrix, few, ITERATIONS)
        return svd.exact(matrix, most)


def extract(
    base: Any,
    tuned: Any,
    sites: Sites,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    targets: str | Collection[str] | None = None,
    train: str | Collection[str] = (),
    bias: Literal["none", "all"] = "none",
) -> Adapter:
    """Make the adapter of a model that was fine-tuned in full: at every site, the nearest update of low rank.

    The difference of each parameter is cut after its strongest singular values, which no other update of that rank
    comes closer to. `extract_report` says what is lost. It is what `lora-jax extract` does on checkpoints, without a
    model.

    Args:
      base: the parameters before fine-tuning.
      tuned: the same tree afterwards.
      sites: from `find_sites`.
      rank: the most terms at a site; in a stack, of each layer or expert.
      energy: the share of the squared norm of a difference to keep, with as few terms as that takes.
      error: the largest norm of what is left out, over that of the difference, likewise.
      targets: as in `LoraConfig`; by default every site, look-up tables and heads too.
      train: names of parameters or modules to take over in full, as in `LoraConfig.train`: embeddings, norms.
      bias: `"all"` takes over the biases in full.

    Returns:
      An adapter for `base`, with a scale of one. Parameters that do not differ have no update.

    Raises:
      ConfigError: nothing says how much to keep, or it is out of range.
      MatchError: a name hits nothing.
      ParameterError: the trees do not fit, or do not differ.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.ones((6, 5)), "norm": jnp.ones(6)}
      >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
      >>> sites = lora.find_sites(fn, base, jnp.ones((2, 6)))
      >>> tuned = {"w": base["w"] + jnp.outer(jnp.arange(6.0), jnp.arange(5.0)), "norm": base["norm"] * 2}
      >>> adapter = lora.extract(base, tuned, sites, rank=4, train="norm")
      >>> list(adapter), adapter["w"].rank
      (['norm', 'w'], 1)
      >>> bool(jnp.allclose(lora.merge(base, adapter)["w"], tuned["w"], atol=1e-4))
      True
    """
    cut = Truncation(rank=rank, energy=energy, error=error)
    before, after = _leaves(base, tuned)
    config = LoraConfig(targets=tuple(sites) if targets is None else targets, train=train, bias=bias)
    chosen = select(config, sites)
    full = [path for path in chosen.train if jnp.issubdtype(after[path].dtype, jnp.inexact)]
    updates: dict[str, Any] = {
        path: Replace(jnp.array(after[path]), sites.get(path) or full_site(path, after[path]))
        for path in full
        if _differs(before[path], after[path])
    }
    for site in chosen.sites:
        if _differs(before[site.path], after[site.path]):
            updates[site.path] = _low_rank(site, widened(after[site.path]) - widened(before[site.path]), cut)
    if not updates:
        raise ParameterError("base and tuned do not differ at any targeted parameter: there is nothing to extract")
    return Adapter(updates)


def _leaves(base: Any, tuned: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    before, after = named_leaves(base)[0], named_leaves(tuned)[0]
    for path, leaf in before.items():
        other = after.get(path)
        if other is None:
            raise ParameterError(f"tuned has no {path!r}; nearest: {nearest(path, after)}")
        if is_array(leaf) and jnp.shape(leaf) != jnp.shape(other):
            raise ParameterError(f"{path!r} is {jnp.shape(leaf)} in base and {jnp.shape(other)} in tuned")
    return before, after


def _differs(before: Any, after: Any) -> bool:
    return bool((jnp.asarray(before) != jnp.asarray(after)).any())


def _low_rank(site: Site, difference: Array, cut: Truncation) -> LowRank:
    found = [cut.triplets(matrix) for matrix in matrices(site, difference)]
    counts = [max(1, cut.count(np.asarray(each.values))) for each in found]
    rank = max(counts)
    pairs = [halves(each, count, rank) for each, count in zip(found, counts, strict=True)]
    a, b = (jnp.stack(each) for each in zip(*pairs, strict=True))
    one = jnp.ones(site.batch_shape, jnp.float32)
    return LowRank(a.reshape(site.a_shape(rank)), b.reshape(site.b_shape(rank)), one, site)


def halves(found: svd.Triplets, count: int, rank: int) -> tuple[Array, Array]:
    """The first `count` terms as two factors, each with a root of the values, and zeros up to `rank`."""
    root = jnp.sqrt(found.values[:count])[:, None]
    padding = ((0, rank - count), (0, 0))
    return jnp.pad(found.left[:count] * root, padding), jnp.pad(found.right[:count] * root, padding)


@dataclass(frozen=True)
class ExtractRow:
    """What became of one parameter that differs.

    Attributes:
      path: path of the parameter, or its name in a checkpoint.
      form: `low rank`, `full`, or `left out`.
      rank: of the update; None without one.
      relative: norm of the difference over the norm of the parameter before.
      lost: norm of what the adapter leaves out over the norm of the difference.
    """

    path: str
    form: str
    rank: int | None
    relative: float
    lost: float


@dataclass(frozen=True, repr=False)
class ExtractReport(Report):
    """What an extracted adapter loses: a table when printed, and its numbers as attributes.

    Attributes:
      rows: one for every parameter that differs.
    """

    rows: tuple[ExtractRow, ...]

    @property
    def left_out(self) -> tuple[str, ...]:
        """Parameters that differ and have no update."""
        return tuple(row.path for row in self.rows if row.form == "left out")

    def table(self) -> Table:
        """A row for every parameter that differs, and advice on those that are left out."""
        headers = ("path", "form", "rank", "|Δ|/|W|", "lost")
        rows = [
            (row.path, row.form, "" if row.rank is None else str(row.rank), f"{row.relative:.2e}", f"{row.lost:.1%}")
            for row in self.rows
        ]
        advice = f"{len(self.left_out)} parameters differ and are left out: name them in train=, or bias='all'."
        return Table(headers, rows, notes=[advice] if self.left_out else [], words=(1,))


def extract_report(base: Any, tuned: Any, adapter: Adapter) -> ExtractReport:
    """Say what an adapter leaves out of a full fine-tune, parameter by parameter.

    Args:
      base: the parameters before fine-tuning.
      tuned: the same tree afterwards.
      adapter: from `extract`, or any other for `base`.

    Returns:
      An object that prints as a table and holds the numbers.

    Raises:
      ParameterError: the trees do not fit each other, or the adapter them.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}
      >>> fn = lambda p, x: x @ p["w"] + p["bias"]
      >>> sites = lora.find_sites(fn, base, jnp.ones(3))
      >>> tuned = {"w": jnp.diag(jnp.float32([4, 3, 0])), "bias": jnp.ones(3)}
      >>> report = lora.extract_report(base, tuned, lora.extract(base, tuned, sites, rank=1))
      >>> [(row.path, row.form, round(row.lost, 3)) for row in report.rows]
      [('bias', 'left out', 1.0), ('w', 'low rank', 0.6)]
    """
    before, after = _leaves(base, tuned)
    check_parameters(adapter, before)
    return ExtractReport(tuple(sorted(_rows(before, after, adapter), key=lambda row: row.path)))


def _rows(before: dict[str, Any], after: dict[str, Any], adapter: Adapter) -> Iterable[ExtractRow]:
    for path, leaf in before.items():
        if not is_array(leaf) or not _differs(leaf, after[path]):
            continue
        weight, wanted = widened(leaf), widened(after[path])
        update = adapter.get(path)
        made = weight if update is None else update.applied(weight)
        form = "left out" if update is None else "low rank" if isinstance(update, LowRank) else "full"
        yield row(path, form, getattr(update, "rank", None), weight, wanted - weight, made - weight)


def row(path: str, form: str, rank: int | None, weight: Any, difference: Any, made: Any) -> ExtractRow:
    """The row of one parameter from its value, its difference and what the adapter makes of that."""
    size, whole = float(jnp.linalg.norm(difference.ravel())), float(jnp.linalg.norm(weight.ravel()))
    lost = float(jnp.linalg.norm((difference - made).ravel()))
    return ExtractRow(path, form, rank, size / whole if whole else float("inf"), lost / size if size else 0.0)
