"""Every writer, killed or failed at every change of a file: the path holds the old or the new, whole."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WRITERS = ("own", "peft", "merge", "convert", "back", "compose", "compose_own")
QUICK = [("own", "kill", 30), ("peft", "ENOSPC+", 5), ("merge", "kill", 5)]
"""Of every run: writer, fault, and 5 for each fifth moment."""
FULL = {"kill": 7, "ENOSPC": 25, "ENOSPC+": 11, "EIO": 29, "EIO+": 31}
"""With --full, every writer at some moments; with --moments all, at every one, which takes an hour."""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that is preloaded."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    built = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-o", built, HERE / "faults.c", "-ldl"], check=True)
    return built


def check(library: Path, writer: str, fault: str, every: int, patience: float = 540) -> None:
    env = {**os.environ, "LD_PRELOAD": str(library), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    env["JAX_COMPILATION_CACHE_DIR"] = str(library.parent / "xla")  # Or every fork compiles the same programs.
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    env.pop("COVERAGE_PROCESS_CONFIG", None)  # Measuring lines writes files too.
    command = [sys.executable, "-W", "ignore", HERE / "driver.py", writer, fault, str(every)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=patience)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    print(writer, fault, found)
    assert found["moments"]
    assert found.keys() <= {"moments", "old", "new"}, found


@pytest.mark.parametrize(("writer", "fault", "every"), QUICK)
def test_some_moments(library: Path, writer: str, fault: str, every: int) -> None:
    check(library, writer, fault, every)


@pytest.mark.full
@pytest.mark.parametrize("fault", FULL)
@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer(library: Path, writer: str, fault: str, request: pytest.FixtureRequest) -> None:
    every = request.config.getoption("--moments") == "all"
    check(library, writer, fault, 1 if every else FULL[fault], 3600 if every else 540)
