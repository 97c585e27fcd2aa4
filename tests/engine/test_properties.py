"""Random programs: any chain of moves before any product, and any division of the weight's axes between the factors."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_close, merged, random_adapter
from hypothesis import assume, given
from hypothesis import strategies as st
from jax import lax

import lora_jax as lora
from lora_jax.adapter.site import Site

Move = Callable[[Any], Any]


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.device_put(np.float32(np.random.default_rng(seed).normal(size=shape)))


@st.composite
def moves(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[list[Move], tuple[int, ...]]:
    """A chain of structural operations, and the shape it leads to."""
    chain: list[Move] = []
    for _ in range(draw(st.integers(0, 4))):
        move = draw(one_move(shape))
        chain.append(move)
        shape = jax.eval_shape(move, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
    return chain, shape


@st.composite
def one_move(draw: st.DrawFn, shape: tuple[int, ...]) -> Move:
    """A structural operation on an array of some shape."""
    axis = draw(st.integers(0, len(shape) - 1))
    size = shape[axis]
    start = draw(st.integers(0, size - 1))
    names = ["transpose", "flip", "slice", "expand", "scale", "take", "split_axis", "halves"]
    names += ["merge"] if axis + 1 < len(shape) else []
    names += ["index", "gather"] if len(shape) > 2 else []
    match draw(st.sampled_from(names)):
        case "transpose":
            return partial(jnp.transpose, axes=draw(st.permutations(range(len(shape)))))
        case "flip":
            return partial(jnp.flip, axis=axis)
        case "slice":
            stride = draw(st.integers(1, 2))
            return lambda w: lax.slice_in_dim(w, start, size, stride, axis)
        case "expand":
            return partial(jnp.expand_dims, axis=axis)
        case "scale":
            return lambda w: -w * 0.5
        case "take":
            rows = jnp.array(draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3)))
            return lambda w: jnp.take(w, rows, axis)
        case "split_axis":
            part = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
            return lambda w: w.reshape(*w.shape[:axis], part, size // part, *w.shape[axis + 1 :])
        case "halves":
            return lambda w: jnp.split(w, [start], axis)[1]
        case "merge":
            return lambda w: w.reshape(*w.shape[:axis], size * w.shape[axis + 1], *w.shape[axis + 2 :])
        case "index":
            return lambda w: lax.index_in_dim(w, start, axis, keepdims=False)
        case "gather":
            return lambda w: lax.dynamic_index_in_dim(w, jnp.array(start), axis, keepdims=False)
    raise AssertionError


@st.composite
def products(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Callable[[Any, Any], Any], tuple[int, ...]]:
    """A product with a weight of some shape on either side, and the shape of the other operand."""
    roles = draw(st.lists(st.sampled_from("cbf"), min_size=len(shape), max_size=len(shape)))
    ours = [[i for i, role in enumerate(roles) if role == kind] for kind in "cb"]
    free = draw(st.lists(st.integers(1, 3), max_size=2))
    order = draw(st.permutations([*ours[0], *ours[1], *(-1 - i for i in range(len(free)))]))
    theirs = [[order.index(i) for i in axes] for axes in ours]
    other = tuple(shape[i] if i >= 0 else free[-1 - i] for i in order)
    if draw(st.booleans()):
        return lambda w, x: lax.dot_general(w, x, ((ours[0], theirs[0]), (ours[1], theirs[1]))), other
    return lambda w, x: lax.dot_general(x, w, ((theirs[0], ours[0]), (theirs[1], ours[1]))), other


@st.composite
def programs(draw: st.DrawFn) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    """A function of one weight, moved and multiplied; the weight; and the other operand."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    chain, moved = draw(moves(shape))
    product, other = draw(products(moved))

    def fn(params: dict[str, Any], x: Any) -> Any:
        w = params["w"]
        for move in chain:
            w = move(w)
        return product(w, x)

    return fn, {"w": normal(1, *shape)}, normal(2, *other)


def agrees(fn: Any, params: Any, x: Any, site: Site) -> None:
    adapter = random_adapter([site])
    run = jax.jit(
        lambda a: [
            lora.adapt(fn)(params, a, x),
            lora.adapt(fn, strategy="factored")(params, a, x),
            fn(merged(params, a), x),
        ]
    )
    result, factored, expected = run(adapter)
    size = jnp.maximum(jnp.abs(expected).max(initial=0), prod(params["w"].shape) ** 0.5)
    assert_close(jnp.append(result, size), jnp.append(expected, size))
    assert_close(jnp.append(factored, size), jnp.append(expected, size))


@given(programs())
def test_found_sites_divide_the_axes_and_adapt_rightly(program):
    fn, params, x = program
    sites = lora.find_sites(fn, params, x)
    assume(sites)
    site = sites["w"]
    axes = (*site.in_axes, *site.out_axes, *site.batch_axes)
    assert sorted(axes) == list(range(params["w"].ndim))
    assert site.in_axes
    assert site.out_axes
    agrees(fn, params, x, site)


@given(programs(), st.data())
def test_any_division_of_the_axes_adapts_rightly(program, data):
    fn, params, x = program
    shape = params["w"].shape
    roles = data.draw(st.lists(st.sampled_from("iob"), min_size=len(shape), max_size=len(shape)))
    into, out, batch = (tuple(i for i, role in enumerate(roles) if role == kind) for kind in "iob")
    site = Site(path="w", shape=shape, dtype="float32", kind="dense", in_axes=into, out_axes=out, batch_axes=batch)
    agrees(fn, params, x, site)


@given(st.integers(2, 4), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.data())
def test_random_convolutions(window, groups, channels, features, dimensions, data):
    letters = "HW"[:dimensions]
    layout = ["".join(data.draw(st.permutations(each + letters))) for each in ("NC", "OI", "NC")]
    spatial = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in letters)  # noqa: E731
    sizes = dict(zip(letters, spatial(5, 7), strict=True)) | {"N": 2, "C": groups * channels}
    kernel = dict(zip(letters, [window] * dimensions, strict=True)) | {"I": channels, "O": groups * features}
    geometry = {"window_strides": spatial(1, 2), "rhs_dilation": spatial(1, 2), "lhs_dilation": spatial(1, 2)}
    padding = [(data.draw(st.integers(2, 4)), data.draw(st.integers(2, 4))) for _ in letters]

    def fn(params: Any, x: Any) -> Any:
        return lax.conv_general_dilated(
            x, params["w"], padding=padding, dimension_numbers=tuple(layout), feature_group_count=groups, **geometry
        )

    params = {"w": normal(1, *(kernel[letter] for letter in layout[1]))}
    x = normal(2, *(sizes[letter] for letter in layout[0]))
    site = lora.find_sites(fn, params, x)["w"]
    assert site.kind == "conv"
    assert site.out_axes == (layout[1].index("O"),)
    assert not site.batch_axes
    agrees(fn, params, x, site)
