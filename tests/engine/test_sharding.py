"""Sharded programs: the same numbers as on one device, and no communication beyond the base's but rank-sized."""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, differ, random_adapter
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from table.methods import METHODS

import lora_jax as lora
from lora_jax.adapter.sharding import adapter_sharding
from lora_jax.engine import Strategy

B, T, D, F, RANK = 8, 16, 32, 64, 2
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
KEY = np.array([0, 7], np.uint32)
FAST: Any = {"xla_backend_optimization_level": 0}  # Spares LLVM's work; how a program is spread does not change.

Pin = Callable[[str, Any, Any, P], Any]


def make_mesh(kind: str) -> Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(KINDS[kind],) * 2)


def pinned(mesh: Mesh | None) -> Pin:
    """An einsum whose result is placed: by its type on an explicit mesh, by a constraint on an automatic one."""

    def einsum(spec: str, x: Any, w: Any, where: P) -> Any:
        if mesh is None:
            return jnp.einsum(spec, x, w)
        if AxisType.Explicit in mesh.axis_types:
            return jnp.einsum(spec, x, w, out_sharding=NamedSharding(mesh, where))
        return jax.lax.with_sharding_constraint(jnp.einsum(spec, x, w), NamedSharding(mesh, where))

    return einsum


class Feedforward(nn.Module):
    """Two linen layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(D, name="down")(jnp.tanh(nn.Dense(F, name="up")(x)))


def linen(einsum: Pin, params: Any, x: jax.Array) -> Any:
    return Feedforward().apply({"params": params}, x)


def heads(einsum: Pin, params: Any, x: jax.Array, hidden: P, out: P) -> jax.Array:
    h = jnp.tanh(einsum("btd,dhk->bthk", x, params["up"], hidden))
    return einsum("bthk,hkd->btd", h, params["down"], out)


def rows(einsum: Pin, params: Any, x: jax.Array) -> jax.Array:
    return heads(einsum, params, x, P("data"), P("data"))


def tensor(einsum: Pin, params: Any, x: jax.Array) -> jax.Array:
    return heads(einsum, params, x, P("data", None, "model"), P("data"))


def sequence(einsum: Pin, params: Any, x: jax.Array) -> jax.Array:
    return heads(einsum, params, x, P("data", "model"), P("data", "model"))


def both(einsum: Pin, params: Any, x: jax.Array) -> jax.Array:
    return heads(einsum, params, x, P("data", None, "model"), P("data", "model"))


def experts(einsum: Pin, params: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(einsum("btd,edf->ebtf", x, params["up"], P("model", "data")))
    return einsum("ebtf,efd->ebtd", h, params["down"], P("model", "data"))


def scanned(einsum: Pin, params: Any, x: jax.Array) -> jax.Array:
    @jax.checkpoint
    def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
        h = jnp.tanh(einsum("btd,df->btf", x, params["up"], P("data", None, "model")))
        return x + einsum("btf,fd->btd", h, params["down"], P("data")), None

    return jax.lax.scan(layer, x, params)[0]


@dataclass(frozen=True)
class Layout:
    """A function, the shapes of its two kernels, and where they and the tokens are."""

    fn: Callable[..., Any]
    up: tuple[int, ...]
    down: tuple[int, ...]
    x: P
    up_at: P
    down_at: P
    dropout: float = 0.0

    def bound(self, mesh: Mesh | None) -> Callable[..., Any]:
        return partial(self.fn, pinned(mesh))

    def params(self) -> Any:
        draw = np.random.default_rng(1)
        up, down = (jax.device_put(np.float32(draw.normal(size=s) / np.sqrt(D))) for s in (self.up, self.down))
        if self.fn is not linen:
            return {"up": up, "down": down}
        return {"up": {"kernel": up, "bias": jnp.zeros(F)}, "down": {"kernel": down, "bias": jnp.zeros(D)}}

    def specs(self) -> Any:
        if self.fn is not linen:
            return {"up": self.up_at, "down": self.down_at}
        return {"up": {"kernel": self.up_at, "bias": P()}, "down": {"kernel": self.down_at, "bias": P()}}


UP, DOWN = (D, 4, F // 4), (4, F // 4, D)
LAYOUTS = {
    "data parallel": Layout(linen, (D, F), (F, D), P("data"), P(), P()),
    "fully sharded": Layout(rows, UP, DOWN, P("data"), P("data"), P(None, None, "data")),
    "tensor parallel": Layout(tensor, UP, DOWN, P("data"), P(None, "model"), P("model")),
    "sequence parallel": Layout(sequence, UP, DOWN, P("data", "model"), P(), P()),
    "all of these": Layout(both, UP, DOWN, P("data", "model"), P("data", "model"), P("model", None, "data"), 0.5),
    "experts": Layout(experts, (2, D, F), (2, F, D), P("data"), P("model"), P("model")),
    "scanned layers": Layout(scanned, (3, D, F), (3, F, D), P("data"), P(None, None, "model"), P(None, "model")),
}


def tokens() -> jax.Array:
    return jax.device_put(np.float32(np.random.default_rng(0).normal(size=(B, T, D))))


def on(mesh: Mesh, tree: Any, specs: Any) -> Any:
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)


def step(fn: Callable[..., Any], strategy: Strategy = "factored", key: Any = None) -> Callable[..., Any]:
    """Output, and gradients of adapter and input."""
    adapted = lora.adapt(fn, strategy=strategy)

    def loss(adapter: Any, x: Any, params: Any) -> Any:
        y = adapted(params, adapter, x, lora_key=key)
        return (y * y).sum(), y

    def run(adapter: Any, x: Any, params: Any) -> Any:
        (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(adapter, x, params)
        return y, *grads

    return run


def floor(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The base's part of the step: output, and gradient of the input."""
    whole = step(fn)
    return lambda x, params: whole((), x, params)[::2]


def compiled(fn: Callable[..., Any], *args: Any, out: Any = None) -> Any:
    return jax.jit(fn, out_shardings=out).lower(*args).compile(compiler_options=FAST)


def moved(program: Any) -> Counter[tuple[str, int]]:
    """Collectives of a compiled program that carry more than `rank` numbers per token, by kind and size."""
    found: Counter[tuple[str, int]] = Counter()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for result, kind in re.findall(rf" = (\(.*?\)|\S+) ({kinds})(?:-start)?\(", program.as_text()):
        sizes = [prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w\[([\d,]*)\]", result)]
        found.update((kind, size) for size in ([sum(sizes)] if kind == "all-to-all" else sizes) if size > B * T * RANK)
    return found


@cache
def unsharded(layout: str) -> tuple[Any, Any, Any, Any, Any]:
    """Parameters, adapter and tokens on one device, and what a step gives there, with and without a dropout key."""
    given = LAYOUTS[layout]
    params, x, fn = given.params(), tokens(), given.bound(None)
    adapter = random_adapter(lora.find_sites(fn, params, x), rank=RANK, dropout=given.dropout)
    args = (adapter, x, params)
    plain = compiled(step(fn), *args)(*args)
    return *args, plain, compiled(step(fn, key=KEY), *args)(*args) if given.dropout else plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_is_unsharded(layout: str, kind: str) -> None:
    """Factored, with dropout or without, and merged; the factored step moves nothing large that the base does not."""
    given, mesh = LAYOUTS[layout], make_mesh(kind)
    adapter, x, params, plain, dropped = unsharded(layout)
    params, x, fn = on(mesh, params, given.specs()), on(mesh, x, given.x), given.bound(mesh)
    places = adapter_sharding(adapter, params)
    args, out = (jax.device_put(adapter, places), x, params), (None, places, x.sharding)

    program = compiled(step(fn, key=KEY if given.dropout else None), *args, out=out)
    assert_close(program(*args), dropped)
    assert_close(compiled(step(fn, "merged"), *args, out=out)(*args), plain)

    base = compiled(floor(fn), x, params, out=out[::2])
    extra = moved(program) - moved(base)
    assert not extra, f"{layout} moves {extra} beside {moved(base)}"
    for whole in ((B, T, D), (B, T, *UP[1:])):
        assert f"u32[{','.join(map(str, whole))}]" not in program.as_text(), "masks are drawn where the activation is"


@cache
def unsharded_method(method: str, layout: str) -> tuple[lora.Adapter, Any]:
    """An adapter of a method, and what a step gives with it on one device."""
    factors, x, params, _, _ = unsharded(layout)
    made = {path: METHODS[method].trained(factors[path], params[path]) for path in factors}
    adapter = lora.Adapter({path: replace(update, dropout=0.0) for path, update in made.items()})
    return adapter, compiled(step(LAYOUTS[layout].bound(None)), adapter, x, params)(adapter, x, params)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["all of these", "scanned layers"])
@pytest.mark.parametrize(
    ("method", "placed"), [("dora", False), *((method, True) for method in METHODS if method != "lora")]
)
def test_methods(method: str, placed: bool, layout: str, kind: str) -> None:
    """What a method makes of its arrays is spread as they are; DoRA's norms also where nobody placed them."""
    given, mesh = LAYOUTS[layout], make_mesh(kind)
    _, x, params, _, _ = unsharded(layout)
    adapter, plain = unsharded_method(method, layout)
    params, x = on(mesh, params, given.specs()), on(mesh, x, given.x)
    adapter = jax.device_put(adapter, adapter_sharding(adapter, params)) if placed else adapter
    with nullcontext() if placed else jax.set_mesh(mesh):
        assert_close(compiled(step(given.bound(mesh)), adapter, x, params)(adapter, x, params), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_mesh_in_context(kind: str) -> None:
    """`jax.set_mesh` around the call, and an adapter that nobody placed."""
    given, mesh = LAYOUTS["all of these"], make_mesh(kind)
    adapter, x, params, plain, _ = unsharded("all of these")
    with jax.set_mesh(mesh):
        args = adapter, on(mesh, x, given.x), on(mesh, params, given.specs())
        assert_close(compiled(step(given.bound(mesh), "auto"), *args)(*args), plain)


def explicit(array: Any) -> bool:
    return AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types


def place(array: Any, mesh: Mesh, where: P) -> Any:
    move = jax.sharding.reshard if explicit(array) else jax.lax.with_sharding_constraint
    return move(array, NamedSharding(mesh, where))


def moved_weight(mesh: Mesh, w: jax.Array, x: jax.Array) -> jax.Array:
    """Fully sharded weights, gathered by hand before use."""
    return x @ place(w, mesh, P(None, "model"))


def merged_axes(mesh: Mesh, w: jax.Array, x: jax.Array) -> jax.Array:
    """A reshape that has to say where its result goes."""
    where = NamedSharding(mesh, P(None, "model")) if explicit(w) else None
    w = place(w.reshape(D, 2, F // 2), mesh, P(None, None, "model"))
    return x @ jax.lax.reshape(w, (D, F), out_sharding=where)


def sliced(mesh: Mesh, w: jax.Array, x: jax.Array) -> jax.Array:
    """Halves of a fused kernel, the input axis sharded."""
    return jnp.tanh(x @ w[:, : F // 2]) * (x @ w[:, F // 2 :])


def inner_jit(mesh: Mesh, w: jax.Array, x: jax.Array) -> jax.Array:
    """A function with output shardings of its own."""
    put = partial(NamedSharding, mesh)
    w, y = jax.jit(lambda w, x: (w, x @ w), out_shardings=(put(P()), put(P("data", None, "model"))))(w, x)
    return y + x @ w


def looked_up(mesh: Mesh, w: jax.Array, x: jax.Array) -> jax.Array:
    """Rows of a table, spread along either axis."""
    rows = (jnp.abs(x[:, :, 0]) * 8).astype(jnp.int32) % D
    return w.at[rows].get(out_sharding=NamedSharding(mesh, P("data")) if explicit(w) else None)


def convolved(mesh: Mesh, w: jax.Array, x: jax.Array) -> jax.Array:
    """A convolution over time."""
    return jax.lax.conv_general_dilated(x, w.reshape(1, D, F), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def partial_sums(mesh: Mesh, w: jax.Array, x: jax.Array) -> jax.Array:
    """A product whose sum over devices is taken later."""
    if not explicit(w):
        return x @ w
    x = place(x, mesh, P("data", None, "model"))
    where = NamedSharding(mesh, P("data", None, None, unreduced=frozenset({"model"})))
    return place(jnp.einsum("btd,df->btf", x, w, out_sharding=where), mesh, P("data"))


PROGRAMS = {
    moved_weight: P("data", "model"),
    merged_axes: P(None, "model"),
    sliced: P("data"),
    inner_jit: P(None, "model"),
    looked_up: P("model"),
    convolved: P(),
    partial_sums: P("model"),
}


@cache
def by_itself(program: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """Adapter and parameters on one device, and what a step gives there."""
    params, x = {"w": LAYOUTS["data parallel"].params()["up"]["kernel"]}, tokens()
    fn = lambda params, x: program(make_mesh("auto"), params["w"], x)  # noqa: E731
    args = random_adapter(lora.find_sites(fn, params, x), rank=RANK), x, params
    return args[0], params, compiled(step(fn), *args)(*args)[:2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_weight_on_its_way_to_the_product(program: Callable[..., Any], kind: str) -> None:
    """What happens to a sharded weight before it is used leaves it factored, and its factors follow."""
    mesh, x = make_mesh(kind), tokens()
    fn = lambda params, x: program(mesh, params["w"], x)  # noqa: E731
    adapter, params, want = by_itself(program)
    params_at = {"w": jax.device_put(params["w"], NamedSharding(mesh, PROGRAMS[program]))}
    args = jax.device_put(adapter, adapter_sharding(adapter, params_at)), on(mesh, x, P("data")), params_at
    with jax.set_mesh(mesh):
        assert lora.find_sites(fn, params_at, args[1])["w"] == adapter["w"].site
        assert_close(compiled(step(fn), *args)(*args)[:2], want)
        formed = lora.explain(fn, params_at, adapter, args[1]).materialised
    assert bool(formed) == (program is partial_sums and kind == "explicit")


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("kind", KINDS)
def test_shard_map(kind: str, check: bool) -> None:
    """A program over one device's shards: a column-parallel product, and a row-parallel one with its sum."""
    mesh, x = make_mesh(kind), tokens()
    draw = np.random.default_rng(1)
    params = {
        name: jax.device_put(np.float32(draw.normal(size=s) / 8)) for name, s in (("up", (D, F)), ("down", (F, D)))
    }
    specs = {"up": P(None, "model"), "down": P("model")}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        def shard(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
            return jax.lax.psum(jnp.tanh(x @ up) @ down, "model")

        place = {"in_specs": (P("data"), specs["up"], specs["down"]), "out_specs": P("data"), "check_vma": check}
        return jax.shard_map(shard, mesh=mesh, **place)(x, params["up"], params["down"])

    def plain(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["up"]) @ params["down"]

    adapter = random_adapter(lora.find_sites(plain, params, x), rank=RANK, dropout=0.5)
    # Adapters that nobody placed come out right too.
    params_at, x_at = on(mesh, params, specs), on(mesh, x, P("data"))
    want = compiled(step(plain), adapter, x, params)(adapter, x, params)
    strategies: list[Strategy] = ["factored", "auto"] if check else ["auto"]
    for strategy in strategies:
        assert_close(compiled(step(fn, strategy), adapter, x_at, params_at)(adapter, x_at, params_at), want)
    assert not lora.explain(fn, params_at, adapter, x_at).materialised

    same = on(mesh, jnp.broadcast_to(x[:1], x.shape), P("data"))
    run = compiled(lambda *args: lora.adapt(fn)(*args, lora_key=KEY), params_at, adapter, same)
    y = np.asarray(run(params_at, adapter, same))
    assert differ(y[0], y[1])
    assert differ(y[0], y[2]) == check, "shards that are known to differ draw their own masks"


def test_shard_map_over_some_axes() -> None:
    """One mesh axis by hand, the other left to explicit sharding."""
    mesh, x = make_mesh("explicit"), tokens()
    params = {"w": LAYOUTS["data parallel"].params()["up"]["kernel"]}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        specs = {"in_specs": (P(), P(None, "model")), "out_specs": P(None, None, "model")}
        return jax.shard_map(jnp.matmul, mesh=mesh, axis_names={"model"}, **specs)(x, params["w"])

    plain = lambda params, x: x @ params["w"]  # noqa: E731
    adapter = random_adapter(lora.find_sites(plain, params, x), rank=RANK)
    args = adapter, on(mesh, x, P("data")), on(mesh, params, {"w": P(None, "model")})
    assert_close(compiled(step(fn), *args)(*args), step(plain)(adapter, x, params))


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_sharding(kind: str) -> None:
    """Factors are drawn in place, the same as on one device, and what trains in full lies beside its parameter."""
    mesh, given = make_mesh(kind), LAYOUTS["scanned layers"]
    params = given.params() | {"norm": jnp.ones((3, D))}
    specs = given.specs() | {"norm": P(None, ("data", "model"))}
    sites = lora.find_sites(given.bound(None), params, tokens())
    config = lora.LoraConfig(rank=RANK, targets="up", train="norm")
    params_at = on(mesh, params, specs)
    start = lambda key, params: lora.init(key, config, params, sites)  # noqa: E731
    places = adapter_sharding(jax.eval_shape(start, jax.random.key(0), params), params_at)
    adapter = jax.jit(start, out_shardings=places)(jax.random.key(0), params_at)
    assert_same(adapter, start(jax.random.key(0), params))
    up = adapter["up"]
    assert [part.sharding.spec for part in (up.a, up.b, up.scale, adapter["norm"].value)] == [
        P(None, None, None), P(None, None, "model"), P(None), P(None, ("data", "model")),
    ]  # fmt: skip


def test_adapter_sharding_along_some_axes() -> None:
    mesh = make_mesh("auto")
    params = on(mesh, {"w": jnp.ones((8, 8)), "u": jnp.ones((8, 8)), "bias": jnp.ones(8)}, {
        "w": P("data", "model"), "u": P(("model", "data"), None), "bias": P("data"),
    })  # fmt: skip
    fn = lambda params, x: x @ params["w"] @ params["u"] + params["bias"][None]  # noqa: E731
    sites = lora.find_sites(fn, params, jnp.ones((2, 8)))
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets=("w", "u"), train="bias"), params, sites)
    specs = lambda **how: jax.tree.map(lambda each: each.spec, adapter_sharding(adapter, params, **how))  # noqa: E731
    assert (specs()["w"].a, specs()["w"].b) == (P(None, "data"), P(None, "model"))
    some = specs(axes=("model",))
    assert (some["w"].a, some["w"].b, some["u"].a) == (P(None, None), P(None, "model"), P(None, "model"))
    assert some["bias"].value == P("data")
    for wrong in ("model", ("tensor",)):
        with pytest.raises(lora.ParameterError, match=r"the mesh of '[uw]' has data, model"):
            adapter_sharding(adapter, params, axes=wrong)


def test_adapter_sharding_needs_placed_parameters() -> None:
    adapter, _, params, _, _ = unsharded("sequence parallel")
    assert jax.tree.leaves(adapter_sharding(adapter, params))[0] == params["up"].sharding
    with pytest.raises(lora.ParameterError, match=r"'down' has no sharding.*device_put"):
        adapter_sharding(adapter, jax.tree.map(np.asarray, params))
