"""Preconditioned gradients: the formulas in float64 NumPy, what they are for, and every place they may stand in."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_close, assert_same
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optim_cases import SITES, Half, low_rank, mixed, noise, run

import lora_jax as lora
from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.updates import LowRank
from lora_jax.errors import ConfigError, ParameterError
from lora_jax.optim.precondition import divide

REG, EPS = 0.03, 1e-8


def matrices(update: Any, field: str) -> list[np.ndarray]:
    """The factor of every layer and expert as a float64 matrix `[rank, rest]`."""
    array = np.asarray(getattr(update, field), np.float64)
    stacked = len(update.site.batch_axes)
    rank = array.shape[stacked]
    return list(array.reshape(-1, rank, int(np.prod(array.shape[stacked + 1 :]))))


def expected(gradient: Any, update: Any, field: str, other: str, damping: float, lift: bool) -> np.ndarray:
    scales = np.asarray(update.scale, np.float64).reshape(-1) if lift else np.ones(10**3)
    results = []
    for g, f, s in zip(matrices(gradient, field), matrices(update, other), scales, strict=False):
        results.append(np.linalg.inv(f @ f.T + damping * np.eye(len(f))) @ g / s**2)
    return np.stack(results).reshape(getattr(gradient, field).shape).astype(np.float32)


BOTH_WAYS = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])


def first(tx: optax.GradientTransformation, gradients: Any, adapter: Any, jit: bool) -> Any:
    """The first updates, in a program or without one for a single site of each kind of factors."""
    few = lambda tree: tree if jit else Adapter({path: tree[path] for path in ("dense/kernel", "moe/w")})  # noqa: E731
    gradients, adapter = few(gradients), few(adapter)
    return run(tx, gradients, adapter) if jit else tx.update(gradients, tx.init(adapter), adapter)[0]


@BOTH_WAYS
def test_riemannian_is_the_formula(jit: bool) -> None:
    adapter = low_rank()
    gradients = noise(adapter)
    for path, result in first(lora.optim.riemannian(REG), gradients, adapter, jit).items():
        update, gradient = adapter[path], gradients[path]
        assert_close(result.a, expected(gradient, update, "a", "b", REG, False), factor=3)
        assert_close(result.b, expected(gradient, update, "b", "a", REG, False), factor=3)
        assert_same(result.scale, gradient.scale)


@BOTH_WAYS
def test_lora_fa_is_the_formula(jit: bool) -> None:
    adapter = low_rank().without("table/embedding")
    gradients = noise(adapter)
    for path, result in first(lora.optim.lora_fa(optax.identity()), gradients, adapter, jit).items():
        desired = expected(gradients[path], adapter[path], "b", "a", EPS, True)
        assert_close(result.b, desired, factor=10)
        assert not result.a.any()


def test_lora_fa_moves_the_weight_along_the_projected_full_gradient() -> None:
    """What the correction is for: `s·aᵀ·gB` is the full gradient, projected onto the rows of A."""
    adapter = low_rank(rank=3)
    update: Any = adapter["dense/kernel"]
    full = np.random.default_rng(3).normal(size=(6, 5))
    a, scale = np.asarray(update.a, np.float64), float(update.scale)
    gradient = replace(update, a=update.a, b=jnp.asarray(scale * a @ full, jnp.float32))
    tx = lora.optim.lora_fa(optax.identity())
    one = Adapter({"dense/kernel": update})
    b = np.asarray(run(tx, Adapter({"dense/kernel": gradient}), one)["dense/kernel"].b)
    projector = np.linalg.pinv(a) @ a
    assert_close(scale * a.T @ b, projector @ full, "float32", factor=10)


def test_riemannian_steps_do_not_depend_on_the_split_into_factors() -> None:
    """What the preconditioner is for: the same weight from other factors moves in the same way."""
    update: Any = low_rank(rank=2)["dense/kernel"]
    full = np.random.default_rng(3).normal(size=(6, 5))
    mix = np.array([[2.0, 0.5], [-0.3, 0.7]])
    moves = []
    for m in (np.eye(2), mix):
        a, b = m @ np.asarray(update.a, np.float64), np.linalg.inv(m).T @ np.asarray(update.b, np.float64)
        here = replace(update, a=jnp.asarray(a, jnp.float32), b=jnp.asarray(b, jnp.float32), scale=jnp.float32(1))
        gradient = replace(here, a=jnp.asarray(b @ full.T, jnp.float32), b=jnp.asarray(a @ full, jnp.float32))
        step = run(lora.optim.riemannian(1e-7), Adapter({"w": gradient}), Adapter({"w": here}))["w"]
        moves.append(np.asarray(step.a).T @ b + a.T @ np.asarray(step.b))
    assert_close(moves[1], moves[0], "float32", factor=20)
    assert np.abs(moves[0]).max() > 0.1


@given(
    rank=st.integers(1, 16),
    true_rank=st.integers(0, 4),
    size=st.sampled_from([1, 3, 200, 3000]),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e4, 1e12]),
    seed=st.integers(0, 99),
)
@pytest.mark.full
def test_singular_factors_give_finite_descent(rank: int, true_rank: int, size: int, scale: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    factor = scale * draw.normal(size=(rank, true_rank)) @ draw.normal(size=(true_rank, size))
    gradient = draw.normal(size=(rank, 5)).astype(np.float32)
    result = np.asarray(divide(jnp.asarray(gradient), jnp.asarray(factor, jnp.float32), EPS, 0), np.float64)
    assert np.isfinite(result).all()
    assert (result * gradient).sum() > 0


def test_ranks_padded_with_zeros_change_nothing() -> None:
    update: Any = low_rank()["dense/kernel"]
    gradient: Any = noise(update)
    pad = lambda one: replace(one, a=jnp.pad(one.a, ((0, 3), (0, 0))), b=jnp.pad(one.b, ((0, 3), (0, 0))))  # noqa: E731
    for tx in (lora.optim.riemannian(REG), lora.optim.lora_fa(optax.identity())):
        small = run(tx, Adapter({"w": gradient}), Adapter({"w": update}))["w"]
        large = run(tx, Adapter({"w": pad(gradient)}), Adapter({"w": pad(update)}))["w"]
        assert_close(large, pad(small))


def test_lora_fa_at_scale_zero_rests() -> None:
    adapter = low_rank()
    stacked: Any = adapter["scan/w"]
    some = replace(stacked, scale=stacked.scale.at[1].set(0.0).at[2].set(1e-30))
    gradients: Any = noise(stacked)
    gradients = replace(gradients, b=gradients.b * some.scale[:, None, None])
    result = run(lora.optim.lora_fa(optax.identity()), Adapter({"w": gradients}), Adapter({"w": some}))["w"]
    assert np.isfinite(result.b).all()
    assert not result.b[1].any()
    assert result.b[0].all()
    assert result.b[2].all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(dtype: str) -> None:
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), low_rank())
    gradients = noise(narrow)
    wide, wide_gradients = (jax.tree.map(lambda leaf: leaf.astype("float32"), tree) for tree in (narrow, gradients))
    tx = lora.optim.riemannian(REG)
    desired = jax.tree.map(lambda leaf: leaf.astype(dtype), run(tx, wide_gradients, wide))
    assert_same(run(tx, gradients, narrow), desired)
    other = run(lora.optim.lora_fa(optax.sgd(1.0)), gradients, narrow)
    assert {leaf.dtype for leaf in jax.tree.leaves(other)} == {jnp.dtype(dtype)}


TRANSFORMS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "riemannian": lambda: optax.chain(lora.optim.riemannian(REG), optax.scale_by_adam()),
    "lora_fa": lambda: lora.optim.lora_fa(optax.scale_by_adam()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_place_gives_the_same(name: str) -> None:
    """Bare, inside `lora.optimizer`, without jit, on a combined tree, in a chain, in optax's own wrappers."""
    adapter, make = mixed(), TRANSFORMS[name]
    gradients = noise(adapter)
    base = {"w": jnp.ones((6, 5), jnp.bfloat16), "ids": jnp.arange(3)}
    desired = run(lora.optimizer(make(), adapter), gradients, adapter)
    trained = jax.tree.map(lambda trains, leaf: leaf if trains else None, lora.trainable(adapter), desired)

    def check(updates: Any) -> None:
        mask = lora.trainable(updates)
        assert_close(jax.tree.map(lambda trains, leaf: leaf if trains else None, mask, updates), trained)

    check(run(make(), gradients, adapter))
    tx = lora.optimizer(make(), adapter)
    check(tx.update(gradients, tx.init(adapter), adapter)[0])
    tree = {"params": base, "lora": adapter}
    both = run(lora.optimizer(make(), tree), {"params": base, "lora": gradients}, tree)
    check(both["lora"])
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(both["params"]))
    for wrapped in (
        optax.apply_if_finite(make(), 3),
        optax.chain(optax.identity(), make()),
        optax.MultiSteps(make(), 1).gradient_transformation(),
        optax.partition({"all": make()}, lambda tree: jax.tree.map(lambda leaf: "all", tree)),
    ):
        check(run(lora.optimizer(wrapped, adapter), gradients, adapter))
    check(run(optax.MultiSteps(tx, 1).gradient_transformation(), gradients, adapter))


def test_what_has_no_factors_passes() -> None:
    adapter = mixed()
    gradients = noise(adapter)
    for tx in (lora.optim.riemannian(REG), lora.optim.lora_fa(optax.identity())):
        result: Any = run(lora.optimizer(tx, adapter), gradients, adapter)
        for path in ("head/kernel", "head/bias", "scan/bias", "norm/scale", "tokens/embedding"):
            assert_same(result[path], gradients[path])
        assert_same(result["dora/kernel"].magnitude, gradients["dora/kernel"].magnitude)


@pytest.mark.parametrize("frozen", ["a", "b"])
def test_frozen_factor_rests_and_still_divides(frozen: str) -> None:
    update: Any = low_rank()["dense/kernel"]
    half = Half(update.a, update.b, update.scale, update.site, frozen=frozen)
    adapter, trained = Adapter({"w": half}), {"a": "b", "b": "a"}[frozen]
    gradients, tx = noise(adapter), lora.optimizer(lora.optim.riemannian(REG), adapter)
    result: Any = run(tx, gradients, adapter)["w"]
    assert not getattr(result, frozen).any()
    desired = expected(gradients["w"], half, trained, frozen, REG, False)
    assert_close(getattr(result, trained), desired, factor=3)
    bare: Any = run(lora.optim.riemannian(REG), gradients, adapter)["w"]
    assert_same(getattr(bare, frozen), getattr(gradients["w"], frozen))


def test_lora_fa_trains_what_has_no_a_to_hold() -> None:
    """A look-up table starts with A at zero, and an update whose B is frozen has only A."""
    adapter = low_rank()
    update: Any = adapter["dense/kernel"]
    adapter = Adapter({**adapter, "mica": Half(update.a, update.b, update.scale, update.site, frozen="b")})
    gradients: Any = noise(adapter)
    result: Any = run(lora.optimizer(lora.optim.lora_fa(optax.identity()), adapter), gradients, adapter)
    assert_same(result["table/embedding"].a, gradients["table/embedding"].a)
    assert_same(result["table/embedding"].b, gradients["table/embedding"].b)
    assert_same(result["mica"].a, gradients["mica"].a)


def test_lora_fa_keeps_no_state_for_a_and_never_moves_it() -> None:
    adapter = Adapter({path: update for path, update in mixed().items() if path != "table/embedding"})
    tree = {"params": {"w": jnp.ones((50, 50))}, "lora": adapter}
    tx = lora.optimizer(lora.optim.lora_fa(optax.adamw(0.1, weight_decay=0.5)), tree)
    state = tx.init(tree)
    fields = ("b", "magnitude", "value")
    trained = sum(
        getattr(update, field).size for update in adapter.values() for field in fields if hasattr(update, field)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * trained + 1
    new: Any = jax.jit(lambda tree, gradients: optax.apply_updates(tree, tx.update(gradients, state, tree)[0]))(
        tree, noise(tree)
    )
    for path, update in adapter.items():
        if hasattr(update, "a"):
            assert_same(new["lora"][path].a, update.a)
            assert (new["lora"][path].b != update.b).all()


def problem() -> tuple[Any, Any, Any, Any]:
    params = {"up": jax.device_put(np.float32(np.random.default_rng(0).normal(size=(64, 96)) / 8))}
    params["down"] = params["up"].T
    x = jax.device_put(np.float32(np.random.default_rng(1).normal(size=(256, 64))))
    fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]  # noqa: E731
    sites = lora.find_sites(fn, params, x)
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=4, targets=("up", "down")), params, sites)
    return lora.adapt(fn), params, adapter, x


def stepper(tx: optax.GradientTransformation) -> tuple[Any, Any, Any]:
    adapted, params, adapter, x = problem()

    def loss(adapter: Any) -> Any:
        return ((adapted(params, adapter, x) - jnp.sin(x)) ** 2).mean()

    @jax.jit
    def step(adapter: Any, state: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(gradients, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    return step, adapter, tx.init(adapter)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.chain(lora.optim.riemannian(), optax.adam(0.02)),
        lambda: optax.chain(lora.optim.riemannian(), optax.sgd(0.5)),
        lambda: lora.optim.lora_fa(optax.adam(0.02)),
        lambda: lora.optim.lora_fa(optax.sgd(20.0)),
    ],
    ids=["riemannian adam", "riemannian sgd", "lora_fa adam", "lora_fa sgd"],
)
def test_training_from_zero_learns_and_compiles_once(make: Any) -> None:
    step, adapter, state = stepper(lora.optimizer(make(), problem()[2]))
    losses = []
    for _ in range(30):
        adapter, state, value = step(adapter, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    assert step._cache_size() == 1


def test_lora_fa_does_not_compute_the_gradient_of_a() -> None:
    flops = {}
    for name, tx in {"sgd": optax.sgd(1.0), "fa": lora.optim.lora_fa(optax.sgd(1.0))}.items():
        step, adapter, state = stepper(lora.optimizer(tx, problem()[2]))
        flops[name] = step.lower(adapter, state).compile().cost_analysis()["flops"]
    gradient_of_a = 2 * 256 * 4 * (64 + 96)
    assert flops["fa"] < flops["sgd"] - 0.8 * gradient_of_a


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_factors(kind: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    adapter = random_stack()
    gradients = noise(adapter)
    spec = {"a": P("data", None, "model"), "b": P("data", None, "model"), "scale": P("data")}
    places = Adapter({"w": replace(adapter["w"], **{key: NamedSharding(mesh, at) for key, at in spec.items()})})
    there, gradients_there = jax.device_put(adapter, places), jax.device_put(gradients, places)
    for name, make in TRANSFORMS.items():
        tx = lora.optimizer(make(), adapter)
        with jax.set_mesh(mesh):
            result = jax.jit(lambda g, p, tx=tx: tx.update(g, tx.init(p), p)[0])(gradients_there, there)
        assert_close(jax.device_get(result), jax.device_get(run(tx, gradients, adapter)))
        if kind == AxisType.Explicit:
            assert result["w"].b.sharding.spec == spec["b"], name


def random_stack() -> Adapter:
    site = replace(SITES[3], shape=(8, 4, 6), in_axes=(0,), out_axes=(2,), batch_axes=(1,))
    draw = np.random.default_rng(0)
    a, b = (jax.device_put(np.float32(draw.normal(size=shape))) for shape in ((4, 2, 8), (4, 2, 6)))
    return Adapter({"w": LowRank(a, b, jnp.arange(1.0, 5.0), site)})


class Tuned(nnx.Module):
    def __init__(self) -> None:
        self.lora = nnx.LoRAParam(low_rank())


def test_nnx_optimizer() -> None:
    for make in TRANSFORMS.values():
        model = Tuned()
        optimizer = nnx.Optimizer(model, lora.optimizer(make(), model), wrt=nnx.LoRAParam)
        gradients = noise(low_rank())
        tx = lora.optimizer(make(), low_rank())
        desired = optax.apply_updates(low_rank(), run(tx, gradients, low_rank()))
        state = nnx.state(model, nnx.LoRAParam)
        optimizer.update(model, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(gradients)))
        assert_close(model.lora.get_value(), desired)


def test_state_can_be_mapped_like_parameters() -> None:
    adapter = low_rank()
    tx = lora.optimizer(optax.chain(lora.optim.riemannian(), lora.optim.lora_fa(optax.adam(0.1))), adapter)
    state = tx.init(adapter)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state, is_leaf=lambda node: isinstance(node, jax.Array))
    sizes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]  # noqa: E731
    assert sizes(mapped) == sizes(state)


@pytest.mark.parametrize(
    "tx", [lora.optim.riemannian(), lora.optim.lora_fa(optax.sgd(1.0))], ids=["riemannian", "lora_fa"]
)
def test_errors(tx: optax.GradientTransformation) -> None:
    adapter = low_rank()
    with pytest.raises(ParameterError, match=r"reads the values of the factors: call tx\.update\(gradients, state, p"):
        tx.update(adapter, tx.init(adapter))
    wrapped = lora.optimizer(tx, adapter)
    with pytest.raises(ParameterError, match="reads the values"):
        wrapped.update(adapter, wrapped.init(adapter))
    whole = Adapter({"head/bias": mixed()["head/bias"]})
    with pytest.raises(ParameterError, match=r"no low-rank factors in a tree of type Adapter.*\"lora\": adapter"):
        tx.update(whole, tx.init(whole), whole)


def test_factor_hidden_by_a_mask_is_named() -> None:
    adapter = Adapter({"half/kernel": mixed()["half/kernel"]})
    for name, tx in {"riemannian": lora.optim.riemannian(), "lora_fa": lora.optim.lora_fa(optax.sgd(1.0))}.items():
        masked = optax.masked(tx, lora.trainable)
        with pytest.raises(ParameterError, match=rf"{name} needs 'a' of 'half/kernel'.*mask with lora_jax\.optimizer"):
            masked.update(noise(adapter), masked.init(adapter), adapter)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "1", None])
def test_damping_is_positive(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"reg=.* must be a positive number"):
        lora.optim.riemannian(value)
    with pytest.raises(ConfigError, match=r"eps=.* must be a positive number"):
        lora.optim.lora_fa(optax.sgd(1.0), eps=value)
