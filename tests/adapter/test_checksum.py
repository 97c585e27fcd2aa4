"""What must not move is missed when it moved, by name; what is changed on purpose is not."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax as lora
from lora_jax.adapter.checksum import moved

PARAMS = {"layer": {"kernel": jax.random.normal(jax.random.key(0), (6, 5)), "bias": jnp.zeros(5)}}
X = jax.random.normal(jax.random.key(1), (3, 6))
PATH = "layer/kernel"


def fn(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["layer"]["kernel"] + params["layer"]["bias"][None]


def start(**fields: Any) -> lora.Adapter:
    sites = lora.find_sites(fn, PARAMS, X)
    return lora.init(jax.random.key(2), lora.LoraConfig(rank=2, targets=("layer",), **fields), PARAMS, sites)


def decayed(adapter: Any, steps: int = 10) -> Any:
    tx = optax.adamw(1e-2, weight_decay=0.1)
    state = tx.init(adapter)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, adapter), state, adapter)
        adapter = optax.apply_updates(adapter, updates)
    return adapter


METHODS = [
    {}, {"init": "pissa"}, {"method": "dora"}, {"method": "lora-xs"}, {"method": "lora-fa"}, {"method": "vera"},
    {"method": "adalora"}, {"lora_bias": True}, {"param_dtype": "bfloat16"},
]  # fmt: skip


@pytest.mark.parametrize("fields", METHODS, ids=str)
def test_weight_decay_of_what_is_frozen_is_seen(fields: dict[str, Any], tmp_path: Any) -> None:
    adapter = start(**fields)
    assert moved(adapter, adapter.checksum) == []
    after = decayed(adapter, 100)
    checks = {
        "merge": lambda: lora.merge(PARAMS, after),
        "save": lambda: lora.save(tmp_path / "own", after),
        "peft.save": lambda: lora.peft.save(tmp_path / "peft", after, sites=lora.find_sites(fn, PARAMS, X)),
        "summary": lambda: lora.summary(after),
        "explain": lambda: lora.explain(fn, PARAMS, after, X),
    }
    for check in checks if not fields else ("summary",):
        with pytest.warns(UserWarning, match=rf"frozen at .*{PATH}.*lora_jax\.optimizer") as said:
            checks[check]()
        assert len(said) == 1
    train, fixed = lora.partition(adapter)
    kept = lora.combine(decayed(train), fixed)
    lora.summary(kept)
    assert moved(decayed(lora.combine(train, fixed)), adapter.checksum)


def test_what_is_meant_is_no_mistake() -> None:
    """Also under jit, vmap and on stacks; the warnings are errors here."""
    adapter = start(init="pissa")
    step = jax.jit(lambda adapter, by: lora.scale(adapter, by))
    several = lora.Adapter.stack([adapter, lora.scale(adapter, 3)])
    meant = [
        lora.scale(adapter, 0.3), step(adapter, 0.7), step(lora.scale(adapter, 2), 0.1),
        lora.scale(several, 2).unstack()[1],
        jax.vmap(lambda lane: lora.scale(lane, 2))(several).unstack()[0], lora.compose([adapter, adapter], [0.3, 0.2]),
        jax.jit(lambda: start(init="pissa"))(), jax.tree.map(jnp.zeros_like, adapter),
    ]  # fmt: skip
    for each in meant:
        lora.merge(PARAMS, each)
        lora.summary(each)
    jax.jit(lambda adapter: lora.merge(PARAMS, adapter))(decayed(adapter))  # values are not known: not checked
    lora.merge(PARAMS, decayed(lora.Adapter({PATH: lora.Replace(PARAMS["layer"]["kernel"], adapter[PATH].site)})))


def test_no_retrace_for_another_scale() -> None:
    calls = []

    @jax.jit
    def run(adapter: Any) -> jax.Array:
        calls.append(1)
        return lora.adapt(fn)(PARAMS, adapter, X)

    for adapter in (start(), start(alpha=7), lora.scale(start(), 0.1), jax.jit(lora.scale)(start(), 3.0)):
        run(adapter)
    assert len(calls) == 1


def test_lanes_that_decay_are_seen_one_by_one() -> None:
    several = lora.Adapter.stack([start(), decayed(start())])
    one, other = several.unstack()
    assert (moved(one, one.checksum), moved(other, other.checksum)) == ([], [PATH])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.summary(one)


def test_partition_of_a_tree_with_the_base() -> None:
    tree = {"params": PARAMS, "lora": start(init="pissa", bias="all")}
    train, fixed = lora.partition(tree)
    assert {leaf.shape for leaf in jax.tree.leaves(train)} == {(2, 6), (2, 5), (5,)}
    assert len(jax.tree.leaves(train)) == 3
    back = lora.combine(train, fixed)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert all(one is other for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True))
    with pytest.raises(lora.ParameterError, match="No adapter found"):
        lora.partition(PARAMS)
