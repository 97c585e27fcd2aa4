"""The lane of other people's models: skipped, by name, where a package is missing or does not import."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Their warnings are not ours."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(autouse=True)
def their_numerics() -> Iterator[None]:
    """Their models broadcast without saying so, and warn as they are imported."""
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
