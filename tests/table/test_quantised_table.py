"""The shared table on quantised bases: every model computes what it does on the numbers that the codes stand for."""

from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, assert_gradients_close, merged_model

import lora_jax as lora
from lora_jax.quantised.leaf import is_quantised
from table import CASES, Case
from table.test_table import arrays, floats, full, given, loss, quick_jit

FORMATS = ("nf4", "int4", "int8", "fp8")


def rows() -> list[Any]:
    """Every row with one of the formats; with `--full` with all of them."""
    found = []
    for case in filter(full, CASES):
        own = crc32(case.id.encode()) % len(FORMATS)
        marks = [() if i == own else (pytest.mark.full,) for i in range(len(FORMATS))]
        found += [pytest.param(case, f, id=f"{case.id}-{f}", marks=m) for f, m in zip(FORMATS, marks, strict=True)]
    return found


def chosen(path: str, leaf: Any) -> bool:
    """Whatever could be quantised."""
    return leaf.ndim > 1 and leaf.size > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


@pytest.mark.parametrize(("case", "format"), rows())
def test_computes_what_the_numbers_give(case: Case, format: Any) -> None:
    fn, params, _ = case.model
    base = lora.quantise(params, format, block=4, where=chosen, nested=format == "nf4")
    assert any(map(is_quantised, jax.tree.leaves(base, is_leaf=is_quantised)))
    _, adapter, inputs = given(case)
    place = floats(case.model.args)[1]

    def results(run: Any, params: Any) -> Any:
        """Outputs, and gradients by adapter and inputs."""
        values, whole = opened(params)
        call = lambda values, adapter, x: arrays(run(whole(values), adapter, *place(x)))  # noqa: E731
        if not case.reverse:
            return quick_jit(call)(values, adapter, inputs), None
        step = quick_jit(jax.value_and_grad(loss(call), argnums=(1, 2), has_aux=True))
        (_, outputs), gradients = step(values, adapter, inputs)
        return outputs, gradients

    outputs, gradients = results(lora.adapt(fn), base)
    expected, others = results(merged_model(fn), lora.dequantise(base))
    assert_close(outputs, expected)
    if case.reverse:
        assert_gradients_close(gradients, others)


def opened(tree: Any) -> tuple[list[Any], Any]:
    """The arrays of a tree, and a function that puts others in their places."""
    leaves, treedef = jax.tree.flatten(tree)
    here = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def whole(values: list[Any]) -> Any:
        known = dict(zip(here, values, strict=True))
        return jax.tree.unflatten(treedef, [known.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in here], whole


@pytest.mark.parametrize("case", [*filter(full, CASES)], ids=lambda case: case.id)
def test_has_the_sites_of_the_numbers(case: Case) -> None:
    fn, params, args = case.model
    base = lora.quantise(params, "int8", block=4, where=chosen)
    assert lora.find_sites(fn, base, *args) == case.found
