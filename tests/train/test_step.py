"""The compiled step: parts are one large batch, frozen leaves stay, and nothing is compiled twice."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_same

import lora_jax as lora
from lora_jax.errors import ConfigError
from lora_jax.train.optimizer import Optimizer, names
from lora_jax.train.step import distinct, training_step

PARAMS = {"w": jax.random.normal(jax.random.key(0), (6, 5)) / 3, "v": jax.random.normal(jax.random.key(1), (5, 4)) / 3}


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["v"]


SITES = lora.find_sites(model, PARAMS, jnp.ones((2, 6)))


def losses(base: Any, adapter: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squares where something is trained on, which is a different number in every row."""
    x, trained = batch
    each = jnp.square(lora.adapt(model)(base, adapter, x)).sum(-1)
    return jnp.where(trained, each, 0).sum(), trained.sum().astype(jnp.float32)


def fresh() -> lora.Adapter:
    config = lora.LoraConfig(rank=2, targets=("w", "v"))
    adapter = lora.init(jax.random.key(2), config, PARAMS, SITES)
    return jax.tree.map(lambda leaf: leaf + 0.1 if leaf.size > 1 else leaf, adapter)


def rows(count: int) -> Any:
    draw = np.random.default_rng(0)
    return jax.device_put(np.float32(draw.normal(size=(count, 6)))), jnp.asarray(draw.random(count) < 0.6)


def one_step(parts: int) -> Any:
    adapter = fresh()
    tx = Optimizer(peak=0.1, steps=3).transformation(adapter)
    batch = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), rows(12))
    return training_step(losses, tx)(adapter, tx.init(adapter), PARAMS, batch, jax.random.key(0))


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_a_step_in_parts_is_the_step_of_one_large_batch(parts: int) -> None:
    adapter, _, report = one_step(1)
    in_parts, _, other = one_step(parts)
    assert_close(in_parts, adapter)
    assert_close(other, report)
    assert int(report.tokens) == int(rows(12)[1].sum()) < 12


def test_the_gradient_is_that_of_the_mean_over_trained_tokens() -> None:
    adapter = fresh()
    step = training_step(losses, lora.optimizer(optax.sgd(1.0), adapter))
    (x, trained), start = rows(12), fresh()

    def mean(adapter: lora.Adapter) -> jax.Array:
        each = jnp.square(lora.adapt(model)(PARAMS, adapter, x)).sum(-1)
        return jnp.where(trained, each, 0).sum() / trained.sum()

    batch = x[None], trained[None]
    state = lora.optimizer(optax.sgd(1.0), adapter).init(adapter)
    after, _, report = step(adapter, state, PARAMS, batch, jax.random.key(0))
    value, gradient = jax.value_and_grad(mean)(start)
    assert_close(report.loss, value)
    for path, update in start.items():
        assert_close(after[path].a, update.a - gradient[path].a)
        assert_close(after[path].b, update.b - gradient[path].b)
        assert_same(after[path].scale, update.scale)


def test_a_batch_without_anything_to_train_on_changes_nothing_but_what_decays() -> None:
    adapter = fresh()
    tx = lora.optimizer(optax.sgd(1.0), adapter)
    batch = rows(4)[0][None], jnp.zeros((1, 4), bool)
    after, _, report = training_step(losses, tx)(adapter, tx.init(adapter), PARAMS, batch, jax.random.key(0))
    assert_same(after, fresh())
    assert (float(report.loss), float(report.norm)) == (0.0, 0.0)


def test_one_compilation_and_the_base_is_no_constant() -> None:
    adapter = fresh()
    tx = Optimizer(peak=0.1, steps=9).transformation(adapter)
    step = training_step(losses, tx)
    state, batch = tx.init(adapter), jax.tree.map(lambda leaf: leaf[None], rows(4))
    text = step.lower(adapter, state, PARAMS, batch, jax.random.key(0)).as_text()
    assert "dense<[[" not in text
    for index in range(3):
        adapter, state, _ = step(adapter, state, PARAMS, batch, jax.random.key(index))
    assert step._cache_size() == 1


def test_adaloras_penalty_is_added_and_its_budget_prunes() -> None:
    config = lora.LoraConfig(rank=4, targets=("w", "v"), method="adalora")
    adapter = lora.init(jax.random.key(2), config, PARAMS, SITES)
    how = Optimizer(peak=0.05, steps=10, target_rank=2)
    tx = how.transformation(adapter)
    step = training_step(losses, tx, lambda adapter: 0.5 * lora.optim.orthogonality(adapter))
    (adapter, state), batch = distinct((adapter, tx.init(adapter))), jax.tree.map(lambda leaf: leaf[None], rows(8))
    before = float(lora.optim.orthogonality(adapter))
    for index in range(10):
        adapter, state, _ = step(adapter, state, PARAMS, batch, jax.random.key(index))
    assert float(lora.optim.orthogonality(adapter)) < before
    assert sum(int(update.active) for update in adapter.values()) == 4


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("lion", "adafactor", "schedule_free_adamw") else
                                               pytest.mark.full) for n in names()])  # fmt: skip
def test_every_optimizer_that_is_named_takes_steps(name: str) -> None:
    adapter = fresh()
    how = Optimizer(name=name, peak=1e-2, steps=4)
    tx = how.transformation(adapter)
    step, (adapter, state) = training_step(losses, tx), distinct((adapter, tx.init(adapter)))
    batch = jax.tree.map(lambda leaf: leaf[None], rows(8))
    for index in range(2):
        adapter, state, _ = step(adapter, state, PARAMS, batch, jax.random.key(index))
    found = how.evaluated(state, adapter)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found))
    assert bool((found["w"].b != fresh()["w"].b).any())


@pytest.mark.parametrize("precondition", ["riemannian", "lora-fa"])
def test_what_is_made_for_adapters_goes_around_any_optimizer(precondition: str) -> None:
    options = {"precondition": precondition, "lora_plus": 4.0, "rate_pattern": {"w": 0.5}}
    plain, around = (Optimizer(name="sgd", peak=0.1, clip=0, steps=1, **each) for each in ({}, options))
    found = []
    for how in (plain, around):
        adapter = fresh()
        tx = how.transformation(adapter)
        batch = jax.tree.map(lambda leaf: leaf[None], rows(8))
        found.append(training_step(losses, tx)(adapter, tx.init(adapter), PARAMS, batch, jax.random.key(0))[0])
    assert all(bool((found[0][path].b != found[1][path].b).any()) for path in ("w", "v"))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"name": "adamx"}, "there is no optimizer 'adamx' .nearest: adam.*lion"),
        ({"name": "lbfgs"}, "there is no optimizer"),
        ({"name": "sgd", "decay": 0.1}, "sgd decays no weights.*adamw"),
        ({"options": {"b3": 1}}, "adamw has no option b3: there are learning_rate, b1, b2"),
    ],
)
def test_what_no_optimizer_takes_is_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Optimizer(**options).transformation(fresh())


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_and_decays_however_short_the_run(shape: Any) -> None:
    rate = Optimizer(peak=1.0, warmup=4, steps=10, shape=shape).rate
    values = [float(rate(step)) for step in range(11)]
    assert values[0] > 0 and max(values) == values[4] == 1.0
    assert values[10] == pytest.approx(1.0 if shape == "constant" else 0.1)
    assert np.isfinite([float(Optimizer(peak=1.0, warmup=99, steps=1, shape=shape).rate(at)) for at in (0, 1)]).all()
