"""Starting an adapter: `init`, and one module per family of initialisers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.factors import matrices, over, whole, widened
from lora_jax.adapter.registry import METHODS, Data, Entry, Initialiser, Start, find_init, initialisers, register
from lora_jax.adapter.site import Site, Sites, full_site
from lora_jax.adapter.updates import Replace, Update
from lora_jax.capture.captured import statistic_for
from lora_jax.config import parts as part_columns
from lora_jax.config.checks import as_tuple
from lora_jax.config.config import LoraConfig
from lora_jax.config.selection import select
from lora_jax.config.state import state_paths
from lora_jax.dtypes import promoted
from lora_jax.errors import ConfigError, ParameterError, nearest
from lora_jax.init.corda import corda
from lora_jax.init.eva import eva
from lora_jax.init.loftq import loftq
from lora_jax.init.lora_ga import lora_ga
from lora_jax.init.olora import olora
from lora_jax.init.pissa import milora, pissa, pissa_niter
from lora_jax.init.random import default, gaussian, orthogonal
from lora_jax.methods.lora_bias import Shift
from lora_jax.methods.parts import Part, Parts
from lora_jax.methods.trainable_tokens import Rows, rows_of
from lora_jax.paths import is_array, named_leaves

__all__ = [
    "Initialiser", "corda", "default", "eva", "gaussian", "init", "initialisers", "loftq", "lora_ga", "milora", "olora",
    "orthogonal", "pissa", "pissa_niter", "register",
]  # fmt: skip


def init(key: Any, config: LoraConfig, params: Any, sites: Sites, captured: Mapping[str, Any] | None = None) -> Adapter:
    """Draw a fresh adapter.

    Every weight has a key of its own, folded from `key` by the parameter's path and then by the index of the layer or
    expert in a stack. So a site's factors depend neither on the order of the tree nor on which other sites
    are adapted. Works under `jax.jit`, with `out_shardings` to place the factors.

    Args:
      key: a PRNG key, typed (`jax.random.key`) or raw.
      config: what to adapt and how.
      params: the parameters. Their values are read only where the method or the initialiser starts from them, or
        `train`, `bias` or `trainable_tokens` trains them; otherwise `jax.ShapeDtypeStruct` leaves do. Parameters
        that are no floating-point arrays (counters and random keys in a module named by `train`) cannot train and are
        left out.
      sites: from `find_sites`.
      captured: from `lora_jax.capture`, for an initialiser that starts from data (`eva`, `corda`, `lora-ga`).

    Returns:
      An `Adapter` with what the method holds at each selected site, for LoRA factors in `param_dtype` and a float32
      scale, and a copy of what is trained in full, in `param_dtype` or its own dtype, whichever holds both.

    Raises:
      MatchError: something in `config` hits nothing.
      ParameterError: `sites` belongs to other parameters, values are needed and `params` has none, or data are needed
        and `captured` has none, others or those of another model.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"layers": {"w": jnp.ones((3, 4, 4))}}  # three layers, stacked for a scan
      >>> def fn(params, x):
      ...     return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer["w"]), None), x, params["layers"])[0]
      >>> sites = lora.find_sites(fn, params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets=("w",)), params, sites)
      >>> adapter["layers/w"].a.shape, adapter["layers/w"].scale
      ((3, 2, 4), Array([2., 2., 2.], dtype=float32))
    """
    leaves, _ = named_leaves(params)
    _check(sites, leaves)
    selection = select(config, sites, state_paths(params))
    key = _typed(key)
    updates: dict[str, Update] = {site.path: _start(key, config, site, leaves, captured) for site in selection.sites}
    updates |= {path: _replace(config, path, leaves, sites) for path in _floating(selection.train, leaves)}
    updates |= {path: _shift(config, path, site, leaves) for path, site in selection.shifted}
    updates |= {site.path: _rows(config, site, rows, leaves) for site, rows in selection.rows}
    return Adapter(updates)


def _start(
    key: jax.Array, config: LoraConfig, site: Site, leaves: Mapping[str, Any], captured: Mapping[str, Any] | None
) -> Update:
    """The update that the config's method starts with at one site."""
    entry, rank = find_init(config.init), config.rank_for(site.path)
    if _is_complex(site) and (entry.reads or config.method != "lora"):
        raise ConfigError(
            f"{site.path} is {site.dtype}: init={config.init!r} with method={config.method!r} is for real parameters. "
            'Use method="lora" and init="default", "gaussian" or "orthogonal", or leave it out of the targets'
        )
    if part_columns.of_path(config.parts, site.path):
        return _in_parts(key, config, entry, site)
    name = np.uint32(crc32(site.path.encode()))
    scale = _scale(config, site)

    def weight() -> jax.Array:
        return jnp.asarray(_value(site.path, leaves, f"method={config.method!r} and init={config.init!r} read it"))

    def factors() -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
        known: dict[Data, Callable[[], Any]] = {"weight": weight, "scale": lambda: scale}
        data = {what: known[what]() for what in entry.reads if what in known}
        data |= {what: statistic_for(captured, what, config.init, site) for what in entry.reads if what not in known}
        # Without its path, so that all sites of one shape share one compilation.
        draw = partial(_draw, key, name, entry, replace(site, path=""), dtype=config.param_dtype, data=data)
        a, b = _by_layer(draw, site, config.ranks_for(site.path))
        # Copies: an optimizer step that donates the adapter must not donate one array twice.
        return (a, b, jnp.array(a), jnp.array(b)) if entry.away else (a, b, None, None)

    given = Start(
        site=site, rank=rank, scale=scale, dropout=config.dropout, dtype=config.param_dtype,
        key=jax.random.fold_in(key, name), seed=config.seed,
        invocation_tokens=tuple(config.invocation_tokens), factors=factors, weight=weight,
    )  # fmt: skip
    try:
        return METHODS.find(config.method).update.start(given)
    except ConfigError as error:
        raise ConfigError(f"{site.path}: {error}") from None


def _in_parts(key: jax.Array, config: LoraConfig, entry: Entry, site: Site) -> Parts:
    """Factors for parts of a fused kernel, each with an A, a rank and a scale of its own, in one pair."""
    if entry.reads or entry.away:
        raise ConfigError(
            f"{site.path} is adapted in parts, and init={config.init!r} reads the whole of it: use another init, or "
            "leave it out of parts"
        )
    parts, drawn, scales = [], [], []
    for name, (start, stop, *axis) in part_columns.of_path(config.parts, site.path):
        path = part_columns.path_of(site.path, name)
        along = axis[0] if axis else site.out_axes[0]
        rank, scale = config.ranks_for(path), config.scale_for(path)
        if along not in site.out_axes or stop > site.shape[along]:
            raise ConfigError(
                f"parts: {name!r} has columns {start} to {stop} along axis {along}, and {site.path} of shape "
                f"{site.shape} has its outputs along {site.out_axes}"
            )
        if isinstance(rank, tuple) or isinstance(scale, tuple):
            raise ConfigError(f"{path}: a part has one rank and one alpha for all layers of a stack")
        draw = partial(_draw, key, np.uint32(crc32(path.encode())), entry, replace(site, path=""))
        drawn.append(draw(dtype=config.param_dtype, data={}, rank=rank))
        scales.append(scale)
        parts.append(Part(name, start, stop, along, rank, scale / scales[0]))
    a, b = (jnp.concatenate(each, len(site.batch_axes)) for each in zip(*drawn, strict=True))
    scale = jnp.full(site.batch_shape, scales[0], jnp.float32)
    return Parts(a, b, scale, site, config.dropout, parts=tuple(parts))


def _is_complex(site: Site) -> bool:
    return jnp.issubdtype(site.dtype, jnp.complexfloating)


def _scale(config: LoraConfig, site: Site) -> jax.Array:
    """The scale of every linear map of a site."""
    given = as_tuple(config.scale_for(site.path))
    if len(given) not in (1, prod(site.batch_shape)):
        raise ConfigError(
            f"{site.path} is a stack of {prod(site.batch_shape)} layers or experts, and rank_pattern or alpha_pattern "
            f"has {len(given)} values for it: give one for each, or one for all"
        )
    values = jnp.asarray(given, jnp.float32)
    return jnp.broadcast_to(values.reshape(site.batch_shape if len(given) > 1 else ()), site.batch_shape)


def _by_layer(
    draw: Callable[..., tuple[jax.Array, jax.Array]], site: Site, ranks: int | tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Factors with another rank for every layer of a stack, padded with zeros; each layer as if its rank were all's."""
    if isinstance(ranks, int):
        return draw(rank=ranks)
    axis, given = len(site.batch_axes), jnp.broadcast_to(jnp.asarray(ranks), prod(site.batch_shape))
    a, b = jnp.zeros(site.a_shape(max(ranks))), jnp.zeros(site.b_shape(max(ranks)))
    for rank in sorted({*ranks} - {0}):
        chosen = (given == rank).reshape(site.batch_shape)
        drawn = [_padded(each, axis, max(ranks)) for each in draw(rank=rank)]
        a, b = (jnp.where(over(chosen, new), new, old) for new, old in zip(drawn, (a, b), strict=True))
    return a, b


def _padded(factor: jax.Array, axis: int, rank: int) -> jax.Array:
    return jnp.pad(factor, [(0, rank - size if i == axis else 0) for i, size in enumerate(factor.shape)])


@partial(jax.jit, static_argnames=("entry", "site", "rank", "dtype"))
def _draw(
    key: jax.Array, name: np.uint32, entry: Entry, site: Site, rank: int, dtype: str, data: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array]:
    key = jax.random.fold_in(key, name)
    count = prod(site.batch_shape)
    stacks = {name: _stacked(site, name, value, count) for name, value in data.items()}

    def draw_real(key: jax.Array, stacks: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        numbered = {} if entry.number is None else {"number": entry.number}
        return entry.draw(key, site, rank, dtype, **jax.tree.map(_gathered, stacks), **numbered)

    def draw(key: jax.Array, stacks: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        if not _is_complex(site):
            return draw_real(key, stacks)
        parts = zip(*(draw_real(jax.random.fold_in(key, part), stacks) for part in range(2)), strict=True)
        a, b = (jax.lax.complex(real, imaginary) / 2**0.5 for real, imaginary in parts)
        return a, b

    if not site.batch_axes:
        a, b = draw(key, jax.tree.map(lambda value: value[0], stacks))
    else:
        # A loop, and factors of two axes: XLA compiles random bits several times slower for every axis they have.
        indexes = jnp.arange(count, dtype=jnp.uint32)
        a, b = jax.lax.map(lambda each: draw(jax.random.fold_in(key, each[0]), each[1]), (indexes, stacks))
    return a.reshape(site.a_shape(rank)), b.reshape(site.b_shape(rank))


def _gathered(value: Any) -> jax.Array:
    """What an initialiser reads of one linear map, on every device."""
    return whole(widened(value))


def _stacked(site: Site, name: str, value: Any, count: int) -> Any:
    """The data of each linear map of a site, stacked: a matrix `[fan_in, fan_out]` of a parameter, else as it is."""
    if name not in ("weight", "gradient"):
        return jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[len(site.batch_axes) :]), value)
    return matrices(site, value)


def _shift(config: LoraConfig, path: str, site: Site, leaves: Mapping[str, Any]) -> Shift:
    """The bias on B of a site, which is an addition to the bias beside it."""
    leaf = leaves[path]
    if tuple(leaf.shape[: len(site.batch_axes)]) != site.batch_shape:
        raise ParameterError(
            f"lora_bias: {path!r} of shape {tuple(leaf.shape)} is not stacked as {site.path!r} is, "
            f"{site.batch_shape} in front"
        )
    scale = _scale(config, site)
    return Shift(jnp.zeros(leaf.shape, config.param_dtype), scale, full_site(path, leaf))


def _rows(config: LoraConfig, site: Site, rows: tuple[int, ...], leaves: Mapping[str, Any]) -> Rows:
    table = _value(site.path, leaves, f"trainable_tokens={rows} start from its rows")
    return Rows(rows_of(site, jnp.asarray(table), rows).astype(_own_dtype(config, table)), site, rows)


def _replace(config: LoraConfig, path: str, leaves: Mapping[str, Any], sites: Sites) -> Replace:
    leaf = _value(path, leaves, f"train={config.train!r} and bias={config.bias!r} train it in full")
    # A copy: an optimizer step that donates the adapter must not free the base.
    return Replace(jnp.array(leaf, dtype=_own_dtype(config, leaf)), sites.get(path) or full_site(path, leaf))


def _own_dtype(config: LoraConfig, leaf: Any) -> Any:
    """The dtype of what starts as the base's own values: one that holds them."""
    return promoted(leaf.dtype, config.param_dtype)


def _value(path: str, leaves: Mapping[str, Any], why: str) -> Any:
    """The value of a parameter."""
    leaf = leaves[path]
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ParameterError(
            f"The value of {path} is needed ({why}), but params holds shapes only: pass arrays, or call init inside "
            "jax.eval_shape for shapes"
        )
    return leaf


def _floating(paths: tuple[str, ...], leaves: Mapping[str, Any]) -> list[str]:
    missing = [path for path in paths if path not in leaves]
    if missing:
        raise _stale(f"{missing[0]!r} is not among these parameters (nearest: {nearest(missing[0], leaves)})")
    floating = [path for path in paths if jnp.issubdtype(leaves[path].dtype, jnp.inexact)]
    if paths and not floating:
        raise ParameterError(f"None of the parameters named by train is floating-point: {', '.join(paths)}")
    return floating


def _check(sites: Sites, leaves: Mapping[str, Any]) -> None:
    for path, site in sites.items():
        leaf: Any = leaves.get(path)
        if not is_array(leaf):
            raise _stale(f"site {path!r} is not among these parameters (nearest: {nearest(path, leaves)})")
        if tuple(leaf.shape) != site.shape or str(leaf.dtype) != site.dtype:
            given = f"{leaf.dtype}{list(leaf.shape)}"
            raise _stale(f"site {path!r} is {site.dtype}{list(site.shape)}, but params has {given}")


def _stale(problem: str) -> ParameterError:
    return ParameterError(f"The sites belong to other parameters: {problem}. Call find_sites with these parameters.")


def _typed(key: Any) -> jax.Array:
    key = jnp.asarray(key)
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
