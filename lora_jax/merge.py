"""Merging: adapters folded into plain parameters for the plain model, rounded once, checked, and reported on."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.by_path import NumberedUpdate, adapter_list, check_parameters, updates_by_path
from lora_jax.adapter.checksum import warn_if_moved
from lora_jax.adapter.factors import Array, is_traced, widened
from lora_jax.adapter.layers import nameless, stacked, unstack
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import Update, exact_sum, held
from lora_jax.errors import MergeError, listed
from lora_jax.paths import named_leaves, rebuild
from lora_jax.quantised.formats import FORMATS
from lora_jax.quantised.leaf import Quantised
from lora_jax.report.report import Report
from lora_jax.report.tables import Table


def merge(
    params: Any,
    adapters: Adapter | Sequence[Adapter],
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    key: Array | None = None,
    force: bool = False,
) -> Any:
    """Fold adapters into the parameters: plain parameters for the plain model.

    Every adapted parameter becomes `W + Σ delta` (with DoRA's gain on `W`), summed in float32 (or wider, if `W` is) and
    rounded once to the dtype of `W`. Works on any tree (dicts, `FrozenDict`, `nnx.State`, Equinox modules, boxed linen
    parameters), keeps types and shardings, and runs under `jax.jit`. Parameters that are `Quantised` are quantised
    again in the same way, which loses most of a small delta: merge into what they were made of, or into
    `lora_jax.dequantise(params)`, to keep it.

    There is no `unmerge`. The base is never written, so unmerging is keeping the tree you passed in. Subtracting
    the delta again, as PEFT's `unmerge_adapter` does, leaves a rounding error of up to 1e-3 of `W` in bfloat16.

    In bfloat16 a delta much smaller than `W` is mostly lost to rounding to nearest, and LoRA's often are:
    see `merge_report`. `rounding="stochastic"` keeps it in expectation; so does merging into float32 parameters. Where
    less than half of it survives, `merge` warns by name, and refuses if the parameter has 8 bits or fewer.

    Args:
      params: the base's parameters; left untouched. Leaves without an update are returned as they are.
      adapters: one adapter, or several whose deltas are added. A parameter may be trained in full by one only.
      rounding: `"nearest"`, or `"stochastic"`: up or down with probabilities that make the result unbiased. It
        differs only where the parameter is narrower than the arithmetic.
      key: `jax.random` key, required for stochastic rounding; each path draws from its own.
      force: merge into parameters of 8 bits and fewer even if less than half of a delta survives, with a warning.

    Returns:
      A tree like `params`.

    Raises:
      ParameterError: an adapter names a parameter that is missing or shaped differently, or two adapters train
        the same one in full.
      MergeError: a result is NaN or infinite, or too little survives in a narrow parameter (both checked when values
        are known, so not under `jax.jit`), or `rounding` cannot be followed.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> x, fn = jnp.ones((2, 4)), lambda params, x: x @ params["w"]
      >>> sites = lora.find_sites(fn, params, x)
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> train, fixed = lora.partition(adapter)
      >>> trained = lora.combine(jax.tree.map(lambda leaf: leaf + 0.5, train), fixed)
      >>> merged = lora.merge(params, trained)
      >>> bool(jnp.allclose(fn(merged, x), lora.adapt(fn)(params, trained, x), rtol=1e-6))
      True

    References:
      Hu et al., LoRA, arXiv 2106.09685. Gupta et al., stochastic rounding, arXiv 1502.02551.
    """
    warn_if_moved(adapter_list(adapters))
    key = _checked_key(rounding, key)
    leaves, treedef = named_leaves(params)
    merged: dict[str, Any] = {}
    kept: dict[str, Array] = {}
    for path, placed in updates_by_path(adapters, leaves).items():
        updates = [held(update) for _, update in placed]
        _check_floating(path, leaves[path], updates[0].site)
        own = None if key is None else jax.random.fold_in(key, crc32(path.encode()))
        if own is None and stacked(updates) and _in_memory(leaves[path]):
            rounded, sums = _by_layer(leaves[path], [nameless(update) for update in updates])
            merged[path] = _like(rounded, leaves[path])
        else:
            exact = exact_sum(leaves[path], updates)
            merged[path] = _rounded(path, exact, leaves[path], own)
            loses = own is None and _narrow(leaves[path]) and not is_traced(exact)
            sums = _projections(leaves[path], exact, merged[path]) if loses else None
        if sums is not None:
            kept[path] = _survival(sums, _NOISE)
    _check_finite(merged, leaves)
    _check_survival(jax.device_get(kept), leaves, force)
    return rebuild(treedef, leaves | merged)


def _rounded(path: str, exact: Array, leaf: Any, key: Array | None) -> Any:
    """The sum as the parameter holds numbers: in its dtype, or in its codes."""
    if isinstance(leaf, Quantised):
        if key is not None:
            raise MergeError(f"{path!r} is quantised ({leaf.format}), and codes are rounded to the nearest only")
        return leaf.like(exact)
    return _like(exact.astype(leaf.dtype) if key is None else round_stochastically(exact, leaf.dtype, key), leaf)


def _narrow(leaf: Any) -> bool:
    """Whether a parameter is narrower than the arithmetic of a sum."""
    return isinstance(leaf, Quantised) or leaf.dtype.itemsize < 4


def _in_memory(leaf: Any) -> bool:
    """Whether a parameter's layers are at hand one by one: arrays with contents, whole layers on each device."""
    if isinstance(leaf, Quantised) or is_traced(leaf):
        return False
    sharding = getattr(leaf, "sharding", None)
    return not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated or not any(sharding.spec[:1])


_Sums: TypeAlias = tuple[Array, Array, Array]


@jax.jit
def _by_layer(leaf: Array, updates: Sequence[Update]) -> tuple[Array, _Sums | None]:
    """Every layer of a stack with its updates, rounded: no sum of all layers is held in float32.

    With `_projections` of all of them, where rounding loses something.
    """
    parts = [unstack(update) for update in updates]

    def one(given: tuple[Array, list[list[Array]]]) -> tuple[Array, _Sums | None]:
        weight, slices = given
        exact = exact_sum(weight, [layer(own) for (_, layer), own in zip(parts, slices, strict=True)])
        rounded = exact.astype(weight.dtype)
        return rounded, _projections(weight, exact, rounded) if _narrow(leaf) else None

    rounded, sums = jax.lax.map(one, (leaf, [arrays for arrays, _ in parts]))
    return rounded, jax.tree.map(jnp.sum, sums)


def absorb(params: Any, adapter: Adapter) -> tuple[Any, Adapter]:
    """Take what is frozen in an adapter into the parameters: the residual base of PiSSA, OLoRA and their like.

    A start away from zero costs a second pair of thin products in every step. This pays for it once: the parameters
    become `W - scale·a_start·b_start`, the factors stand alone, and both together compute what they did, up to the
    rounding of the parameters' dtype (in bfloat16 about 3e-3, which is what PEFT always pays). The adapter then belongs
    to those parameters, and no longer to the base: before sharing it, save the one that it came from.

    Args:
      params: the base's parameters; left untouched.
      adapter: the adapter.

    Returns:
      New parameters, and the adapter for them.

    Raises:
      ParameterError: the adapter does not fit these parameters.
      MergeError: a parameter is quantised.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> config = lora.LoraConfig(rank=2, targets="w", init="pissa")
      >>> adapter = lora.init(jax.random.key(1), config, params, sites)
      >>> rest, factors = lora.absorb(params, adapter)
      >>> factors["w"].a_start is None, bool(jnp.allclose(lora.merge(rest, factors)["w"], params["w"], atol=1e-6))
      (True, True)

    References:
      Meng et al., PiSSA, arXiv 2404.02948.
    """
    leaves, treedef = named_leaves(params)
    check_parameters(adapter, leaves)
    small = [path for path in adapter if isinstance(leaves[path], Quantised)]
    if small:
        raise MergeError(
            f"{listed(small)}: quantised parameters cannot take in a start, which codes would lose. Keep it in the "
            "adapter, which computes the same, or absorb it before quantising"
        )
    changed = {path: update.absorbed(leaves[path]) for path, update in adapter.items()}
    rest = {path: _like(weight, leaves[path]) for path, (weight, _) in changed.items() if weight is not leaves[path]}
    return rebuild(treedef, leaves | rest), Adapter({path: update for path, (_, update) in changed.items()})


def _checked_key(rounding: str, key: Array | None) -> Array | None:
    if rounding not in ("nearest", "stochastic"):
        raise MergeError(f'rounding={rounding!r} must be "nearest" or "stochastic"')
    if rounding == "stochastic" and key is None:
        raise MergeError('rounding="stochastic" draws random numbers: pass key=jax.random.key(0), or any other key')
    return key if rounding == "stochastic" else None


def _check_floating(path: str, leaf: Any, site: Site) -> None:
    if site.codes or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise MergeError(
            f"{path!r} is {leaf.dtype}, and a delta cannot be merged into {'codes' if site.codes else 'integers'}. "
            "Dequantise the parameter to a floating-point dtype first, or keep the adapter unmerged."
        )


def round_stochastically(exact: Array, dtype: Any, key: Array) -> Array:
    """Round to one of the two neighbours in `dtype`, the nearer one with the greater probability."""
    nearest_value = exact.astype(dtype)
    if jnp.finfo(dtype).bits >= jnp.finfo(exact.dtype).bits:
        return nearest_value
    # Floats are stored as sign and magnitude, so the next magnitude up or down is the next integer.
    unsigned = jnp.dtype(f"uint{jnp.finfo(dtype).bits}")
    bits = jax.lax.bitcast_convert_type(nearest_value, unsigned)
    beyond = jnp.abs(nearest_value.astype(exact.dtype)) > jnp.abs(exact)
    inner_bits = bits - beyond.astype(unsigned)
    outer = jax.lax.bitcast_convert_type(inner_bits + jnp.ones((), unsigned), jnp.dtype(dtype))
    inner = jax.lax.bitcast_convert_type(inner_bits, jnp.dtype(dtype))
    low, high = inner.astype(exact.dtype), outer.astype(exact.dtype)
    outward = jax.random.uniform(key, exact.shape, exact.dtype) < (exact - low) / (high - low)
    return jnp.where(jnp.isfinite(nearest_value.astype(exact.dtype)), jnp.where(outward, outer, inner), nearest_value)


def _like(value: Array, leaf: Any) -> Any:
    """Give a result the container and the placement of the leaf it stands for."""
    if is_traced(value):
        return value
    if isinstance(leaf, np.ndarray):
        return np.asarray(value, leaf.dtype)
    moved = leaf.committed and value.sharding != leaf.sharding
    return jax.device_put(value, leaf.sharding) if moved else value


@jax.jit
def _all_finite(value: Any) -> Array:
    return jnp.isfinite(widened(value)).all()


def _check_finite(merged: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    known = {path: value for path, value in merged.items() if not is_traced(value)}
    finite = jax.device_get({path: _all_finite(value) for path, value in known.items()})
    bad = [path for path, fine in finite.items() if not fine]
    if not bad:
        return
    count = int((~jnp.isfinite(widened(merged[bad[0]]))).sum())
    if not bool(jnp.isfinite(widened(leaves[bad[0]])).all()):
        cause = "The base itself is NaN or infinite there: load it again."
    else:
        cause = f"Either the adapter diverged in training, or the sum overflows {leaves[bad[0]].dtype}: look at both."
    others = f" and {len(bad) - 1} more parameters ({', '.join(bad[1:4])})" if len(bad) > 1 else ""
    raise MergeError(f"Merging makes {count} NaN or infinite entries in {bad[0]!r}{others}. {cause}")


REFUSE_BELOW = 0.5
"""Share of a delta that must survive rounding, or `merge` warns; and refuses, where a parameter has few bits."""

_FEW_BITS = 8
_NOISE = 1e-6  # norm of a delta over the parameter's, below which it is rounding: that of a fresh DoRA on PiSSA


@jax.jit
def _projections(weight: Any, exact: Array, rounded: Any) -> _Sums:
    """Sums over the entries: of what is left of the delta times the delta, of its square, and of the parameter's."""
    delta, kept = exact - widened(weight), widened(rounded) - widened(weight)
    # No `vdot`: it would want an `out_sharding` on explicit meshes.
    return jnp.sum(kept * delta), jnp.sum(delta * delta), jnp.sum(jnp.square(widened(weight)))


def _survival(sums: _Sums, noise: float = 0.0) -> Array:
    """The projection of the delta that is left after rounding onto the exact one; 1 when nothing, or noise, is lost."""
    kept, delta, weight = sums
    counts = delta > noise**2 * weight
    return jnp.where(counts, kept / jnp.where(counts, delta, 1), 1)


def _check_survival(kept: Mapping[str, Any], leaves: Mapping[str, Any], force: bool) -> None:
    lost = {path: float(share) for path, share in kept.items() if share < REFUSE_BELOW}
    if not lost:
        return
    narrow = [path for path in lost if _bits(leaves[path]) <= _FEW_BITS]
    shown = listed([f"{share:.0%} at {path!r} ({spelled(leaves[path])})" for path, share in lost.items()])
    ways = 'with rounding="stochastic", or into parameters of a wider dtype: '
    ways += "jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)"
    if any(isinstance(leaves[path], Quantised) for path in lost):
        ways = "into the parameters that were quantised, or into lora_jax.dequantise(params)"
    said = f"Of the delta, rounding leaves {shown}. The unmerged model does not lose it. Merge {ways}"
    if narrow and not force:
        raise MergeError(f"{said}; or pass force=True.")
    warnings.warn(f"{said}.", stacklevel=3)


def _bits(leaf: Any) -> int:
    return FORMATS[leaf.format].bits if isinstance(leaf, Quantised) else jnp.finfo(leaf.dtype).bits


def spelled(leaf: Any) -> str:
    """How a parameter holds its numbers: its dtype, or its format of codes."""
    return leaf.format if isinstance(leaf, Quantised) else str(leaf.dtype)


WARN_BELOW = 0.9
"""Share of a delta that must survive rounding, or `merge_report` warns."""


@dataclass(frozen=True)
class MergeRow:
    """How one parameter takes a merge.

    Attributes:
      path: path of the parameter.
      dtype: its dtype, or its format if it is quantised.
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
class MergeReport(Report):
    """What `merge_report` returns: a table when printed, and its numbers as attributes.

    Attributes:
      rows: one `MergeRow` per adapted parameter.
    """

    rows: tuple[MergeRow, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Paths at which too little of the delta survives."""
        return tuple(row.path for row in self.rows if row.warns)

    def table(self) -> Table:
        """A row for every parameter, and advice where too little survives."""
        headers = ("path", "dtype", "|Δ|/|W|", "unchanged", "survives", "")
        rows = []
        for row in self.rows:
            numbers = (f"{row.relative:.2e}", f"{row.unchanged:.1%}", f"{row.survival:.3f}")
            rows.append((row.path, row.dtype, *numbers, "⚠" if row.warns else ""))
        advice = (
            f"⚠ Less than {WARN_BELOW:.0%} of the delta survives rounding to nearest at {len(self.warnings)} of "
            f'{len(self.rows)} parameters. Merge with rounding="stochastic", or into float32 parameters.'
        )
        return Table(headers, rows, notes=[advice] if self.warnings else [], words=(1,))


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
      >>> train, fixed = lora.partition(adapter)
      >>> train = jax.tree.map(lambda leaf: leaf + 1e-4, train)
      >>> report = lora.merge_report(params, lora.combine(train, fixed))
      >>> report.warnings
      ('w',)
    """
    leaves, _ = named_leaves(params)
    return MergeReport(tuple(_rows(updates_by_path(adapters, leaves), leaves)))


def _rows(found: Mapping[str, list[NumberedUpdate]], leaves: Mapping[str, Any]) -> Iterable[MergeRow]:
    for path, placed in sorted(found.items()):
        weight = widened(leaves[path])
        exact = exact_sum(weight, [update for _, update in placed])
        rounded = _rounded(path, exact, leaves[path], None)
        delta, kept = exact - weight, widened(rounded) - weight
        yield MergeRow(
            path=path,
            dtype=spelled(leaves[path]),
            relative=float(jnp.sqrt(jnp.sum(jnp.square(delta)) / jnp.sum(jnp.square(weight)))),
            unchanged=float((kept == 0).mean()),
            survival=float(_survival(_projections(leaves[path], exact, rounded))),
        )
