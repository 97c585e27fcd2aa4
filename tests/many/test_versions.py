"""What is no example's own meets every adapter, and each example takes its own version of it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, compiled, random_adapter
from jax import lax

import lora_jax as lora

IDS = jnp.array([1, 0, 2])
X = jax.random.normal(jax.random.key(0), (3, 5, 4))
TOKENS = jnp.array([[1, 2, 0, 3, 3], [0, 1, 4, 2, 2], [4, 4, 0, 1, 3]])


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {
    "probe": normal(1, 2, 4), "table": normal(2, 9, 4), "bias": normal(3, 9, 2), "first": normal(4, 4, 6),
    "second": normal(5, 6, 4), "w": normal(6, 4, 4), "layers": normal(7, 3, 4, 4),
}  # fmt: skip


def attend(query, keys, values):
    return jax.nn.softmax(query @ keys.mT / 2) @ values


def learned_queries(p, x):
    """The head of a vision model that pools by attention."""
    return attend(jnp.broadcast_to(p["probe"], (3, 2, 4)) @ p["w"], x, x)


def queries_through_a_network(p, x):
    """Queries of a detector: products and nonlinear operations before they meet an image, without an axis of images."""
    queries = jax.nn.gelu(p["probe"] @ p["first"]) @ p["second"]
    queries = (queries - queries.mean(-1, keepdims=True)) * lax.rsqrt(queries.var(-1, keepdims=True) + 1e-5)
    scores = jnp.einsum("qd,btd->bqt", jax.nn.relu(queries), x)
    return jnp.einsum("bqt,btd->bqd", jax.nn.softmax(scores), x @ p["w"])


def latents_through_a_loop(p, x):
    """Latents that read the examples again and again."""
    start = jnp.broadcast_to(p["probe"] @ p["w"], (3, 2, 4))
    return lax.scan(lambda z, w: (z + attend(z @ w, x, x), z), start, p["layers"])


def latents_of_no_example(p, x):
    """A loop of which the constants have versions."""
    shift = jnp.tanh(p["probe"] @ p["w"])
    body = jax.checkpoint(lambda z, w: (jnp.tanh(z @ w) + shift.sum(0, keepdims=True)[None], None))
    return lax.scan(body, x, p["layers"])[0]


def positions(p, x):
    """A table of positions."""
    return (x + p["table"][jnp.arange(5)][None]) @ p["w"]


def relative_positions(p, x):
    """A bias for every distance, and head: T5."""
    distance = jnp.abs(jnp.arange(5)[:, None] - jnp.arange(5)[None])
    bias = jnp.transpose(p["bias"][distance], (2, 0, 1))
    return jax.nn.softmax((x @ x.mT)[:, None] + bias[None]).sum(1) @ (x @ p["w"])


def tokens_in_front(p, x):
    """Tokens of a class, put in front of those of an image."""
    return jnp.tanh(jnp.concatenate([jnp.broadcast_to(p["probe"] @ p["w"], (3, 2, 4)), x], axis=1)) @ p["second"].T


def chosen(p, x):
    """A learned vector where something is missing."""
    return jnp.where(x > 0, x, (p["probe"][:1] @ p["w"])[None]) @ p["first"]


def looked_up_later(p, x):
    """A table that the program computes, and tokens look rows up in."""
    return jnp.tanh(p["table"] @ p["w"])[TOKENS] * x


def stepwise(p, x):
    """A loop with a number of steps, and an early end of none."""
    target = jnp.sin(p["probe"][0] @ p["w"])
    return lax.fori_loop(0, 3, lambda _, z: z + 0.1 * (target[None, None] - z), x)


def branches(p, x):
    """A branch that some flag chooses."""
    vector = p["probe"] @ p["w"]
    return lax.cond(x.sum() > -1e9, lambda x: x + vector[:1][None], lambda x: x - vector[:1][None], x)


PROGRAMS: dict[Callable[..., Any], tuple[str, ...]] = {
    learned_queries: ("w",), queries_through_a_network: ("first", "second", "w"),
    latents_through_a_loop: ("w", "layers"), latents_of_no_example: ("w", "layers"), positions: ("table", "w"),
    relative_positions: ("bias", "w"), tokens_in_front: ("w", "second"), chosen: ("w", "first"),
    looked_up_later: ("w",), stepwise: ("w",), branches: ("w",),
}  # fmt: skip


def banked(fn: Callable[..., Any], targets: tuple[str, ...]) -> list[lora.Adapter]:
    sites = lora.find_sites(fn, PARAMS, X)
    return [random_adapter([sites[path] for path in targets], seed=seed) for seed in (0, 1)]


def own_rows(fn: Callable[..., Any], adapters: Any, x: Any = X) -> Any:
    """Each row from the model with its own adapter merged."""
    models = [fn(PARAMS, x), *(fn(lora.merge(PARAMS, each), x) for each in adapters)]

    def own(*leaves: Any) -> Any:
        axis = _rows(leaves[0])
        return jnp.stack([jnp.take(leaves[slot], row, axis) for row, slot in enumerate(IDS.tolist())], axis)

    return jax.tree.map(own, *models)


def _rows(leaf: Any) -> int:
    """The axis of examples: behind that of steps where a loop collects."""
    return 0 if leaf.ndim < 4 else 1


def routed(fn: Callable[..., Any], adapters: Any, x: Any = X) -> Any:
    return lora.route(fn)(PARAMS, adapters, IDS, x)


@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)
def test_each_example_takes_its_own(fn: Callable[..., Any]) -> None:
    """As if it were alone with its adapter; so do the gradients."""
    adapters = banked(fn, PROGRAMS[fn])

    def loss(run: Callable[..., Any], pair: Any) -> Any:
        rows = run(fn, pair)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(rows)), rows

    found, wanted = (jax.jit(jax.grad(partial(loss, run), has_aux=True))(adapters) for run in (routed, own_rows))
    assert_close(found[1], wanted[1], factor=10)
    assert_close(found[0], wanted[0], factor=100)


def test_without_a_program() -> None:
    """Operation by operation."""
    adapters = banked(positions, PROGRAMS[positions])
    assert_close(routed(positions, adapters), compiled(own_rows)(positions, adapters), factor=10)


@pytest.mark.parametrize("fn", [queries_through_a_network, positions], ids=lambda fn: fn.__name__)
def test_under_vmap_remat_and_jvp(fn: Callable[..., Any]) -> None:
    """Transformations outside of the routed call."""
    adapters = banked(fn, PROGRAMS[fn])
    many = jnp.stack([X, 2 * X])
    wanted = jax.jit(lambda x: own_rows(fn, adapters, x))
    assert_close(jax.jit(jax.vmap(lambda x: routed(fn, adapters, x)))(many)[1], wanted(2 * X), factor=10)
    assert_close(jax.jit(jax.checkpoint(lambda x: routed(fn, adapters, x)))(X), wanted(X), factor=10)
    changes = lambda run: jax.jit(  # noqa: E731
        lambda pair: jax.jvp(lambda pair: run(fn, pair), (pair,), (pair,))  # Scales do not train.
    )
    assert_close(changes(routed)(adapters), changes(own_rows)(adapters), factor=10)


def test_in_half_precision() -> None:
    params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (PARAMS, X))
    adapters = banked(positions, PROGRAMS[positions])
    found = compiled(lora.route(positions))(params, adapters, IDS, x)
    assert found.dtype == jnp.bfloat16
    assert_close(found.astype(jnp.float32), compiled(own_rows)(positions, adapters), jnp.bfloat16, factor=10)


def test_explain_says_that_all_adapters_are_met() -> None:
    shown = lora.route(positions).explain(PARAMS, banked(positions, PROGRAMS[positions]), IDS, X)
    assert {use.path: use.route for use in shown.uses}["table"] == "look-up"


def test_a_broken_adapter_stays_with_its_rows() -> None:
    first, second = banked(queries_through_a_network, PROGRAMS[queries_through_a_network])
    spoil = lambda second: jax.tree.map(lambda leaf: leaf * jnp.nan, second)  # noqa: E731
    run = jax.jit(
        lambda first, second: jax.value_and_grad(
            lambda a: jnp.sum(routed(queries_through_a_network, [a, spoil(second)])[:2])
        )(first)
    )
    wanted = jax.jit(jax.value_and_grad(lambda a: jnp.sum(own_rows(queries_through_a_network, [a, second])[:2])))(first)
    assert_close(run(first, second), wanted, factor=100)


def test_what_no_example_ever_meets_is_refused() -> None:
    """A result that is the same for all examples has no row to be chosen by."""
    fn = lambda p, x: (x @ p["w"], jnp.tanh(p["probe"] @ p["w"]))  # noqa: E731
    with pytest.raises(lora.ParameterError, match="Each of the examples is to have its own adapter"):
        routed(fn, banked(fn, ("w",)))


def test_weights_of_examples_refuse_it() -> None:
    """A weighted sum of adapters is none of their versions once an operation is not linear."""
    weights = jax.nn.one_hot(IDS, 3)
    with pytest.raises(lora.ParameterError, match="Each of the examples is to have its own adapter"):
        lora.route(positions)(PARAMS, banked(positions, PROGRAMS[positions]), weights, X)
