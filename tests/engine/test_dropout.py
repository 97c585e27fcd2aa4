"""Dropout acts on the input of A, and every place it acts at draws its own mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, differ

import lora_jax as lora
from lora_jax.adapter.updates import LowRank

KEY = jax.random.key(3)
X = jnp.ones((2, 8))


def identity(fn, params, *args, rate=0.5):
    """An adapter whose low-rank term is the identity, and the adapted function: on zero weights it shows the masks."""
    sites = lora.find_sites(fn, params, *args)

    def update(site):
        eye = jnp.broadcast_to(jnp.eye(8), (*site.batch_shape, 8, 8))
        return LowRank(
            eye.reshape(site.a_shape(8)), eye.reshape(site.b_shape(8)), jnp.ones(site.batch_shape), site, rate
        )

    return lora.Adapter({path: update(site) for path, site in sites.items()}), lora.adapt(fn)


def masks(fn, params, *args, key=KEY, rate=0.5):
    """The outputs of a function of zero weights: its masked inputs."""
    adapter, adapted = identity(fn, params, *args, rate=rate)
    return adapted(params, adapter, *args, lora_key=key)


def zeros(*names, shape=(8, 8)):
    return {name: jnp.zeros(shape) for name in names}


def all_differ(results):
    return all(differ(one, other) for i, one in enumerate(results) for other in results[:i])


@pytest.mark.parametrize("strategy", ["auto", "factored", "merged"])
def test_elements_of_the_input_are_dropped_and_the_rest_scaled_up(strategy):
    fn, params, x = lambda p, x: x @ p["w"], zeros("w"), jnp.arange(1.0, 4001).reshape(500, 8)
    adapter, adapted = identity(fn, params, x, rate=0.2)
    out = lora.adapt(fn, strategy=strategy)(params, adapter, x, lora_key=KEY)
    kept = np.asarray(out != 0)
    np.testing.assert_allclose(out, np.where(kept, x / 0.8, 0), rtol=1e-6)
    assert 0.77 < kept.mean() < 0.83
    assert_close(adapted(params, adapter, x), x)


def test_every_parameter_and_every_use_has_its_own_mask():
    assert all_differ(masks(lambda p, x: (x @ p["a"], x @ p["b"]), zeros("a", "b"), X))
    assert all_differ(masks(lambda p, x: (x @ p["a"], x @ p["a"], x @ p["a"].T), zeros("a"), X))


def test_masks_do_not_depend_on_what_else_is_adapted():
    fn, params = lambda p, x: (x @ p["a"], x @ p["b"]), zeros("a", "b")
    adapter, adapted = identity(fn, params, X)
    both = adapted(params, adapter, X, lora_key=KEY)
    alone = adapted(params, adapter.without("a"), X, lora_key=KEY)
    assert_same(alone[1], both[1])


def test_every_adapter_has_its_own_mask():
    fn, params = lambda p, x: x @ p["w"], zeros("w")
    adapter, adapted = identity(fn, params, X)
    twice = adapted(params, (adapter, adapter), X, lora_key=KEY)
    assert differ(twice, 2 * adapted(params, adapter, X, lora_key=KEY))


def scan_of_products(p, x):
    return jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]


@pytest.mark.parametrize(
    ("fn", "shape"), [(lambda p, x: x @ p["w"], (8, 8)), (scan_of_products, (3, 8, 8))], ids=["plain", "scan"]
)
def test_adapters_share_a_mask_or_have_none_if_their_keys_say_so(fn, shape):
    params = zeros("w", shape=shape)
    adapter, adapted = identity(fn, params, X)
    run = jax.jit(lambda keys: adapted(params, (adapter, adapter), X, lora_key=keys))
    one, other = jax.random.split(KEY)
    shared, apart, first = run((one, one)), run((one, other)), run((one, None))
    assert set(np.unique(shared)) == {0.0, 4.0}
    assert set(np.unique(apart)) == {0.0, 2.0, 4.0}
    assert_close(first - 1, shared / 2)  # The second adapter passes its input on as it is.
    assert_close(run((None, one)), first)
    assert_close(run((None, None)), jnp.full_like(first, 2))


def test_a_new_adapter_trains_on_top_of_a_frozen_one():
    """Gradients reach the new one alone; dropout is its own."""
    fn, params = lambda p, x: jnp.tanh(x @ p["w"]), zeros("w")
    adapter, adapted = identity(fn, params, X)
    loss = lambda below, new: adapted(params, (below, new), X, lora_key=(None, KEY)).sum()  # noqa: E731
    frozen, gradient = jax.grad(lambda pair: loss(jax.lax.stop_gradient(pair[0]), pair[1]))((adapter, adapter))
    assert not np.asarray(frozen["w"].b).any() and np.asarray(gradient["w"].b).any()
    assert_close(gradient["w"].b, jax.grad(loss, argnums=1)(adapter, adapter)["w"].b)


def test_a_key_for_each_adapter():
    adapter, adapted = identity(lambda p, x: x @ p["w"], zeros("w"), X)
    with pytest.raises(lora.ConfigError, match="lora_key has 3 keys for 2 adapters"):
        adapted(zeros("w"), (adapter, adapter), X, lora_key=(KEY, KEY, None))
    with pytest.raises(lora.ConfigError, match=r"lora_key has shape \(2,\): give one key, or a tuple"):
        adapted(zeros("w"), (adapter, adapter), X, lora_key=jax.random.split(KEY))


@pytest.mark.parametrize("reverse", [False, True])
def test_every_step_of_a_scan_has_its_own_mask(reverse):
    def scanned(p, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"], reverse=reverse)[1]

    assert all_differ(masks(scanned, zeros("w", shape=(4, 8, 8)), X))

    def closed_over(p, x):
        return jax.lax.scan(lambda c, _: (c, x @ p["w"]), 0, length=4, reverse=reverse)[1]

    assert all_differ(masks(closed_over, zeros("w"), X))


def test_every_step_of_a_nested_scan_has_its_own_mask():
    def nested(p, x):
        inner = lambda c, w: (c, x @ w)  # noqa: E731
        return jax.lax.scan(lambda c, w: jax.lax.scan(inner, c, w), 0, p["w"])[1].reshape(-1, 2, 8)

    assert all_differ(masks(nested, zeros("w", shape=(2, 3, 8, 8)), X))


def test_every_turn_of_a_loop_has_its_own_mask():
    def loop(p, x):
        keep = lambda i, outs: outs.at[i].set(x @ p["w"])  # noqa: E731
        return jax.lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, keep(*c)), (0, jnp.zeros((4, 2, 8))))[1]

    assert all_differ(masks(loop, zeros("w"), X))


def test_branches_draw_their_own_masks():
    def branches(p, x):
        one = lambda x: x @ p["w"]  # noqa: E731
        return [jax.lax.cond(flag, one, lambda x: (x + 0) @ p["w"], x) for flag in (True, False, True)]

    assert all_differ(masks(branches, zeros("w"), X))


def test_examples_of_a_batch_have_their_own_masks():
    rows = masks(lambda p, x: jax.vmap(lambda x: x @ p["w"])(x), zeros("w"), jnp.ones((5, 8)))
    assert all_differ(rows)
    experts = masks(
        lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], x), zeros("w", shape=(5, 8, 8)), jnp.ones((5, 2, 8))
    )
    assert all_differ(experts)


def test_under_vmap_lanes_differ_with_their_keys():
    fn, params = lambda p, x: x @ p["w"], zeros("w")
    adapter, adapted = identity(fn, params, X)
    call = lambda key: adapted(params, adapter, X, lora_key=key)  # noqa: E731
    assert all_differ(jax.vmap(call)(jax.random.split(KEY, 4)))
    same = jax.vmap(lambda x: adapted(params, adapter, x, lora_key=KEY))(jnp.stack([X, X]))
    assert_same(same[0], same[1])


def test_remat_repeats_the_mask_of_the_forward_pass():
    params = {"w": jnp.eye(8), "v": jnp.eye(8)}

    def block(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"])

    adapter, plain = identity(block, params, X)
    inside = lora.adapt(jax.checkpoint(block))

    def gradients(call):
        return jax.grad(lambda a: call(params, a, X, lora_key=KEY).sum())(adapter)

    expected = gradients(plain)
    assert_close(gradients(jax.checkpoint(plain)), expected)
    recomputed = jax.grad(lambda a: inside(params, a, X, lora_key=KEY).sum())(adapter)
    numeric = [inside(params, lora.scale(adapter, 1 + sign * 1e-2), X, lora_key=KEY).sum() for sign in (1, -1)]
    slope = sum(jnp.vdot(update.b, recomputed[path].b) for path, update in adapter.items())
    np.testing.assert_allclose(slope, (numeric[0] - numeric[1]) / 2e-2, rtol=1e-2)


@pytest.mark.parametrize(
    "key", [jax.random.key(3), jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")], ids=["new", "raw", "rbg"]
)
def test_any_kind_of_key(key):
    fn, params = lambda p, x: x @ p["w"], zeros("w")
    adapter, adapted = identity(fn, params, X)
    eager = adapted(params, adapter, X, lora_key=key)
    assert_same(eager, jax.jit(adapted)(params, adapter, X, lora_key=key))
    assert differ(eager, adapted(params, adapter, X))


def test_convolutions_drop_elements_of_the_image():
    def fn(p, x):
        return jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    out = masks(fn, zeros("w", shape=(1, 8, 8)), jnp.ones((3, 50, 8)))
    assert set(np.unique(out)) == {0.0, 2.0}


def test_look_ups_have_no_dropout():
    fn, params, tokens = lambda p, t: p["e"][t], zeros("e"), jnp.arange(8)
    assert_same(masks(fn, params, tokens), masks(fn, params, tokens, key=None))


def test_scan_gives_eager_and_compiled_the_same_masks():
    def scanned(p, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]

    params = zeros("w", shape=(4, 8, 8))
    adapter, adapted = identity(scanned, params, X)
    assert_same(adapted(params, adapter, X, lora_key=KEY), jax.jit(adapted)(params, adapter, X, lora_key=KEY))
