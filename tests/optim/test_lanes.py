"""Lanes: adapters trained in one step are what each is alone, and stop one by one."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_same, random_adapter
from table import CASES, Case

import lora_jax as lora
from benchmarks.harness import compilations
from benchmarks.lanes import lanes_step
from benchmarks.steps import lora_step
from benchmarks.transformer import Shape

K = 3
STEPS = 4
WIDTH = 6
RATES, DECAYS = [1e-3, 1e-2, 5e-2], [0.0, 0.3, 0.1]
IDS = ("linen-attention", "linen-scan_of_remat", "plain-look_up_then_tied_attend", "plain-gathered_experts")
ROWS = [case for case in CASES if case.id.removesuffix(f"-{case.method}") in IDS and case.method in ("lora", "dora")]


def build(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    """An optimizer that looks at every leaf, at the whole tree, and at time."""
    rate = optax.cosine_decay_schedule(learning_rate, STEPS)
    return optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(rate, weight_decay=weight_decay))


def fn(params: Any, x: Any) -> Any:
    """Two layers."""
    return jnp.tanh(x @ params["up"]) @ params["down"]


PARAMS = {
    "up": jax.random.normal(jax.random.key(0), (WIDTH, 8)),
    "down": jax.random.normal(jax.random.key(1), (8, WIDTH)),
}
X = jax.random.normal(jax.random.key(2), (K, 5, WIDTH))
SITES = lora.find_sites(fn, PARAMS, X[0])
LAYERS = next(case for case in CASES if case.id == "linen-scan_of_remat").targets


def started(count: int = K, **fields: Any) -> list[lora.Adapter]:
    """Adapters of the two layers from different seeds."""
    config = lora.LoraConfig(**{"rank": 2, "targets": ("up", "down"), **fields})
    return [lora.init(jax.random.key(i), config, PARAMS, SITES) for i in range(count)]


def loss(adapter: Any, x: Any, key: Any = None) -> Any:
    """How far the adapted model is from a constant."""
    return ((lora.adapt(fn)(PARAMS, adapter, x, lora_key=key) - 1) ** 2).mean()


def moved(tx: Any, adapters: Any, state: Any, gradients: Any, **extra: Any) -> tuple[Any, Any]:
    """One step of an optimizer."""
    updates, state = tx.update(gradients, state, adapters, **extra)
    return optax.apply_updates(adapters, updates), state


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_lanes_train_as_each_would_alone(case: Case) -> None:
    model, params, args = case.model
    adapted = lora.adapt(model)

    def size(adapter: Any) -> Any:
        leaves = [leaf for leaf in jax.tree.leaves(adapted(params, adapter, *args)) if hasattr(leaf, "dtype")]
        return sum(
            (leaf.astype(jnp.float32) ** 2).mean() for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)
        )

    alone = [lora.scale(case.adapter, 0.4 + 0.3 * i) for i in range(K)]
    stacked, tx = lora.Adapter.stack(alone), lora.optim.lanes(build, learning_rate=RATES, weight_decay=DECAYS)
    own = lambda i: lora.optimizer(build(RATES[i], DECAYS[i]), case.adapter)  # noqa: E731
    state, states = jax.jit(tx.init)(stacked), [jax.jit(own(i).init)(adapter) for i, adapter in enumerate(alone)]
    step = jax.jit(lambda adapters, state: moved(tx, adapters, state, jax.vmap(jax.grad(size))(adapters)))
    gradient = jax.jit(jax.grad(size))
    step_alone = jax.jit(lambda i, adapter, state: moved(own(i), adapter, state, gradient(adapter)), static_argnums=0)
    for _ in range(STEPS):
        stacked, state = step(stacked, state)
        for i in range(K):
            alone[i], states[i] = step_alone(i, alone[i], states[i])
        for lane, adapter in zip(stacked.unstack(), alone, strict=True):
            assert_close(lane, adapter, factor=10)  # Adam divides by roots of small gradients


def test_each_lane_has_its_learning_rate_and_decay() -> None:
    stacked = lora.Adapter.stack(started(1) * K)
    tx = lora.optim.lanes(optax.adamw, learning_rate=RATES, weight_decay=DECAYS)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, stacked), tx.init(stacked), stacked)
    for i, (rate, decay) in enumerate(zip(RATES, DECAYS, strict=True)):
        assert_close(updates["up"].a[i], -rate * (1 + decay * stacked["up"].a[i]))
        assert not updates["up"].scale.any()


def test_seeds_alone_need_no_hyperparameters() -> None:
    stacked = lora.Adapter.stack(started())
    tx = lora.optim.lanes(lambda: optax.sgd(0.5))
    updates, state = tx.update(jax.tree.map(jnp.ones_like, stacked), tx.init(stacked), stacked)
    assert state.hyperparams == {}
    assert_same(updates["up"].b, jnp.full((K, 2, 8), -0.5))


def test_hyperparameters_in_the_state_can_be_replaced() -> None:
    stacked, tx = lora.Adapter.stack(started()), lora.optim.lanes(optax.sgd, learning_rate=RATES)
    state = tx.init(stacked)._replace(hyperparams={"learning_rate": jnp.full(K, 2.0)})
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, stacked), state, stacked)
    assert_same(updates["up"].b, jnp.full((K, 2, 8), -2.0))


def test_extra_arguments_have_an_axis_of_lanes() -> None:
    """Only the lanes whose own loss stays the same learn more slowly."""
    stacked = lora.Adapter.stack(started())
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = lora.optim.lanes(lambda: optax.chain(optax.sgd(1.0), plateau))
    state, gradients = tx.init(stacked), jax.tree.map(jnp.ones_like, stacked)
    for loss in ([5.0, 5.0, 5.0], [5.0, 4.0, 5.0], [5.0, 3.0, 5.0]):
        updates, state = tx.update(gradients, state, stacked, value=jnp.array(loss))
    assert updates["up"].b[:, 0, 0].tolist() == [-0.25, -1.0, -0.25]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_stopped_lane_keeps_every_bit(method: str) -> None:
    stacked = lora.Adapter.stack(started(method=method))
    tx = lora.optim.lanes(build, learning_rate=RATES, weight_decay=DECAYS)
    gradient = jax.vmap(jax.grad(loss))
    step = jax.jit(lambda adapters, state, x, active: moved(tx, adapters, state, gradient(adapters, x), active=active))
    everyone = jnp.ones(K, bool)
    first, state = step(stacked, tx.init(stacked), X, everyone)
    broken = X.at[1].set(jnp.nan)  # a lane that diverged has gradients that are not numbers
    second, after = step(first, state, broken, jnp.array([True, False, True]))
    going, _ = step(first, state, X, everyone)
    lane = lambda tree, i: [np.asarray(leaf[i]).tobytes() for leaf in jax.tree.leaves(tree)]  # noqa: E731
    assert lane(second, 1) == lane(first, 1)
    assert lane(after, 1) == lane(state, 1)
    for i in (0, 2):
        assert lane(second, i) == lane(going, i)
        assert lane(second, i) != lane(first, i)


def test_negative_zeros_of_a_stopped_lane_stay() -> None:
    zeros = jax.tree.map(lambda leaf: -jnp.zeros_like(leaf), started(1)[0])
    stacked = lora.Adapter.stack([zeros] * K)
    tx = lora.optim.lanes(optax.sgd, learning_rate=RATES)
    after, _ = moved(tx, stacked, tx.init(stacked), jax.tree.map(jnp.ones_like, stacked), active=jnp.zeros(K, bool))
    assert all(jnp.signbit(leaf).all() for leaf in jax.tree.leaves(after))


def test_products_with_the_base_are_those_of_one_batch() -> None:
    """No product runs lane by lane on the base, and no lane has weights of its own."""
    gradient = jax.jit(jax.vmap(jax.grad(loss)))
    text = gradient.lower(lora.Adapter.stack(started()), X).as_text()
    shapes = ["x".join(map(str, leaf.shape)) for leaf in PARAMS.values()]
    products = [line for line in text.splitlines() if "dot_general" in line]
    on_base = [line for line in products if any(f"tensor<{shape}xf32>" in line for shape in shapes)]
    assert len(on_base) == 3  # two forward, one backward
    assert not any("batching_dims" in line for line in on_base)
    assert not any(f"tensor<{K}x{shape}xf32>" in text for shape in shapes)


def test_a_step_of_lanes_computes_what_one_adapter_computes_on_all_tokens() -> None:
    shape = Shape(layers=1, width=128, hidden=512, vocabulary=512, heads=8, batch=4, length=64)
    one, lanes = (step.compile()[0] for step in (lora_step(shape, 4), lanes_step(shape, 4, 4)))
    assert lanes.cost_analysis()["flops"] <= 1.02 * one.cost_analysis()["flops"]
    assert lanes.memory_analysis().temp_size_in_bytes <= 1.15 * one.memory_analysis().temp_size_in_bytes


def test_nothing_is_compiled_when_lanes_stop() -> None:
    stacked, tx = lora.Adapter.stack(started()), lora.optim.lanes(optax.adamw, learning_rate=RATES)
    gradient = jax.vmap(jax.grad(loss))
    step = jax.jit(lambda adapters, state, active: moved(tx, adapters, state, gradient(adapters, X), active=active))
    state = tx.init(stacked)
    stacked, state = jax.block_until_ready(step(stacked, state, np.array([True] * K)))
    with compilations() as seen:
        for active in ([True, False, True], [False, False, True], [False] * K):
            stacked, state = jax.block_until_ready(step(stacked, state, np.array(active)))
    assert seen == []


def test_dropout_differs_between_lanes_with_keys_of_their_own() -> None:
    (adapter,) = started(1, dropout=0.5)
    adapter = lora.Adapter({path: replace(update, b=jnp.ones_like(update.b)) for path, update in adapter.items()})
    stacked, keys = lora.Adapter.stack([adapter] * K), jax.random.split(jax.random.key(7), K)
    losses = jax.vmap(loss, in_axes=(0, None, 0))(stacked, X[0], keys)
    assert_close(losses, jnp.stack([loss(adapter, X[0], key) for key in keys]))
    assert len(set(losses.tolist())) == K
    shared = jax.vmap(loss, in_axes=(0, None, None))(stacked, X[0], keys[0])
    assert len(set(shared.tolist())) == 1


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "lora-xs", "vera"])
def test_what_is_stacked_comes_apart(method: str) -> None:
    given = started(method=method, train=())
    assert_same(lora.Adapter.stack(given).unstack(), given)


def test_stacks_of_what_trains_in_full_and_of_stacked_layers_come_apart() -> None:
    given = [random_adapter(LAYERS, seed) for seed in range(K)]
    assert_same(lora.Adapter.stack(given).unstack(), given)
    given = started(targets="up", train="down")
    assert_same(lora.Adapter.stack(given).unstack(), given)


def test_scales_may_differ() -> None:
    given = [adapter for alpha in (1, 2, 4) for adapter in started(1, alpha=alpha)]
    assert lora.Adapter.stack(given)["up"].scale.tolist() == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 3}, r"Adapters 0 and 2 .* at 'down' they differ in a \(float32\[2,8\] and float32\[3,8\]\)"),
        ({"method": "dora"}, r"at 'down' they differ in kind \(LowRank and Dora\)"),
        ({"dropout": 0.1}, r"at 'down' they differ in dropout \(0.0 and 0.1\)\. .* a stack of its own"),
        ({"init": "pissa"}, r"at 'down' they differ in a_start \(None and float32\[2,8\]\)"),
        ({"param_dtype": "bfloat16"}, r"a \(float32\[2,8\] and bfloat16\[2,8\]\)"),
        ({"targets": "up"}, r"adapter 0 adapts 'down' and adapter 2 does not\. Leave it out"),
    ],
)
def test_adapters_of_different_forms_do_not_stack(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(lora.ParameterError, match=message):
        lora.Adapter.stack([*started(2), *started(1, **fields)])


def test_an_adapter_of_other_parameters_does_not_stack() -> None:
    wide = lora.find_sites(fn, {"up": jnp.ones((WIDTH, 9)), "down": jnp.ones((9, WIDTH))}, X[0])
    with pytest.raises(lora.ParameterError, match=r"site.shape \(\(8, 6\) and \(9, 6\)\)"):
        lora.Adapter.stack([random_adapter(SITES), random_adapter(wide)])


def test_no_adapters_do_not_stack() -> None:
    with pytest.raises(lora.ParameterError, match="nothing to stack"):
        lora.Adapter.stack([])


def test_what_is_no_stack_is_refused() -> None:
    adapter = started(1)[0]
    layers = random_adapter(LAYERS)
    uneven = lora.Adapter.stack([adapter] * K)
    uneven = lora.Adapter({"up": uneven["up"], "down": lora.Adapter.stack([adapter] * 2)["down"]})
    for given, message in (
        (adapter, r"not a stack of lanes: 'down' has an array"),
        (layers, r"has an array of \d axes, where one lane's has \d"),
        (uneven, r"2 at 'down', 3 at 'up'"),
        (lora.Adapter({}), "no arrays"),
    ):
        with pytest.raises(lora.ParameterError, match=message):
            given.unstack()
        with pytest.raises(lora.ParameterError, match=message):
            lora.optim.lanes(optax.adam, learning_rate=RATES).init(given)


def test_a_stack_outside_vmap_is_refused() -> None:
    with pytest.raises(lora.ParameterError, match=r"under jax.vmap, or take one of them: adapter.unstack\(\)\[0\]"):
        lora.adapt(fn)(PARAMS, lora.Adapter.stack(started()), X[0])


def test_hyperparameters_are_one_for_each_lane() -> None:
    with pytest.raises(lora.ConfigError, match=r"learning_rate=0.1 is not a sequence of numbers"):
        lora.optim.lanes(optax.sgd, learning_rate=0.1)
    with pytest.raises(lora.ConfigError, match=r"learning_rate has 2 values, but the adapter has 3 lanes"):
        lora.optim.lanes(optax.sgd, learning_rate=[0.1, 0.2]).init(lora.Adapter.stack(started()))
