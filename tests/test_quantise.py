"""Quantised bases: formats, trees, memory of programs, and what else takes them; models are in tests/table."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import assert_close, random_adapter
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.quantised.formats import FORMATS
from lora_jax.quantised.leaf import Quantised, folded_axes, is_quantised

SCHEMES = ("nf4", "int4", "int8", "fp8")


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def levels(format: str) -> np.ndarray:
    """All numbers of a format, relative to its scale."""
    how = FORMATS[format]
    if how.levels:
        return np.asarray(how.levels, np.float32)
    if format.startswith("int"):
        return np.arange(-how.largest, how.largest + 1, dtype=np.float32)
    every = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    return every[np.isfinite(every)]


@pytest.mark.parametrize("format", SCHEMES)
def test_every_number_is_the_nearest_of_its_block(format):
    value = np.asarray(normal(0, 6, 128))
    leaf = lora.quantise({"w": value}, format, where=("w",))["w"]
    blocks = value.reshape(-1, 64)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(FORMATS[format].largest)
    tried = np.abs(blocks[..., None] - scale[..., None] * levels(format))
    best = tried.min(-1)
    found = np.abs(np.asarray(leaf.dense()).reshape(-1, 64) - blocks)
    np.testing.assert_allclose(found, best, atol=1e-6)


@pytest.mark.parametrize("format", SCHEMES)
def test_searched_scales_lose_no_more(format):
    value = normal(1, 16, 256)
    error = lambda **how: jnp.square(lora.quantise({"w": value}, format, where=("w",), **how)["w"].dense() - value)  # noqa: E731
    by_block = [error(**how).reshape(-1, 64).sum(1) for how in ({}, {"search": True})]
    assert (by_block[1] <= by_block[0]).all()
    if format in ("nf4", "int4"):
        assert by_block[1].sum() < 0.97 * by_block[0].sum()


def test_bytes_of_a_number():
    shape = jax.ShapeDtypeStruct((24, 2048, 2048), jnp.bfloat16)
    each = lambda *how, **more: lora.quantise({"w": shape}, *how, **more)["w"].nbytes / shape.size  # noqa: E731
    assert each("nf4") == 0.5625
    assert each("nf4", nested=True) < 0.53
    assert each("int8", block=128) < 1.032


@pytest.mark.parametrize(
    ("shape", "leading", "trailing"),
    [
        ((8, 64), (8,), (64,)), ((3, 8, 64), (3, 8), (64,)), ((3, 128, 4, 32), (3, 128), (4, 32)), ((128,), (), (128,)),
        ((30, 10), (), (30, 10)), ((3, 30, 10), (3,), (30, 10)), ((5,), (), (5,)), ((3, 3, 16, 32), (3, 3), (16, 32)),
    ],
)  # fmt: skip
def test_any_shape_is_taken(shape, leading, trailing):
    value = normal(2, *shape)
    leaf = lora.quantise({"w": value}, "int8", where=("w",))["w"]
    assert (leaf.leading, leaf.trailing, leaf.shape, leaf.size) == (leading, trailing, shape, value.size)
    assert folded_axes(shape, 64) == len(trailing)
    assert_close(leaf.dense(), value, factor=3e4)


def test_constant_and_zero_blocks():
    value = jnp.zeros((2, 64)).at[1].set(-3.0)
    for format in SCHEMES:
        leaf = lora.quantise({"w": value}, format, where=("w",))["w"]
        np.testing.assert_allclose(leaf.dense(), value, rtol=0.15 if format == "int4" else 1e-6)


def test_what_is_left_and_what_is_refused():
    params = {"w": normal(3, 64, 64), "norm": jnp.ones(64), "small": normal(4, 8, 8), "ids": jnp.arange(8192)}
    small = lora.quantise(params, "nf4")
    assert [path for path, leaf in small.items() if is_quantised(leaf)] == ["w"]
    assert lora.quantise(small, "int8")["w"] is small["w"]
    assert is_quantised(lora.quantise(params, where=lambda path, leaf: path == "small")["small"])
    with pytest.raises(lora.MatchError, match=r"where='nothing' selects none of ids, norm, small, w"):
        lora.quantise(params, where="nothing")
    with pytest.raises(lora.ParameterError, match="ids"):
        lora.quantise(params, where=("ids",))
    with pytest.raises(lora.ConfigError, match="nf4, int4, int8, fp8"):
        lora.quantise(params, "int3")  # pyright: ignore[reportArgumentType]
    with pytest.raises(lora.ConfigError, match="power of two"):
        lora.quantise(params, block=48)
    with pytest.raises(lora.ParameterError, match=r"'w' .*NaN or infinite"):
        lora.quantise(params | {"w": params["w"].at[3, 4].set(jnp.nan)})


LAYERS, WIDTH, HIDDEN = 4, 64, 256
STACK = {
    "table": normal(5, 512, WIDTH),
    "layers": {"up": normal(6, LAYERS, WIDTH, HIDDEN) / 8, "down": normal(7, LAYERS, HIDDEN, WIDTH) / 16},
}


def stacked(params: Any, tokens: Any) -> Any:
    """Layers that a scan runs over, after what programs do to stacks of weights before."""
    layers = {name: jax.lax.stop_gradient(w).astype(jnp.float32) for name, w in params["layers"].items()}
    layers["up"] = jnp.swapaxes(jnp.swapaxes(layers["up"], 1, 2), 1, 2)

    def layer(x: Any, each: Any) -> Any:
        return x + jnp.tanh(x @ each["up"]) @ each["down"], None

    return jax.lax.scan(jax.checkpoint(layer), params["table"][tokens], layers)[0]


def compiled_step(params: Any, tokens: Any) -> Any:
    sites = lora.find_sites(stacked, params, tokens)
    adapter = random_adapter([sites["layers/up"], sites["layers/down"]])
    loss = lambda adapter, params, tokens: jnp.square(lora.adapt(stacked)(params, adapter, tokens)).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss)).lower(adapter, params, tokens).compile()


def test_no_dense_stack_is_kept_or_formed():
    """What a step needs beside activations is codes, and one layer's numbers at a time."""
    tokens = jnp.zeros((2, 4), jnp.int32)
    memory = {}
    for name, params in {"dense": STACK, "nf4": lora.quantise(STACK)}.items():
        found = compiled_step(params, tokens).memory_analysis()
        memory[name] = found.argument_size_in_bytes + found.temp_size_in_bytes
    assert memory["nf4"] < 0.55 * memory["dense"]
    # XLA for CPUs unpacks int4 to a byte each before a loop; of int8 it needs no more than a few layers' numbers.
    layer, codes = 4 * WIDTH * HIDDEN, 2 * LAYERS * WIDTH * HIDDEN
    for format, unpacked in {"nf4": codes, "int8": 0}.items():
        temporary = compiled_step(lora.quantise(STACK, format), tokens).memory_analysis().temp_size_in_bytes
        assert temporary < 4 * layer + unpacked


def test_operations_are_those_of_the_dense_step():
    """Up to the few that make a number of its code: forward, in the layer that is recomputed, and backward."""
    tokens = jnp.zeros((16, 32), jnp.int32)
    flops = [compiled_step(p, tokens).cost_analysis()["flops"] for p in (STACK, lora.quantise(STACK))]
    numbers = sum(leaf.size for leaf in jax.tree.leaves(STACK["layers"])) // LAYERS  # XLA counts a loop's body once.
    assert flops[1] - flops[0] < 3 * 30 * numbers


def test_look_ups_dequantise_their_rows_only():
    params = lora.quantise({"table": normal(8, 4096, 64)})
    fn = lambda params, tokens: params["table"][tokens]  # noqa: E731
    tokens = jnp.array([[3, 4095], [0, -1]])
    program = jax.jit(lambda params, tokens: lora.adapt(fn)(params, (), tokens)).lower(params, tokens).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4096
    plain = lora.dequantise(params)
    assert_close(program(params, tokens), fn(plain, tokens))
    beyond = jnp.array([4096, 5])
    taken = lambda params, tokens: jnp.take(params["table"], tokens, axis=0)  # noqa: E731
    assert jnp.isnan(lora.adapt(taken)(params, (), beyond)[0]).all()
    filled = lambda params, tokens: params["table"].at[tokens].get(mode="fill", fill_value=0)  # noqa: E731
    for each in (fn, filled):
        assert_close(lora.adapt(each)(params, (), beyond), each(plain, beyond))


INDEXED = {
    "slices": lambda w, x: sum(x @ w[i] for i in range(3)),
    "dynamic": lambda w, x: jax.lax.fori_loop(0, 3, lambda i, y: y + x @ w[i], jnp.zeros((2, 128))),
    "split": lambda w, x: sum(x @ each for each in jnp.split(w, 2, axis=2)),
    "strided": lambda w, x: jnp.einsum("bi,lio->bo", x, w[::2, :, ::-1]),
    "transposed": lambda w, x: jnp.einsum("bi,oil->bo", x, w.T),
    "broadcast": lambda w, x: jnp.einsum("bi,klio->bo", x, jnp.broadcast_to(w, (2, *w.shape))),
    "chosen": lambda w, x: jnp.einsum("bi,kio->bo", x, w[jnp.array([2, 0])]),
    "concatenated": lambda w, x: x @ jnp.concatenate([w[0], w[1]], axis=1),
    "scaled": lambda w, x: x @ (w[0] * jnp.arange(1.0, 65.0)[:, None]),
    "branches": lambda w, x: jax.lax.cond(x.sum() > 0, lambda w: x @ w[0], lambda w: x @ w[1], w),
    "half the stack": lambda w, x: jax.lax.scan(lambda y, each: (jnp.tanh(y @ each), None), x, w[1:, :, :64])[0],
    "reversed": lambda w, x: jax.lax.scan(lambda y, each: (jnp.tanh(y @ each), None), x, jnp.flip(w[..., :64], 0))[0],
    "vectorised": lambda w, x: jax.vmap(lambda each: x @ each)(w).sum(0),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEXED)
def test_views_of_a_quantised_stack(name):
    params, x = {"w": normal(9, 3, 64, 128)}, normal(10, 2, 64)
    fn = lambda params, x: INDEXED[name](params["w"], x)  # noqa: E731
    base = lora.quantise(params, "int8")
    plain = lora.dequantise(base)
    adapter = random_adapter(lora.find_sites(fn, base, x))
    loss = lambda adapter, base: jnp.square(lora.adapt(fn)(base, adapter, x)).sum()  # noqa: E731
    found, expected = (jax.jit(jax.value_and_grad(loss))(adapter, p) for p in (base, plain))
    assert_close(found, expected)


def test_codes_that_are_closed_over_are_not_folded():
    """XLA would dequantise constants while it compiles."""
    base, x = lora.quantise({"w": normal(11, 256, 256)}), normal(12, 4, 256)
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    adapter = random_adapter(lora.find_sites(fn, base, x))
    text = jax.jit(lambda x: lora.adapt(fn)(base, adapter, x)).lower(x).compile().as_text()
    assert "f32[256,256]{1,0} constant" not in text
    assert_close(jax.jit(lambda x: lora.adapt(fn)(base, adapter, x))(x), lora.adapt(fn)(base, adapter, x))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh(kind):
    """Codes are spread as the numbers would be: leading axes as they are, the last as the codes' last."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)
    params, x = {"w": normal(13, 64, 256)}, normal(14, 8, 64)
    fn = lambda params, x: jax.nn.relu(x @ params["w"])  # noqa: E731
    base = lora.quantise(params, "nf4")
    adapter = random_adapter(lora.find_sites(fn, params, x))
    where = NamedSharding(mesh, P(None, "model"))
    spread = jax.device_put(base, where)
    assert spread["w"].sharding.is_equivalent_to(where, 2)
    placed = jax.device_put(adapter, lora.adapter_sharding(adapter, spread))
    assert placed["w"].b.sharding.spec == P(None, "model")
    with jax.set_mesh(mesh):
        y = jax.jit(lora.adapt(fn))(spread, placed, jax.device_put(x, NamedSharding(mesh, P("data", None))))
    assert_close(np.asarray(y), lora.adapt(fn)(base, adapter, x))
    out = jax.jit(lora.quantise, out_shardings=where)(jax.device_put(params, where))
    assert out["w"].codes.sharding.is_equivalent_to(where, 2)
    assert_close(np.asarray(out["w"].dense()), base["w"].dense())


def of_rows(w: jax.Array, x: jax.Array) -> jax.Array:
    """The product with one shard of the rows."""
    mine = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("model") * len(w), len(w), axis=1)
    return jax.lax.psum(mine @ w, "model")


SHARDED = {
    "columns": (P(None, "model"), P(None, "model"), lambda w, x: x @ w),
    "rows": (P("model", None), P(), of_rows),
    "both": (P("data", "model"), P(None, "model"), lambda w, x: jax.lax.psum(x[:, :16] @ w, "data")),
}  # fmt: skip


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("name", SHARDED)
def test_shard_map_takes_codes(name, format):
    """Shards of codes go in, as long as blocks end with them."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    where, out, body = SHARDED[name]
    params, x = {"w": normal(13, 64, 256)}, normal(14, 8, 64)
    run = jax.shard_map(body, mesh=mesh, in_specs=(where, P()), out_specs=out, check_vma=False)
    fn = lambda params, x: run(params["w"], x)  # noqa: E731
    base = lora.quantise(params, format)
    adapter = random_adapter(lora.find_sites(fn, base, x))
    loss = lambda adapter, base: jnp.square(lora.adapt(fn)(base, adapter, x)).sum()  # noqa: E731
    found, expected = (jax.jit(jax.value_and_grad(loss))(adapter, p) for p in (base, lora.dequantise(base)))
    assert_close(found, expected)
    whole = [eqn for eqn in jax.make_jaxpr(lora.adapt(fn))(base, adapter, x).eqns if eqn.primitive.name == "shard_map"]
    assert any(v.aval.dtype == base["w"].codes.dtype for v in whole[0].invars)


def test_merging():
    params, x = {"w": normal(15, 64, 128)}, normal(16, 2, 64)
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    base = lora.quantise(params, "int8")
    adapter = random_adapter(lora.find_sites(fn, base, x))
    exact = lora.adapt(fn)(base, adapter, x)
    assert_close(fn(lora.merge(lora.dequantise(base), adapter), x), exact)
    again = lora.merge(base, adapter)
    assert isinstance(again["w"], Quantised)
    (row,) = lora.merge_report(base, adapter).rows
    assert row.dtype == "int8"
    assert row.survival > 0.9
    assert_close(lora.merge(params, adapter)["w"] - params["w"], adapter["w"].delta(), factor=10)
    with pytest.raises(lora.MergeError, match="nearest only"):
        lora.merge(base, adapter, rounding="stochastic", key=jax.random.key(0))
    little = lora.scale(adapter, 1e-4)
    with pytest.raises(lora.MergeError, match=r"at 'w' \(nf4\).*what they were made of|quantised.*dequantise"):
        lora.merge(lora.quantise(params), little)
    with pytest.warns(UserWarning, match="rounding leaves"):
        lora.merge(lora.quantise(params), little, force=True)
    with pytest.raises(lora.MergeError, match="absorb it before quantising"):
        lora.absorb(base, adapter)


def test_loftq_with_the_quantiser_itself():
    params, x = {"w": normal(17, 64, 64)}, normal(18, 2, 64)
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    sites = lora.find_sites(fn, params, x)
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=8, targets="w"), params, sites)
    fitted, base = lora.loftq(adapter, params, "nf4", steps=2)
    assert isinstance(base["w"], Quantised)
    error = lambda tree: float(jnp.linalg.norm(tree["w"] - params["w"]))  # noqa: E731
    start = error(lora.dequantise(lora.quantise(params)))
    assert error(lora.merge(lora.dequantise(base), fitted)) < 0.8 * start


def test_on_disk(tmp_path):
    params, x = {"w": normal(19, 64, 128)}, normal(20, 2, 64)
    base = lora.quantise(params, nested=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", base)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "base", jax.tree.map(ocp.utils.to_shape_dtype_struct, base))
    assert (back["w"].dense() == base["w"].dense()).all()
    adapter = random_adapter(lora.find_sites(lambda params, x: x @ params["w"], base, x))
    lora.save(tmp_path / "adapter", adapter, params=base)
    for given in (base, lora.dequantise(base), params):
        assert (lora.load(tmp_path / "adapter", params=given)["w"].a == adapter["w"].a).all()


def test_summary_says_what_is_in_few_bits():
    params = {"w": normal(21, 64, 128), "norm": jnp.ones(64)}
    base = lora.quantise(params)
    adapter = random_adapter(
        lora.find_sites(lambda params, x: (x * params["norm"][None]) @ params["w"], base, normal(22, 2, 64))
    )
    info = lora.summary(adapter, base)
    assert info.line == lora.summary(adapter, params).line
    assert info.stored == {"nf4": (1, 4608), "float32": (1, 256)}
    assert "base: float32 1 parameter (256 bytes), nf4 1 parameter (4,608 bytes)" in str(info)
