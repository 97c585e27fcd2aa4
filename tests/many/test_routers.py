"""Routers: adapters chosen by the inputs of every product."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, compiled, random_adapter
from table import CASES, Case

import lora_jax as lora
from lora_jax.many.routers import Learned, Router, Strongest

BOTH_WAYS = {"plain-used_both_ways", "plain-gradient_inside", "plain-fused_on_the_input"}
"""Rows of the shared table that apply a parameter to what has the axes of its outputs, or to parts of its inputs."""
FORMED = {
    "plain-scattered_points", "plain-sum_of_weights", "plain-standardised", "plain-concatenation",
    "plain-concatenated_inputs", "plain-padding", "plain-tiled", "plain-rolled", "plain-stacked_then_scanned",
    "plain-chosen_by_a_flag", "plain-convolved_kernel", "plain-fourier", "plain-complex_pair", "plain-complex_phases",
}  # fmt: skip
KINDS = {"conv", "embedding", "ragged"}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Constant(Router):
    """The same weights everywhere."""

    keys: Any
    given: Any

    def weights(self, scores: Any) -> Any:
        return jnp.broadcast_to(self.given, scores.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Identity(Router):
    """The scores themselves."""

    keys: Any

    def weights(self, scores: Any) -> Any:
        return scores


def ones(bank: lora.AdapterBank) -> dict[str, Any]:
    """Keys for every slot."""
    return {
        path: jnp.ones((*held.site.batch_shape, held.count - 1, *held.site.sizes(held.site.in_axes)))
        for path, held in bank.items()
    }


def delta(adapter: lora.Adapter) -> np.ndarray:
    """What an adapter adds to `w`."""
    update = adapter["w"]
    assert isinstance(update, lora.LowRank)
    return np.asarray(update.delta())


def random_keys(bank: lora.AdapterBank, seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jax.device_put(np.float32(draw.normal(size=leaf.shape))), ones(bank))


ROWS = [case for case in CASES if case.method == "lora" and not case.materialised]


def shows_no_input(case: Case) -> bool:
    """Whether a row uses a parameter otherwise than by applying it to inputs in plain products."""
    if case.id == "plain-one_hot_look_up":  # a table, but in a product
        return False
    return bool({site.kind for site in case.targets.values()} & KINDS) or case.id in BOTH_WAYS | FORMED


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_constant_weights_are_a_weighted_sum_of_adapters(case: Case) -> None:
    """Every way of using a parameter in a product, in loops, experts and transformations, with three adapters."""
    fn, params, args = case.model
    adapters = [random_adapter(case.targets, seed=i, rank=rank) for i, rank in enumerate((2, 3, 1))]
    bank = lora.AdapterBank.of(adapters)
    router = Constant(ones(bank), jnp.array([0.5, -2.0, 0.0]))
    if shows_no_input(case):
        with pytest.raises(lora.ParameterError, match=r"(?i)leave .* out"):
            lora.route(fn)(params, bank, router, *args)
        return
    found = compiled(lora.route(fn))(params, bank, router, *args)
    expected = compiled(lora.adapt(fn))(params, [lora.scale(adapters[0], 0.5), lora.scale(adapters[1], -2.0)], *args)
    is_array = lambda leaf: hasattr(leaf, "shape")  # noqa: E731
    found, expected = ([leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)] for tree in (found, expected))
    assert_close(found, expected)


def normal(*shape: int, seed: int = 0) -> Any:
    return jax.device_put(np.float32(np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-2])))


X = normal(5, 6, seed=9) * 3


def dense(params: Any, x: Any) -> Any:
    return x @ params["w"]


def on_the_left(params: Any, x: Any) -> Any:
    return (params["w"].T @ x.T).T


def heads(params: Any, x: Any) -> Any:
    return jnp.einsum("bd,dhk->bhk", x, params["w"].reshape(6, 2, 2))


def in_parts(params: Any, x: Any) -> Any:
    """A fused weight, of which the program takes parts."""
    one, other = jnp.split(params["w"], 2, axis=1)
    return jnp.concatenate([x @ one, x @ other], axis=1)


def in_columns(params: Any, x: Any) -> Any:
    """Inputs that are two axes."""
    return jnp.einsum("bij,ijo->bo", x.reshape(-1, 2, 3), params["w"].reshape(2, 3, 4))


def checkpointed(params: Any, x: Any) -> Any:
    return jax.checkpoint(dense)(params, x)


FORMS: list[Callable[..., Any]] = [dense, on_the_left, heads, in_parts, in_columns, checkpointed]
SITES = lora.find_sites(dense, {"w": normal(6, 4)}, X)
ADAPTERS = [random_adapter(SITES, seed=i, rank=rank) for i, rank in enumerate((2, 3, 1))]
BANK = lora.AdapterBank.of(ADAPTERS)
PARAMS = {"w": normal(6, 4)}


@pytest.mark.parametrize("fn", FORMS)
def test_scores_are_products_of_inputs_and_keys(fn: Callable[..., Any]) -> None:
    keys = random_keys(BANK)
    found = jax.jit(lora.route(fn))(PARAMS, BANK, Identity(keys), X)
    scores = np.asarray(X) @ np.asarray(keys["w"]).T
    parts = [np.asarray(X) @ delta(adapter) for adapter in ADAPTERS]
    expected = np.asarray(X @ PARAMS["w"]) + sum(scores[:, i, None] * part for i, part in enumerate(parts))
    assert_close(found.reshape(5, 4), jnp.asarray(expected, jnp.float32))


def halves(params: Any, x: Any) -> Any:
    return x[:, :3] @ params["w"][:3] + x[:, 3:] @ params["w"][3:]


def kept_apart(params: Any, x: Any) -> Any:
    return jax.vmap(jnp.matmul, in_axes=(1, 0))(x.reshape(-1, 2, 3), params["w"].reshape(2, 3, 4)).sum(0)


def chunks(params: Any, x: Any) -> Any:
    parts = x.reshape(-1, 2, 3).swapaxes(0, 1), params["w"].reshape(2, 3, 4)
    return jax.lax.scan(lambda total, part: (total + part[0] @ part[1], None), jnp.zeros((len(x), 4)), parts)[0]


def split_over_devices(spec: Any, params: Any, x: Any) -> Any:
    """A product inside `shard_map`: with inputs, outputs or rows split."""
    mesh = jax.make_mesh((2,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    total = (lambda y: jax.lax.psum(y, "m")) if spec[0][1] else lambda y: y
    product = jax.shard_map(lambda x, w: total(x @ w), mesh=mesh, in_specs=spec[:2], out_specs=spec[2])
    return product(x, params["w"])


def specs(*names: Any) -> tuple[Any, ...]:
    return tuple(jax.sharding.PartitionSpec(*each) for each in names)


BY_INPUTS = specs((None, "m"), ("m", None), (None, None))
BY_OUTPUTS = specs((None, None), (None, "m"), (None, "m"))
BY_ROWS = specs(("m", None), (None, None), ("m", None))


@pytest.mark.parametrize("fn", [halves, kept_apart, chunks, partial(split_over_devices, BY_INPUTS)])
def test_parts_of_an_input_decide_nothing(fn: Callable[..., Any]) -> None:
    """Every part would be routed by itself, and the result would be another one than that of the whole product."""
    assert_close(compiled(lora.adapt(fn))(PARAMS, ADAPTERS, X), compiled(lora.adapt(dense))(PARAMS, ADAPTERS, X))
    with pytest.raises(lora.ParameterError, match=r"parts"):
        lora.route(fn)(PARAMS, BANK, lora.routers.arrow(BANK), X)


@pytest.mark.parametrize("spec", [BY_OUTPUTS, BY_ROWS])
def test_whole_inputs_on_every_device(spec: Any) -> None:
    x, router = normal(4, 6, seed=3), lora.routers.arrow(BANK, top_k=2)
    found = jax.jit(lora.route(partial(split_over_devices, spec)))(PARAMS, BANK, router, x)
    assert_close(np.asarray(found), np.asarray(compiled(lora.route(dense))(PARAMS, BANK, router, x)))


def test_an_axis_that_the_program_only_broadcasts() -> None:
    fn = lambda params, x: jnp.einsum("bdi,dio->bo", x[:, :, None], params["w"][:, None])  # noqa: E731
    router = lora.routers.arrow(BANK, top_k=2)
    assert_close(
        compiled(lora.route(fn))(PARAMS, BANK, router, X), compiled(lora.route(dense))(PARAMS, BANK, router, X)
    )


def layers(params: Any, x: Any) -> Any:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def experts(params: Any, x: Any) -> Any:
    return jax.vmap(jnp.matmul)(jnp.stack([x, 2 * x, -x]), params["w"]).sum(0)


@pytest.mark.parametrize("fn", [layers, experts])
def test_every_map_of_a_stack_has_keys_of_its_own(fn: Callable[..., Any]) -> None:
    params = {"w": normal(3, 6, 6)}
    sites = lora.find_sites(fn, params, X)
    bank = lora.AdapterBank.of([random_adapter(sites, seed=i) for i in range(2)])
    keys = random_keys(bank)
    deltas = [delta(bank.get(slot)) for slot in (1, 2)]

    def one(x: Any, e: int) -> Any:
        scores = x @ np.asarray(keys["w"][e]).T
        return x @ np.asarray(params["w"][e]) + sum(scores[:, i, None] * (x @ deltas[i][e]) for i in range(2))

    x = np.asarray(X)
    in_turn = lambda: np.tanh(one(np.tanh(one(np.tanh(one(x, 0)), 1)), 2))  # noqa: E731
    expected = in_turn() if fn is layers else one(x, 0) + one(2 * x, 1) + one(-x, 2)
    assert_close(
        compiled(lora.route(fn))(params, bank, Identity(keys), X), jnp.asarray(expected, jnp.float32), factor=3
    )


def arrow_by_hand(x: np.ndarray, adapters: Any, top_k: int, temperature: float) -> np.ndarray:
    deltas = [delta(adapter) for adapter in adapters]
    prototypes = np.stack([np.linalg.svd(delta)[0][:, 0] for delta in deltas])
    result = np.asarray(x @ np.asarray(PARAMS["w"]))
    for row, similar in enumerate(np.abs(x @ prototypes.T)):
        chosen = np.argsort(-similar)[:top_k]
        powers = np.exp((similar[chosen] - similar[chosen].max()) / temperature)
        for weight, i in zip(powers / powers.sum(), chosen, strict=True):
            result[row] += weight * (x[row] @ deltas[i])
    return result


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (3, 2.0), (7, 1.0)])
def test_arrow(top_k: int, temperature: float) -> None:
    router = lora.routers.arrow(BANK, top_k=top_k, temperature=temperature)
    np.testing.assert_allclose(np.linalg.norm(router.keys["w"], axis=-1), 1, rtol=1e-6)
    found = compiled(lora.route(dense))(PARAMS, BANK, router, X)
    expected = arrow_by_hand(np.asarray(X), ADAPTERS, top_k, temperature)
    assert_close(found, jnp.asarray(expected, jnp.float32), factor=3)


def test_arrow_leaves_out_slots_that_hold_nothing_for_a_parameter() -> None:
    """Empty slots, and adapters of other targets, take no share of the softmax."""
    params = {"w": normal(6, 4), "v": normal(4, 3)}
    both = lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"]  # noqa: E731
    sites = lora.find_sites(both, params, X)
    full, partial = random_adapter(sites, seed=1), random_adapter([sites["w"]], seed=2)
    bank = lora.AdapterBank.empty(sites, slots=6, rank=4).put(2, full).put(5, partial)
    router = lora.routers.arrow(bank, top_k=4)
    assert np.flatnonzero(np.abs(router.keys["w"]).sum(-1)).tolist() == [1, 4]
    usage = compiled(lora.route(both).usage)(params, bank, router, X)
    np.testing.assert_allclose(usage["v"], [0, 1, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(usage["w"].sum(), 1, rtol=1e-6)
    assert 0 < usage["w"][1] < 1 and np.asarray(usage["w"])[[0, 2, 3]].tolist() == [0, 0, 0]
    # A row of zeros is like no prototype: it meets the base, and its gradient is finite.
    loss = lambda x: jnp.sum(lora.route(both)(params, bank, router, x) ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(jnp.zeros_like(X))
    assert bool(jnp.isfinite(gradient).all())
    assert_close(compiled(lora.route(both))(params, bank, router, jnp.zeros_like(X)), both(params, jnp.zeros_like(X)))


def test_what_changes_nothing_but_by_rounding_takes_no_share() -> None:
    config = lora.LoraConfig(rank=2, targets="w", init="pissa")
    untrained = lora.init(jax.random.key(0), config, PARAMS, SITES)
    bank = lora.AdapterBank.of([untrained, ADAPTERS[1]])
    usage = compiled(lora.route(dense).usage)(PARAMS, bank, lora.routers.arrow(bank, top_k=2), X)["w"]
    np.testing.assert_allclose(usage, [0, 1], atol=1e-6)


def test_equal_scores_are_not_more_than_top_k() -> None:
    router = lora.routers.arrow([ADAPTERS[0]] * 3, top_k=2)
    assert router.weights(jnp.ones((1, 3))).tolist() == [[0.5, 0.5, 0]]
    bank, strongest = lora.routers.components([ADAPTERS[2]] * 2, top_k=1)
    np.testing.assert_allclose(compiled(lora.route(dense).usage)(PARAMS, bank, strongest, X)["w"].sum(), 1)
    assert not Strongest({}, 3).weights(jnp.zeros((1, 4))).any()


def test_extreme_temperatures() -> None:
    scores = jnp.float32([[1, 2, 3]])
    cold, warm = (lora.routers.arrow(BANK, temperature=t).weights(scores) for t in (1e-37, 1e37))
    np.testing.assert_allclose(cold, [[0, 0, 1]])
    np.testing.assert_allclose(warm, [[1 / 3] * 3], rtol=1e-6)
    traced = jax.jit(lambda t: lora.routers.arrow(BANK, temperature=t).weights(scores))(1e37)
    assert_close(traced, warm)


def test_arrow_on_scanned_layers_is_arrow_layer_by_layer() -> None:
    params = {"w": normal(3, 6, 6)}
    bank = lora.AdapterBank.of([random_adapter(lora.find_sites(layers, params, X), seed=i) for i in range(4)])
    keys = lora.routers.arrow(bank).keys["w"]
    for layer in range(3):
        alone = {path: held for path, held in bank.items()}["w"]
        site = lora.find_sites(dense, {"w": params["w"][layer]}, X)["w"]
        one = lora.AdapterBank({"w": type(alone)(alone.a[layer], alone.b[layer], None, site)})
        np.testing.assert_allclose(np.abs(lora.routers.arrow(one).keys["w"]), np.abs(keys[layer]), atol=1e-5)


def test_a_learned_router_finds_which_adapter_is_for_which_input() -> None:
    """Two adapters, each right for inputs that point one way; nothing says which."""
    draw = np.random.default_rng(0)
    kind = draw.integers(2, size=256)
    x = jax.device_put(np.float32(draw.normal(size=(256, 6)) + 3 * np.eye(6)[kind]))
    deltas = [delta(adapter) for adapter in ADAPTERS[:2]]
    y = dense(PARAMS, x) + np.stack([np.asarray(row) @ deltas[i] for row, i in zip(x, kind, strict=True)])
    bank = lora.AdapterBank.of(ADAPTERS[:2])
    router: Any = lora.routers.learned(jax.random.key(0), bank)
    optimizer = optax.adam(0.1)

    def loss(router: Any) -> Any:
        return jnp.mean((lora.route(dense)(PARAMS, bank, router, x) - y) ** 2)

    @jax.jit
    def step(router: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(router)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(router, updates), state, value

    state = optimizer.init(router)
    router, state, before = step(router, state)
    for _ in range(60):
        router, state, after = step(router, state)
    assert float(after) < 0.05 * float(before)
    for i in (0, 1):
        usage = compiled(lora.route(dense).usage)(PARAMS, bank, router, x[kind == i])
        assert float(usage["w"][i]) > 0.95


def test_gradients_of_a_learned_router() -> None:
    router = lora.routers.learned(jax.random.key(0), BANK, top_k=2)

    def loss(keys: Any, bank: Any) -> Any:
        return jnp.sum(jnp.sin(lora.route(dense)(PARAMS, bank, Learned(keys, 2), X)))

    with jax.default_matmul_precision("highest"):
        chex.assert_numerical_grads(
            jax.jit(lambda keys: loss({"w": keys}, BANK)), (router.keys["w"],), order=1, atol=2e-2, rtol=2e-2
        )
    gradient = jax.jit(jax.grad(loss, argnums=1))(router.keys, BANK)["w"].a
    assert all(float(jnp.abs(part).max()) > 0 for part in gradient)


def components_by_hand(x: np.ndarray, adapters: Any, top_k: int) -> np.ndarray:
    terms = []
    for adapter in adapters:
        left, values, right = np.linalg.svd(delta(adapter), full_matrices=False)
        rank = adapter["w"].rank
        terms += [(left[:, i], values[i] * right[i]) for i in range(rank)]
    result = np.asarray(x @ np.asarray(PARAMS["w"]))
    for row in range(len(x)):
        answers = [(x[row] @ v) * u for v, u in terms]
        for i in np.argsort([-np.linalg.norm(answer) for answer in answers])[:top_k]:
            result[row] += answers[i]
    return result


@pytest.mark.parametrize("top_k", [1, 2, 3, 6, None])
def test_components_with_the_strongest_answers(top_k: int | None) -> None:
    bank, router = lora.routers.components(ADAPTERS, top_k=top_k)
    assert (bank.slots, bank.rank, router.top_k) == (7, 1, top_k or 3)
    found = jax.jit(lora.route(dense))(PARAMS, bank, router, X)
    expected = components_by_hand(np.asarray(X), ADAPTERS, top_k or 3)
    assert_close(found, jnp.asarray(expected, jnp.float32), factor=3)
    met = compiled(lora.route(dense).usage)(PARAMS, bank, router, X)["w"]
    np.testing.assert_allclose(met.sum(), top_k or 3, rtol=1e-6)


def test_all_components_are_all_adapters() -> None:
    """Of different targets, scanned layers among them, subtracted and of other methods."""
    params = {"w": normal(3, 6, 6), "v": normal(6, 3)}
    fn = lambda params, x: layers(params, x) @ params["v"]  # noqa: E731
    sites = lora.find_sites(fn, params, X)
    config = lora.LoraConfig(rank=2, targets=("w", "v"), method="adalora")
    other = jax.tree.map(lambda leaf: leaf + 0.1, lora.init(jax.random.key(0), config, params, sites))
    adapters = [random_adapter(sites, seed=1), lora.scale(random_adapter([sites["w"]], seed=2), -0.5), other]
    bank, router = lora.routers.components(adapters, top_k=6)
    assert bank["w"].count == bank["v"].count == 7
    assert_close(
        compiled(lora.route(fn))(params, bank, router, X), compiled(lora.adapt(fn))(params, adapters, X), factor=3
    )


def test_components_that_are_none() -> None:
    config = lora.LoraConfig(rank=2, targets="w", method="dora")
    dora = lora.methods.precompute(PARAMS, lora.init(jax.random.key(0), config, PARAMS, SITES))
    with pytest.raises(lora.ParameterError, match="w has a gain"):
        lora.routers.components([dora])
    with pytest.raises(lora.ConfigError, match="at least one adapter"):
        lora.routers.components([])


def test_dora_is_routed_with_its_gains() -> None:
    config = lora.LoraConfig(rank=2, targets="w", method="dora", init="gaussian")
    fresh = [lora.init(jax.random.key(i), config, PARAMS, SITES) for i in range(2)]
    moved = [jax.tree.map(lambda leaf: leaf + 0.1, each) for each in fresh]
    adapters = [lora.methods.precompute(PARAMS, adapter) for adapter in moved]
    bank = lora.AdapterBank.of(adapters)
    for i in (0, 1):
        found = compiled(lora.route(dense))(PARAMS, bank, Constant(ones(bank), jnp.eye(2)[i]), X)
        assert_close(found, compiled(lora.adapt(dense))(PARAMS, adapters[i], X))


def test_usage_by_layer_and_by_expert() -> None:
    for fn in (layers, experts):
        params = {"w": normal(3, 6, 6)}
        bank = lora.AdapterBank.of([random_adapter(lora.find_sites(fn, params, X), seed=i) for i in range(2)])
        routed = lora.route(fn)
        found = jax.jit(routed.usage)(params, bank, lora.routers.arrow(bank, top_k=2), X)["w"]
        assert found.shape == (3, 2)
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
        assert len({round(float(value), 4) for value in found[:, 0]}) == 3, "each has inputs of its own"
    only = compiled(lora.route(experts).usage)(params, bank, Constant(ones(bank), jnp.array([0.25, 0.0])), X)["w"]
    np.testing.assert_allclose(only, [[0.25, 0.0]] * 3)


def test_nothing_is_compiled_for_other_adapters_or_temperatures() -> None:
    count = 0

    @jax.jit
    def run(bank: Any, router: Any) -> Any:
        nonlocal count
        count += 1
        return lora.route(dense)(PARAMS, bank, router, X)

    bank = lora.AdapterBank.empty(SITES, slots=5, rank=4)
    for slot, temperature in ((1, 1.0), (3, 0.1), (4, 7.0)):
        bank = bank.put(slot, ADAPTERS[slot % 3])
        run(bank, lora.routers.arrow(bank, temperature=temperature))
    assert count == 1
