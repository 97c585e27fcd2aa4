"""JAX's stricter modes, and programs for any batch size: what runs for the base runs adapted and routed."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import pytest
from helpers import assert_close, cast_floats, random_adapter
from jax import lax
from table import CASES, Case

import lora_jax as lora

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "leaks": jax.checking_leaks,
    "checks": lambda: jax.enable_checks(True),
}
NAMES = {
    "plain-matmul", "plain-scan", "plain-chosen_by_a_flag", "plain-integer_input", "plain-gated_block",
    "plain-ragged_dot", "linen-attention", "linen-embed", "linen-conv",
}  # fmt: skip
ROWS = [case for case in CASES if case.id.removesuffix("-dora") in NAMES and not case.variant]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_what_runs_for_the_base_runs_adapted(case: Case, mode: str) -> None:
    """Value, gradient and merge; under strict promotion with a base in bfloat16."""
    model = case.model
    params, args = model.params, model.args
    if mode == "strict promotion" and not any(map(jnp.iscomplexobj, jax.tree.leaves((params, args)))):
        params, args = cast_floats((params, args), jnp.bfloat16)
    with MODES[mode]():
        base = jax.jit(lambda: model.fn(params, *args))()

        def loss(adapter: Any) -> Any:
            found = lora.adapt(model.fn)(params, adapter, *args)
            return sum(jnp.sum(jnp.abs(leaf)).astype(jnp.float32) for leaf in jax.tree.leaves(found))

        found = jax.jit(lambda adapter: lora.adapt(model.fn)(params, adapter, *args))(case.adapter)
        jax.jit(jax.grad(loss))(case.adapter)
        lora.merge(params, case.adapter)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, base)


@pytest.mark.parametrize("mode", MODES)
def test_what_runs_for_the_base_runs_routed(mode: str) -> None:
    """In every form, with ids and with weights."""
    params, x = {"w": jnp.ones((6, 5), jnp.bfloat16), "table": jnp.ones((4, 6), jnp.bfloat16)}, jnp.array([0, 1, 2])
    fn = lambda params, x: params["table"][x] @ params["w"]  # noqa: E731
    sites = lora.find_sites(fn, params, x)
    adapters = [random_adapter(sites, seed=seed) for seed in (0, 1)]
    with MODES[mode]():
        for strategy in ("rows", "mask", "blocks"):
            run = lora.route(fn, strategy=strategy)
            loss = lambda pair, ids, run=run: run(params, pair, ids, x).astype(jnp.float32).sum()  # noqa: E731
            for ids in (jnp.array([1, 0, 2]), jnp.eye(3)):
                jax.jit(jax.grad(loss))(adapters, ids)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / 3


BLOCK = {name: normal(i, 3, 8, 2, 4) for i, name in enumerate("qkv")}
BLOCK |= {"o": normal(4, 3, 2, 4, 8), "up": normal(5, 3, 8, 16), "down": normal(6, 3, 16, 8)}
PARAMS = {"embed": normal(7, 11, 8), "blocks": BLOCK, "conv": normal(8, 3, 8, 8), "head": normal(9, 8, 11)}
TOKENS = jax.random.randint(jax.random.key(0), (3, 5), 0, 11)


def transformer(params: Any, tokens: Any) -> Any:
    """Look-up, attention by einsum under scan and remat, a reshape to tokens, a convolution, a head."""
    batch, length = tokens.shape
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]

    def block(x: Any, w: Any) -> Any:
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, w[name]) for name in "qkv")
        scores = jnp.where(mask, jnp.einsum("bthk,bshk->bhts", q, k), -1e9)
        x += jnp.einsum("bhts,bshk,hkd->btd", jax.nn.softmax(scores), v, w["o"])
        return x + (jax.nn.gelu(x.reshape(batch * length, 8) @ w["up"]) @ w["down"]).reshape(x.shape), None

    x = lax.scan(jax.checkpoint(block), params["embed"][tokens], params["blocks"])[0]
    x = lax.conv_general_dilated(x, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return x @ params["head"]


@pytest.mark.parametrize("sizes", ["batch, 5", "batch, length"])
def test_one_program_for_any_size(sizes: str) -> None:
    """Exported with symbolic sizes by default, adapted, differentiated and routed."""
    adapters = [random_adapter(lora.find_sites(transformer, PARAMS, TOKENS), seed=seed) for seed in (0, 1)]
    bank, ids = lora.AdapterBank.of(adapters), jnp.array([1, 0, 2])
    batch, length = jax.export.symbolic_shape(sizes)
    tokens, rows = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, length), (batch,)))
    adapted = lambda adapter, tokens: lora.adapt(transformer)(PARAMS, adapter, tokens)  # noqa: E731
    routed = lambda bank, ids, tokens: lora.route(transformer)(PARAMS, bank, ids, tokens)  # noqa: E731
    gradient = jax.grad(lambda adapter, tokens: adapted(adapter, tokens).sum())
    for fn, shapes, args in (
        (adapted, (adapters[0], tokens), (adapters[0], TOKENS)),
        (gradient, (adapters[0], tokens), (adapters[0], TOKENS)),
        (routed, (bank, rows, tokens), (bank, ids, TOKENS)),
    ):
        exported = jax.export.deserialize(jax.export.export(jax.jit(fn))(*shapes).serialize())
        assert_close(exported.call(*args), jax.jit(fn)(*args), factor=10)
