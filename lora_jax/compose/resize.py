"""One adapter in another form: another rank, more targets, longer tables, or its singular value decomposition."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast
from zlib import crc32

import jax
import jax.numpy as jnp

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.factors import Array, over
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, Replace, Update
from lora_jax.compose.factors import decomposed, gathered, has_factors
from lora_jax.config.checks import positive_int
from lora_jax.errors import ConfigError, MatchError, ParameterError, nearest
from lora_jax.methods import AdaLora, Dora, Gained, Rows
from lora_jax.paths import lookup, named_leaves


def resize(
    adapter: Adapter,
    rank: int | Mapping[str, int] | None = None,
    *,
    like: Adapter | None = None,
    params: Any = None,
    key: Any = None,
) -> Adapter:
    """Give a trained adapter another form: another rank, more targets, or tables that have got more rows.

    To a higher rank the function stays: A gets new rows as the default initialiser draws them, B zeros. To a lower one
    it becomes the nearest of that rank, by a singular value decomposition. Scales stay as they are, whatever `alpha /
    rank` would be now.

    Args:
      adapter: left untouched. What has no rank (parameters trained in full, rows, biases) is kept.
      rank: the new rank everywhere, or ranks by pattern, as in `LoraConfig.rank_pattern`; what no pattern hits keeps
        its rank.
      like: a fresh adapter, from `lora_jax.init`, with the targets and ranks to have. What only it has is taken from
        it. What only `adapter` has is kept.
      params: the base as it is now, where its tables got more rows (new tokens), which the adapter leaves as they are.
      key: for new rows of A; the same without one.

    Returns:
      The adapter in its new form.

    Raises:
      ConfigError: there is nothing to do, or both `rank` and `like` say what.
      MatchError: a pattern hits nothing.
      ParameterError: the rank of a method other than `lora` and `dora` would change, or a parameter got smaller.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((6, 5))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 6)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> train, fixed = lora.partition(adapter)
      >>> adapter = lora.combine(jax.tree.map(lambda leaf: leaf + 0.5, train), fixed)
      >>> larger = lora.resize(adapter, rank=4)
      >>> larger["w"].rank, bool(jnp.allclose(larger["w"].delta(), adapter["w"].delta()))
      (4, True)
      >>> back = lora.resize(larger, rank=2)
      >>> back["w"].rank, bool(jnp.allclose(back["w"].delta(), adapter["w"].delta(), atol=1e-5))
      (2, True)
    """
    if (rank is None) == (like is None) and (rank is not None or params is None):
        raise ConfigError("resize needs the new form: either rank= or like=, or params= for tables with more rows")
    ranks = _ranks(adapter, rank, like)
    key = jax.random.key(0) if key is None else key
    leaves = {} if params is None else named_leaves(params)[0]
    made: dict[str, Update] = dict(like or {})
    for path, update in adapter.items():
        fresh = None if like is None else like.get(path)
        site = fresh.site if fresh is not None else _site(update.site, leaves)
        grown = _placed(update, site, leaves.get(path, getattr(fresh, "value", None)))
        own = jax.random.fold_in(key, crc32(path.encode()))
        made[path] = _of_rank(grown, ranks[path], own) if path in ranks else grown
    return Adapter(made)


def _ranks(adapter: Adapter, rank: Any, like: Adapter | None) -> dict[str, int]:
    """The rank that every update is to have, for those that have one."""
    ranked = {path: update.rank for path, update in adapter.items() if isinstance(update, LowRank)}
    if like is not None:
        return ranked | {path: new.rank for path in ranked if isinstance(new := like.get(path), LowRank)}
    if not isinstance(rank, Mapping):
        return ranked if rank is None else dict.fromkeys(ranked, positive_int("rank", rank))
    given = {pattern: positive_int(f"rank of {pattern!r}", each) for pattern, each in rank.items()}
    for pattern in given:
        if not any(lookup([(pattern, None)], path) for path in ranked):
            raise MatchError(f"resize: {pattern!r} hits no low-rank update; nearest: {nearest(pattern, ranked)}")
    found = {path: lookup(given.items(), path) for path in ranked}
    return {path: hit[1] if (hit := found[path]) else old for path, old in ranked.items()}


def _site(site: Site, leaves: Mapping[str, Any]) -> Site:
    leaf = leaves.get(site.path)
    return site if leaf is None else replace(site, shape=tuple(leaf.shape))


def _placed(update: Update, site: Site, value: Any) -> Update:
    """The update at a parameter that may have got larger: zeros in the factors, the base's own numbers in a value."""
    if site.shape == update.site.shape:
        return cast(Any, replace)(update, site=site)
    sizes = zip(update.site.shape, site.shape, strict=False)
    alike = len(site.shape) == len(update.site.shape) and site.batch_shape == update.site.batch_shape
    if not alike or any(new < old for old, new in sizes):
        raise ParameterError(
            f"resize: {site.path!r} is {site.shape} now and was {update.site.shape}: it can only "
            "get more rows or columns"
        )
    if isinstance(update, Replace):
        whole = jnp.asarray(value, update.value.dtype)
        start = (0,) * whole.ndim
        return replace(update, site=site, value=jax.lax.dynamic_update_slice(whole, update.value, start))
    if isinstance(update, Rows):
        return replace(update, site=site)
    if type(update) is not LowRank:
        raise _refused(update, "its parameter has another shape")
    return jax.tree.map(lambda leaf, axes: _padded(leaf, axes, site), replace(update, site=site), _axes(update, site))


def _axes(update: LowRank, site: Site) -> Any:
    axes = jax.tree.map(_Axes, update.axes(), is_leaf=lambda node: isinstance(node, tuple))
    return replace(axes, site=site)


class _Axes:
    """The site's axes along an array, as a leaf."""

    def __init__(self, axes: tuple[int | None, ...]):
        self.axes = axes


def _padded(leaf: Array, along: _Axes, site: Site) -> Array:
    sizes = [size if axis is None else site.shape[axis] for size, axis in zip(leaf.shape, along.axes, strict=True)]
    more = [(0, new - old) for old, new in zip(leaf.shape, sizes, strict=True)]
    return jnp.pad(leaf, more) if more else leaf


def _of_rank(update: Update, rank: int, key: Array) -> Update:
    assert isinstance(update, LowRank)
    if rank == update.rank:
        return update
    if type(update) not in (LowRank, Dora):
        raise _refused(update, f"rank {update.rank} cannot become {rank}")
    return _grown(update, rank, key) if rank > update.rank else _truncated(update, rank)


def _refused(update: Update, why: str) -> ParameterError:
    return ParameterError(
        f"resize: {update.site.path!r} has a {type(update).__name__}, and {why}: resize is for method='lora', and for "
        "ranks of 'dora'. lora_jax.compose([adapter], rank=...) makes plain factors of other methods."
    )


def _grown(update: LowRank, rank: int, key: Array) -> LowRank:
    """New terms whose product is zero, drawn as by the default initialiser."""
    site, more = update.site, rank - update.rank
    a_shape, b_shape = site.a_shape(more), site.b_shape(more)
    if site.kind == "embedding":
        a, b = jnp.zeros(a_shape), jax.random.normal(key, b_shape)
    else:
        bound = max(site.fan_in, 1) ** -0.5
        a, b = jax.random.uniform(key, a_shape, minval=-bound, maxval=bound), jnp.zeros(b_shape)
    join = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], len(site.batch_axes))  # noqa: E731
    return replace(update, a=join(update.a, a), b=join(update.b, b))


def _truncated(update: LowRank, rank: int) -> LowRank:
    """The strongest terms of the update, shared evenly by both factors."""
    found, axis = decomposed(update), len(update.site.batch_axes)
    cut = lambda array: jax.lax.slice_in_dim(array, 0, min(rank, array.shape[axis]), axis=axis)  # noqa: E731
    root, scale = jnp.sqrt(cut(found.values)), jnp.where(update.scale == 0, 1, update.scale)
    a = cut(found.left) * over(root, found.left)
    b = cut(found.right) * over(root, found.right) / over(scale, found.right)
    a, b = (_with_rank(each, rank, axis) for each in (a, b))
    return replace(update, a=a.astype(update.a.dtype), b=b.astype(update.b.dtype), a_start=None, b_start=None)


def _with_rank(factor: Array, rank: int, axis: int) -> Array:
    """A factor with zeros where a matrix has fewer singular values than terms are asked for."""
    return jnp.pad(factor, [(0, rank - size if i == axis else 0) for i, size in enumerate(factor.shape)])


def canonical(adapter: Adapter) -> Adapter:
    """Rewrite an adapter as `Σ_i d_i · u_i ⊗ v_i` at every parameter, with orthonormal `u` and `v` and `d` descending.

    That is the singular value decomposition of each update, from a QR of its factors and an SVD of the rank's size. It
    does not depend on how the factors were scaled, rotated or started, so that terms of several adapters compare.

    Args:
      adapter: left untouched.

    Returns:
      An adapter that computes the same. Factors become `AdaLora`, with `v` in `a`, `u` in `b`, `d` in `values` and a
      scale of one. DoRA stays DoRA, with `d · u` in `b`, and what has no factors stays as it is.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> adapter = jax.tree.map(lambda leaf: leaf + 0.5, adapter)
      >>> update = lora.canonical(adapter)["w"]
      >>> bool(jnp.allclose(update.a @ update.a.T, jnp.eye(2), atol=1e-6)), bool(update.values[0] >= update.values[1])
      (True, True)
      >>> bool(jnp.allclose(update.delta(), adapter["w"].delta(), atol=1e-5))
      True
    """
    return Adapter({path: _canonical(update) for path, update in gathered(adapter).items()})


def _canonical(update: Update) -> Update:
    if isinstance(update, Gained) or not has_factors(update):
        return update
    found, site = decomposed(update), update.site
    one = jnp.ones(site.batch_shape, jnp.float32)
    if isinstance(update, Dora):
        b = found.right * over(found.values, found.right)
        return replace(update, a=found.left, b=b, scale=one, a_start=None, b_start=None)
    return AdaLora(found.left, found.right, one, site, update.dropout, values=found.values)
