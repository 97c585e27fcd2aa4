"""Operations through which a routed call keeps track of whose rows are whose, and those where it does not."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, compiled, random_adapter
from jax import lax

import lora_jax as lora

IDS, LAST = jnp.array([1, 0, 2]), jnp.array([3, 1, 2])
X = jax.random.normal(jax.random.key(0), (3, 4, 6))
PARAMS = {
    "w": jax.random.normal(jax.random.key(1), (6, 5)),
    "v": jax.random.normal(jax.random.key(2), (5, 5)),
    "experts": jax.random.normal(jax.random.key(3), (4, 6, 5)),
}


def placed(cache: Any, new: Any, place: Any) -> Any:
    return lax.dynamic_update_slice(cache, new, (place, 0))


FOLLOWED: dict[str, Callable[..., Any]] = {
    "the last token of each example": lambda p, x: (x @ p["w"])[jnp.arange(3), LAST] @ p["v"],
    "its place may be data": lambda p, x: (x @ p["w"])[jnp.arange(3), jnp.argmax(x[..., 0], 1)] @ p["v"],
    "several places": lambda p, x: (x @ p["w"])[jnp.arange(3)[:, None], jnp.stack([LAST, LAST], 1)] @ p["v"],
    "take_along_axis": lambda p, x: jnp.take_along_axis(x @ p["w"], LAST[:, None, None], axis=1) @ p["v"],
    "a cache, written where each example is": (
        lambda p, x: jnp.zeros((3, 8, 5)).at[jnp.arange(3), LAST].set((x @ p["w"])[:, 0]) @ p["v"]
    ),
    "a cache under vmap": lambda p, x: jax.vmap(placed)(jnp.zeros((3, 8, 5)), x @ p["w"], LAST) @ p["v"],
    "a slice under vmap": (
        lambda p, x: jax.vmap(lambda c, i: lax.dynamic_slice(c, (i, 0), (1, 5)))(x @ p["w"], LAST) @ p["v"]
    ),
    "all places of a cache": lambda p, x: jnp.zeros((3, 8, 5)).at[:, jnp.arange(4)].add(x @ p["w"]) @ p["v"],
    "precision": lambda p, x: lax.reduce_precision(x, 5, 10) @ p["w"],
    "the largest, about": lambda p, x: lax.approx_max_k(x @ p["w"], 5, recall_target=1.0)[0] @ p["v"],
    "cumulative sums": lambda p, x: jnp.cumsum(x, 1) @ p["w"],
    "an expert for each example": lambda p, x: jnp.einsum("btd,bdo->bto", x, p["experts"][LAST]) @ p["v"],
    "an expert for each token": (
        lambda p, x: jnp.einsum("btd,btdo->bto", x, p["experts"][jnp.argmax(x[..., :4], -1)]) @ p["v"]
    ),
}  # fmt: skip
LOST: dict[str, tuple[Callable[..., Any], str]] = {
    "other examples' rows": (lambda p, x: (x @ p["w"])[LAST % 3] @ p["v"], "gather"),
    "examples one after the other": (lambda p, x: lax.map(lambda row: row @ p["w"], x), "scan"),
    "sums over segments": (lambda p, x: jax.ops.segment_sum(x[:, 0], jnp.array([0, 0, 1]), 3) @ p["w"], "scatter-add"),
    "grouped products": (lambda p, x: lax.ragged_dot(x[:, 0], p["experts"], jnp.array([1, 1, 1, 0])), "ragged_dot"),
}  # fmt: skip


def banked(fn: Callable[..., Any]) -> list[lora.Adapter]:
    sites = lora.find_sites(fn, PARAMS, X)
    return [random_adapter(sites, seed=seed) for seed in (0, 1)]


@pytest.mark.parametrize("fn", FOLLOWED.values(), ids=FOLLOWED)
def test_rows_are_their_own(fn: Callable[..., Any]) -> None:
    adapters = banked(fn)
    models, alone = [PARAMS, *(lora.merge(PARAMS, each) for each in adapters)], jax.jit(fn)
    wanted = np.stack([alone(models[slot], X)[row] for row, slot in enumerate(IDS.tolist())])
    assert_close(compiled(lora.route(fn))(PARAMS, adapters, IDS, X), wanted, factor=10)


@pytest.mark.parametrize(("fn", "operation"), LOST.values(), ids=LOST)
def test_the_operation_that_loses_them_is_named(fn: Callable[..., Any], operation: str) -> None:
    with pytest.raises(lora.ParameterError, match=operation):
        compiled(lora.route(fn))(PARAMS, banked(fn), IDS, X)
