"""Look-ups out of range: values and gradients follow the base's rule, clip or fill or drop."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, merged, random_adapter

import lora_jax as lora

PARAMS = {"table": jax.random.normal(jax.random.key(0), (4, 3))}
IDS = jnp.array([0, 3, 9, -1, -7])


@pytest.mark.parametrize(
    "rule",
    [{"mode": "clip"}, {"mode": "fill"}, {"mode": "fill", "fill_value": 7.0}, {"mode": "drop"}],
    ids=str,
)
def test_gradients_of_both_factors_are_those_of_the_merged_table(rule: dict[str, Any]) -> None:
    fn = lambda params, ids: jnp.nan_to_num(params["table"].at[ids].get(**rule), nan=1.0)  # noqa: E731
    adapter = random_adapter(lora.find_sites(fn, PARAMS, IDS))
    adapted = lambda adapter: lora.adapt(fn)(PARAMS, adapter, IDS)  # noqa: E731
    reference = lambda adapter: fn(merged(PARAMS, adapter), IDS)  # noqa: E731
    assert_close(adapted(adapter), reference(adapter))
    got, wanted = (
        jax.grad(lambda a, run=run: jnp.square(run(a)).sum())(adapter)["table"] for run in (adapted, reference)
    )
    assert_close((got.a, got.b), (wanted.a, wanted.b))
