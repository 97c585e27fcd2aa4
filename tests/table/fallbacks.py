"""Uses that have no low-rank form: the weight is formed on the spot, and the result is right all the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from table.registry import Draw, Model, case


def fallback(
    name: str, shape: tuple[int, ...], fn, *given: tuple[int, ...], roles: str = "dense io", found: bool = False
) -> None:
    """Add a use of one parameter `w`."""
    sites, hidden = ({"w": roles}, {}) if found else ({}, {"w": roles})

    @case("plain", sites, name, hidden=hidden, materialised=("w",))
    def _(draw: Draw) -> Model:
        return Model(lambda p, *args: fn(p["w"], *args), {"w": draw(*shape)}, tuple(draw(*each) for each in given))


fallback("elementwise", (2, 4), lambda w, x: jnp.sin(w) * x, (2, 4))
fallback(
    "weight_norm", (4, 3), lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True)), (2, 4), found=True
)  # fmt: skip
fallback("weight_norm_beside", (4, 3), lambda w, x: (x @ w) / jnp.linalg.norm(w, axis=0)[None], (2, 4), found=True)
fallback(
    "masked", (4, 3), lambda w, x: x @ jnp.where(jnp.arange(12).reshape(4, 3) % 2 == 0, w, 0), (2, 4), found=True
)  # fmt: skip
fallback("times_a_mask", (4, 3), lambda w, x: x @ (w * jnp.tri(4, 3)), (2, 4), found=True)
fallback(
    "straight_through", (4, 3), lambda w, x: x @ (w + lax.stop_gradient(jnp.round(4 * w) / 4 - w)), (2, 4), found=True
)  # fmt: skip
fallback("reshape_across_roles", (4, 6), lambda w, x: x @ w.reshape(3, 8), (2, 3))
fallback("sum", (4, 3), lambda w, x: x * w.sum(), (2, 4))
fallback("rounded_to_integers", (4, 3), lambda w, x: x @ (w * 9).astype(jnp.int32).astype(x.dtype), (2, 4))
fallback("scattered", (4, 3), lambda w, x: x @ w.at[0, 1].set(0.5), (2, 4))
fallback("sorted", (4, 3), lambda w, x: x @ jnp.sort(w, 0), (2, 4))
fallback(
    "changed_by_a_loop", (4, 4),
    lambda w, x: lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1] * 0.9 + 0.1), None), (x, w), length=3)[0][0], (2, 4),
)  # fmt: skip
fallback(
    "batch_grouped_conv", (3, 2, 4),
    lambda w, x: lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), batch_group_count=2,
    ), (4, 7, 2), roles="conv iio",
)  # fmt: skip
fallback(
    "conv_of_the_weight", (3, 4),
    lambda w, x: lax.conv_general_dilated(w[None], x, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")), (3, 4, 2),
)  # fmt: skip


@case("plain", {"w": "dense io"}, "weight_as_activation", hidden={"gate": "dense io"}, materialised=("gate",))
def _(draw: Draw) -> Model:
    return Model(lambda p, x: ((p["gate"] * 2) * x) @ p["w"], {"gate": draw(5, 4), "w": draw(4, 3)}, (draw(5, 4),))


@case("plain", {"w": "dense io"}, "pallas_call", materialised=("w",), reverse=False)
def _(draw: Draw) -> Model:
    def kernel(x, w, out):
        out[...] = jnp.dot(x[...], w[...])

    def fn(p, x):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((2, 3), x.dtype), interpret=True)(x, p["w"])

    return Model(fn, {"w": draw(4, 3)}, (draw(2, 4),))


@case(
    "linen",
    {"params/layer_instance/kernel": "dense io"},
    "weight_norm",
    materialised=("params/layer_instance/kernel",),
)
def _(draw: Draw) -> Model:
    module, x = nn.WeightNorm(nn.Dense(3)), draw(2, 4)
    return Model(module.apply, draw.fill(jax.eval_shape(module.init, jax.random.key(0), x)), (x,))
