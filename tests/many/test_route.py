"""Routing: every example of a batch gives what it gives alone with its own adapter."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    TOLERANCE,
    assert_close,
    assert_gradients_close,
    cast_floats,
    compiled,
    random_adapter,
)
from table import CASES, Case

import lora_jax as lora
from lora_jax.engine.routing.forms import Form

ALONE = {
    # No axis of examples, or another one than the first of every argument.
    "equinox-linear_one_example", "equinox-ensemble", "haiku-recurrent", "linen-conv_without_batch",
    "linen-dense_general_batched", "linen-two_of_one_shape", "linen-vmapped_experts", "nnx-shared_and_raw",
    "nnx-ensemble", "plain-batch_grouped_conv", "plain-broadcast", "plain-conv_of_the_weight",
    "plain-conv2d_odd_layout", "plain-ensemble_of_convolutions",
    "plain-decoding", "plain-elementwise", "plain-ensemble", "plain-ensemble_last_axis",
    "plain-ensemble_of_one_input", "plain-equal_shapes_as_activation", "plain-experts", "plain-experts_inner_axis",
    "plain-fused_qkv_reshaped", "plain-gathered_experts", "plain-key_value_2kdh", "plain-left_einsum",
    "plain-look_up_then_experts", "plain-matmul_of_a_vector", "plain-recurrent", "plain-stacked_look_up",
    "plain-take_along_columns", "plain-tensordot", "plain-top_two_experts", "plain-vmapped_ensemble",
    "plain-vmapped_recurrence", "plain-weight_as_activation", "plain-weight_on_the_left",
    # The examples meet in the result.
    "plain-cond_returning_the_weight", "plain-gradient_inside", "plain-pallas_call", "plain-penalised",
    "plain-ragged_dot", "plain-ragged_dot_of_transposed", "plain-ragged_experts",
    "plain-scan_returning_the_weights", "plain-unused_and_returned",
}  # fmt: skip
"""Rows of the shared table that have no examples to run alone."""

REFUSED = {
    "plain-product_of_weights", "plain-gram", "plain-tiled",
}  # fmt: skip
"""Rows in which a weight would have to be formed, beside those that say so."""


def route(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A routed function that is compiled as one program."""
    return compiled(lora.route(fn, **options))


ROWS = [case for case in CASES if case.id not in ALONE and case.method == "lora"]
GAINED = [
    case for case in CASES if case.method == "dora" and not case.variant and case.id[: -len("-dora")] not in ALONE
]


def refused(case: Case) -> bool:
    """Whether a row has no low-rank form for every example."""
    return bool(case.materialised) or case.id.removesuffix("-dora") in REFUSED


def rows(cases: Sequence[Case], *conditions: Callable[[Case], bool]) -> Any:
    """Parametrize a test over rows."""
    chosen = [case for case in cases if all(condition(case) for condition in conditions)]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.id)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array with axes."""
    return getattr(leaf, "ndim", 0) > 0


def example(tree: Any, i: int) -> Any:
    """One example, as a batch of one."""
    return jax.tree.map(lambda leaf: leaf[i : i + 1] if is_array(leaf) else leaf, tree)


def batch(case: Case) -> int:
    """Number of examples in a row of the table."""
    (size,) = {leaf.shape[0] for leaf in jax.tree.leaves(case.model.args) if is_array(leaf)}
    return size


def axes(case: Case) -> Any:
    """Where the examples run in the arguments."""
    return jax.tree.map(lambda leaf: 0 if is_array(leaf) else None, case.model.args)


def each_alone(case: Case, adapters: Sequence[lora.Adapter], ids: Sequence[int]) -> Any:
    """What every example gives alone with its adapter, in one batch."""
    fn, params, args = case.model
    adapted = compiled(lora.adapt(fn))
    found = [adapted(params, [adapters[slot - 1]] if slot else [], *example(args, i)) for i, slot in enumerate(ids)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts) if is_array(parts[0]) else parts[0], *found)


def arrays(tree: Any) -> list[Any]:
    """The arrays of a result that may hold other things."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def ids_of(case: Case) -> list[int]:
    """A slot for every example: the base among them."""
    return [(2, 0, 1)[i % 3] for i in range(batch(case))]


def adapters_of(case: Case) -> list[lora.Adapter]:
    """Two adapters of different ranks."""
    return [random_adapter(case.targets, seed=i, rank=rank) for i, rank in enumerate((2, 3))]


@cache
def reference(case: Case) -> list[Any]:
    """The results of a row, each example alone with its adapter."""
    return arrays(each_alone(case, adapters_of(case), ids_of(case)))


@pytest.mark.parametrize("strategy", get_args(Form))
@rows(ROWS, lambda case: not refused(case))
def test_every_example_is_as_it_is_alone(case: Case, strategy: Form) -> None:
    routed = compiled(lora.route(case.model.fn, batch_axes=axes(case), strategy=strategy))
    found = routed(case.model.params, adapters_of(case), ids_of(case), *case.model.args)
    assert_close(arrays(found), reference(case))


@rows(GAINED, lambda case: not refused(case))
def test_dora_with_its_gains_computed_once(case: Case) -> None:
    params, ids = case.model.params, ids_of(case)
    adapters = [case.adapter, lora.scale(case.adapter, 0.5)]
    bank = compiled(lambda: lora.AdapterBank.of([lora.methods.precompute(params, each) for each in adapters]))()
    found = route(case.model.fn, batch_axes=axes(case))(params, bank, ids, *case.model.args)
    assert_close(arrays(found), arrays(each_alone(case, adapters, ids)))


@rows([*ROWS, *GAINED], refused)
def test_what_has_no_form_for_every_example_is_refused(case: Case) -> None:
    adapters = [random_adapter(case.targets)]
    with pytest.raises(lora.ParameterError, match=r"[Ll]eave .* out of the bank"):
        route(case.model.fn, batch_axes=axes(case))(case.model.params, adapters, [1] * batch(case), *case.model.args)


SOME = (
    "linen-attention",
    "linen-scan_of_remat",
    "linen-conv2d_circular",
    "plain-look_up_then_tied_attend",
    "plain-while_loop",
)


@rows(ROWS, lambda case: case.id in SOME)
def test_under_jit_and_with_weights_of_all_slots(case: Case) -> None:
    """One-hot weights are ids; and weights of two adapters are both of them, scaled."""
    fn, params, args = case.model
    adapters, ids = adapters_of(case), ids_of(case)
    routed = jax.jit(lora.route(fn, batch_axes=axes(case)))
    expected = reference(case)
    assert_close(arrays(routed(params, adapters, jnp.array(ids), *args)), expected)
    assert_close(arrays(routed(params, adapters, jax.nn.one_hot(jnp.array(ids), 3), *args)), expected)
    both = [lora.scale(adapters[0], 0.25), lora.scale(adapters[1], -2.0)]
    weights = jnp.broadcast_to(jnp.array([9.0, 0.25, -2.0]), (batch(case), 3))
    assert_close(arrays(routed(params, adapters, weights, *args)), arrays(jax.jit(lora.adapt(fn))(params, both, *args)))


@pytest.mark.parametrize("strategy", get_args(Form))
@rows(ROWS, lambda case: case.id in SOME and case.reverse)
def test_gradients(case: Case, strategy: Form) -> None:
    """Of the adapters and of the inputs, as through every example alone."""
    fn, params, args = case.model
    ids, adapters = ids_of(case), adapters_of(case)
    routed = lora.route(fn, batch_axes=axes(case), strategy=strategy)

    def weighed(outputs: Any) -> Any:
        return sum(jnp.vdot(out, jnp.cos(jnp.arange(1.0, out.size + 1)).reshape(out.shape)) for out in arrays(outputs))

    found = jax.jit(jax.grad(lambda adapters: weighed(routed(params, adapters, jnp.array(ids), *args))))(adapters)
    expected = jax.jit(jax.grad(lambda adapters: weighed(each_alone(case, adapters, ids))))(adapters)
    factors = [[(update.a, update.b) for each in trees for update in each.values()] for trees in (found, expected)]
    assert_gradients_close(*factors)


def dense(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w"])


PARAMS = {"w": jax.device_put(np.float32(np.random.default_rng(0).normal(size=(6, 5))))}
X = jax.device_put(np.float32(np.random.default_rng(1).normal(size=(4, 3, 6))))
SITES = lora.find_sites(dense, PARAMS, X)
alone = jax.jit(lora.adapt(dense))
ADAPTERS = [random_adapter(SITES, seed=i, rank=2 + i) for i in range(3)]


def test_ids_of_every_token() -> None:
    ids = np.array([[0, 1, 2], [3, 3, 0], [1, 0, 0], [2, 2, 2]])
    expected = [[alone(PARAMS, ADAPTERS[i - 1 : i] if i else [], X[b, t]) for t, i in enumerate(row)]
                for b, row in enumerate(ids)]  # fmt: skip
    for strategy in get_args(Form):
        routed = jax.jit(lora.route(dense, token_axes=1, strategy=strategy))
        assert_close(routed(PARAMS, ADAPTERS, ids, X), jnp.array(expected))
    weights = jax.nn.one_hot(ids, 4)
    assert_close(route(dense, token_axes=1)(PARAMS, ADAPTERS, weights, X), jnp.array(expected))


def test_a_flattened_batch_of_tokens() -> None:
    """Tokens of all examples in a row, as servers have them; attention mixes them within the program."""
    params = PARAMS | {"q": PARAMS["w"].T}

    def attend(params: Any, x: Any) -> Any:
        values = dense(params, x)
        return jax.nn.softmax(values @ params["q"] @ x.T) @ values

    tokens = X[0]
    sites = lora.find_sites(attend, params, tokens)
    adapters = [random_adapter(sites, seed=i) for i in range(2)]
    ids = [2, 0, 1]
    own = [adapters[i - 1 : i] if i else [] for i in ids]
    merged = [lora.merge(params, each) for each in own]
    values = jnp.stack([dense(m, x) for m, x in zip(merged, tokens, strict=True)])
    scores = jnp.stack([v @ m["q"] @ tokens.T for m, v in zip(merged, values, strict=True)])
    assert_close(route(attend)(params, adapters, ids, tokens), jax.nn.softmax(scores) @ values)


def test_axes_that_differ_from_argument_to_argument() -> None:
    """A cache whose examples are on another axis, and an argument without examples."""

    def step(params: Any, cache: Any, x: Any, at: Any) -> Any:
        new = jax.lax.dynamic_update_slice_in_dim(cache, dense(params, x)[None], at, 0)
        return new, new.sum(0) @ params["head"]

    params = PARAMS | {"head": jax.device_put(np.float32(np.random.default_rng(2).normal(size=(5, 7))))}
    cache, x, at = jnp.zeros((3, 4, 5)), X[:, 0], jnp.int32(1)
    adapters = [random_adapter(lora.find_sites(step, params, cache, x, at), seed=i) for i in range(2)]
    ids, adapted = [1, 2, 0, 1], lora.adapt(step)
    alone = [
        adapted(params, adapters[i - 1 : i] if i else [], cache[:, j : j + 1], x[j : j + 1], at)
        for j, i in enumerate(ids)
    ]
    found = jax.jit(lora.route(step, batch_axes=(1, 0, None)))(params, adapters, jnp.array(ids), cache, x, at)
    assert_close(found[0], jnp.concatenate([new for new, _ in alone], axis=1))
    assert_close(found[1], jnp.concatenate([out for _, out in alone]))


def test_one_example_and_no_adapter_at_all() -> None:
    assert_close(lora.route(dense)(PARAMS, ADAPTERS, [2], X[:1]), lora.adapt(dense)(PARAMS, ADAPTERS[1], X[:1]))
    np.testing.assert_array_equal(lora.route(dense)(PARAMS, [], [0] * 4, X), dense(PARAMS, X))


def test_a_weight_that_is_repeated_for_every_example() -> None:
    repeated = lambda params, x: jnp.matmul(x, jnp.broadcast_to(params["w"], (len(x), 6, 5)))  # noqa: E731
    expected = route(lambda params, x: x @ params["w"])(PARAMS, ADAPTERS, [3, 0, 1, 2], X)
    for ids in ([3, 0, 1, 2], jax.nn.one_hot(jnp.array([3, 0, 1, 2]), 4)):
        assert_close(route(repeated)(PARAMS, ADAPTERS, ids, X), expected)


def test_bfloat16_keeps_its_dtype() -> None:
    params, x = cast_floats((PARAMS, X), jnp.bfloat16)
    found = route(dense)(params, ADAPTERS, [3, 0, 1, 2], x)
    expected = route(dense)(PARAMS, ADAPTERS, [3, 0, 1, 2], X)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=3 * TOLERANCE["bfloat16"])


def test_ids_out_of_range() -> None:
    with pytest.raises(lora.ParameterError, match=r"ids \[-1, 4\] are no slots of a bank of 4"):
        lora.route(dense)(PARAMS, ADAPTERS, [4, 0, -1, 1], X)
    found = jax.jit(lora.route(dense))(PARAMS, ADAPTERS, jnp.array([4, 0, -1, 1]), X)
    assert_close(found[:3], dense(PARAMS, X)[:3])


@pytest.mark.parametrize(
    ("options", "ids", "message"),
    [
        ({}, [1, 2], "ids have 2 examples, but an argument of shape"),
        ({}, [[1, 2, 0]] * 4, "for ids of every token say where tokens run, with token_axes"),
        ({"token_axes": 1}, [1, 2, 0, 1], r"give slots as integers \[batch, tokens\]"),
        ({"token_axes": 2}, [[1, 2, 0]] * 4, "ids have 3 tokens, but an argument"),
        ({}, [[0.5, 0.5]] * 4, "weights of all 4 slots"),
        ({"batch_axes": (0, 0)}, [0, 1, 2, 3], "does not match the 1 positional arguments"),
    ],
)
def test_ids_that_do_not_fit(options: Any, ids: Any, message: str) -> None:
    with pytest.raises(lora.LoraError, match=message):
        lora.route(dense, **options)(PARAMS, ADAPTERS, ids, X)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: jnp.roll(x, 1, axis=0),
        lambda x: x[::-1],
        lambda x: x[jnp.array([1, 0, 3, 2])],
        lambda x: jnp.moveaxis(jax.lax.top_k(jnp.moveaxis(x, 0, -1), 4)[0], -1, 0),
        lambda x: jax.lax.pad(x, jnp.float32(0), ((-1, 1, 0), (0, 0, 0), (0, 0, 0))),
        lambda x: jnp.concatenate([x[2:], x[:2]]),
        lambda x: jax.lax.map(lambda each: each + 1, x),
        lambda x: x.reshape(2, 2, 3, 6).swapaxes(0, 1).reshape(4, 3, 6),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y[::-1], x),
        lambda x: jax.lax.cond(x.sum() > 0, lambda y: y, lambda y: y[::-1], x),
        lambda x: jnp.where(x.sum() > 0, x, x[::-1]),
        lambda x: jnp.where(x.sum() > 0, x, jax.lax.map(lambda each: each + 1, x)[::-1]),
        lambda x: x.at[1:].set(x[:-1]),
        lambda x: x.at[jnp.array([1, 0, 3, 2])].set(x),
        lambda x: jax.lax.while_loop(lambda s: s[0] < 0, lambda s: (s[0] + 1, s[1][::-1]), (0, x))[1],
        lambda x: jax.lax.reshape(x.reshape(2, 2, 18), (2, 2, 18), dimensions=(1, 0, 2)).reshape(4, 3, 6),
    ],
)
def test_examples_that_change_places_are_never_taken_for_others(mixed: Callable[..., Any]) -> None:
    with pytest.raises(lora.ParameterError, match="run along none"):
        route(lambda params, x: dense(params, mixed(x)))(PARAMS, ADAPTERS, [0, 1, 2, 3], X)


@pytest.mark.parametrize(
    "moved",
    [
        lambda x: x.reshape(12, 6).reshape(4, 3, 6),
        lambda x: x.transpose(1, 0, 2).reshape(12, 6).reshape(3, 4, 6).transpose(1, 0, 2),
        lambda x: jnp.cumsum(jnp.flip(jax.nn.softmax(x), 1), 1),
        lambda x: jnp.sort(x, axis=1),
        lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1],
        lambda x: jnp.where(x > 0, x, jnp.zeros_like(x)) + jax.nn.gelu(x),
        lambda x: jax.vmap(lambda each: each @ each.T @ each)(x),
        lambda x: jax.lax.scan(lambda y, _: (y * x, y), jnp.ones_like(x), None, length=2)[1].sum(0),
        lambda x: jax.lax.associative_scan(jnp.add, x, axis=1),
        lambda x: jnp.take_along_axis(x, jnp.argsort(x, axis=1), 1),
        lambda x: jnp.repeat(x[:, None], 2, axis=1).sum(1),
        lambda x: jnp.zeros_like(x).at[:, 1].set(x[:, 0]),
        lambda x: jnp.einsum("bqd,bkd,bkf->bqf", x, x, x),
        lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
        lambda x: jax.checkpoint(lambda y: jnp.tanh(y))(x),
        lambda x: jnp.tile(x, (1, 2, 1)).reshape(4, 2, 3, 6).sum(1),
        lambda x: jnp.stack(jnp.unstack(x, axis=1), axis=1),
        lambda x: x + x[jnp.array([1, 0, 3, 2])][jnp.array([1, 0, 3, 2])],
    ],
)
def test_examples_are_followed_through_what_keeps_them_apart(moved: Callable[..., Any]) -> None:
    ids = [2, 0, 3, 1]
    fn = lambda params, x: dense(params, moved(x))  # noqa: E731
    found = route(fn)(PARAMS, ADAPTERS, ids, X)
    values = moved(X)
    wanted = [alone(PARAMS, ADAPTERS[i - 1 : i] if i else [], values[j]) for j, i in enumerate(ids)]
    assert_close(found, np.stack(wanted))


def test_products_inside_loops_that_change_places() -> None:
    """What the first turn sees is not what the second one does."""
    square = {"w": jax.device_put(np.float32(np.random.default_rng(3).normal(size=(6, 6))))}
    turns = lambda params, x: jax.lax.fori_loop(0, 2, lambda i, y: dense(params, y)[::-1], x)  # noqa: E731
    collected = lambda params, x: jax.lax.scan(  # noqa: E731
        lambda y, _: (y[::-1], dense(params, y)), x, None, length=2
    )[1]
    for fn in (turns, collected):
        adapters = [random_adapter(lora.find_sites(fn, square, X), seed=i) for i in range(3)]
        with pytest.raises(lora.ParameterError, match="run along none"):
            route(fn)(square, adapters, [0, 1, 2, 3], X)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32"])
def test_ids_and_tokens_of_narrow_dtypes(dtype: str) -> None:
    """A bank with more slots than the dtype has numbers."""
    looked_up = lambda params, t: jax.vmap(  # noqa: E731
        lambda i: jax.lax.dynamic_index_in_dim(params["e"], i, 0, keepdims=False)
    )(t)
    params, tokens = {"e": PARAMS["w"]}, jnp.asarray([5, 0, 1, 2], dtype)
    adapter = random_adapter(lora.find_sites(looked_up, params, tokens))
    bank, looked = lora.AdapterBank.of([adapter], slots=300), jax.jit(lora.adapt(looked_up))
    for put, ids in ((1, [0, 1, 0, 120]), (120, [120, 0, 120, 1])):
        bank = bank.evict(1).put(put, adapter)
        expected = jnp.concatenate(
            [looked(params, [adapter] if i == put else [], tokens[j : j + 1]) for j, i in enumerate(ids)]
        )
        assert_close(jax.jit(lora.route(looked_up))(params, bank, jnp.asarray(ids, dtype), tokens), expected)
    assert_close(route(looked_up)(params, bank, jnp.asarray([299, 0, 120, 1]), tokens)[2:3], expected[2:3])


@pytest.mark.parametrize("strategy", get_args(Form))
def test_a_broken_adapter_stays_with_its_own_examples(strategy: Form) -> None:
    """Products that overflow; numbers that are not finite do not get into a bank."""
    params = {"e": PARAMS["w"], "w": PARAMS["w"].T @ PARAMS["w"], "k": PARAMS["w"][None, :5]}
    tokens = jnp.arange(8).reshape(4, 2) % 6

    def fn(params: Any, tokens: Any) -> Any:
        x = jnp.tanh(params["e"][tokens] @ params["w"])
        return jax.lax.conv_general_dilated(x, params["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    sites = lora.find_sites(fn, params, tokens)
    good, last = (random_adapter(sites, seed=i) for i in range(2))
    bad = lora.Adapter({path: replace(update, a=update.a * 1e38, b=update.b * 1e3) for path, update in last.items()})
    routed = jax.jit(lora.route(fn, strategy=strategy))
    found = routed(params, [good, bad], [0, 1, 2, 1], tokens)
    assert not np.isfinite(found[2]).all()
    expected = routed(params, [good, last], [0, 1, 2, 1], tokens)
    assert_close(found[jnp.array([0, 1, 3])], expected[jnp.array([0, 1, 3])])


def test_an_empty_batch_and_arguments_without_axes() -> None:
    assert route(dense)(PARAMS, ADAPTERS, jnp.zeros(0, int), X[:0]).shape == (0, 3, 5)
    scaled = lambda params, x, by: dense(params, x) * by  # noqa: E731
    found = route(scaled)(PARAMS, ADAPTERS, [1, 2, 3, 0], X, jnp.float32(2))
    assert_close(found, 2 * route(dense)(PARAMS, ADAPTERS, [1, 2, 3, 0], X))


def test_where_examples_cannot_be_told_apart() -> None:
    shuffled = lambda params, x: dense(params, jnp.sort(x, axis=0))  # noqa: E731
    with pytest.raises(lora.ParameterError, match="run along none; operations that lose them: sort"):
        route(shuffled)(PARAMS, ADAPTERS, [0, 1, 2, 3], X)
    crossed = lambda params, x: dense(params, x[:, None] + x[None])  # noqa: E731
    with pytest.raises(lora.ParameterError, match="run along several axes at once"):
        route(crossed)(PARAMS, ADAPTERS, [0, 1, 2, 3], X)
    square = {"w": jnp.ones((4, 4))}
    over = lambda params, x: params["w"] @ x[:, 0]  # noqa: E731
    sites = lora.find_sites(over, square, X)
    with pytest.raises(lora.ParameterError, match="applied over the axis of examples"):
        route(over)(square, [random_adapter(sites)], [0, 1, 0, 1], X)
    other = {"v": PARAMS["w"]}
    with pytest.raises(lora.ParameterError, match="these parameters have nothing; nearest: v"):
        route(lambda params, x: x @ params["v"])(other, ADAPTERS, [0, 1, 2, 3], X)


def test_explain_says_the_form_and_what_it_adds() -> None:
    abstract = jax.ShapeDtypeStruct((4, 30, 6), jnp.float32)
    (use,) = lora.route(dense).explain(PARAMS, ADAPTERS, jax.ShapeDtypeStruct((4,), jnp.int32), abstract).uses
    assert (use.path, use.primitive, use.route, use.flops) == ("w", "dot_general", "rows", 2 * 120 * 4 * (6 + 5))
    (use,) = lora.route(dense).explain(PARAMS, ADAPTERS, [0, 1, 2, 3], X[:, :1]).uses
    assert (use.route, use.flops) == ("mask", 3 * 2 * 4 * 4 * (6 + 5))
    many = [*ADAPTERS, *ADAPTERS]
    tokens = lora.route(dense, token_axes=1).explain(PARAMS, many, jnp.zeros((20, 20), int), jnp.zeros((20, 20, 6)))
    assert tokens.uses[0].route == "blocks"
    few = lora.route(dense).explain(PARAMS, ADAPTERS, [1, 2, 0], X[:3, :2])
    assert few.uses[0].route == "rows", "no more factors are gathered than the bank has"
    assert (
        lora.route(dense, token_axes=1, strategy="rows").explain(PARAMS, many, [[1]], X[:1, :1]).uses[0].route == "rows"
    )
