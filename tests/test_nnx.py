"""NNX models through `functional` and through the recipe, in graph mode and in tree mode."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import assert_close, assert_same, differ, merged, random_adapter
from table import CASES
from table.registry import Draw

import lora_jax as lora
from lora_jax.nnx import functional

MODES = {"graph": (True, True), "simple_graph": (True, False), "tree": (False, False)}
ROWS = [
    case
    for case in CASES
    if case.framework == "nnx" and case.name in ("linear", "tied_attend", "scan_of_remat", "ensemble", "recurrent")
]


@pytest.fixture(params=MODES)
def mode(request):
    """Run the test in one of NNX's modes."""
    graph, updates = MODES[request.param]
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(updates):
        yield request.param


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_every_mode(case, mode):
    fn, params, args = case.build(Draw(case.id))
    sites = lora.find_sites(fn, params, *args)
    assert dict(sites) == dict(case.found)
    adapter = random_adapter(sites)
    expected = fn(merged(params, adapter), *args)
    assert_close(jax.jit(lora.adapt(fn))(params, adapter, *args), expected)
    grads = jax.grad(lambda a: lora.adapt(fn)(params, a, *args).sum())(adapter)
    assert all(leaf.any() for update in grads.values() for leaf in (update.a, update.b))


class Noisy(nnx.Module):
    """Everything that is state but no parameter: statistics, random streams, a counter."""

    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop, self.calls = nnx.Dropout(0.5, rngs=rngs), nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.drop(self.norm(self.linear(x)))


def test_state_that_is_no_parameter_is_frozen(mode):
    model, x = Noisy(nnx.Rngs(0)), jnp.arange(8.0).reshape(2, 4)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Not(nnx.RngState)))
    fn, params = functional(model)
    assert set(lora.find_sites(fn, params, x)) == {"linear/kernel"}
    adapter = random_adapter(lora.find_sites(fn, params, x))
    call = jax.jit(lora.adapt(fn))
    assert_same(call(params, adapter, x), call(params, adapter, x))
    assert_same(nnx.state(model, nnx.Not(nnx.RngState)), before)


def test_the_recipe_of_the_documentation(mode):
    model, x = Noisy(nnx.Rngs(0)), jnp.ones((2, 4))
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, rest, x):
        model = nnx.merge(graph, params, rest, copy=True)
        return model(x), nnx.state(model, nnx.Not(nnx.Param))

    adapter = random_adapter(lora.find_sites(fn, params, rest, x))
    out, new = lora.adapt(fn)(params, adapter, rest, x)
    expected, _ = fn(merged(params, adapter), rest, x)
    assert_close(out, expected)
    assert int(new["calls"][...]) == 1


def test_merged_parameters_go_back_into_the_model(mode):
    model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
    fn, params = functional(model)
    adapter = random_adapter(lora.find_sites(fn, params, x))
    before = model(x)
    nnx.update(model, lora.merge(params, adapter))
    assert_close(model(x), lora.adapt(fn)(params, adapter, x))
    assert differ(model(x), before)


def test_the_adapted_function_inside_nnx_jit(mode):
    model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
    _, params = functional(model)
    fn = lambda params, x: nnx.merge(nnx.graphdef(model), params)(x)  # noqa: E731
    adapter = random_adapter(lora.find_sites(fn, params, x))

    @nnx.jit
    def step(model, adapter, x):
        graph, params = nnx.split(model, nnx.Param)
        return lora.adapt(lambda params, x: nnx.merge(graph, params)(x))(params, adapter, x)

    assert_close(step(model, adapter, x), fn(merged(params, adapter), x))


def test_state_goes_on_as_the_models_own_does(mode):
    own, x = Noisy(nnx.Rngs(0)), jnp.arange(8.0).reshape(2, 4)
    fn, params, state = functional(Noisy(nnx.Rngs(0)), state=True)
    adapted = jax.jit(lora.adapt(fn))
    adapter = lora.init(
        jax.random.key(0), lora.LoraConfig(rank=2, targets=("linear",)), params, lora.find_sites(fn, params, state, x)
    )
    for _ in range(3):
        out, state = adapted(params, adapter, state, x)
        assert_close(out, own(x))
    assert int(state["calls"][...]) == 3
    assert_close(state["norm"]["mean"][...], own.norm.mean[...])
    nnx.update(own, state)


@pytest.mark.parametrize("state", [False, True])
def test_another_mode_of_the_model_is_refused(mode, state):
    model, x = Noisy(nnx.Rngs(0)), jnp.ones((2, 4))
    fn, *given = functional(model, state=state)
    fn(*given, x)
    model.eval()
    with pytest.raises(
        lora.ParameterError, match=r"mode of the model was changed.*drop/deterministic=True.*functional again"
    ):
        lora.adapt(fn)(given[0], (), *given[1:], x)
    fn, *given = functional(model, state=state)
    again = fn(*given, x)
    assert_close(again[0] if state else again, model(x))
    del model
    fn(*given, x)


def test_state_of_nnx_does_not_train():
    """Even if the whole state of the model is given as parameters."""
    model, x = Noisy(nnx.Rngs(0)), jnp.ones((2, 4))
    graph, everything, rest = nnx.split(model, nnx.Not(nnx.RngState), ...)
    fn = lambda everything, x: nnx.merge(graph, everything, rest, copy=True)(x)  # noqa: E731
    sites = lora.find_sites(fn, everything, x)
    config = lora.LoraConfig(rank=2, targets=("linear",), train=("norm",))
    assert set(lora.init(jax.random.key(0), config, everything, sites)) == {"linear/kernel", "norm/bias", "norm/scale"}
    with pytest.raises(lora.MatchError, match="'mean' hits only state"):
        lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets=("linear",), train=("mean",)), everything, sites)
