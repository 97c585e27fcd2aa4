"""Composing adapters, as PEFT's `add_weighted_adapter` does: one of several, and a report on what is lost."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.by_path import adapter_list, check_parameters
from lora_jax.adapter.factors import Array, times, widened
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, Replace, Update
from lora_jax.compose import full as whole
from lora_jax.compose.factors import Fused, Options, gathered, has_factors, plain_factors, sizes
from lora_jax.compose.full import Blend, Weighted
from lora_jax.compose.methods import METHODS, checked, fused, weighed
from lora_jax.errors import ConfigError, ParameterError, listed
from lora_jax.methods import Dora, Gained, Rows, Shift
from lora_jax.paths import named_leaves
from lora_jax.report.report import Report, plain_value
from lora_jax.report.tables import Table


class Composed(NamedTuple):
    """One parameter of a composition.

    Attributes:
      update: what the new adapter holds.
      given: the updates it is made of, with their weights.
      fused: its factors, and the energy that was lost; None where there are no factors.
    """

    update: Update
    given: Sequence[Weighted]
    fused: Fused | None


def compose(
    adapters: Sequence[Adapter],
    weights: Sequence[Any] | Array | None = None,
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str | None = None,
    key: Array | None = None,
    params: Any = None,
) -> Adapter:
    """Make one adapter out of several.

    Adapters may have different ranks, targets and methods; whatever has low-rank factors takes part with them. Nothing
    is ever left out: what cannot be composed is refused by its path. Nothing given is written, and the base is not
    needed.

    | `method` | what becomes of the factors at each parameter | rank |
    |---|---|---|
    | `cat` | all terms: the weighted sum, exactly | sum of the ranks |
    | `svd`, `linear` | the nearest factors to the weighted sum | the largest |
    | `slerp` | the same of two adapters, along the circle through both | the largest |
    | `rank_one` | the strongest singular terms of all adapters, unchanged | half of the sum |
    | `block` | the strongest adapters, whole | half of the sum |
    | `ties`, `dare_linear`, `dare_ties`, `magnitude_prune` | A and B, each entry by entry, as in PEFT | the largest |
    | the same with `_svd` | the updates entry by entry, and the nearest factors to that | the largest |
    | `knots` | `ties` in a basis that all updates share, and the nearest factors to that | the largest |
    | `peft_linear` | PEFT's `linear`: sums of A and of B, whose product has cross terms | the largest |

    Parameters trained in full, rows and DoRA's magnitudes are composed by their difference to the base's, and additions
    to biases as they are: `ties`, `dare`, `magnitude_prune`, `knots` and `slerp` treat them as they treat factors, all
    others add them up. DoRA's factors are composed inside of its norm, and what `lora_jax.scale` made of one counts as
    its weight; `lora_jax.methods.precompute` takes the norm out first, for a sum of what the adapters do, and so that
    DoRA goes together with other methods.

    Differs from PEFT's `add_weighted_adapter`: ranks need not be equal, `linear` is a sum without cross terms, scales
    (of rsLoRA too) count once, starting factors of PiSSA and OLoRA are taken off and the base stays as it is, and
    nothing is dropped.

    Args:
      adapters: what to compose; two of them for `slerp`.
      weights: a factor for the effect of each; negative ones subtract. By default 1, and halves for `slerp`, whose
        weights add up to one. May be traced, and differentiated.
      method: what to do; see the table.
      rank: of the result at most; not for `cat`. By default as in the table.
      density: for `ties`, `dare`, `magnitude_prune` and `knots`: the share of entries that is kept, above 0, at most 1.
      majority_sign: for those that elect signs: `"total"` (the default), the sign of the sum, or `"frequency"`, the
        sign of most. As in PEFT, weights do not vote.
      key: `jax.random` key, required by `dare`.
      params: the base's parameters, needed where a parameter or a row is trained in full and its weights do not add up
        to one.

    Returns:
      A new adapter with factors in float32 and scales of one. Its dropout rate is that of all given factors, or zero if
      they differ. On a mesh with explicit axes it is whole on every device.

    Raises:
      ConfigError: the method, its settings or the weights cannot be used.
      ParameterError: updates of one parameter cannot be composed; the message names it.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> start = lambda seed: lora.init(jax.random.key(seed), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> one, other = (jax.tree.map(lambda leaf: leaf + 0.1, start(seed)) for seed in range(2))
      >>> exact = lora.compose([one, other], [1.0, -0.5])["w"]
      >>> exact.rank, bool(jnp.allclose(exact.delta(), one["w"].delta() - 0.5 * other["w"].delta(), atol=1e-6))
      (4, True)
      >>> lora.compose([one, other], method="svd", rank=2)["w"].rank
      2

    References:
      Yadav et al., TIES-Merging, arXiv 2306.01708. Yu et al., DARE, arXiv 2311.03099. Stoica et al., KnOTS, arXiv
      2410.19735.
    """
    made = composed(
        adapters, weights, method=method, rank=rank, density=density, majority_sign=majority_sign, key=key,
        params=params,
    )  # fmt: skip
    return Adapter({path: each.update for path, each in made.items()})


def composed(
    adapters: Sequence[Adapter],
    weights: Sequence[Any] | Array | None = None,
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str | None = None,
    key: Array | None = None,
    params: Any = None,
) -> dict[str, Composed]:
    """What `compose` makes, by path, with what it is made of."""
    given = adapter_list(adapters)
    options = checked(method, rank, density, majority_sign, key)
    counted = weighed(len(given), weights, METHODS.find(method))
    leaves = {} if params is None else named_leaves(params)[0]
    for adapter in given if leaves else ():
        check_parameters(adapter, leaves)
    composer = _Composer(method, options, leaves, _dropout(given))
    found: dict[str, list[Weighted]] = {}
    for adapter, (weight, known) in zip(given, counted, strict=True):
        for path, update in gathered(adapter).items():
            found.setdefault(path, []).append(Weighted(update, weight, known))
    return {
        path: composer.compose(path, held, None if key is None else jax.random.fold_in(key, crc32(path.encode())))
        for path, held in sorted(found.items())
    }


class _Composer:
    """How every parameter of one composition is composed."""

    def __init__(self, name: str, options: Options, base: Mapping[str, Any], dropout: float):
        self.name, self.options, self.base, self.dropout = name, options, base, dropout
        self.method = METHODS.find(name)

    def compose(self, path: str, held: Sequence[Weighted], key: Array | None) -> Composed:
        """The composition at one parameter."""
        _check_site(path, held)
        blend = Blend(self.method, self.options, key, self.base)
        kinds = {_kind(path, each.update) for each in held}
        if kinds in ({LowRank}, {Gained}, {LowRank, Gained}):
            return self._factors(path, held, blend)
        if len(kinds) > 1:
            raise _incompatible(path, held, kinds)
        (kind,) = kinds
        if kind is Dora:
            return self._dora(path, held, blend)
        makers = {Shift: whole.shift, Replace: whole.replace, Rows: whole.rows}
        return Composed(makers[kind](path, held, blend), held, None)

    def _fused(self, path: str, held: Sequence[Weighted], key: Array | None) -> Fused:
        try:
            return fused(self.name, self.options, [each.update for each in held], [effect(each) for each in held], key)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def _factors(self, path: str, held: Sequence[Weighted], blend: Blend) -> Composed:
        found, site = self._fused(path, held, blend.key), held[0].update.site
        gains = [each.update.gain - 1 for each in held if isinstance(each.update, Gained)]
        if not gains:
            return Composed(LowRank(found.a, found.b, _ones(site), site, self.dropout), held, found)
        none = jnp.zeros_like(gains[0])
        given = [each.update.gain - 1 if isinstance(each.update, Gained) else none for each in held]
        gain = 1 + blend.changes(given, held, site.batch_shape)
        return Composed(Gained(found.a, found.b, gain, site, self.dropout), held, found)

    def _dora(self, path: str, held: Sequence[Weighted], blend: Blend) -> Composed:
        """Factors and magnitudes, each by their own differences: with weights of zero, the base."""
        updates: list[Dora] = [each.update for each in held]
        found, site = self._fused(path, held, blend.key), updates[0].site
        squares = updates[0].base_squares
        size = jnp.sqrt(squares)
        given = [times(update.strength, widened(update.magnitude) - size) for update in updates]
        magnitude = size + blend.changes(given, held, site.batch_shape)
        new = Dora(
            found.a, found.b, _ones(site), site, self.dropout,
            magnitude=magnitude, base_squares=squares, strength=_ones(site),
        )  # fmt: skip
        return Composed(new, held, found)


def effect(held: Weighted) -> Array:
    """The weight of an update's factors: of DoRA times its strength, which is what `lora_jax.scale` multiplies."""
    return held.weight * held.update.strength if isinstance(held.update, Dora) else held.weight


def _ones(site: Site) -> Array:
    return jnp.ones(site.batch_shape, jnp.float32)


def _kind(path: str, update: Update) -> type[Update]:
    if update.waits:
        raise ParameterError(f"{path!r} cannot be composed: it has {update.waits}")
    for kind in (Dora, Gained, Shift, Replace, Rows):
        if isinstance(update, kind):
            return kind
    if not has_factors(update):
        raise ParameterError(
            f"{path!r} has a {type(update).__name__}, which has no low-rank factors to compose. Leave it out with "
            f"adapter.without({path!r}), or give the class a low_rank()."
        )
    return LowRank


def _incompatible(path: str, held: Sequence[Weighted], kinds: set[type[Update]]) -> ParameterError:
    names = ", ".join(type(each.update).__name__ for each in held)
    hint = " lora_jax.methods.precompute(params, adapter) takes DoRA's norm out." if Dora in kinds else ""
    return ParameterError(
        f"{path!r} has updates of different kinds ({names}), which cannot become one.{hint} Otherwise leave it out of "
        f"some of the adapters: adapter.without({path!r})"
    )


def _check_site(path: str, held: Sequence[Weighted]) -> None:
    facts = [
        (each.update.site.shape, each.update.site.in_axes, each.update.site.out_axes, each.update.site.batch_axes)
        for each in held
    ]
    for other in facts[1:]:
        if other != facts[0]:
            raise ParameterError(
                f"{path!r} is of another kind in each adapter: shape, input, output and stacked axes are {facts[0]} in "
                f"one and {other} in another. They were trained on different models."
            )


def _dropout(adapters: Sequence[Adapter]) -> float:
    """The rate that all factors share, or none."""
    rates = {update.dropout for adapter in adapters for update in adapter.values() if hasattr(update, "a")}
    return rates.pop() if len(rates) == 1 else 0.0


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
