"""What is known to go wrong in the most used JAX library for LoRA, qwix 0.1.8: each has a test that passes here."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import assert_close, assert_same, differ, merged, random_adapter

import lora_jax as lora
from lora_jax.nnx import functional
from table import CASES


def agrees(name, *args):
    """A row of the shared table: its sites are found and the adapted model is the merged one."""
    case = next(case for case in CASES if case.id == name)
    fn, params, args = case.model
    adapter = random_adapter(case.found)
    assert set(adapter) == set(case.sites)
    run = jax.jit(fn)
    wanted = run(merged(params, adapter), *args)
    assert_close(jax.jit(lora.adapt(fn))(params, adapter, *args), wanted)
    assert differ(run(params, *args), wanted)
    return adapter


@pytest.mark.parametrize("name", ["linen-einsum", "nnx-einsum", "plain-heads_ndh"])
def test_einsum_in_a_module(name):
    """There: SetAttributeFrozenModuleError."""
    agrees(name)


@pytest.mark.parametrize("name", ["plain-weight_on_the_left", "plain-left_einsum"])
def test_the_weight_as_the_first_operand(name):
    """There: silently no adapters."""
    agrees(name)


def test_call_history_does_not_matter():
    """There: a raw `x @ w` is adapted on the first call of a process and not on the second, nor after a plain one."""
    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    first = lora.find_sites(fn, params, x)
    fn(params, x), jax.jit(fn)(params, x), x @ params["w"]
    assert dict(lora.find_sites(fn, params, x)) == dict(lora.find_sites(jax.jit(fn), params, x)) == dict(first)
    adapter = random_adapter(first)
    compiled = jax.jit(lora.adapt(fn))(params, adapter, x)
    assert_close(lora.adapt(fn)(params, adapter, x), compiled)
    assert_close(lora.adapt(jax.jit(fn))(params, adapter, x), compiled)
    init = jax.jit(lambda key: lora.init(key, lora.LoraConfig(targets="w"), params, lora.find_sites(fn, params, x)))
    assert set(init(jax.random.key(0))) == {"w"}


@pytest.mark.parametrize("name", ["linen-two_of_one_shape", "plain-equal_shapes", "nnx-shared_and_raw"])
def test_parameters_of_equal_shape(name):
    """There: two give silently none, three a ValueError."""
    agrees(name)


@pytest.mark.parametrize("name", ["plain-equal_shapes_as_activation", "linen-two_of_one_shape"])
def test_an_activation_shaped_like_a_parameter(name):
    """There: the activation is taken for the parameter, and the adapter gets an adapter."""
    agrees(name)


@pytest.mark.parametrize("name", ["linen-tied_attend", "nnx-tied_attend", "plain-look_up_then_tied_attend"])
def test_tied_attend(name):
    """There: none, two or an error, by how it is initialised; and the look-up never."""
    adapter = agrees(name)
    (table,) = [update for path, update in adapter.items() if path.split("/")[-1] in ("embedding", "w")]
    assert table.site.uses >= 2, "one update must serve both uses"


@pytest.mark.parametrize("name", ["linen-embed", "nnx-embed", "haiku-embed", "equinox-embedding", "plain-look_up"])
def test_embedding_look_up(name):
    """There: not supported, silently none."""
    agrees(name)


@pytest.mark.parametrize(
    "name", ["plain-experts", "plain-gathered_experts", "plain-mixture_of_experts", "linen-vmapped_experts"]
)
def test_experts_have_their_own_a_and_b(name):
    """There: A is per expert, B is shared."""
    for path, update in agrees(name).items():
        if update.site.batch_axes:
            experts = update.site.batch_shape
            assert update.a.shape[:1] == update.b.shape[:1] == experts, path


@pytest.mark.parametrize("name", ["plain-ragged_dot", "plain-ragged_experts"])
def test_ragged_dot(name):
    """There: one wrong adapter for all experts, or none."""
    for update in agrees(name).values():
        assert update.site.kind == "ragged"
        assert update.a.shape[0] == update.b.shape[0] == 3


def test_default_init_does_not_count_experts_as_inputs():
    """There: he_uniform takes the expert axis for receptive field, so A starts too small."""
    params, x = {"w": jnp.ones((64, 16, 5))}, jnp.ones((64, 2, 16))
    fn = lambda p, x: jnp.einsum("ebd,edh->ebh", x, p["w"])  # noqa: E731
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(targets="w"), params, lora.find_sites(fn, params, x))
    bound = 16**-0.5
    assert 0.99 * bound < jnp.abs(adapter["w"].a).max() <= bound


@pytest.mark.parametrize("name", ["nnx-scan", "nnx-scan_of_remat", "nnx-ensemble", "linen-scan", "linen-scan_axis_1"])
def test_scanned_layers(name):
    """There: NNX scan is an IndexError unless the model is changed."""
    for update in agrees(name).values():
        assert len(update.site.batch_axes) == 1


def test_no_dropout_in_evaluation():
    """There: linen cannot run without a dropout key at all, and NNX still drops after `.eval()`."""
    x = jnp.ones((2, 4))
    linen, model = nn.Dense(3), nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    variables = linen.init(jax.random.key(0), x)
    for fn, params in ((linen.apply, variables), functional(model)):
        adapter = random_adapter(lora.find_sites(fn, params, x), dropout=0.5)
        evaluated = lora.adapt(fn)(params, adapter, x)
        assert_close(evaluated, fn(merged(params, adapter), x))
        assert_same(evaluated, lora.adapt(fn)(params, adapter, x))
        assert differ(evaluated, lora.adapt(fn)(params, adapter, x, lora_key=jax.random.key(0)))


@pytest.mark.parametrize("targets", ["q_proj", ("q_proj",), "typo.*", ("dens",)])
def test_a_target_that_hits_nothing_is_an_error(targets):
    """There: a typo silently adapts nothing."""
    params, x = {"dense": {"kernel": jnp.ones((4, 3))}}, jnp.ones((2, 4))
    sites = lora.find_sites(lambda p, x: x @ p["dense"]["kernel"], params, x)
    with pytest.raises(lora.MatchError, match="dense"):
        lora.init(jax.random.key(0), lora.LoraConfig(targets=targets), params, sites)


def test_adapters_are_no_parameters_of_the_model():
    """There: adapters live in the model's own `params`, or subclass `nnx.Param`, and share the base's dtype."""
    model = nnx.Linear(4, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    fn, params = functional(model)
    x = jnp.ones((2, 4), jnp.bfloat16)
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(targets="kernel"), params, lora.find_sites(fn, params, x))
    assert lora.adapt(fn)(params, adapter, x).dtype == fn(params, x).dtype == jnp.bfloat16
    assert adapter["kernel"].a.dtype == adapter["kernel"].b.dtype == jnp.float32
    assert_same(nnx.state(model), before)
    assert jax.tree.structure(nnx.state(model, nnx.Param)) == jax.tree.structure(params)
