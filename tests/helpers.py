"""What the tests share: one tolerance per dtype, random adapters, and the merged model as the reference."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.site import Site, Sites
from lora_jax.adapter.updates import LowRank, exact_sum, held
from lora_jax.paths import named_leaves, rebuild

GOLDEN = Path(__file__).parent / "golden"
"""Adapters that real PEFT wrote, and what PEFT makes of the base with them; `golden/make.py` makes them."""

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
"""Largest error of a result, relative to its largest element, by the dtype it was computed in."""


def assert_close(actual: Any, desired: Any, dtype: Any = None, factor: float = 1.0) -> None:
    """Trees of the same structure, shapes and dtypes, with values that agree within the tolerance of the dtype."""
    jax.tree.map(lambda a, d: _leaf_close(a, d, dtype or jnp.result_type(d), factor), actual, desired)


def _leaf_close(actual: Any, desired: Any, dtype: Any, factor: float) -> None:
    assert (jnp.shape(actual), jnp.result_type(actual)) == (jnp.shape(desired), jnp.result_type(desired))
    wide = np.complex128 if jnp.iscomplexobj(desired) else np.float64
    actual, desired = (np.asarray(value).astype(wide) for value in (actual, desired))
    size = np.abs(desired).max(initial=0.0)
    assert np.isfinite(size)
    tolerance = TOLERANCE[jnp.dtype(dtype).name] * factor
    error = np.abs(actual - desired).max(initial=0.0)
    assert error <= tolerance * size, f"error {error:.2e} of {size:.2e} exceeds {tolerance:.0e}"


def assert_gradients_close(actual: Any, desired: Any) -> None:
    """Gradients of one loss that agree leaf by leaf, but for the rounding of terms as large as the largest of them.

    A leaf may be nothing but what is left when such terms cancel, as before a normalisation.
    """
    largest = max(float(np.abs(leaf).max(initial=0.0)) for leaf in jax.tree.leaves(desired))
    rounding = 10 * float(np.finfo(np.float32).eps) * largest
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert (jnp.shape(one), jnp.result_type(one)) == (jnp.shape(other), jnp.result_type(other))
        size = float(np.abs(other).max(initial=0.0))
        error = np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).max(initial=0.0)
        assert error <= TOLERANCE["float32"] * size + rounding, f"error {error:.2e} of {size:.2e} ({largest:.2e})"


def assert_same(actual: Any, desired: Any) -> None:
    """Trees of the same structure and dtypes, equal bit for bit (zeros of either sign are equal)."""
    jax.tree.map(lambda a, d: np.testing.assert_array_equal(np.asarray(a), np.asarray(d), strict=True), actual, desired)


def differ(one: Any, other: Any) -> bool:
    """Whether any element of two trees differs."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return any(bool((np.asarray(a) != np.asarray(b)).any()) for a, b in pairs)


def random_adapter(sites: Sites | Sequence[Site], seed: int = 0, rank: int = 2, dropout: float = 0.0) -> Adapter:
    """An adapter whose every factor is random and non-zero, with another scale for every layer and expert."""
    found = sites.values() if isinstance(sites, Sites) else sites
    draw = np.random.default_rng(seed)

    def normal(shape: tuple[int, ...], fan: int) -> jax.Array:
        return jax.device_put((draw.normal(size=shape) / np.sqrt(fan)).astype(np.float32))

    return Adapter({
        site.path: LowRank(
            normal(site.a_shape(rank), site.fan_in),
            normal(site.b_shape(rank), rank),
            jax.device_put(np.float32(draw.uniform(0.5, 1.5, size=site.batch_shape))),
            site,
            dropout,
        )
        for site in found
    })  # fmt: skip


def merged(params: Any, *adapters: Adapter) -> Any:
    """The parameters with every update added: what the adapted model must be equal to."""
    leaves, treedef = named_leaves(params)
    leaves = {path: jax.lax.stop_gradient(leaf) if hasattr(leaf, "dtype") else leaf for path, leaf in leaves.items()}
    paths = {path: None for adapter in adapters for path in adapter}
    updates = {path: [adapter[path] for adapter in adapters if path in adapter] for path in paths}
    return rebuild(treedef, leaves | _sums({path: leaves[path] for path in paths}, updates))


@jax.jit
def _sums(weights: dict[str, Any], updates: dict[str, Any]) -> dict[str, Any]:
    """Every weight with its updates added."""
    return {path: exact_sum(w, [held(each) for each in updates[path]]).astype(w.dtype) for path, w in weights.items()}


def merged_model(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The reference: `fn` on merged parameters, as a function of parameters and adapter."""
    return lambda params, adapter, *args: fn(merged(params, adapter), *args)


def cast_floats(tree: Any, dtype: Any) -> Any:
    """The tree with its floating-point arrays in another dtype."""
    floating = lambda leaf: hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if floating(leaf) else leaf, tree)


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled as one program, which takes less time than one for each of its operations.

    It may take and return what is no array: leaves that are none are compiled in.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = [leaf if isinstance(leaf, jax.Array | np.ndarray) else None for leaf in leaves]
        others: list[Any] = []

        @jax.jit
        def run(arrays: list[Any]) -> list[Any]:
            joined = [old if new is None else new for new, old in zip(arrays, leaves, strict=True)]
            args, kwargs = treedef.unflatten(joined)
            found, structure = jax.tree.flatten(fn(*args, **kwargs))
            others[:] = [structure, [None if isinstance(leaf, jax.Array) else leaf for leaf in found]]
            return [leaf for leaf in found if isinstance(leaf, jax.Array)]

        found = iter(run(arrays))
        return others[0].unflatten([next(found) if leaf is None else leaf for leaf in others[1]])

    return call
