"""Starting an adapter: `init`, and one module per family of initialisers."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter import Adapter
from lora_jax.config import LoraConfig
from lora_jax.errors import ConfigError, ParameterError, nearest
from lora_jax.init.default import default
from lora_jax.init.gaussian import gaussian
from lora_jax.init.orthogonal import orthogonal
from lora_jax.paths import is_array, named_leaves
from lora_jax.registry import Initialiser, find, initialisers, register
from lora_jax.selection import select
from lora_jax.site import Site, Sites
from lora_jax.updates import LowRank, Replace

__all__ = ["Initialiser", "default", "gaussian", "init", "initialisers", "orthogonal", "register"]


def init(key: Any, config: LoraConfig, params: Any, sites: Sites) -> Adapter:
    """Draw a fresh adapter.

    Every weight has a key of its own, folded from `key` by the parameter's path and then by the index of the layer or
    expert in a stack. So a site's factors depend neither on the order of the tree nor on which other sites
    are adapted. Works under `jax.jit`, with `out_shardings` to place the factors.

    Args:
      key: a PRNG key, typed (`jax.random.key`) or raw.
      config: what to adapt and how.
      params: the parameters. Their values are read only where `train` or `bias` names a parameter to train
        in full; otherwise `jax.ShapeDtypeStruct` leaves do. Parameters that are no floating-point arrays (counters
        and random keys in a module named by `train`) cannot train and are left out.
      sites: from `find_sites`.

    Returns:
      An `Adapter` with low-rank factors in `param_dtype` and a float32 scale at each selected site, and a copy
      of each parameter trained in full, in `param_dtype` or its own dtype, whichever holds both.

    Raises:
      MatchError: something in `config` hits nothing.
      ParameterError: `sites` belongs to other parameters, or values are needed and `params` has none.

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
    selection = select(config, sites)
    key = _typed(key)
    low_rank = {site.path: _low_rank(key, config, site) for site in selection.sites}
    replaced = {path: _replace(config, path, leaves, sites) for path in _floating(selection.train, leaves)}
    return Adapter({**low_rank, **replaced})


def _low_rank(key: jax.Array, config: LoraConfig, site: Site) -> LowRank:
    name = np.uint32(crc32(site.path.encode()))
    rank = config.rank_for(site.path)
    try:
        # Without its path, so that all sites of one shape share one compilation.
        a, b = _draw(key, name, find(config.init), replace(site, path=""), rank, config.param_dtype)
    except ConfigError as error:
        raise ConfigError(f"{site.path}: {error}") from None
    scale = jnp.full(site.batch_shape, config.scale_for(site.path), jnp.float32)
    return LowRank(a, b, scale, site, config.dropout)


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _draw(
    key: jax.Array, name: np.uint32, initialiser: Initialiser, site: Site, rank: int, dtype: str
) -> tuple[jax.Array, jax.Array]:
    key = jax.random.fold_in(key, name)

    def draw(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        return initialiser(jax.random.fold_in(key, index), site, rank, dtype)

    # A loop, and factors of two axes: XLA compiles random bits several times slower for every axis they have.
    indexes = jnp.arange(prod(site.batch_shape), dtype=jnp.uint32)
    a, b = jax.lax.map(draw, indexes) if site.batch_axes else initialiser(key, site, rank, dtype)
    return a.reshape(site.a_shape(rank)), b.reshape(site.b_shape(rank))


def _replace(config: LoraConfig, path: str, leaves: Mapping[str, Any], sites: Sites) -> Replace:
    leaf = leaves[path]
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ParameterError(
            f"{path} is to be trained in full (train={config.train!r}, bias={config.bias!r}) and starts from its "
            "value, but params holds shapes only: pass arrays, or call init inside jax.eval_shape for shapes"
        )
    # A copy: an optimizer step that donates the adapter must not free the base.
    value = jnp.array(leaf, dtype=jnp.promote_types(leaf.dtype, config.param_dtype))
    site = sites.get(path) or Site(path=path, shape=tuple(leaf.shape), dtype=str(leaf.dtype), kind="full")
    return Replace(value, site)


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
