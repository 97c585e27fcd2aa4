"""Which rows of the shared table run by default: few that together meet every pair of things that may interact."""

from collections.abc import Hashable, Sequence
from itertools import groupby

import pytest

from table.registry import Case

Row = tuple[Case, str]
"""A case, and the test it is put through, with the test's other parameters."""


def kinds(case: Case) -> set[str]:
    """What a case does with its parameters: the operations, whether they are stacked, and whether one is formed."""
    found = set()
    for path, roles in (case.sites | case.hidden).items():
        kind, axes = roles.split()
        found |= {kind, f"stacked {kind}"} if "b" in axes else {kind}
        found |= {"formed"} if path in case.materialised else set()
    return found


def pairs(row: Row, models: bool = True) -> set[Hashable]:
    """The pairs that a row tests: framework and model, method and kind, and each of kind, method, framework and test."""
    case, test = row
    of_kinds = {pair for kind in kinds(case) for pair in ((case.method, kind), (kind, test))}
    of_models = {(case.framework, case.name)} if models else set()
    return of_kinds | of_models | {(case.method, test), (case.framework, test)}


def covering(rows: Sequence[Row], models: bool = True) -> list[Row]:
    """Rows that meet every pair that any row meets, always the same: the row that adds most is next, the first of equals.

    Args:
      rows: to choose from.
      models: whether every model is to be among them.
    """
    left = {row: pairs(row, models) for row in rows}
    missing = set().union(*left.values())
    chosen = []
    while missing:
        best = max(left, key=lambda row: len(left[row] & missing))
        missing -= left.pop(best)
        chosen.append(best)
    return chosen


def left_out(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """Collected tests that run rows of the table and need not: every file has a covering of its own.

    Every model runs in the tests of the table; elsewhere every kind does. The same in whatever order they are given.
    """
    spare: set[pytest.Item] = set()
    in_order = sorted(items, key=lambda item: (item.path, item.location[1] or 0, item.name))
    for path, of_file in groupby(in_order, key=lambda item: item.path):
        rows = {item: row for item in of_file if (row := row_of(item))}
        chosen = {*covering([*rows.values()], models=path.name == "test_table.py")}
        spare |= {item for item, row in rows.items() if row not in chosen}
    return spare


def row_of(item: pytest.Item) -> Row | None:
    """The row that a test runs, if any."""
    params = dict(item.callspec.params) if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    case = params.pop("case", None)
    return (case, " ".join(map(str, [item.originalname, *params.values()]))) if isinstance(case, Case) else None


def reproduction(nodeid: str, case: Case) -> str:
    """Two commands: one runs the test of a row again, one the row's model with its adapter."""
    call = "lora.adapt(case.model.fn)(case.model.params, case.adapter, *case.model.args)"
    code = f"import conftest, lora_jax as lora; from table import row; case = row({case.id!r}); print({call})"
    return f'python -m pytest "{nodeid}"\nPYTHONPATH=.:tests python -c "{code}"'
