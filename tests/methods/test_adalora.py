"""AdaLoRA: importance, budget, pruning and trimming, as pure state that compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close

import lora_jax as lora

KEY = jax.random.key(0)
PARAMS = {"first": jax.random.normal(KEY, (6, 5)), "layers": jax.random.normal(jax.random.key(1), (2, 5, 5))}
X = jax.random.normal(jax.random.key(2), (16, 6))


def fn(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ params["first"], params["layers"])[0]


SITES = lora.find_sites(fn, PARAMS, X)
TARGET = fn(jax.tree.map(lambda leaf: leaf + 0.3 * jnp.cos(leaf * 9), PARAMS), X)


def start(**fields):
    return lora.init(KEY, lora.LoraConfig(method="adalora", rank=4, **fields), PARAMS, SITES)


def loss(adapter):
    return jnp.square(lora.adapt(fn)(PARAMS, adapter, X) - TARGET).mean()


def train(steps, wrap=lambda tree: tree, **options):
    adapter = start()
    tx = lora.optimizer(lora.optim.adalora(optax.adam(0.05), **options), adapter)
    traces = []

    @jax.jit
    def step(adapter, state):
        traces.append(1)
        updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    state, seen = tx.init(adapter), []
    for _ in range(steps):
        adapter, state = step(adapter, state)
        seen.append({path: np.asarray(update.values != 0) for path, update in adapter.items()})
    assert len(traces) == 1
    return adapter, state, [sum(int(kept.sum()) for kept in each.values()) for each in seen]


def test_budget_falls_with_the_cube_and_stays():
    _, _, counts = train(20, target_rank=2, total_steps=20, warmup=4, final=6)
    budgets = [12] * 4 + [int(6 * (1 - step / 10) ** 3 + 6) for step in range(1, 10)] + [6] * 7
    # A pruned term of a step without pruning may come back; here every step prunes.
    assert counts == budgets


def test_pruning_every_few_steps_lets_terms_come_back():
    _, _, counts = train(12, target_rank=1, total_steps=12, every=5, final=2)
    assert counts[3] == 12
    assert counts[4] == int(9 * 0.5**3 + 3)
    assert counts[5] > counts[4]
    assert counts[9:] == [3, 3, 3]


def test_training_goes_on_and_trimming_changes_nothing():
    adapter, _, _ = train(40, target_rank=2, total_steps=40, final=10)
    assert float(loss(adapter)) < 0.3 * float(loss(start()))
    trimmed = lora.methods.trim(adapter)
    assert all(type(update) is lora.LowRank for update in trimmed.values())
    assert_close(lora.adapt(fn)(PARAMS, trimmed, X), lora.adapt(fn)(PARAMS, adapter, X))
    most = {path: int(np.asarray(update.active).max()) for path, update in adapter.items()}
    assert {path: update.rank for path, update in trimmed.items()} == most
    assert lora.summary(trimmed).parameters < lora.summary(adapter).parameters
    plain = lora.Adapter({"first": trimmed["first"]})
    assert lora.methods.trim(plain)["first"] is plain["first"]


def test_works_in_a_combined_tree_and_after_clipping():
    adapter = start()
    tree = {"params": PARAMS, "lora": adapter}
    inner = optax.chain(
        optax.clip_by_global_norm(1.0), lora.optim.adalora(optax.adam(0.1), target_rank=1, total_steps=3)
    )
    tx = lora.optimizer(inner, tree)

    @jax.jit
    def step(tree, state):
        updates, state = tx.update(jax.grad(lambda tree: loss(tree["lora"]))(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    state = tx.init(tree)
    for _ in range(3):
        tree, state = step(tree, state)
    assert sum(int((update.values != 0).sum()) for update in tree["lora"].values()) == 3
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), tree["params"], PARAMS))


def test_orthogonality():
    adapter = start()
    expected = []
    for update in adapter.values():
        for factor in (update.a, update.b):
            for rows in np.asarray(factor).reshape(-1, 4, factor.shape[-1]):
                expected.append(np.linalg.norm(rows @ rows.T - np.eye(4)))
    both = jax.jit(jax.value_and_grad(lora.optim.orthogonality))
    np.testing.assert_allclose(float(both(adapter)[0]), np.mean(expected), rtol=1e-5)
    perfect = jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.eye(4, leaf.shape[-1]), leaf.shape) if leaf.ndim > 1 and leaf.shape[-1] > 4 else leaf, adapter)  # fmt: skip  # noqa: E501
    penalty, gradient = both(perfect)
    assert float(penalty) == 0
    assert not any(bool(leaf.any()) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_rank": 4, "total_steps": 9}, lora.ParameterError, "target_rank=4 is not below the ranks there are"),
        ({"target_rank": 0, "total_steps": 9}, lora.ConfigError, "target_rank=0 must be a positive integer"),
        ({"target_rank": 1, "total_steps": 9, "warmup": 9}, lora.ConfigError, "leave nothing of total_steps=9"),
        ({"target_rank": 1, "total_steps": 9, "beta1": 1.0}, lora.ConfigError, r"beta1=1.0 must be a probability"),
    ],
)
def test_numbers_that_make_no_schedule_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        lora.optim.adalora(optax.sgd(1.0), **options).init(start())


def test_other_adapters_are_refused():
    plain = lora.init(KEY, lora.LoraConfig(), PARAMS, SITES)
    with pytest.raises(lora.ParameterError, match="No AdaLoRA update in a tree of type Adapter"):
        lora.optimizer(lora.optim.adalora(optax.sgd(1.0), target_rank=1, total_steps=2), plain).init(plain)
    tx = lora.optim.adalora(optax.sgd(1.0), target_rank=1, total_steps=2)
    with pytest.raises(lora.ParameterError, match="adalora reads the values of the factors"):
        tx.update(start(), tx.init(start()))
