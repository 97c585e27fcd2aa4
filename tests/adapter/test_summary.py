"""The table of what an adapter holds, and PEFT's line."""

import jax
import jax.numpy as jnp
import pytest
from helpers import random_adapter

import lora_jax as lora
from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.site import Site
from lora_jax.adapter.summary import summary, trainable_line
from lora_jax.adapter.updates import Replace, pytree
from lora_jax.report.tables import render

DENSE = Site(path="mlp/kernel", shape=(100, 40), dtype="bfloat16", kind="dense", in_axes=(0,), out_axes=(1,))
STACK = Site(path="layers/kernel", shape=(3, 10, 20), dtype="float32", kind="dense", in_axes=(1,), out_axes=(2,), batch_axes=(0,))  # fmt: skip  # noqa: E501
HEAD = Site(path="head/bias", shape=(40,), dtype="float32", kind="full")
PARAMS = {
    "mlp": {"kernel": jnp.zeros((100, 40), jnp.bfloat16)},
    "layers": {"kernel": jnp.zeros((3, 10, 20))},
    "head": {"bias": jnp.zeros(40)},
    "act": jax.nn.relu,
}
FACTORS = 2 * (100 + 40) + 3 * 2 * (10 + 20)


@pytest.mark.parametrize(
    "axes", [{"in_axes": (0,)}, {"in_axes": (0, 1), "out_axes": (1,)}, {"in_axes": (0,), "out_axes": (-1,)}]
)
def test_a_site_accounts_for_every_axis_once(axes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(lora.ParameterError, match=r"Site 'w' of shape \(4, 3\)"):
        Site(path="w", shape=(4, 3), dtype="float32", kind="dense", **axes)


def make() -> Adapter:
    return Adapter({**random_adapter([DENSE, STACK]), "head/bias": Replace(jnp.zeros(40), HEAD)})


def test_rows_and_totals() -> None:
    info = summary(make(), PARAMS)
    rows = {row.path: row for row in info.rows}
    assert list(rows) == ["head/bias", "layers/kernel", "mlp/kernel"]
    mlp, stack, head = rows["mlp/kernel"], rows["layers/kernel"], rows["head/bias"]
    assert (mlp.update, mlp.kind, mlp.shape, mlp.stacked, mlp.rank) == ("LowRank", "dense", (100, 40), (), 2)
    assert (mlp.trainable, mlp.parameters, mlp.nbytes) == (280, 280, 281 * 4)
    assert (stack.stacked, stack.rank, stack.parameters, stack.nbytes) == ((3,), 2, 180, 183 * 4)
    assert stack.scale is not None
    assert stack.scale[0] < stack.scale[1]
    assert (head.update, head.kind, head.rank, head.scale, head.parameters) == ("Replace", "full", None, None, 40)
    assert info.trainable == info.parameters == FACTORS + 40
    assert info.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(dict(make())))


def test_line_is_that_of_peft() -> None:
    base, trained = 4000 + 600 + 40, FACTORS + 40
    line = f"trainable params: {trained:,d} || all params: {base + trained:,d} || trainable%: {100 * trained / (base + trained):.4f}"  # noqa: E501
    assert trainable_line(make(), PARAMS) == summary(make(), PARAMS).line == line
    assert line == "trainable params: 500 || all params: 5,140 || trainable%: 9.7276"


def test_line_of_an_empty_adapter() -> None:
    assert trainable_line(Adapter({}), {}) == "trainable params: 0 || all params: 0 || trainable%: 0.0000"


def test_frozen_factors_count_but_do_not_train() -> None:
    adapter = make()
    frozen = type("HalfFrozen", (type(adapter["mlp/kernel"]),), {"trains": lambda self: _mask(self)})

    def _mask(update):
        return jax.tree.map(lambda leaf: leaf is update.b, update)

    pytree("site", "dropout")(frozen)
    update = adapter["mlp/kernel"]
    row = summary(Adapter({"mlp/kernel": frozen(update.a, update.b, update.scale, DENSE)})).rows[0]
    assert (row.trainable, row.parameters) == (80, 280)


def test_printing() -> None:
    text = repr(summary(make(), PARAMS))
    assert text == render(summary(make(), PARAMS))
    for part in ("mlp/kernel", "100×40", "LowRank", "Replace", "3 adapted parameters", "500", "9.7276"):
        assert part in text
    assert "trainable params" not in repr(summary(make()))
    assert summary(make()).line is None


def test_abstract_adapter_and_params() -> None:
    abstract = jax.eval_shape(make)
    params = jax.eval_shape(lambda: {"w": jnp.zeros(1000)})
    info = summary(abstract, params)
    assert info.rows[2].scale is None
    assert info.trainable == 500
    assert info.base == 1000
    assert "500" in repr(info)
