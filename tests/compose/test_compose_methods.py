"""What PEFT's add_weighted_adapter gets wrong, and methods with a rule of their own."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same
from hypothesis import given
from hypothesis import strategies as st
from test_compose import SEARCH, SITES, THINNING, compose, delta, layers, made, near, total

import lora_jax as lora
from lora_jax.compose.factors import triplets
from lora_jax.compose.ties_dare import kept, majority
from lora_jax.methods import AdaLora

# The defects of PEFT's add_weighted_adapter, one by one.


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd", "rank_one"])
def test_scales_count_once(method: str) -> None:
    """PEFT once multiplied the update of its `svd` methods by the scale twice."""
    (adapter,) = made(1, sites=SITES[:1])
    strong = lora.scale(adapter, 4.0)
    found = compose([strong], method, **({"density": 1.0} if method in THINNING else {}))
    near(delta(found, "dense"), 4 * delta(adapter, "dense"))


def test_rslora_adapters_keep_their_size() -> None:
    """In PEFT the new adapter inherits rsLoRA, and with it a factor of the root of its rank."""
    params = {"w": jnp.ones((8, 6))}
    sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 8)))
    config = lora.LoraConfig(rank=4, targets="w", rslora=True)
    adapter = lora.init(jax.random.key(0), config, params, sites)
    trained = lora.Adapter({"w": replace(adapter["w"], b=jax.random.normal(jax.random.key(1), (4, 6)))})
    for method in ("cat", "svd", "linear"):
        near(delta(compose([trained], method), "w"), delta(trained, "w"))


def test_linear_has_no_cross_terms() -> None:
    """PEFT adds up A and B by themselves, and the product has one adapter's B times the other's A."""
    adapters = made(sites=SITES[:1], ranks=(2, 2))
    desired = total(adapters, (1, 1), "dense")
    near(delta(compose(adapters, "linear", rank=4), "dense"), desired)
    theirs = delta(compose(adapters, "peft_linear"), "dense")
    assert np.linalg.norm(theirs - desired) > 0.3 * np.linalg.norm(desired)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starting_factors_are_taken_off_and_the_base_is_left_alone(init: str) -> None:
    """PEFT starts the new adapter as the first one was, and so takes its product off the base once more."""
    params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
    before = np.array(params["w"])
    sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 8)))
    config = lora.LoraConfig(rank=2, targets="w", init=init)
    adapters = [lora.init(jax.random.key(seed), config, params, sites) for seed in range(2)]
    for method in ("cat", "svd"):
        fresh = compose(adapters, method)
        assert np.abs(delta(fresh, "w")).max() < 1e-5, "at the start the model is the base"
    trained = [lora.Adapter({"w": replace(each["w"], b=2.0 * each["w"].b)}) for each in adapters]
    near(delta(compose(trained, "cat", [0.3, 0.6]), "w"), total(trained, [0.3, 0.6], "w"), 1e-5)
    np.testing.assert_array_equal(params["w"], before)


def test_a_failure_leaves_nothing_behind() -> None:
    adapters = made(sites=SITES[:1])
    copies = jax.tree.map(np.array, adapters)
    with pytest.raises(lora.ConfigError, match="density"):
        lora.compose(adapters, method="ties")
    assert_same(adapters, copies)
    assert lora.compose(adapters)["dense"].rank == 5


# Methods with a rule of their own.


def test_dare_keeps_the_expectation_and_draws_by_key_path_and_layer() -> None:
    (adapter,) = made(1, sites=SITES[4:5])
    keys = jax.random.split(jax.random.key(3), 400)
    draw = jax.jit(jax.vmap(lambda key: lora.compose(
        [adapter], method="dare_linear_svd", density=0.5, key=key, rank=3)["layers"].delta()))  # fmt: skip
    near(draw(keys).mean(0), delta(adapter, "layers"), 0.3)
    one, again, other = draw(keys[jnp.array([0, 0, 1])])
    np.testing.assert_array_equal(one, again)
    dropped = np.abs(np.asarray(one)) < 1e-6
    assert 0.3 < dropped.mean() < 0.7
    assert (dropped != (np.abs(np.asarray(other)) < 1e-6)).any()
    assert (dropped[:, 0] != dropped[:, 1]).any()


@SEARCH
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=20), st.floats(0, 1))
def test_pruning_keeps_as_many_as_asked_for(numbers: list[int], share: float) -> None:
    values = np.float32(numbers)
    count = int(share * len(numbers))
    chosen = np.asarray(kept(jnp.asarray(values), count))
    assert chosen.sum() == count
    if 0 < count < len(numbers):
        assert np.abs(values[chosen]).min() >= np.abs(values[~chosen]).max()


def test_majority_sign_both_ways() -> None:
    stack = jnp.float32([[5.0, 1.0, 0.0], [-1.0, -1.0, 2.0], [-1.0, 1.0, -3.0]])
    assert majority(stack, "total").tolist() == [[True, True, False], [False, False, False], [False, True, True]]
    assert majority(stack, "frequency").tolist() == [[False, True, False], [True, False, True], [True, True, False]]


def test_knots_against_full_matrices() -> None:
    """The definition, with matrices side by side and their singular value decomposition."""
    adapters = made(sites=SITES[:1], ranks=(2, 2))
    found = compose(adapters, "knots", [0.5, 1.5], density=0.6, rank=4)
    deltas = [delta(adapter, "dense").T for adapter in adapters]
    left, values, right = np.linalg.svd(np.concatenate(deltas, 1), full_matrices=False)
    blocks = [right[:4, :6], right[:4, 6:]]
    pruned = [np.where(np.abs(each) >= np.sort(np.abs(each), None)[-int(0.6 * each.size)], each, 0) for each in blocks]
    agreeing = np.sign(pruned) == np.where(np.sum(pruned, 0) >= 0, 1, -1)
    weighted = np.array(pruned) * np.array([0.5, 1.5])[:, None, None]
    core = (weighted * agreeing).sum(0) / np.maximum(agreeing.sum(0), 1)
    # Singular vectors have a sign of their own, which elected signs go with, as a sum of zero may not occur.
    near(delta(found, "dense"), ((left[:, :4] * values[:4]) @ core).T, 1e-4)


def test_slerp_keeps_the_length() -> None:
    """Of two updates of equal length, every one on the way is as long; parallel ones are interpolated."""
    first, second = made(sites=SITES[:1])
    sized = [lora.scale(each, 1 / np.linalg.norm(delta(each, "dense"))) for each in (first, second)]
    for share in (0.1, 0.5, 0.8):
        found = compose(sized, "slerp", [1 - share, share], rank=5)
        np.testing.assert_allclose(np.linalg.norm(delta(found, "dense")), 1, rtol=1e-5)
    doubled = compose([first, lora.scale(first, 3.0)], "slerp", rank=2)
    near(delta(doubled, "dense"), 2 * delta(first, "dense"), 1e-5)


def test_rank_one_keeps_the_strongest_terms() -> None:
    adapters = made(sites=[SITES[4]])
    found = compose(adapters, "rank_one", [0.5, -1.0])
    assert found["layers"].rank == 2, "half of the sum of the ranks, 2 and 3"
    for layer in range(4):
        terms = []
        for adapter, weight in zip(adapters, (0.5, -1.0), strict=True):
            left, values, right = np.linalg.svd(layers(SITES[4], delta(adapter, "layers"))[layer], full_matrices=False)
            terms += [weight * d * np.outer(left[:, i], right[i]) for i, d in enumerate(values)]
        strongest = sorted(terms, key=lambda term: -np.linalg.norm(term))[:2]
        near(layers(SITES[4], delta(found, "layers"))[layer], sum(strongest), 1e-4)


def test_block_keeps_whole_adapters() -> None:
    site = SITES[4]
    weak, strong = made(sites=[site], ranks=(2, 2))
    layer = jnp.arange(4) < 2
    weak = lora.Adapter({site.path: replace(weak[site.path], scale=jnp.where(layer, 100.0, 0.01))})
    found = compose([weak, strong], "block")
    assert found[site.path].rank == 2
    desired = np.where(np.asarray(layer)[None, :, None], delta(weak, site.path), delta(strong, site.path))
    near(delta(found, site.path), desired)
    whole = compose([weak, strong], "block", rank=4)
    near(delta(whole, site.path), total([weak, strong], [1, 1], site.path))
    with pytest.raises(lora.ConfigError, match=r"layers: method='block' keeps whole adapters, and rank=1"):
        compose([weak, strong], "block", rank=1)


def test_report_of_what_is_left_out() -> None:
    adapters = made()
    report = lora.compose_report(adapters, method="rank_one", rank=2)
    exact = lora.compose(adapters)
    for row in report.rows:
        left_out = delta(exact, row.path) - delta(report.adapter, row.path)
        size = np.square(delta(exact, row.path)).sum()
        np.testing.assert_allclose(row.lost, np.square(left_out).sum() / size, rtol=1e-4)
        np.testing.assert_allclose(row.deviation**2, row.lost, rtol=1e-3)
    assert report.worst is not None
    assert report.worst.lost == max(row.lost for row in report.rows)
    assert "energy lost" in repr(report)
    exact = lora.compose_report(adapters)
    assert all(row.lost == 0 and row.deviation < 1e-6 for row in exact.rows)
    assert all(row.lost == 0 for row in lora.compose_report(adapters, [0, 0]).rows)


@pytest.mark.parametrize("method", ["lora", "dora", "lora-fa", "lora-xs", "adalora", "vera"])
def test_canonical(method: str, getkey: Callable[[], jax.Array]) -> None:
    """It computes the same, with orthonormal factors and descending values."""
    params = {"w": jax.random.normal(getkey(), (3, 8, 6)) / 3}
    fn = lambda params, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w @ w.T), None), x, params["w"])[0]  # noqa: E731
    x = jax.random.normal(getkey(), (2, 8))
    sites = lora.find_sites(fn, params, x)
    adapter = lora.init(getkey(), lora.LoraConfig(method=method, rank=2, targets="w"), params, sites)
    adapter = jax.tree.map(
        lambda leaf, train: leaf + 0.3 * jax.random.normal(getkey(), leaf.shape) if train else leaf,
        adapter, lora.trainable(adapter),
    )  # fmt: skip
    found = lora.canonical(adapter)
    # The weights: a function of six products in a row magnifies the last bit of the factors.
    assert_close(lora.merge(params, found), lora.merge(params, adapter))
    update = found["w"]
    near(jnp.einsum("lri,lsi->lrs", update.a, update.a), np.broadcast_to(np.eye(2), (3, 2, 2)), 1e-5)
    if isinstance(update, AdaLora):
        assert bool((update.values[:, 0] >= update.values[:, 1]).all())
        near(jnp.einsum("lri,lsi->lrs", update.b, update.b), np.broadcast_to(np.eye(2), (3, 2, 2)), 1e-5)


def test_triplets_of_more_terms_than_dimensions() -> None:
    a, b = (jax.random.normal(jax.random.key(i), (9, size)) for i, size in enumerate((4, 6)))
    found = triplets(a, b)
    assert found.values.shape == (4,)
    near((found.left.T * found.values[None]) @ found.right, a.T @ b, 1e-5)
