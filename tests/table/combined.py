"""Weights that a program scales, adds, or puts together before it uses them, and that stay low-rank."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from table.plain_ops import operation, product, variant
from table.registry import Draw, Model, case

NUMBERS = jnp.arange(1.0, 5.0)
PAIR = {"w": "dense io", "v": "dense io"}
SHAPES = {"w": (4, 4), "v": (4, 4)}

# Scaled along axes.
product("columns_scaled", "io", (4, 3), lambda w, x: x @ (w * NUMBERS[None, :3]), (2, 4))
variant("rows_divided", "io", (4, 3), lambda w, x: x @ (w / NUMBERS[:, None]), (2, 4))
variant("scaled_by_a_trained_number", "io", (4, 3), lambda w, x, s: x @ (w * jnp.exp(s)), (2, 4), ())

# Sums, with other weights and with arrays.
operation("sum_of_weights", PAIR, SHAPES, lambda p, x: x @ (0.3 * p["w"] - 0.7 * p["v"]), (2, 4), affine=True)
variant("plus_an_array", "io", (4, 3), lambda w, x: x @ (w + NUMBERS[:, None] / 9), (2, 4))
product("standardised", "io", (4, 3), lambda w, x: x @ (w - w.mean(0, keepdims=True)), (2, 4))


def _parts(z):
    return jnp.concatenate([z.real, z.imag], -1)


# Complex matrices made of real ones, which meet real activations.
operation(
    "complex_pair", PAIR, SHAPES, lambda p, x: _parts(x @ (p["w"] - 1j * p["v"])), (2, 4), affine=True
)  # fmt: skip
operation(
    "complex_phases", PAIR, SHAPES,
    lambda p, x: _parts(x @ ((p["w"] + 1j * p["v"]) * jnp.exp(1j * NUMBERS)[None, :])), (2, 4), affine=True,
)  # fmt: skip

# Put together.
operation(
    "concatenation", {"w": "dense io", "v": "dense io"}, {"w": (4, 3), "v": (4, 2)},
    lambda p, x: x @ jnp.concatenate([p["w"], p["v"], 2 * p["w"]], 1), (2, 4), affine=True,
)  # fmt: skip
variant("concatenated_inputs", "io", (2, 3), lambda w, x: x @ jnp.concatenate([w, -w], 0), (2, 4))
product("padding", "io", (4, 3), lambda w, x: x @ jnp.pad(w, ((0, 1), (2, 0))), (2, 5))
variant("tiled", "io", (4, 3), lambda w, x: x @ jnp.tile(w, (2, 2)), (2, 8))
variant("rolled", "io", (4, 3), lambda w, x: x @ jnp.roll(w, 1, 1), (2, 4))
variant("permuted", "io", (4, 3), lambda w, x: x @ w[:, jnp.array([2, 0, 1])], (2, 4))
operation(
    "stacked_then_scanned", PAIR, SHAPES,
    lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([p["w"], p["v"]]))[0], (2, 4),
)  # fmt: skip
operation(
    "chosen_by_a_flag", PAIR, SHAPES, lambda p, x: x @ jnp.where(jnp.arange(4) < 2, p["w"], p["v"]), (2, 4), affine=True
)  # fmt: skip

# Passed through.
variant("named", "io", (4, 3), lambda w, x: x @ checkpoint_name(w, "weights"), (2, 4))
variant("put_on_a_device", "io", (4, 3), lambda w, x: x @ jax.device_put(w, jax.devices()[0]), (2, 4))


@case("plain", {}, "convolved_kernel", hidden={"w": "dense io"})
def _convolved_kernel(draw: Draw) -> Model:
    fn = lambda p, x: jax.vmap(lambda x: jnp.convolve(x, p["w"][:, 0]))(x)  # noqa: E731
    return Model(fn, {"w": draw(3, 4)}, (draw(2, 5),))


# Ensembles: `vmap` over kernels merges axes.


def _convolved(x, w, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


product(
    "ensemble_of_convolutions", "biiio", (2, 3, 2, 2, 3), lambda w, x: jax.vmap(_convolved)(x, w), (2, 1, 4, 3, 2),
    kind="conv",
)  # fmt: skip
variant(
    "ensemble_of_one_input", "biiio", (2, 3, 2, 2, 3), lambda w, x: jax.vmap(_convolved, (None, 0))(x, w), (1, 4, 3, 2),
    kind="conv",
)  # fmt: skip
variant(
    "depthwise_multiplier_last", "iioi", (3, 2, 4, 1), lambda w, x: _convolved(x, w.reshape(3, 2, 1, 4), 4), (1, 4, 3, 4),
    kind="conv",
)  # fmt: skip

# Both operands are one weight.
operation(
    "weight_twice", {"w": "dense oi"}, {"w": (4, 4)}, lambda p, x: x @ (p["w"] @ p["w"]), (2, 4), materialised=("w",)
)  # fmt: skip


def _while_each(p, x):
    """Each example ends by itself, some of them after five steps."""

    def one(x):
        goes_on = lambda state: (state[0] < 5) & (jnp.abs(state[1]).sum() < 9)  # noqa: E731
        return lax.while_loop(goes_on, lambda state: (state[0] + 1, state[1] @ p["w"] + 1), (0, x))[1]

    return jax.vmap(one)(x)


operation("loops_that_end_apart", {"w": "dense io"}, {"w": (4, 4)}, _while_each, (3, 4), reverse=False)
operation("fourier", {"w": "dense io"}, {"w": (4, 3)}, lambda p, x: jnp.abs(jnp.fft.fft(x) @ p["w"]), (2, 4))
