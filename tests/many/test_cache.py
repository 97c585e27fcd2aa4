"""AdapterCache: what was written again is not served, threads share it, and prefetching is bounded."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora

PARAMS = {"q": {"kernel": jnp.ones((4, 3))}}
X = jnp.ones((2, 4))
SITES = lora.find_sites(lambda params, x: x @ params["q"]["kernel"], PARAMS, X)
CONFIG = lora.LoraConfig(targets="q/kernel", rank=2, alpha=2)
ZERO = lora.init(jax.random.key(0), CONFIG, PARAMS, SITES)
ONE = lora.Adapter({"q/kernel": replace(ZERO["q/kernel"], a=ZERO["q/kernel"].a * 0 + 0.5, b=ZERO["q/kernel"].b + 1)})


def version(number: float) -> lora.Adapter:
    """An adapter that adds `number` to every weight."""
    return lora.scale(ONE, number)


def cached(load: Callable[[str], lora.Adapter | None], slots: int = 4) -> lora.AdapterCache:
    return lora.AdapterCache(lora.AdapterBank.empty(SITES, slots=slots, rank=2), load)


def served(cache: lora.AdapterCache, name: str) -> float:
    """The number of the version that a batch gets."""
    slot = int(cache.ids([name])[0])
    return float(jnp.max(lora.merge(PARAMS, cache.bank.get(slot))["q"]["kernel"])) - 1


@pytest.fixture
def shelf() -> dict[str, lora.Adapter]:
    return {name: version(number) for number, name in enumerate("abcdefgh", 1)}


class Gate:
    """A `load` that waits until it is let through."""

    def __init__(self, shelf: dict[str, lora.Adapter]):
        self.shelf, self.loads = shelf, []
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self, name: str) -> lora.Adapter | None:
        self.loads.append(name)
        found = self.shelf.get(name)
        self.begun.set()
        assert self.open.wait(30)
        return found


@pytest.mark.parametrize("when", ["waiting", "being loaded", "in the bank", "in the bank and waiting"])
def test_evicted_names_are_loaded_again_wherever_they_were(when: str, shelf: dict[str, Any]) -> None:
    gate = Gate(shelf)
    cache = cached(gate)
    if when != "being loaded":
        gate.open.set()
    if "bank" in when:
        assert served(cache, "a") == 1
    if when != "in the bank":
        cache.prefetch(["a"])
        assert gate.begun.wait(30)
    shelf["a"] = version(5)
    cache.evict("a")
    gate.open.set()
    assert served(cache, "a") == 5
    cache.evict("a")
    with pytest.raises(lora.ParameterError, match="'a' is not in the bank, which has none"):
        cache.evict("a")


FORMATS = {
    "own": (lambda path, it: lora.save(path, it, overwrite=True), lora.load),
    "peft": (
        lambda path, it: lora.peft.save(path, it, overwrite=True),
        lambda path: lora.peft.load(path, PARAMS, sites=SITES),
    ),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("prefetched", [True, False])
def test_files_that_are_written_again_are_read_again(form: str, prefetched: bool, tmp_path: Path) -> None:
    save, load = FORMATS[form]
    save(tmp_path / "a", version(1))
    loads = []
    cache = cached(lambda name: loads.append(name) or load(tmp_path / name))
    if prefetched:
        cache.prefetch(["a"])
        cache._prefetched._coming["a"].result(30)
    else:
        assert served(cache, "a") == served(cache, "a") == 1 and loads == ["a"]
    save(tmp_path / "a", version(5))
    assert served(cache, "a") == 5
    assert served(cache, "a") == 5 and loads == ["a", "a"]
    assert cache.names == ("a",) and cache.misses == len(loads) - prefetched


def test_what_cannot_be_read_again_is_an_error_and_what_is_gone_is_served(tmp_path: Path) -> None:
    lora.save(tmp_path / "a", version(1))
    cache = cached(lambda name: lora.load(tmp_path / name))
    assert served(cache, "a") == 1
    (tmp_path / "a").rename(tmp_path / "aside")
    assert served(cache, "a") == 1
    (tmp_path / "a").mkdir()
    with pytest.raises(lora.CheckpointError):
        cache.ids(["a"])
    (tmp_path / "a").rmdir()
    lora.save(tmp_path / "a", version(3))
    assert served(cache, "a") == 3


def test_a_failed_prefetch_is_tried_again_by_the_batch(shelf: dict[str, Any]) -> None:
    cache = cached(shelf.get)
    cache.prefetch(["new"])
    assert isinstance(cache._prefetched._coming["new"].exception(30), lora.ParameterError)
    shelf["new"] = version(7)
    assert served(cache, "new") == 7


def test_prefetching_is_bounded_and_what_waits_the_longest_makes_room(shelf: dict[str, Any]) -> None:
    gate = Gate(shelf)
    cache = cached(gate)
    cache.prefetch(f"{number}" for number in range(10_000_000_000))
    assert gate.begun.wait(30)
    assert [*cache._prefetched._coming] == ["0", "1", "2"]
    cache.prefetch(["a", "2"])
    assert [*cache._prefetched._coming] == ["1", "2", "a"]
    threading.Timer(0.05, gate.open.set).start()
    assert served(cache, "a") == 1  # Not behind the others.
    cache.evict("a")
    assert served(cache, "a") == 1 and "0" in gate.loads


def test_a_batch_that_waits_keeps_the_slots_that_it_was_given(shelf: dict[str, Any]) -> None:
    gate = Gate(shelf)
    gate.open.set()
    cache = cached(gate, slots=3)
    cache.ids(["a", "b"])
    gate.open.clear(), gate.begun.clear()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(cache.ids, ["a", "c"])
        assert gate.begun.wait(30)
        other = pool.submit(cache.ids, ["d", "e"])
        cache.prefetch(["f"])  # Does not wait for the batch.
        assert not one.done() and not other.done()
        gate.open.set()
        assert one.result(30).tolist() == [1, 2] and {*other.result(30)} == {1, 2}
    assert {*cache.names} == {"d", "e"}


def test_threads_share_a_cache(shelf: dict[str, Any]) -> None:
    cache = cached(shelf.get, slots=3)
    routed = jax.jit(lora.route(lambda params, x: x @ params["q"]["kernel"]))
    alone = {name: np.asarray(X @ lora.merge(PARAMS, each)["q"]["kernel"]) for name, each in shelf.items()}

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(12):
            names = [*rng.choice([*shelf], 2)]
            cache.prefetch(rng.choice([*shelf], 2))
            with cache:
                ids = cache.ids(names)
                found = routed(PARAMS, cache.bank, jnp.asarray(ids), X)
            np.testing.assert_allclose(found, [alone[name][i] for i, name in enumerate(names)], rtol=1e-6)
            with suppress(lora.ParameterError):
                cache.evict(str(rng.choice([*shelf])))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for seed in range(4)]:
            done.result(60)
    assert cache.hits + cache.misses >= 4 * 12 and len(cache.names) <= 2
