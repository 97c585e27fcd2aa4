"""Strict numerics for every test: no silent rank promotion, no 64-bit values, and every warning is an error."""

import os
from collections.abc import Callable
from itertools import count
from zlib import crc32

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_rank_promotion", "raise")


TESTS_BETWEEN_CLEARINGS = 400

_ended = count(1)


def pytest_runtest_logfinish() -> None:
    """Forget compiled programs now and then: each holds memory maps, of which Linux gives a process 65,530."""
    if next(_ended) % TESTS_BETWEEN_CLEARINGS == 0:
        jax.clear_caches()


def pytest_configure(config: pytest.Config) -> None:
    """Turn warnings into errors, ours and those of the libraries our code calls."""
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture
def getkey(request: pytest.FixtureRequest) -> Callable[[], jax.Array]:
    """A function that returns a new random key at every call; the same keys in every run of a test."""
    root = jax.random.key(crc32(request.node.nodeid.encode()))
    numbers = count()
    return lambda: jax.random.fold_in(root, next(numbers))
