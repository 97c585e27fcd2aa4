"""What holds for every model of the zoo: its sites, its head, nothing formed, routed, and adapted as merged."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, differ

import lora_jax as lora
from lora_jax.nnx import functional
from lora_jax.paths import is_array, named_leaves

NORMS_AND_BIASES = r"(norm\w*|ln\w*|bias|scale|LayerNorm\w*)(/|$)"
"""Paths of stacked vectors, which have two axes and are no matrices."""


class Model(NamedTuple):
    """A function of parameters and arguments, as the code base has it, and where examples run in the arguments."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    batch_axes: Any = 0


class Row(NamedTuple):
    """A model, and what must be found in it.

    Attributes:
      build: makes it, small and with numbers.
      sites: how many parameters are sites.
      heads: which of them are heads.
      kinds: kinds of some of the sites, by path.
      plain: pattern of the parameters with two axes or more that are no sites.
      routed: pattern of the sites that have a routed form; others are refused by name.
      dtype: the narrowest in which the model computes.
    """

    build: Callable[[], Model]
    sites: int
    heads: tuple[str, ...]
    kinds: Mapping[str, str] = MappingProxyType({})
    plain: str = NORMS_AND_BIASES
    routed: str = ""
    dtype: str = "float32"


def check_sites(row: Row) -> None:
    """The expected sites and heads, no weight passed over, and none formed."""
    model = row.build()
    sites = lora.find_sites(model.fn, model.params, *model.args)
    assert {path: sites[path].kind for path in row.kinds} == row.kinds
    assert {path for path, site in sites.items() if site.head} == set(row.heads)
    passed_over = [path for path in matrices(model.params) if path not in sites and not re.search(row.plain, path)]
    assert not passed_over and len(sites) == row.sites, f"{len(sites)} sites, without {passed_over}"
    adapter = new(model, sites)
    formed = [(use.path, use.reason) for use in lora.explain(model.fn, model.params, adapter, *model.args).materialised]
    assert not formed


def check_routed(row: Row) -> None:
    """Sites have their low-rank form in the routed call too, or are refused by name."""
    model = row.build()
    sites = lora.find_sites(model.fn, model.params, *model.args)
    kept = [path for path in sites if re.search(row.routed, path)]
    if kept:
        assert {use.path for use in routed_uses(model, new(model, kept, sites))} == set(kept)
    for path in sites.keys() - set(kept):
        with pytest.raises(lora.ParameterError, match=path):
            routed_uses(model, new(model, [path], sites))


def routed_uses(model: Model, adapter: Any) -> tuple[Any, ...]:
    ids = jnp.arange(len(jax.tree.leaves(model.args)[0])) % 3
    routed = lora.route(model.fn, batch_axes=model.batch_axes)
    return routed.explain(model.params, [adapter, adapter], ids, *model.args).uses


def check_merged(row: Row) -> None:
    """The adapted model computes what the model with merged parameters does, which is not what the base does."""
    model = row.build()
    sites = lora.find_sites(model.fn, model.params, *model.args)
    adapter = numbers(new(model, sites), size=0.1)
    adapted = jax.jit(lora.adapt(model.fn))(model.params, adapter, *model.args)
    plain = jax.jit(model.fn)
    merged = plain(lora.merge(model.params, adapter), *model.args)
    assert_close(adapted, merged, row.dtype, factor=10.0 if row.dtype == "float32" else 1.0)
    assert differ(merged, plain(model.params, *model.args))


def check_quantised(row: Row) -> None:
    """On a quantised base the same sites are found, and the adapted model computes what the numbers give."""
    model = row.build()
    sites = lora.find_sites(model.fn, model.params, *model.args)
    base = lora.quantise(model.params, "int8", block=4, where=lambda path, leaf: path in sites)
    assert lora.find_sites(model.fn, base, *model.args) == sites
    adapter, run = numbers(new(model, sites), size=0.1), jax.jit(lora.adapt(model.fn))
    plain = run(lora.dequantise(base), adapter, *model.args)
    assert_close(run(base, adapter, *model.args), plain, row.dtype, factor=10.0 if row.dtype == "float32" else 1.0)


def new(model: Model, targets: Any, sites: Any = None) -> Any:
    config = lora.LoraConfig(rank=2, targets=tuple(targets))
    return jax.eval_shape(lambda: lora.init(jax.random.key(0), config, model.params, sites or targets))


def matrices(params: Any) -> list[str]:
    """Paths of the floating-point parameters with two axes or more."""
    leaves = {path: leaf for path, leaf in named_leaves(params)[0].items() if is_array(leaf)}
    return [path for path, leaf in leaves.items() if leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.inexact)]


def numbers(tree: Any, size: float = 0.3) -> Any:
    """Values for abstract arrays: noise for floating-point ones, around 1 for vectors, zeros and keys for others."""
    draw = np.random.default_rng(0)

    def value(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(draw.normal(leaf.ndim == 1, size, leaf.shape), leaf.dtype)

    return jax.tree.map(value, tree)


def of_nnx(make: Callable[[], nnx.Module], *args: Any, **kwargs: Any) -> Model:
    """A model of NNX, by the recipe of `lora_jax.nnx.functional`."""
    model = nnx.eval_shape(make)
    nnx.update(model, numbers(nnx.state(model)))
    fn, params = functional(model)
    return Model(lambda params, *args: fn(params, *args, **kwargs), params, args)


def tokens(batch: int = 2, length: int = 8, vocabulary: int = 32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, vocabulary, (batch, length)), jnp.int32)


def positions(batch: int = 2, length: int = 8) -> jax.Array:
    return jnp.tile(jnp.arange(length), (batch, 1))


def causal(batch: int = 2, length: int = 8) -> jax.Array:
    return jnp.tile(jnp.tri(length, dtype=bool), (batch, 1, 1))


def pixels(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
