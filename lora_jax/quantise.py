"""quantise and dequantise: a base in few bits, and back."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lora_jax.adapter.factors import is_traced
from lora_jax.errors import ConfigError, MatchError, ParameterError, listed
from lora_jax.paths import hits, is_array, named_leaves, rebuild
from lora_jax.quantised.leaf import Quantised, dense_of, folded_axes, is_quantised, quantised

Scheme = Literal["nf4", "int4", "int8", "fp8"]
SMALLEST = 4096
"""Entries below which a parameter is left as it is: it would not matter."""


def quantise(
    params: Any,
    format: Scheme = "nf4",
    *,
    block: int = 64,
    where: Callable[[str, Any], bool] | str | tuple[str, ...] | None = None,
    nested: bool = False,
    search: bool = False,
) -> Any:
    """Hold a base in 4 or 8 bits: the same tree with `Quantised` leaves, which every function here takes.

    `find_sites`, `init`, `adapt`, `route`, `merge` and the others take the tree where they take parameters, and your
    function stays as it is: it sees parameters of the shapes and dtypes it knows, which are dequantised where they
    are used, and again in the backward pass instead of being kept. Matrices and stacks of them are quantised; norms,
    biases and what is small stay as they are.

    Args:
      params: the base's parameters: arrays, or `jax.ShapeDtypeStruct`. Runs leaf by leaf, and under `jax.jit`.
      format: `"nf4"` (quantiles of a normal distribution, QLoRA's), `"int4"` and `"int8"` (whole numbers), `"fp8"`
        (float8_e4m3fn).
      block: how many numbers share a scale; a power of two. Blocks run along the last axis, or along several where
        they do not divide it; what is left over is padded.
      where: which parameters: a function of path and leaf, a regex that matches whole paths, or names, as for
        `LoraConfig.targets`. None takes every floating-point parameter of two axes or more and 4,096 entries or more.
      nested: quantise the scales too, to 8 bits: 4.13 bits for a number instead of 4.5.
      search: give every block the scale of least squared error instead of that of its largest number.

    Returns:
      A tree like `params`. What was quantised before is left as it is.

    Raises:
      ConfigError: an unknown format, or a block that is no power of two.
      MatchError: `where` selects nothing.
      ParameterError: `where` selects a parameter that is no floating-point array of one axis or more, or one is NaN
        or infinite somewhere.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 128)), "bias": jnp.zeros(128)}
      >>> small = lora.quantise(params, "nf4")
      >>> small["w"].shape, small["w"].nbytes, params["w"].nbytes, small["bias"].dtype
      ((64, 128), 4608, 32768, dtype('float32'))
      >>> fn = lambda params, x: x @ params["w"] + params["bias"]
      >>> sites = lora.find_sites(fn, small, jnp.ones((2, 64)))
      >>> adapter = lora.init(jax.random.key(1), lora.LoraConfig(rank=2, targets="w"), small, sites)
      >>> y = jax.jit(lora.adapt(fn))(small, adapter, jnp.ones((2, 64)))
      >>> bool(jnp.allclose(y, fn(lora.dequantise(small), jnp.ones((2, 64))), atol=1e-4))
      True

    References:
      Dettmers et al., QLoRA, arXiv 2305.14314. PEFT leaves this to bitsandbytes, and to modules of its own.
    """
    check_format(format)
    if block < 2 or block & (block - 1):
        raise ConfigError(f"block={block!r} must be a power of two, as 64")
    leaves, treedef = named_leaves(params)
    run = partial(_small, format=format, block=block, nested=nested, search=search)
    small = {path: run(leaf) for path, leaf in _chosen(leaves, where).items()}
    _check_finite({path: finite for path, (_, finite) in small.items()})
    return rebuild(treedef, leaves | {path: leaf for path, (leaf, _) in small.items()})


def check_format(format: str | None) -> None:
    """Refuse a format that there is not; None is none.

    Raises:
      ConfigError: it is unknown.
    """
    if format is not None and format not in get_args(Scheme):
        raise ConfigError(f"format={format!r}; choose one of {', '.join(get_args(Scheme))}")


def dequantise(params: Any) -> Any:
    """The plain parameters: every quantised leaf as the numbers that it stands for, in its own dtype.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lora
      >>> small = lora.quantise({"w": jnp.eye(64)}, "int8")
      >>> bool((lora.dequantise(small)["w"] == jnp.eye(64)).all())
      True
    """
    return jax.tree.map(dense_of, params, is_leaf=is_quantised)


def _small(leaf: Any, *, format: str, block: int, nested: bool, search: bool) -> tuple[Quantised, Any]:
    """One leaf, and whether all of it is finite, by a program that all leaves of its shape share."""
    folded = folded_axes(tuple(leaf.shape), block)

    def run(value: jax.Array) -> tuple[Quantised, jax.Array]:
        return quantised(value, format, block, folded, nested=nested, search=search), jnp.isfinite(value).all()

    return jax.eval_shape(run, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else jax.jit(run)(jnp.asarray(leaf))


def _check_finite(finite: Mapping[str, Any]) -> None:
    known = {path: fine for path, fine in finite.items() if isinstance(fine, jax.Array) and not is_traced(fine)}
    bad = [repr(path) for path, fine in jax.device_get(known).items() if not fine]
    if bad:
        raise ParameterError(f"{listed(bad)} has NaN or infinite entries: load the base again")


def _chosen(leaves: Mapping[str, Any], where: Any) -> dict[str, Any]:
    free = {path: leaf for path, leaf in leaves.items() if is_array(leaf) and not isinstance(leaf, Quantised)}
    if where is None:
        return {path: leaf for path, leaf in free.items() if _fits(leaf) and leaf.ndim > 1 and leaf.size >= SMALLEST}
    select = where if callable(where) else lambda path, leaf: hits(where, path)
    found = {path: leaf for path, leaf in free.items() if select(path, leaf)}
    wrong = [path for path, leaf in found.items() if not _fits(leaf)]
    if wrong:
        raise ParameterError(f"where={where!r} selects {listed(wrong)}: only floating-point arrays are quantised")
    if not found:
        raise MatchError(f"where={where!r} selects none of {listed(list(leaves))}")
    return found


def _fits(leaf: Any) -> bool:
    return len(leaf.shape) > 0 and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size > 0
