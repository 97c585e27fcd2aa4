"""The rows that run by default meet every pair of things that may interact, and every model."""

import shlex
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

import lora_jax as lora
from table import CASES, row, test_table
from table.covering import Row, covering, kinds, reproduction

TABLE: list[Row] = [
    (case, name)
    for name, test in vars(test_table).items()
    if name.startswith("test_")
    for mark in test.pytestmark
    for case in mark.args[1]
]
CHOSEN = covering(TABLE)

ATTRIBUTES: dict[str, Callable[[Row], Any]] = {
    "method": lambda row: {row[0].method},
    "kind": lambda row: kinds(row[0]),
    "framework": lambda row: {row[0].framework},
    "model": lambda row: {(row[0].framework, row[0].name)},
    "test": lambda row: {row[1]},
}


def met(rows: list[Row], *attributes: str) -> set[Any]:
    """What comes together in some row."""
    return {pair for row in rows for pair in product(*(ATTRIBUTES[name](row) for name in attributes))}


@pytest.mark.parametrize(
    "pair", [("method", "kind"), ("kind", "test"), ("method", "test"), ("framework", "test"), ("model",)]
)
def test_nothing_is_left_out(pair: tuple[str, ...]) -> None:
    assert met(CHOSEN, *pair) == met(TABLE, *pair)


def test_it_is_small_and_always_the_same() -> None:
    assert {*CHOSEN} < {*TABLE}
    assert len(CHOSEN) < len({(case.framework, case.name) for case in CASES}) * 2
    assert covering(TABLE) == CHOSEN


def test_kinds() -> None:
    named = {case.id: kinds(case) for case in CASES}
    assert named["linen-scan"] == {"dense", "stacked dense"}
    assert named["plain-look_up_then_dense-dora"] == {"dense", "embedding"}
    assert named["plain-weight_as_activation"] == {"dense", "formed"}


def test_a_row_that_fails_is_reproduced_by_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    case = row("plain-scan-dora")
    test, call = reproduction("tests/table/test_table.py::test_gradient[plain-scan-dora]", case).splitlines()
    assert test == 'python -m pytest "tests/table/test_table.py::test_gradient[plain-scan-dora]"'
    exec(shlex.split(call)[-1])
    fn, params, args = case.model
    assert capsys.readouterr().out == f"{lora.adapt(fn)(params, case.adapter, *args)}\n"
