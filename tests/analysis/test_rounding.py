"""Rounding of a base beside its adapter: levels of formats, and against dense computations."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_analysis import BIAS, SITES, near, one_site, weights

import lora_jax as lora
from lora_jax.analysis import rounding
from lora_jax.analysis.rounding import FACTOR_BYTES, FORMATS, FRACTIONS
from lora_jax.quantised.formats import NF4

# Rounding.


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


LEVELS = {"INT8": np.arange(-127, 128) / 127, "INT4": np.arange(-7, 8) / 7, "NF4": np.asarray(NF4)}
"""What a number may be, relative to the largest of its block."""


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_formats_round_to_the_nearest_level(form: Any) -> None:
    """Number by number, with blocks along the inputs; the last block may be shorter."""
    weight = normal(100, 5)
    weight[:, 4] = 0
    found = np.asarray(form.rounded(jnp.asarray(weight)))
    block = form.block or 100
    for start in range(0, 100, block):
        for column in range(5):
            part = weight[start : start + block, column]
            scale = np.abs(part).max()
            levels = LEVELS[form.name].astype(np.float32) * scale
            near(found[start : start + block, column], levels[np.abs(part[:, None] - levels).argmin(1)], 1e-6)


def test_rounding_is_that_of_dense_computations() -> None:
    weight, x = normal(128, 96), normal(40, 128, seed=1) * np.linspace(0.1, 3, 128, dtype=np.float32)
    rows = rounding(jnp.asarray(weight), inputs=x).rows
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    for row, form in zip(rows, FORMATS, strict=True):
        assert row.nbytes == form.nbytes(128, 96) == row.bits * 128 * 96 / 8
        bytes_of = lambda rank: FACTOR_BYTES * rank * (128 + 96)  # noqa: E731
        assert bytes_of(row.rank) <= row.nbytes < bytes_of(row.rank + 1)
        rest = left[:, row.rank :] * values[row.rank :] @ right[row.rank :]
        for found, error in ((row.truncated, rest), (row.rounded, weight - np.asarray(form.rounded(weight)))):
            near(found.total, np.linalg.norm(error) / np.linalg.norm(weight), 1e-4)
            near(found.outputs, np.linalg.norm(x @ error) / np.linalg.norm(x @ weight), 1e-4)
            near(found.peak, np.abs(error).max() / np.sqrt((error**2).mean()), 1e-3)
            squares = np.sort((error**2).ravel())[::-1]
            held = [squares[: max(round(share * squares.size), 1)].sum() / squares.sum() for share in FRACTIONS]
            near(found.held, held, 1e-4)
            near(found.top, held[FRACTIONS.index(0.01)], 1e-4)


def test_normal_weights_favour_nf4_and_rounding() -> None:
    int8, int4, nf4 = rounding(normal(256, 192)).rows
    assert int8.rounded.total < nf4.rounded.total < int4.rounded.total < int8.truncated.total < int4.truncated.total
    assert (int4.nbytes, int4.rank) == (nf4.nbytes, nf4.rank)
    assert int4.rounded.outputs == int4.rounded.total
    near(int4.truncated.top, 0.085, 0.05)  # of normal errors


def test_a_weight_of_low_rank_favours_truncation() -> None:
    int8, int4, _ = rounding(normal(128, 8) @ normal(8, 96, seed=1)).rows
    assert max(int8.truncated.total, int4.truncated.total) < 1e-5 < int8.rounded.total


def test_an_entry_that_sticks_out_takes_the_error_of_a_truncation() -> None:
    """Sixty of them, each a direction of its own, of which fewer fit."""
    weight = 0.001 * normal(128, 128)
    weight[np.arange(60), np.arange(60)] += np.linspace(1, 2, 60)
    int4 = rounding(weight).rows[1]
    assert int4.rank < 60
    assert int4.truncated.top > 0.9 > int4.rounded.top


def test_rounding_of_sites_with_captured_inputs() -> None:
    params = {"layers": jnp.asarray(normal(3, 16, 16) / 4), "head": jnp.asarray(normal(16, 5, seed=1)), "table": jnp.ones((9, 16))}  # fmt: skip  # noqa: E501

    def model(params: Any, tokens: Any) -> Any:
        x = params["table"][tokens] * jnp.arange(16.0)[None]
        x, seen = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, params["layers"])
        return x @ params["head"], seen, x

    tokens = jnp.arange(8)
    sites = lora.find_sites(lambda *args: model(*args)[0], params, tokens)
    config = lora.LoraConfig(targets=("layers", "head"))
    captured = lora.capture(lambda *args: model(*args)[0], params, [(tokens,)], "inputs", config=config)
    _, seen, last = model(params, tokens)
    report = rounding(params, sites, captured)
    same = rounding(params, sites, {"layers": seen, "head": last})
    assert report.inputs == "given"
    assert len(report.rows) == 3 * (3 + 1 + 1)
    for one, other in zip(report.rows, same.rows, strict=True):
        assert one.name == other.name
        if one.path == "table":
            assert one.rounded.outputs is None
        else:
            near(one.rounded.outputs, other.rounded.outputs, 1e-3)
            near(one.truncated.outputs, other.truncated.outputs, 1e-3)
    assert rounding(params, [sites["head"]]).inputs == "normal"


def test_rounding_of_zeros_and_of_bfloat16() -> None:
    assert all(row.rounded.total == row.truncated.total == 0 for row in rounding(jnp.zeros((8, 6))).rows)
    half = jnp.asarray(normal(32, 16), jnp.bfloat16)
    for one, other in zip(rounding(half).rows, rounding(half.astype(jnp.float32)).rows, strict=True):
        assert one.rounded.total == other.rounded.total


def test_rounding_refuses_what_it_cannot_read() -> None:
    params = weights()
    for args, complaint in (
        ((jnp.ones((2, 3, 4)),), "One weight has two axes"),
        ((params,), "Pass sites="),
        ((params, [replace(SITES[0], path="dens")]), "nearest: dense"),
        ((params, [one_site()]), "and its site"),
        ((params | {"bias": jnp.ones(10)}, [BIAS]), "no linear map"),
        ((params, SITES[:1], {"heads": jnp.ones((5, 9))}), "inputs for heads"),
        ((params, SITES[:1], {"dense": jnp.ones((5, 9))}), "it reads tokens×12"),
        ((params, SITES[4:5], {"layers": jnp.ones((5, 7))}), "it reads 3×tokens×7"),
    ):
        with pytest.raises(lora.ParameterError, match=complaint):
            rounding(*args)
