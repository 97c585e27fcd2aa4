"""Strict numerics for every test: no silent rank promotion, no 64-bit values, and every warning is an error."""

import os
from collections.abc import Callable, Generator
from itertools import count
from typing import Any
from zlib import crc32

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_rank_promotion", "raise")

for name, examples in (("covering", 20), ("full", 100)):
    settings.register_profile(name, max_examples=examples, deadline=None, derandomize=True, database=None)

TESTS_BETWEEN_CLEARINGS = 400

OLDER_EMITTERS = jax.__version_info__ < (0, 11)  # XLA ends the process at a flag that it does not know
QUICK = ["--xla_cpu_use_fusion_emitters=false"] if OLDER_EMITTERS else ["--xla_disable_hlo_passes=fusion-wrapper"]
"""Flags with which XLA compiles a small program in two thirds of the time: its emitters without MLIR."""

_ended = count(1)


def pytest_runtest_logfinish() -> None:
    """Forget compiled programs now and then: each holds memory maps, of which Linux gives a process 65,530."""
    if next(_ended) % TESTS_BETWEEN_CLEARINGS == 0:
        jax.clear_caches()


class Together(LoadScopeScheduling):
    """Tests that share models and compiled programs run in one process: those of a file, or of a case of the table."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        return test.partition("[")[2] if file.endswith("test_table.py") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """How `-n` divides the tests."""
    return Together(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of those who leave less out."""
    parser.addoption("--full", action="store_true", help="every row of the shared table, and longer random searches")
    parser.addoption("--moments", choices=["some", "all"], default="some", help="at which tests/faults kills a writer")


def pytest_configure(config: pytest.Config) -> None:
    """Most of the time of the tests is XLA's compiler's: programs are kept for the next run, and not optimised.

    With `--full` those of the shared table are, and all of them compiled, as they are for users.
    """
    full = config.getoption("--full")
    settings.load_profile("full" if full else "covering")
    if not full:
        os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *QUICK])
    jax.config.update("jax_disable_most_optimizations", True)
    if cache := getattr(config, "cache", None):
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Optimise the programs of the shared table with `--full`."""
    optimised = item.config.getoption("--full") and item.path.parent.name == "table"
    jax.config.update("jax_disable_most_optimizations", not optimised)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A row of the shared table that fails says how to see it again, in the tests and in one line of Python."""
    from table.covering import reproduction, row_of

    report = yield
    row = row_of(item)
    if report.failed and row:
        report.sections.append(("the same again", reproduction(item.nodeid, row[0])))
    return report


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let `-k embedding` choose rows by the kinds of their layers, too."""
    from table.covering import kinds, row_of  # it imports JAX, which is configured by now

    row = row_of(item)
    item.extra_keyword_matches |= {*kinds(row[0]), row[0].method} if row else set()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the rows of the shared table run those that cover it, unless all are asked for, or some by name.

    Tests marked `full` take long and hold little that no other holds.
    """
    if config.getoption("--full") or config.option.keyword or any("::" in arg for arg in config.args):
        return
    from table.covering import left_out

    deselected = [*left_out(items), *(item for item in items if item.get_closest_marker("full"))]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]


@pytest.fixture(autouse=True)
def _registries() -> Generator[None]:
    """What a test registers under a name is gone after it."""
    from lora_jax import compose, init, methods  # noqa: F401
    from lora_jax.adapter.registry import INITS, METHODS
    from lora_jax.compose.methods import METHODS as COMPOSITIONS

    tables: list[dict[str, Any]] = [table.entries for table in (INITS, METHODS, COMPOSITIONS)]
    before = [dict(entries) for entries in tables]
    yield
    for entries, kept in zip(tables, before, strict=True):
        entries.clear()
        entries.update(kept)


@pytest.fixture
def getkey(request: pytest.FixtureRequest) -> Callable[[], jax.Array]:
    """A function that returns a new random key at every call; the same keys in every run of a test."""
    root = jax.random.key(crc32(request.node.nodeid.encode()))
    numbers = count()
    return lambda: jax.random.fold_in(root, next(numbers))
