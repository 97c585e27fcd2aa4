"""Freezing: no state and no change for what does not train, wherever optax is used."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import assert_close

from lora_jax.adapter.adapter import Adapter, trainable
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, Replace, pytree
from lora_jax.errors import ParameterError
from lora_jax.optim import optimizer, schedule_free_eval_params

SITE = Site(path="w", shape=(6, 5), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
BIAS = Site(path="bias", shape=(5,), dtype="float32", kind="full")


def make(rank: int = 2) -> Adapter:
    a, b = jax.random.normal(jax.random.key(0), (rank, 6)), jnp.zeros((rank, 5))
    return Adapter({"w": LowRank(a, b, jnp.float32(2.0), SITE), "bias": Replace(jnp.zeros(5), BIAS)})


def base() -> dict[str, jax.Array]:
    odd = jnp.array([-0.0, 0.0, jnp.nan, -jnp.inf, 1.0], jnp.bfloat16)
    return {"w": jax.random.normal(jax.random.key(1), (6, 5)), "bias": jnp.zeros(5), "odd": odd, "ids": jnp.arange(3)}


def loss(adapter: Adapter, params: dict[str, jax.Array]) -> jax.Array:
    x = jax.random.normal(jax.random.key(2), (7, 6))
    y = x @ adapter["w"].applied(params["w"]) + adapter["bias"].applied(params["bias"])[None]
    return ((y - 1) ** 2).mean()


def bits(tree: object) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_state_holds_nothing_for_frozen_leaves() -> None:
    tree = {"params": base() | {"big": jnp.zeros((300, 300))}, "lora": make()}
    state = optimizer(optax.adam(0.1), tree).init(tree)
    trained = (2 * 6 + 2 * 5 + 5) * 4
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == 2 * trained + 4  # two moments and a count


@pytest.mark.parametrize("jit", [False, True])
def test_frozen_leaves_keep_every_bit(jit: bool) -> None:
    tree = {"params": base(), "lora": make()}
    tx = optimizer(optax.adamw(0.1, weight_decay=0.5), tree)

    def step(tree, state):
        grads = jax.tree.map(lambda leaf: jnp.ones_like(leaf), tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    new, _ = (jax.jit(step) if jit else step)(tree, tx.init(tree))
    assert bits(new["params"]) == bits(tree["params"])
    assert [leaf.dtype for leaf in jax.tree.leaves(new)] == [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert bits(new["lora"]["w"].scale) == bits(tree["lora"]["w"].scale)
    for field in ("a", "b"):
        assert (getattr(new["lora"]["w"], field) != getattr(tree["lora"]["w"], field)).all()


def test_zero_would_not_do() -> None:
    negative = jnp.array(-0.0)
    assert bits(optax.apply_updates(negative, jnp.array(0.0))) != bits(negative)


def test_plain_loop_on_an_adapter_learns() -> None:
    adapter, params = make(), base()
    tx = optimizer(optax.adam(0.05), adapter)

    @jax.jit
    def step(adapter, state):
        updates, state = tx.update(jax.grad(loss)(adapter, params), state, adapter)
        return optax.apply_updates(adapter, updates), state

    state, before = tx.init(adapter), loss(adapter, params)
    for _ in range(20):
        adapter, state = step(adapter, state)
    assert loss(adapter, params) < 0.5 * before
    assert step._cache_size() == 1
    assert bits(adapter["w"].scale) == bits(make()["w"].scale)


def test_clipping_sees_only_what_trains() -> None:
    tree = {"params": jnp.zeros(10), "lora": make()}
    grads = jax.tree.map(jnp.zeros_like, tree)
    grads = {"params": jnp.full(10, 1e6), "lora": grads["lora"]}
    grads["lora"] = jax.tree.map(jnp.ones_like, grads["lora"])
    tx = optimizer(optax.clip_by_global_norm(1.0), tree)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    assert optax.tree.norm(updates) == pytest.approx(1.0, rel=1e-5)


def test_extra_arguments_reach_the_inner_optimizer() -> None:
    adapter = make()
    tx = optimizer(optax.contrib.reduce_on_plateau(factor=0.5, patience=1), adapter)
    state = tx.init(adapter)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), state, adapter, value=1.0)
    assert (updates["w"].a == 1).all()


def test_gradients_of_integer_leaves_are_ignored() -> None:
    tree = {"params": {"ids": jnp.arange(4, dtype=jnp.int8)}, "lora": make()}
    grads = jax.grad(lambda tree: loss(tree["lora"], base()), allow_int=True)(tree)
    tx = optimizer(optax.sgd(1.0), tree)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    new = optax.apply_updates(tree, updates)
    assert bits(new["params"]) == bits(tree["params"])
    assert new["params"]["ids"].dtype == jnp.int8


def test_train_state() -> None:
    tree = {"params": {"w": base()["w"], "bias": -jnp.zeros(5)}, "lora": make()}
    state = TrainState.create(apply_fn=loss, params=tree, tx=optimizer(optax.adam(0.05), tree))

    @jax.jit
    def step(state):
        def objective(tree):
            return state.apply_fn(tree["lora"], jax.lax.stop_gradient(tree["params"]))

        return state.apply_gradients(grads=jax.grad(objective)(state.params))

    for _ in range(3):
        state = step(state)
    assert int(state.step) == 3
    assert bits(state.params["params"]) == bits(tree["params"])
    assert loss(state.params["lora"], tree["params"]) < loss(tree["lora"], tree["params"])


class Tuned(nnx.Module):
    def __init__(self) -> None:
        self.linear = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
        self.lora = nnx.LoRAParam(make())

    def params(self) -> dict[str, jax.Array]:
        kernel, bias = self.linear.kernel[...], self.linear.bias
        return {"w": kernel, "bias": jnp.zeros(5) if bias is None else bias[...]}


@pytest.mark.parametrize("both", [False, True], ids=["adapter", "adapter and base"])
@pytest.mark.parametrize("graph_updates", [False, True], ids=["no updates", "graph updates"])
@pytest.mark.parametrize("graph", [False, True], ids=["tree", "graph"])
def test_nnx_optimizer(graph: bool, graph_updates: bool, both: bool) -> None:
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph_updates):
        model = Tuned()
        wrt = (nnx.LoRAParam, nnx.Param) if both else nnx.LoRAParam
        state = nnx.optimizer.Optimizer(model, optimizer(optax.adam(0.05), model), wrt=wrt)
        kernel, before = bits(model.linear.kernel[...]), loss(model.lora.get_value(), model.params())
        moments = jax.tree.leaves(state.opt_state)
        assert sum(leaf.nbytes for leaf in moments) == 2 * (2 * 6 + 2 * 5 + 5) * 4 + 4

        def objective(tuned: nnx.State, rest: nnx.State, graphdef: nnx.GraphDef[Tuned]) -> jax.Array:
            merged = nnx.merge(graphdef, tuned, rest)
            return loss(merged.lora.get_value(), merged.params())

        @nnx.jit
        def step(model: Tuned, state: nnx.Optimizer[Tuned]) -> None:
            graphdef, tuned, rest = nnx.split(model, wrt, ...)
            state.update(model, jax.grad(objective)(tuned, rest, graphdef))

        for _ in range(3):
            step(model, state)
        state.update(model, nnx.state(Tuned(), wrt))  # and outside jit
        adapter = model.lora.get_value()
        assert isinstance(adapter, Adapter)
        assert isinstance(adapter["w"], LowRank)
        assert loss(adapter, model.params()) < before
        assert bits(adapter["w"].scale) == bits(make()["w"].scale)
        assert bits(model.linear.kernel[...]) == kernel
        assert int(state.step[...]) == 4


def test_another_adapter_than_the_one_given_may_be_trained() -> None:
    tx = optimizer(optax.adam(0.1), jax.eval_shape(make))
    other = Adapter({"w": make(rank=4)["w"]})
    state = tx.init(other)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, other), state, other)
    assert sorted(jnp.shape(leaf) for leaf in jax.tree.leaves(state)) == [(), (4, 5), (4, 5), (4, 6), (4, 6)]
    assert (updates["w"].scale == 0).all()


def test_tree_without_an_adapter_is_refused() -> None:
    with pytest.raises(ParameterError, match=r'No adapter found in a tree of type dict.*"lora": adapter'):
        optimizer(optax.sgd(0.1), base())


def test_adapter_in_which_nothing_trains_is_refused() -> None:
    @pytree("site", "dropout")
    class Frozen(LowRank):
        def trains(self) -> "Frozen":
            return jax.tree.map(lambda leaf: False, self)

    frozen = make()["w"]
    with pytest.raises(ParameterError, match="nothing that trains"):
        optimizer(optax.sgd(0.1), Adapter({"w": Frozen(frozen.a, frozen.b, frozen.scale, SITE)}))


def by_hand(factors: dict[str, jax.Array]) -> jax.Array:
    whole = Adapter(
        {"w": LowRank(factors["a"], factors["b"], jnp.float32(2.0), SITE), "bias": Replace(factors["c"], BIAS)}
    )
    return loss(whole, base())


def on_adapters(adapter: Adapter) -> jax.Array:
    return loss(adapter, base())


SAM = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
LOOKING_AROUND = {
    "lbfgs": optax.lbfgs(),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=8)),
    "sam": optax.contrib.sam(optax.sgd(0.05), SAM, sync_period=2),
    "sam, opaque": optax.contrib.sam(optax.adam(0.05), SAM, sync_period=2, opaque_mode=True),
    "schedule_free": optax.contrib.schedule_free_adamw(0.05),
    "finite": optax.apply_if_finite(optax.adam(0.05), 3),
    "several": optax.MultiSteps(optax.adam(0.05), 2),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=0.05, weight_decay=0.1),
    "prodigy": optax.contrib.prodigy(),
    "polyak": optax.polyak_sgd(max_learning_rate=0.1),
    "plateau": optax.chain(optax.sgd(0.05), optax.contrib.reduce_on_plateau(patience=1)),
}


@pytest.mark.parametrize("name", LOOKING_AROUND)
def test_optimizers_take_the_steps_that_they_take_on_the_factors_alone(name: str) -> None:
    tx: Any = LOOKING_AROUND[name]
    wants = {
        "lbfgs": ("value", "grad", "value_fn"),
        "backtracking": ("value", "grad", "value_fn"),
        "sam, opaque": ("grad_fn",),
    }
    wants |= {"polyak": ("value",), "plateau": ("value",)}

    def trained(tx: Any, tree: Any, fn: Any) -> Any:
        @jax.jit
        def step(tree: Any, state: Any) -> Any:
            value, gradients = jax.value_and_grad(fn)(tree)
            more = {"value": value, "grad": gradients, "value_fn": fn, "grad_fn": lambda p, _: jax.grad(fn)(p)}
            given = {each: more[each] for each in wants.get(name, ())}
            updates, state = tx.update(gradients, state, tree, **given)
            return optax.apply_updates(tree, updates), state

        state = jax.jit(tx.init)(tree)
        for _ in range(4):
            tree, state = step(tree, state)
        return tree, state

    adapter = jax.tree.map(lambda leaf, trains: leaf + 0.1 if trains else leaf, make(), trainable(make()))
    got, state = trained(optimizer(tx, adapter), adapter, on_adapters)
    factors = {"a": adapter["w"].a, "b": adapter["w"].b, "c": adapter["bias"].value}
    want, plain = trained(tx, factors, by_hand)
    if name == "schedule_free":
        got, want = schedule_free_eval_params(state, got), optax.contrib.schedule_free_eval_params(plain, want)
    assert_close({"a": got["w"].a, "b": got["w"].b, "c": got["bias"].value}, want, factor=10)
    assert bits(got["w"].scale) == bits(adapter["w"].scale)


def test_averages_of_no_schedule_free_state_are_refused() -> None:
    adapter = make()
    with pytest.raises(ParameterError, match=r"no state of optax\.contrib\.schedule_free in a MaskedState"):
        schedule_free_eval_params(optimizer(optax.adam(0.1), adapter).init(adapter), adapter)
