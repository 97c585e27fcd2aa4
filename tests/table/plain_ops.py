"""Plain functions: every way to use one parameter linearly."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from table.registry import Draw, Model, case

plain = partial(case, "plain")


def operation(
    name: str, sites: dict[str, str], shapes: dict[str, tuple[int, ...]], fn: Any, *given: Any, **facts: Any
) -> None:
    """Add a function of some parameters and random arguments of the given shapes."""

    def build(draw: Draw) -> Model:
        args = tuple(draw(*each) if isinstance(each, tuple) else each for each in given)
        return Model(fn, {key: draw(*shape) for key, shape in shapes.items()}, args)

    case("plain", sites, name, **facts)(build)


def product(
    name: str, roles: str, shape: tuple[int, ...], fn: Any, *given: Any, kind: str = "dense", **facts: Any
) -> None:
    """Add one linear use of one parameter `w`."""
    operation(
        name, {"w": f"{kind} {roles}"}, {"w": shape}, lambda p, *args: fn(p["w"], *args), *given, affine=True, **facts
    )


def variant(name: str, roles: str, shape: tuple[int, ...], fn: Any, *given: Any, **facts: Any) -> None:
    """Add a linear use that differs from another in its geometry only."""
    product(name, roles, shape, fn, *given, variant=True, **facts)


# Products: any axes, either operand.
product("matmul", "io", (4, 3), lambda w, x: x @ w, (2, 5, 4))
variant("matmul_of_a_vector", "io", (4, 3), lambda w, x: x @ w, (4,))
variant("square_matmul", "io", (4, 4), lambda w, x: x @ w, (4, 4))
product("weight_on_the_left", "oi", (3, 4), lambda w, x: w @ x, (4, 5))
product("transposed", "oi", (3, 4), lambda w, x: x @ w.T, (2, 5, 4))
variant("left_einsum", "io", (4, 3), lambda w, x: jnp.einsum("dh,btd->thb", w, x), (2, 5, 4))
product("heads_ndh", "oio", (2, 4, 3), lambda w, x: jnp.einsum("btd,ndh->btnh", x, w), (2, 5, 4))
variant("heads_out_nhd", "iio", (2, 3, 4), lambda w, x: jnp.einsum("btnh,nhd->btd", x, w), (2, 5, 2, 3))
product("key_value_2kdh", "ooio", (2, 3, 4, 5), lambda w, x: jnp.einsum("bsd,ckdh->cbskh", x, w), (2, 5, 4))
variant("cube", "oio", (4, 4, 4), lambda w, x: jnp.einsum("btd,ndh->bnth", x, w), (4, 4, 4))
variant("token_axis_summed", "io", (4, 3), lambda w, x: jnp.einsum("btd,dh->bh", x, w), (2, 5, 4))
variant("tensordot", "oii", (2, 3, 4), lambda w, x: jnp.tensordot(w, x, axes=((2, 1), (0, 2))), (4, 5, 3))
product(
    "one_hot_look_up", "io", (7, 3), lambda w, t: jax.nn.one_hot(t, 7) @ w, jnp.array([[1, 6, 0], [3, 3, 2]]),
    kind="embedding",
)  # fmt: skip
variant("integer_input", "io", (4, 3), lambda w, x: x @ w, jnp.arange(8).reshape(2, 4))

# Stacks of weights.
product("experts", "bio", (3, 4, 5), lambda w, x: jnp.einsum("ebd,edh->ebh", x, w), (3, 2, 4))
variant("experts_inner_axis", "iob", (4, 5, 3), lambda w, x: jnp.einsum("ebd,dhe->beh", x, w), (3, 2, 4))
product(
    "every_token_to_every_expert",
    "iio",
    (3, 4, 5),
    lambda w, x, g: jnp.einsum("td,te,edh->th", x, g, w),
    (2, 4),
    (2, 3),
)
variant("all_experts_at_once", "oio", (3, 4, 5), lambda w, x: jnp.einsum("td,edh->teh", x, w), (2, 4))
product(
    "gathered_experts", "bio", (3, 4, 5), lambda w, x: jnp.einsum("td,tdh->th", x, w[jnp.array([2, 0, 1, 0])]), (4, 4)
)
product(
    "top_two_experts",
    "bio",
    (3, 4, 5),
    lambda w, x: jnp.einsum("td,tkdh->tkh", x, w[jnp.array([[2, 0], [1, 2]])]),
    (2, 4),
)
product("ragged_dot", "bio", (3, 4, 5), lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 0, 4])), (6, 4), kind="ragged")
product(
    "ragged_dot_of_transposed", "boi", (3, 5, 4), lambda w, x: lax.ragged_dot(x, w.mT, jnp.array([2, 3, 1])), (6, 4), kind="ragged",
)  # fmt: skip
product("indexed_layer", "bio", (3, 4, 5), lambda w, x: x @ w[1], (2, 4))
product("sliced_layer", "bio", (3, 4, 5), lambda w, x: x @ lax.dynamic_index_in_dim(w, 2, keepdims=False), (2, 4))
product("unrolled_layers", "bio", (3, 4, 4), lambda w, x: x @ w[0] @ w[1] @ w[2], (2, 4))
product("ensemble", "bio", (3, 4, 5), lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x), (3, 2, 4))
variant("ensemble_of_one_input", "oio", (3, 4, 5), lambda w, x: jax.vmap(lambda w: x @ w)(w), (2, 4))
variant(
    "ensemble_last_axis", "iob", (4, 5, 3), lambda w, x: jax.vmap(lambda w, x: x @ w, in_axes=(2, 0))(w, x), (3, 2, 4)
)
product("vmapped_input", "io", (4, 3), lambda w, x: jax.vmap(jax.vmap(lambda v: v @ w, 1), 0)(x), (2, 4, 5))

# One parameter that holds several weights.
product("fused_qkv_sliced", "io", (4, 9), lambda w, x: [x @ w[:, :3], x @ w[:, 3:6], x @ w[:, 6:]], (2, 4))
product("fused_qkv_split", "io", (4, 9), lambda w, x: [x @ part for part in jnp.split(w, 3, 1)], (2, 4))
product("fused_qkv_indexed", "ibo", (4, 3, 5), lambda w, x: [x @ w[:, i] for i in range(3)], (2, 4))
product(
    "fused_qkv_reshaped", "io", (4, 30), lambda w, x: jnp.einsum("btd,dcnh->cbnth", x, w.reshape(4, 3, 2, 5)), (2, 3, 4)
)
product("fused_on_the_input", "io", (8, 3), lambda w, x: x @ w[:4] + x @ w[4:], (2, 4))
product("heads_merged", "ioo", (4, 2, 3), lambda w, x: x @ w.reshape(4, 6), (2, 4))
variant("strided", "io", (4, 6), lambda w, x: x @ w[:, ::2] + x @ w[:, ::-2], (2, 4))
product("scaled_and_cast", "io", (4, 3), lambda w, x: x @ (-w.astype(jnp.float32) * 0.5 / 3), (2, 4))
product("frozen_by_the_model", "io", (4, 3), lambda w, x: x @ lax.optimization_barrier(lax.stop_gradient(w)), (2, 4))
product("expanded", "io", (4, 3), lambda w, x: jnp.einsum("gbd,gdh->gbh", x, w[None]), (1, 2, 4))
product("broadcast", "io", (4, 3), lambda w, x: jnp.matmul(x, jnp.broadcast_to(w, (2, 4, 3))), (2, 5, 4))
product("equal_shapes_as_activation", "io", (4, 4), lambda w, x: (x + 1) @ (x @ w), (4, 4))


# Convolutions: channels first and last, every geometry.
def convolution(
    name: str,
    shape: tuple[int, ...],
    image: tuple[int, ...],
    strides: tuple[int, ...],
    padding: Any,
    numbers: Any,
    **more: Any,
) -> None:
    """Add a convolution; the letters of the kernel's layout give its roles."""
    roles = "".join("o" if letter == "O" else "i" for letter in numbers[1])
    fn = lambda w, x: lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **more)  # noqa: E731
    variant(name, roles, shape, fn, image, kind="conv")


LAST, FIRST = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
convolution("conv1d", (3, 2, 4), (2, 7, 2), (1,), "SAME", ("NWC", "WIO", "NWC"))
convolution("conv2d_strided", (3, 2, 2, 4), (2, 5, 6, 2), (2, 1), "SAME", LAST)
convolution("conv2d_channels_first", (4, 2, 3, 2), (2, 2, 5, 6), (1, 2), [(1, 0), (2, 1)], FIRST)
convolution("conv2d_odd_layout", (4, 3, 2, 2), (5, 2, 6, 2), (1, 1), "VALID", ("HNWC", "OHIW", "NWCH"))
convolution("conv2d_dilated", (3, 2, 2, 4), (2, 7, 6, 2), (1, 1), "SAME", LAST, rhs_dilation=(2, 3))
convolution("conv2d_fractional", (3, 2, 2, 4), (2, 3, 4, 2), (1, 1), [(1, 1), (0, 2)], LAST, lhs_dilation=(2, 3))
convolution("conv2d_grouped", (3, 2, 2, 6), (2, 5, 6, 4), (1, 1), "SAME", LAST, feature_group_count=2)
convolution("conv2d_depthwise", (3, 2, 1, 8), (2, 5, 6, 4), (1, 1), "SAME", LAST, feature_group_count=4)
convolution("conv3d", (2, 2, 2, 2, 3), (1, 3, 4, 3, 2), (1, 1, 2), "SAME", ("NDHWC", "DHWIO", "NDHWC"))
product(
    "conv_transpose",
    "iioi",
    (3, 2, 4, 2),
    lambda w, x: lax.conv_transpose(x, w, (2, 1), "SAME", transpose_kernel=True),
    (2, 3, 4, 2),
    kind="conv",
)
product(
    "vmapped_conv",
    "iio",
    (3, 2, 4),
    lambda w, x: jax.vmap(
        lambda x: lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    )(x),
    (2, 1, 7, 2),
    kind="conv",
)

# Look-ups.
TOKENS = jnp.array([[1, 6, 0], [3, 3, 2]])
product("look_up", "io", (7, 4), lambda w, t: w[t], TOKENS, kind="embedding")
product("take_clipped", "io", (7, 4), lambda w, t: jnp.take(w, t + 3, axis=0, mode="clip"), TOKENS, kind="embedding")
variant("take_along_columns", "oi", (4, 7), lambda w, t: jnp.take(w, t, axis=1), TOKENS, kind="embedding")
product("look_up_then_tied_attend", "io", (7, 4), lambda w, t: w[t] @ w.T, TOKENS, kind="embedding")
operation(
    "look_up_then_dense", {"e": "embedding io", "w": "dense io"}, {"e": (7, 4), "w": (4, 3)},
    lambda p, t: p["e"][t] @ p["w"], TOKENS, affine=True,
)  # fmt: skip
operation(
    "look_up_then_experts", {"e": "embedding io", "w": "dense bio"}, {"e": (7, 4), "w": (2, 4, 3)},
    lambda p, t: jnp.einsum("btd,bdh->bth", p["e"][t], p["w"]), TOKENS, affine=True,
)  # fmt: skip
operation(
    "stacked_look_up", {"e": "embedding bio"}, {"e": (2, 7, 4)},
    lambda p, t: jax.vmap(lambda e, t: e[t])(p["e"], t), TOKENS, affine=True,
)  # fmt: skip

operation(
    "scattered_points", {}, {"w": (4, 3)}, lambda p, x: x * p["w"][jnp.array([1, 2]), jnp.array([0, 2])][None], (5, 2),
    hidden={"w": "dense io"},
)  # fmt: skip

# Several parameters.
operation(
    "equal_shapes", {"a": "dense io", "b": "dense io", "c": "dense io"}, dict.fromkeys("abc", (4, 4)),
    lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"] + x @ p["c"], (3, 4),
)  # fmt: skip
operation(
    "used_three_times",
    {"w": "dense io"},
    {"w": (4, 4)},
    lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["w"],
    (2, 4),
)
operation("used_both_ways", {"w": "dense io"}, {"w": (4, 3)}, lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, (2, 4))
operation(
    "product_of_weights", {"a": "dense oi", "b": "dense io"}, {"a": (4, 3), "b": (3, 5)},
    lambda p, x: x @ (p["a"] @ p["b"]), (2, 4), materialised=("a",),
)  # fmt: skip
operation("gram", {"w": "dense oi"}, {"w": (4, 3)}, lambda p, x: x @ (p["w"] @ p["w"].T), (2, 4), materialised=("w",))
operation(
    "penalised",
    {"w": "dense io"},
    {"w": (4, 3)},
    lambda p, x: (x @ p["w"], jnp.sum(p["w"] ** 2)),
    (2, 4),
    materialised=("w",),
)
operation(
    "unused_and_returned", {"w": "dense io"}, {"w": (4, 3), "unused": (4, 3)}, lambda p, x: (x @ p["w"], p["w"]), (2, 4),
    materialised=("w",),
)  # fmt: skip
