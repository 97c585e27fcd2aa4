"""Variants of LoRA beside DoRA: their formulas, what trains, what they keep, and what they combine with."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_same

import lora_jax as lora
from lora_jax.adapter.registry import METHODS

KEY = jax.random.key(0)
PARAMS = {
    "in": {"kernel": jax.random.normal(KEY, (12, 8)), "bias": jnp.zeros(8)},
    "layers": {"w": jax.random.normal(jax.random.key(1), (3, 8, 2, 4))},
    "embed": jax.random.normal(jax.random.key(2), (9, 12)),
}
TOKENS = jnp.asarray([[1, 7, 3], [0, 2, 7]])


def fn(params, tokens):
    x = params["embed"][tokens] @ params["in"]["kernel"] + params["in"]["bias"][None, None]

    def layer(x, w):
        return jnp.tanh(jnp.einsum("btd,dhk->bthk", x, w).reshape(x.shape)), None

    return jax.lax.scan(layer, x, params["layers"]["w"])[0]


SITES = lora.find_sites(fn, PARAMS, TOKENS)
ADAPTED = jax.jit(lora.adapt(fn))
BASE = jax.jit(fn)


def start(method, **fields):
    fields |= {"invocation_tokens": (1,)} if method == "alora" else {}
    config = lora.LoraConfig(**{"targets": ("in", "layers"), "rank": 4, "method": method, **fields})
    return lora.init(KEY, config, PARAMS, SITES)


def moved(adapter, seed=0):
    """Every trained leaf moved by random numbers."""
    draw = np.random.default_rng(seed)
    move = lambda leaf, trains: leaf + jnp.float32(0.3 * draw.normal(size=leaf.shape)) * trains  # noqa: E731
    return jax.tree.map(move, adapter, lora.trainable(adapter))


# aLoRA, which no weight can express, has a file of its own.
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"alora"}))
def test_whole_life(method, tmp_path: Path):
    """Starts as the base, trains what it says, merges, saves, loads, and goes to PEFT as what it computes."""
    adapter = start(method)
    assert_close(ADAPTED(PARAMS, adapter, TOKENS), BASE(PARAMS, TOKENS))
    loss = lambda adapter: jnp.square(ADAPTED(PARAMS, adapter, TOKENS)).sum()  # noqa: E731
    trained = moved(adapter)
    gradient = jax.jit(jax.grad(loss))(trained)
    jax.tree.map(
        lambda leaf, trains: np.testing.assert_equal(bool(leaf.any()), trains), gradient, lora.trainable(adapter)
    )
    merged = lora.merge(PARAMS, trained)
    assert_close(ADAPTED(PARAMS, trained, TOKENS), BASE(merged, TOKENS), factor=2)
    lora.save(tmp_path / "own", trained, params=PARAMS)
    assert_same(lora.load(tmp_path / "own", PARAMS), trained)
    names = lora.peft.Names([("layers/w", "layers.{i}.w"), ("{m}/kernel", "{m}")])
    lora.peft.save(tmp_path / "peft", trained, names, sites=SITES)
    assert_close(lora.merge(PARAMS, lora.peft.load(tmp_path / "peft", PARAMS, SITES, names)), merged)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_step_of_an_optimizer_moves_what_trains_and_nothing_else(method):
    adapter = moved(start(method))
    tx = lora.optimizer(optax.adamw(0.1), adapter)
    state = tx.init(adapter)
    ones = jax.tree.map(lambda leaf: np.ones_like(leaf), adapter)
    after = jax.jit(lambda ones: optax.apply_updates(adapter, tx.update(ones, state, adapter)[0]))(ones)
    jax.tree.map(lambda old, new, trains: np.testing.assert_equal(bool((old != new).any()), trains), adapter, after, lora.trainable(adapter))  # fmt: skip  # noqa: E501
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * lora.summary(adapter).trainable + 1


def test_lora_xs_spans_the_leading_directions():
    update = start("lora-xs")["in/kernel"]
    u, s, v = np.linalg.svd(np.asarray(PARAMS["in"]["kernel"]), full_matrices=False)
    best = (u[:, :4] * s[:4]) @ v[:4]
    whole = replace(update, core=jnp.eye(4), scale=jnp.float32(1))
    assert_close(whole.delta(), np.float32(best))
    assert lora.summary(start("lora-xs")).trainable == 4 * 4 * (1 + 3)
    with pytest.raises(lora.ConfigError, match=r"^in/kernel: rank 9 is more than a 12 × 8 matrix has"):
        start("lora-xs", rank=9)


def test_vera_shares_its_projections_by_seed_and_shape():
    adapter = moved(start("vera"))
    stacked, own = adapter["layers/w"].low_rank(), adapter["in/kernel"].low_rank()
    assert_same(stacked.a[0], stacked.a[2])
    other = replace(adapter["in/kernel"], seed=1).low_rank()
    assert bool((other.a != own.a).all())
    bound = np.sqrt(6 / 12)  # Kaiming's for the inputs, as in PEFT
    assert 0.9 * bound < float(jnp.abs(other.a).max()) <= bound
    assert lora.summary(adapter).trainable == (4 + 8) * (1 + 3)


def backward_memory(method):
    """Bytes that a layer keeps for its backward pass."""
    params = {"w": jnp.ones((256, 256))}
    one = lambda params, x: jnp.sin(x) @ params["w"]  # noqa: E731
    x = jnp.ones((512, 256))
    adapter = lora.init(
        KEY, lora.LoraConfig(rank=4, method=method, targets="w"), params, lora.find_sites(one, params, x)
    )
    # Two layers: the gradient of the first needs nothing of the second but what its input's gradient needs.
    chain = lambda adapter, x: lora.adapt(one, strategy="factored")(params, adapter, x)  # noqa: E731
    _, pull = jax.vjp(chain, adapter, x)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pull))


def test_lora_fa_keeps_no_input():
    """LoRA keeps `sin(x)` for the gradient of A beside `cos(x)` for that of the input; LoRA-FA only the latter."""
    assert backward_memory("lora") - backward_memory("lora-fa") >= 512 * 256 * 4


def test_lora_fa_computes_no_gradient_of_a():
    def flops(method):
        adapter = start(method)
        loss = lambda adapter: jnp.square(ADAPTED(PARAMS, adapter, TOKENS)).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(adapter).compile().cost_analysis()["flops"]

    assert flops("lora-fa") < flops("lora")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lora-xs", "init": "gaussian"}, "has its own start, so init='gaussian' has no effect"),
        ({"method": "vera", "init": "pissa"}, "has its own start"),
        ({"method": "adalora", "init": "orthogonal"}, "has its own start"),
        ({"method": "dora", "lora_bias": True}, "cannot have lora_bias=True"),
        ({"method": "nothing"}, "method='nothing' is not a method; choose one of: adalora"),
        ({"seed": -1}, r"seed=-1 must be an integer from 0"),
    ],
)
def test_pairs_that_do_not_combine_are_refused(fields, message):
    with pytest.raises(lora.ConfigError, match=message):
        lora.LoraConfig(**fields)


@pytest.mark.parametrize("method", ["lora-fa", "vera"])
def test_tables_are_refused_where_nothing_would_train(method):
    with pytest.raises(lora.ConfigError, match=r"^embed: "):
        start(method, targets=("embed",))


def test_docs_state_every_method_and_pair():
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    for name, method in METHODS.entries.items():
        if name.startswith("example"):
            continue
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}`")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert (cells[2], cells[3]) == ("any" if method.draws else "its own", "yes" if method.lora_bias else "no")
