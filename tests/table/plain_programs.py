"""Plain functions: weights inside control flow, transformations and nested programs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from table.registry import Draw, Model, case


def program(sites: dict[str, str], shapes: dict[str, tuple[int, ...]], *inputs: tuple[int, ...], **facts: Any) -> Any:
    """Add a function of a dictionary of parameters and random arrays."""

    def add(fn: Any) -> Any:
        def build(draw: Draw) -> Model:
            return Model(
                fn, {key: draw(*shape) for key, shape in shapes.items()}, tuple(draw(*each) for each in inputs)
            )

        case("plain", sites, fn.__name__.strip("_"), **facts)(build)
        return fn

    return add


LAYERS = {"w": "dense bio", "v": "dense bio"}
SHAPES = {"w": (3, 4, 5), "v": (3, 5, 4), "norm": (3, 4)}


def layer(x: Any, p: Any) -> Any:
    """A residual block, as the body of a scan."""
    return x + jnp.tanh((x * p["norm"][None]) @ p["w"]) @ p["v"], None


@program(LAYERS, SHAPES, (2, 4))
def scan(p, x):
    return lax.scan(layer, x, p)[0]


@program(LAYERS, SHAPES, (2, 4))
def scan_reversed_and_unrolled(p, x):
    return lax.scan(layer, x, p, reverse=True, unroll=2)[0]


@program({"w": "dense ibo", "v": "dense iob"}, {"w": (4, 3, 5), "v": (5, 4, 3), "norm": (3, 4)}, (2, 4))
def scan_over_other_axes(p, x):
    stacked = {"w": jnp.moveaxis(p["w"], 1, 0), "v": jnp.moveaxis(p["v"], 2, 0), "norm": p["norm"]}
    return lax.scan(layer, x, stacked)[0]


@program(LAYERS, SHAPES, (2, 4))
def scan_of_remat(p, x):
    return lax.scan(jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable), x, p)[0]


@program({"w": "dense bbio"}, {"w": (2, 3, 4, 4)}, (2, 4))
def scan_of_scan(p, x):
    inner = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    return lax.scan(lambda x, w: lax.scan(inner, x, w), x, p["w"])[0]


@program({"w": "dense bio"}, {"w": (4, 3, 3)}, (2, 3))
def scan_of_reshaped_stack(p, x):
    double = lambda x, w: (jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]), None)  # noqa: E731
    return lax.scan(double, x, p["w"].reshape(2, 2, 3, 3))[0]


@program({"w": "dense bio"}, {"w": (4, 3, 3)}, (2, 3))
def scan_of_half_the_stack(p, x):
    step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    x, _ = lax.scan(step, x, p["w"][2:])
    return lax.scan(step, x, p["w"][:2])[0]


@program({"w": "dense bio"}, {"w": (3, 4, 4)}, (2, 4))
def scan_indexing_the_stack(p, x):
    return lax.scan(lambda x, i: (jnp.tanh(x @ p["w"][i]), None), x, jnp.arange(3))[0]


@program({"w": "dense io", "u": "dense io"}, {"w": (4, 4), "u": (3, 4)}, (5, 2, 3))
def recurrent(p, x):
    return lax.scan(lambda h, x: (jnp.tanh(x @ p["u"] + h @ p["w"]),) * 2, jnp.zeros((2, 4), x.dtype), x)


@program({"w": "dense io"}, {"w": (4, 4)}, (2, 4))
def scan_carrying_the_weight(p, x):
    return lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, p["w"]), None, length=3)[0][0]


@program({"w": "dense bio"}, {"w": (3, 4, 4)}, (2, 4), materialised=("w",))
def scan_returning_the_weights(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), w), x, p["w"])


@program({"e": "embedding io", "w": "dense io"}, {"e": (5, 3), "w": (3, 5)}, (2, 3))
def decoding(p, x):
    def step(h, _):
        token = jnp.argmax(h @ p["w"], -1)
        return jnp.tanh(h + p["e"][token]), h

    return lax.scan(step, x, length=3)


@program({"w": "dense io"}, {"w": (4, 4)}, (2, 4))
def fori_loop(p, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"]), x)


@program({"w": "dense bio"}, {"w": (3, 4, 4)}, (2, 4))
def fori_loop_over_layers(p, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)


@program({"w": "dense io"}, {"w": (4, 4)}, (2, 4), reverse=False)
def while_loop(p, x):
    # With some weights the sum never gets there.
    go_on = lambda c: (c[0] < 5) & ((c[1] @ p["w"]).sum() < 9)  # noqa: E731
    return lax.while_loop(go_on, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"]) + 2), (0, x))[1]


@program({"w": "dense io"}, {"w": (4, 4)}, (2, 4), reverse=False)
def while_loop_carrying_the_weight(p, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]), c[2]), (0, x, p["w"]))[1]


@program({"a": "dense io", "b": "dense io", "c": "dense io"}, dict.fromkeys("abc", (4, 4)), (2, 4))
def cond(p, x):
    left = lambda x: jnp.tanh(x @ p["a"]) @ p["c"]  # noqa: E731
    right = lambda x: x @ p["b"]  # noqa: E731
    return lax.cond(x.sum() > 0, left, right, x), lax.switch(2, [right, left, left], x * x)


@program({"w": "dense io"}, {"w": (4, 4)}, (2, 4), materialised=("w",))
def cond_returning_the_weight(p, x):
    return x @ lax.cond(x.sum() > 0, lambda: p["w"], lambda: -p["w"]) + x @ p["w"]


@program({"w": "dense io", "v": "dense io"}, {"w": (4, 5), "v": (5, 4)}, (2, 4))
def remat(p, x):
    policies = jax.checkpoint_policies
    for policy in (None, policies.dots_saveable, policies.save_only_these_names("h")):
        x = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], policy=policy)(p, x)
    return x


@program({"w": "dense io", "v": "dense io"}, {"w": (4, 5), "v": (5, 4)}, (2, 4))
def remat_static_and_closed_over(p, x):
    block = jax.checkpoint(lambda x, twice: jnp.tanh(x @ p["w"]) @ p["v"] * (2 if twice else 1), static_argnums=1)
    return block(block(x, True), False)


@program({"w": "dense bio"}, {"w": (2, 4, 4)}, (3, 4))
def regions_that_pass_the_weight_on(p, x):
    hand_on = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), w))
    x, (stack,) = lax.scan(lambda x, ws: (hand_on(x, ws[0])[0], (hand_on(x, ws[0])[1],)), x, (p["w"],))
    return lax.scan(lambda x, w: hand_on(x, w), x, stack)[0]


@jax.custom_vjp
def clipped(x, w):
    """A product whose gradient is clipped."""
    return x @ w


clipped.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda saved, g: (g.clip(-0.1, 0.1) @ saved[1].T, saved[0].T @ g.clip(-0.1, 0.1))
)


@program({"w": "dense io"}, {"w": (4, 3)}, (2, 4), materialised=("w",))
def custom_vjp(p, x):
    return clipped(x, p["w"])


@jax.custom_jvp
def doubled(x, w):
    """A product whose derivative is twice what it should be."""
    return x @ w


doubled.defjvp(lambda primals, tangents: (doubled(*primals), 2 * (tangents[0] @ primals[1] + primals[0] @ tangents[1])))


@program({"w": "dense io"}, {"w": (4, 3)}, (2, 4), materialised=("w",))
def custom_jvp(p, x):
    return doubled(x, p["w"])


@program({"w": "dense io"}, {"w": (4, 3)}, (2, 4))
def custom_jvp_beside_the_weight(p, x):
    return jax.nn.silu(jax.nn.relu(x) @ p["w"])


@program({"w": "dense io", "v": "dense io"}, {"w": (4, 5), "v": (5, 4)}, (2, 4))
def nested_jit(p, x):
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
    return jax.jit(lambda p, x: inner(p["v"], inner(p["w"], x)))(p, x)


@program({"w": "dense io"}, {"w": (4, 3)}, (2, 4))
def jit_returning_the_weight(p, x):
    return x @ jax.jit(lambda w: w.T)(p["w"]).T


@program({"w": "dense bio", "v": "dense bio"}, {"w": (3, 4, 5), "v": (3, 5, 2)}, (3, 2, 4))
def vmapped_ensemble(p, x):
    return jax.vmap(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"])(p, x)


@program({"w": "dense bio"}, {"w": (3, 4, 4)}, (3, 2, 4))
def vmapped_scan(p, x):
    step = lambda x, _: (jnp.tanh(x @ p["w"][0]), None)  # noqa: E731
    return jax.vmap(lambda x: lax.scan(step, x, None, length=2)[0])(x)


@program({"w": "dense bio"}, {"w": (3, 4, 4)}, (3, 2, 4))
def vmapped_recurrence(p, x):
    step = lambda w, x: lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=2)[0]  # noqa: E731
    return jax.vmap(step)(p["w"], x)


@program({"w": "dense io", "v": "dense io"}, {"w": (4, 5), "v": (5, 4)}, (2, 4))
def gradient_inside(p, x):
    energy = lambda x: jnp.sum(jnp.tanh(x @ p["w"]) @ p["v"])  # noqa: E731
    return jax.grad(energy)(x), jax.jvp(energy, (x,), (x,))[1]


@program({"q": "dense ioo", "k": "dense ioo", "v": "dense ioo", "o": "dense iio"},
         {"q": (4, 4, 3), "k": (4, 2, 3), "v": (4, 2, 3), "o": (4, 3, 4)}, (2, 5, 4))  # fmt: skip
def attention(p, x):
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, p[name]) for name in "qkv")
    return jnp.einsum("btnh,nhd->btd", jax.nn.dot_product_attention(q, k, v, is_causal=True), p["o"])


@program({"gate": "dense bio", "up": "dense bio", "down": "dense bio", "router": "dense io"},
         {"gate": (3, 4, 5), "up": (3, 4, 5), "down": (3, 5, 4), "router": (4, 3)}, (6, 4))  # fmt: skip
def mixture_of_experts(p, x):
    """Each token goes to two of three experts, in batches of fixed size for each expert."""
    weights, chosen = lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    sent = jnp.einsum("tk,tke->te", weights, jax.nn.one_hot(chosen, 3))
    batches = jnp.einsum("te,td->etd", jnp.sign(sent), x)
    hidden = jax.nn.silu(jnp.einsum("etd,edh->eth", batches, p["gate"])) * jnp.einsum("etd,edh->eth", batches, p["up"])
    return jnp.einsum("te,etd->td", sent, jnp.einsum("eth,ehd->etd", hidden, p["down"]))


@program({"gate": "dense io", "up": "dense io", "down": "dense io"},
         {"gate": (4, 5), "up": (4, 5), "down": (5, 4), "norm": (4,)}, (6, 4))  # fmt: skip
def gated_block(p, x):
    h = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)) * p["norm"][None]
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


@program({"up": "ragged bio", "down": "ragged bio"}, {"up": (3, 4, 5), "down": (3, 5, 4)}, (6, 4))
def ragged_experts(p, x):
    chosen = jnp.array([2, 0, 1, 0, 2, 2])
    order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=3)
    hidden = jax.nn.silu(lax.ragged_dot(x[order], p["up"], sizes))
    return lax.ragged_dot(hidden, p["down"], sizes)[jnp.argsort(order)]


@case("plain", {"0/w": "dense io", "1/0": "dense io"})
def tuples_and_plain_python_leaves(draw):
    fn = lambda p, x: (x @ p[0]["w"] * p[2]) @ p[1][0]  # noqa: E731
    return Model(fn, ({"w": draw(4, 3)}, [draw(3, 2)], 2.0), (draw(2, 4),))


@case("plain", {"w": "dense io"})
def static_arguments_and_results(draw):
    def fn(p, x, activation, options):
        h = getattr(jnp, activation)(x @ p["w"])
        return {"h": h, "name": activation, "count": 3, "none": None, "size": options["size"]}

    return Model(fn, {"w": draw(4, 3)}, (draw(2, 4), "tanh", {"size": 7}))
