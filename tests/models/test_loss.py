"""The loss at trained positions: that of all logits at once, its gradient too, in a fraction of the memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, merged, random_adapter

import lora_jax as lora
from lora_jax.errors import ParameterError
from lora_jax.models.loss import token_losses

BATCH, TIME, WIDTH, VOCABULARY = 3, 20, 8, 40


def inputs(share: float = 0.4) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"head": jax.random.normal(keys[0], (VOCABULARY, WIDTH))}
    hidden = jax.random.normal(keys[1], (BATCH, TIME, WIDTH))
    targets = jax.random.randint(keys[2], (BATCH, TIME), 0, VOCABULARY)
    return params, hidden, targets, jax.random.uniform(keys[3], (BATCH, TIME)) < share


def dense(params: Any, hidden: jax.Array, targets: jax.Array, trained: jax.Array) -> jax.Array:
    logits = hidden @ params["head"].T
    return jnp.where(trained, optax.softmax_cross_entropy_with_integer_labels(logits, targets), 0)


@partial(jax.jit, static_argnames=("positions", "chunk"))
def chunked(params: Any, hidden: jax.Array, targets: jax.Array, trained: jax.Array, **sizes: Any) -> jax.Array:
    return token_losses(lambda x: x @ params["head"].T, hidden, targets, trained, **sizes).loss


SIZES = [
    {},
    {"chunk": 7},
    {"positions": 30, "chunk": 8},
    {"positions": 30, "chunk": 64},
    {"positions": 500, "chunk": 1},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_losses_and_gradients_are_those_of_all_logits(sizes: dict[str, int]) -> None:
    params, hidden, targets, trained = inputs()
    assert 20 <= trained.sum() <= 30
    expected = dense(params, hidden, targets, trained)
    assert_close(chunked(params, hidden, targets, trained, **sizes), expected)

    def mean(params: Any, hidden: jax.Array, losses: Any, **sizes: Any) -> jax.Array:
        return losses(params, hidden, targets, trained, **sizes).sum() / trained.sum()

    wanted = jax.grad(mean, (0, 1))(params, hidden, dense)
    assert_close(jax.jit(jax.grad(lambda p, h: mean(p, h, chunked, **sizes), (0, 1)))(params, hidden), wanted)


def test_correct_tells_where_the_most_probable_token_is_the_target() -> None:
    params, hidden, targets, trained = inputs()
    best = (hidden @ params["head"].T).argmax(-1)
    targets = targets.at[:, ::2].set(best[:, ::2])
    head = lambda x: x @ params["head"].T  # noqa: E731
    found = jax.jit(lambda hidden: token_losses(head, hidden, targets, trained, chunk=9).correct)(hidden)
    np.testing.assert_array_equal(found, (best == targets) & trained)


def test_too_little_room_is_loud() -> None:
    params, hidden, targets, trained = inputs()
    room = int(trained.sum())
    assert np.isfinite(chunked(params, hidden, targets, trained, positions=room, chunk=5)).all()
    assert np.isnan(chunked(params, hidden, targets, trained, positions=room - 1, chunk=5)[trained]).any()


def test_nothing_trained_is_no_loss() -> None:
    params, hidden, targets, trained = inputs(0.0)
    assert not chunked(params, hidden, targets, trained, positions=8).any()


def test_another_mask_uses_the_same_program() -> None:
    params, hidden, targets, trained = inputs()
    before = chunked._cache_size()
    for mask in (trained, ~trained, jnp.zeros_like(trained)):
        chunked(params, hidden, targets, mask, positions=41, chunk=8)
    assert chunked._cache_size() == before + 1


def test_an_adapted_head_is_one_of_many_functions() -> None:
    params, hidden, targets, trained = inputs()
    sites = lora.find_sites(chunked, params, hidden, targets, trained)
    adapter = random_adapter(sites)
    adapted = jax.jit(lambda a: lora.adapt(chunked)(params, a, hidden, targets, trained, chunk=8).sum())
    expected = jax.jit(lambda a: dense(merged(params, a), hidden, targets, trained).sum())
    assert_close(adapted(adapter), expected(adapter))
    assert_close(jax.grad(adapted)(adapter)["head"].a, jax.grad(expected)(adapter)["head"].a)


def test_logits_of_all_tokens_never_exist() -> None:
    batch, time, width, vocabulary, room = 4, 256, 16, 8192, 256
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((vocabulary, width), jnp.float32), ((batch, time, width), jnp.float32),
        ((batch, time), jnp.int32), ((batch, time), bool),
    )]  # fmt: skip

    def loss(kernel: Any, hidden: Any, targets: Any, trained: Any) -> jax.Array:
        return chunked({"head": kernel}, hidden, targets, trained, positions=room, chunk=64).sum()

    for program in (loss, jax.grad(loss, (0, 1))):
        compiled = jax.jit(program).lower(*shapes).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * 64 * vocabulary * 4 + 2**20
        assert f"{batch * time},{vocabulary}" not in compiled.as_text()
        assert f"{batch},{time},{vocabulary}" not in compiled.as_text()


def test_shapes_that_do_not_fit_are_refused() -> None:
    params, hidden, targets, trained = inputs()
    with pytest.raises(ParameterError, match=r"targets \(3, 19\)"):
        chunked(params, hidden, targets[:, 1:], trained)
    with pytest.raises(ParameterError, match="positions=0"):
        chunked(params, hidden, targets, trained, positions=0)
