"""AdapterBank: slots that are filled and emptied in place, without compiling anything."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, random_adapter

import lora_jax as lora
from benchmarks.harness import compilations


def fn(params: Any, tokens: Any) -> Any:
    x = params["embed"][tokens]
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    return x @ params["head"]


def _params(*sizes: tuple[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    draw = np.random.default_rng(0)
    return {name: jax.device_put(np.float32(draw.normal(size=shape))) for name, shape in sizes}


PARAMS = _params(("embed", (9, 4)), ("layers", (3, 4, 4)), ("head", (4, 5)))
TOKENS = jnp.asarray([[1, 2], [3, 4], [8, 0], [5, 5]])
SITES = lora.find_sites(fn, PARAMS, TOKENS)


def adapter(seed: int, rank: int = 2, *without: str) -> lora.Adapter:
    return random_adapter(SITES, seed=seed, rank=rank).without(*without)


@pytest.fixture
def bank() -> lora.AdapterBank:
    return lora.AdapterBank.empty(SITES, slots=4, rank=3)


def alone(given: Any, row: int) -> Any:
    return lora.adapt(fn)(PARAMS, given, TOKENS[row : row + 1])[0]


routed = jax.jit(lora.route(fn))


def test_different_ranks_and_targets_in_one_bank(bank: lora.AdapterBank) -> None:
    given = [adapter(0), adapter(1, 3, "head"), adapter(2, 1, "embed", "layers")]
    for slot, each in enumerate(given, 1):
        bank = bank.put(slot, each)
    found = routed(PARAMS, bank, jnp.asarray([3, 1, 0, 2]), TOKENS)
    expected = [alone(given[2], 0), alone(given[0], 1), alone([], 2), alone(given[1], 3)]
    assert_close(found, jnp.stack(expected))
    assert_close(routed(PARAMS, lora.AdapterBank.of(given), jnp.asarray([3, 1, 0, 2]), TOKENS), found)


def test_what_was_evicted_is_the_base_and_others_stay(bank: lora.AdapterBank) -> None:
    bank = bank.put(1, adapter(0)).put(2, adapter(1, 3)).evict(1)
    found = routed(PARAMS, bank, jnp.asarray([1, 2, 1, 2]), TOKENS)
    assert_close(found[0], alone([], 0))
    assert_close(found[1], alone(adapter(1, 3), 1))
    assert_same(jax.tree.leaves(bank.put(2, lora.Adapter({}))), jax.tree.leaves(lora.AdapterBank.empty(SITES, 4, 3)))


def test_get_gives_what_was_put(bank: lora.AdapterBank) -> None:
    bank = bank.put(3, adapter(0))
    held = bank.get(3)
    assert_close(alone(held, 1), alone(adapter(0), 1))
    assert held["head"].rank == 3
    again = bank.put(2, held).get(2)
    assert_close(alone(again, 1), alone(adapter(0), 1))


def test_a_thousand_loads_and_evictions_compile_nothing(bank: lora.AdapterBank) -> None:
    given = [adapter(0), adapter(1, 3, "head"), adapter(2, 1, "embed"), lora.scale(adapter(3), 0.5)]
    ids = [jnp.asarray(each) for each in ([0, 1, 2, 3], [3, 3, 1, 0])]
    bank = bank.put(1, given[0])
    routed(PARAMS, bank, ids[0], TOKENS).block_until_ready()
    with compilations() as compiled:
        for i in range(500):
            bank = bank.put(1 + i % 3, given[i % 4])
            bank = bank.evict(1 + (i + 1) % 3)
            if i % 50 == 0:
                routed(PARAMS, bank, ids[i % 2], TOKENS)
    assert not compiled
    expected = alone(given[499 % 4], 1)
    assert_close(routed(PARAMS, bank, jnp.asarray([0, 1 + 499 % 3, 0, 0]), TOKENS)[1], expected)


def test_slots_are_written_in_place(bank: lora.AdapterBank) -> None:
    before = bank["head"].a
    bank = bank.put(1, adapter(0))
    assert before.is_deleted()
    assert bank["head"].a.shape == (3, 3, 4)


def test_a_slot_out_of_range_is_left_alone_inside_jit(bank: lora.AdapterBank) -> None:
    bank = bank.put(3, adapter(0))
    held = jax.tree.map(np.asarray, bank)
    put = jax.jit(lambda bank, slot: bank.put(slot, adapter(1)))
    for slot in (0, 4, 9, -1):
        assert_same(jax.tree.leaves(put(bank, slot)), jax.tree.leaves(held))
    assert float(jnp.abs(put(bank, 2)["head"].a[1] - held["head"].a[1]).max()) > 0


def test_a_transposed_use_is_another_parameter() -> None:
    square = {"w": jnp.eye(4)}
    uses = (lambda p, x: x @ p["w"], lambda p, x: x @ p["w"].T)
    sites = [lora.find_sites(use, square, jnp.ones((2, 4))) for use in uses]
    with pytest.raises(lora.ParameterError, match="they are for different models"):
        lora.AdapterBank.of([random_adapter(each) for each in sites])


def test_methods_without_a_scale_of_their_own() -> None:
    """PiSSA's start, VeRA and the like are plain factors in a bank."""
    given = []
    for options in ({"init": "pissa"}, {"method": "vera", "rank": 4}, {"method": "lora-fa"}):
        config = lora.LoraConfig(**{"rank": 2, "targets": ("head", "layers"), **options})
        start = lora.init(jax.random.key(0), config, PARAMS, SITES)
        given.append(jax.tree.map(lambda leaf, train: leaf + 0.3 if train else leaf, start, lora.trainable(start)))
    bank = lora.AdapterBank.empty(SITES, slots=4, rank=4)
    for slot, each in enumerate(given, 1):
        bank = bank.put(slot, each)
    found = routed(PARAMS, bank, jnp.asarray([1, 2, 3, 0]), TOKENS)
    assert_close(found[:3], jnp.stack([alone(each, i) for i, each in enumerate(given)]))


def test_gains_need_room() -> None:
    config = lora.LoraConfig(method="dora", rank=2, targets="head")
    start = lora.init(jax.random.key(0), config, PARAMS, SITES)
    trained = jax.tree.map(lambda leaf, train: leaf + 0.2 if train else leaf, start, lora.trainable(start))
    with pytest.raises(lora.ParameterError, match=r"depends on the base: give the bank lora.methods.precompute"):
        lora.AdapterBank.of([trained])
    fixed = lora.methods.precompute(PARAMS, trained)
    with pytest.raises(lora.ParameterError, match="gains=True"):
        lora.AdapterBank.empty(SITES, 3, 2).put(1, fixed)
    bank = lora.AdapterBank.empty(SITES, 3, 2, gains=True).put(1, fixed).put(2, adapter(0))
    found = routed(PARAMS, bank, jnp.asarray([1, 2, 0, 1]), TOKENS)
    assert_close(found[:3], jnp.stack([alone(trained, 0), alone(adapter(0), 1), alone([], 2)]))
    with pytest.raises(lora.ParameterError, match="Slot 1 has a gain at head"):
        bank.get(1)


def test_refusals(bank: lora.AdapterBank) -> None:
    with pytest.raises(lora.ParameterError, match=r"slot=0, but this bank has slots 1 to 3; slot 0 is the base"):
        bank.put(0, adapter(0))
    with pytest.raises(lora.ParameterError, match="slot=4"):
        bank.get(4)
    with pytest.raises(lora.ParameterError, match=r"has rank 4, the bank has room for 3"):
        bank.put(1, adapter(0, 4))
    with pytest.raises(lora.ParameterError, match="no room at 'embed'; nearest: layers"):
        lora.AdapterBank.empty([SITES["layers"]], 3, 2).put(1, adapter(0))
    other = random_adapter([replace(SITES["head"], shape=(4, 6))])
    with pytest.raises(lora.ParameterError, match="they are for different models"):
        bank.put(1, other)
    with pytest.raises(lora.ParameterError, match="they are for different models"):
        lora.AdapterBank.of([adapter(0), other])
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, adapter(0))
    with pytest.raises(lora.ParameterError, match="embed holds numbers that are not finite"):
        bank.put(1, broken)
    whole = lora.Adapter({"head": lora.Replace(PARAMS["head"], SITES["head"])})
    with pytest.raises(lora.ParameterError, match="has a Replace, which is no low-rank change: leave it out"):
        bank.put(1, whole)
    with pytest.raises(lora.ConfigError, match="at least 2 slots"):
        lora.AdapterBank.empty(SITES, 1, 2)
    with pytest.raises(lora.ConfigError, match="2 adapters of ranks up to 2 do not fit into slots=2"):
        lora.AdapterBank.of([adapter(0), adapter(1)], slots=2)
    with pytest.raises(KeyError, match="nearest: head"):
        bank["heat"]


def test_it_prints_as_a_table_and_is_a_tree(bank: lora.AdapterBank) -> None:
    assert "embed" in repr(bank)
    assert len(jax.tree.leaves(bank)) == 3 * len(bank) == 9  # factors, and whether they are sound
    assert bank.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(bank))
    assert (bank.slots, bank.rank, list(bank)) == (4, 3, ["embed", "head", "layers"])


def test_a_bank_trains_too() -> None:
    """Gradients reach the slots that were used, and no others."""
    bank = lora.AdapterBank.of([adapter(i) for i in range(3)])
    grads = jax.jit(jax.grad(lambda bank: jnp.square(routed(PARAMS, bank, jnp.asarray([1, 0, 1, 3]), TOKENS)).sum()))(
        bank
    )
    used = [bool(jnp.any(jnp.moveaxis(grads["layers"].a, 1, 0)[i])) for i in range(3)]
    assert used == [True, False, True]


# AdapterCache.

SHELF = {name: adapter(i, 1 + i % 3) for i, name in enumerate("abcdef")}


def cached(**options: Any) -> lora.AdapterCache:
    return lora.AdapterCache(lora.AdapterBank.empty(SITES, slots=4, rank=3), SHELF.get, **options)


def test_a_cache_serves_more_adapters_than_slots() -> None:
    cache = cached()
    for batch in (["a", "b", "c", None], ["d", "a", "a", "b"], ["e", "f", None, "a"], ["c", "c", "c", "c"]):
        ids = jnp.asarray(cache.ids(batch))
        found = routed(PARAMS, cache.bank, ids, TOKENS)
        expected = [alone(SHELF[name] if name else [], i) for i, name in enumerate(batch)]
        assert_close(found, jnp.stack(expected))
    assert (cache.hits, cache.misses) == (3, 7)


@pytest.mark.parametrize(("policy", "left"), [("lru", {"a", "c", "d"}), ("fifo", {"b", "c", "d"})])
def test_policies(policy: Any, left: set[str]) -> None:
    cache = cached(policy=policy)
    cache.ids(["a", "b", "c"])
    cache.ids(["a"])
    cache.ids(["d"])
    assert {*cache.names} == left


def test_pinned_adapters_stay_and_others_can_be_evicted() -> None:
    cache = cached(pinned=["a"])
    for batch in (["a", "b", "c"], ["d", "e"], ["f", "b"]):
        cache.ids(batch)
    assert cache.names[0] == "a" and {*cache.names} == {"a", "f", "b"}
    cache.evict("f")
    assert {*cache.names} == {"a", "b"}
    with pytest.raises(lora.ParameterError, match="'f' is not in the bank, which has a, b"):
        cache.evict("f")
    with pytest.raises(lora.ConfigError, match=r"4 adapters are needed or pinned at once \(a, c, d, e\)"):
        cache.ids(["c", "d", "e"])


def test_prefetched_adapters_are_loaded_once() -> None:
    loads: list[str] = []

    def load(name: str) -> lora.Adapter | None:
        loads.append(name)
        return SHELF.get(name)

    cache = lora.AdapterCache(lora.AdapterBank.empty(SITES, slots=4, rank=3), load)
    cache.prefetch(["a", "b", "a"])
    cache.prefetch(["b", "nobody"])
    ids = cache.ids(["b", "a", None, "b"])
    assert sorted(loads)[:2] == ["a", "b"] and loads.count("a") == loads.count("b") == 1
    assert_close(routed(PARAMS, cache.bank, jnp.asarray(ids), TOKENS)[1], alone(SHELF["a"], 1))
    with pytest.raises(lora.ParameterError, match="There is no adapter 'nobody'"):
        cache.ids(["nobody"])
    with pytest.raises(lora.ConfigError, match="policy='random'; choose one of lru, fifo"):
        cached(policy="random")
    with pytest.raises(lora.ConfigError, match="4 adapters are needed or pinned"):
        cached(pinned="abcd")
