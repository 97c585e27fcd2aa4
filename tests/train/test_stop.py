"""Runs that are stopped by Ctrl-C, SIGTERM or death, at any place: what goes on from there is the undisturbed run."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import pytest
from killed import Killed
from tiny_runs import assert_equal_runs

from lora_jax.cli import main
from lora_jax.report.terminal import Progress
from lora_jax.train import job
from lora_jax.train.metrics import plot_loss, read_metrics
from lora_jax.train.state import save_state
from lora_jax.train.stop import Interrupted, deferred

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def usual_ctrl_c() -> Iterator[None]:
    """Python's own handler: what a shell starts in the background has none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signalled(*numbers: int, error: Exception | None = None) -> None:
    """A piece of work into which signals come, and that may fail."""
    with deferred() as stop:
        stop.message = "all is saved"
        for number in numbers:
            signal.raise_signal(number)
        if error:
            raise error


@SIGNALS
def test_a_signal_waits_for_the_end(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="all is saved") as raised:
        signalled(number)
    assert raised.value.number == number and signal.getsignal(number) == before


def test_a_second_sigterm_waits_too_and_the_first_counts() -> None:
    with pytest.raises(Interrupted) as raised:
        signalled(signal.SIGTERM, signal.SIGTERM)
    assert raised.value.number == signal.SIGTERM


@SIGNALS
def test_ctrl_c_acts_at_once_where_another_signal_waits(number: int) -> None:
    with pytest.raises(KeyboardInterrupt) as raised:
        signalled(number, signal.SIGINT)
    assert not isinstance(raised.value, Interrupted)


def test_an_error_is_not_hidden_by_a_signal() -> None:
    with pytest.raises(ValueError, match="real"):
        signalled(signal.SIGTERM, error=ValueError("real"))


def test_in_other_threads_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        with deferred() as stop:
            seen.append((stop.number, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def after(usual: Callable[..., Any], happens: Callable[[], None], wanted: Callable[..., bool]) -> Callable[..., Any]:
    """A function after which, at some of its calls, something happens."""

    def call(*args: Any, **options: Any) -> Any:
        result = usual(*args, **options)
        if wanted(*args, **options):
            happens()
        return result

    return call


def progress(title: str, step: int) -> tuple[str, Callable[..., Any], Callable[..., bool]]:
    """After a step."""
    return (
        "lora_jax.report.terminal.Progress.update",
        Progress.update,
        lambda self, done, now: (self._title, done) == (title, step),
    )


def saving(step: int) -> tuple[str, Callable[..., Any], Callable[..., bool]]:
    """In the saving of a state, at its end."""
    return "lora_jax.train.finetune.save_state", save_state, lambda directory, state: state.step == step


def metrics_of(out: Path) -> str:
    return (out / "metrics.jsonl").read_text()


PLACES = {
    "a step": progress("fine-tuning", 5),
    "the last step": progress("fine-tuning", 6),
    "a save": saving(4),
    "the last save": saving(6),
    "the plot": ("lora_jax.train.job.plot_loss", plot_loss, lambda *args: True),
    "the comparison": ("lora_jax.train.job.FinetuneJob._verify", job.FinetuneJob._verify, lambda *args: True),
    "the end": ("lora_jax.train.folder.Folder.finish", job.Folder.finish, lambda *args: True),
}
"""Where something happens: the name of a function, the function, and at which calls."""


def die() -> None:
    raise Killed


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


SOON = {"die": ("a step",), "terminate": ("the plot",)}
CASES = [
    pytest.param(place, happens, marks=() if place in SOON[happens.__name__] else pytest.mark.full)
    for place in PLACES
    for happens in (die, terminate)
]


def stopped(args: list[str], place: str, happens: Callable[[], None]) -> int | None:
    """The exit code of a run to which something happens; None if it dies."""
    name, usual, wanted = PLACES[place]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, after(usual, happens, wanted))
        try:
            return main(args)
        except Killed:
            return None


@pytest.mark.parametrize(("place", "happens"), CASES)
def test_a_run_that_is_stopped_and_resumed_is_the_undisturbed_one(
    happens: Callable[[], None],
    place: str,
    tiny: list[str],
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    code = stopped([*tiny, "--checkpoint-every", "2", "--out", str(out)], place, happens)
    assert code == (None if happens is die else 143)
    if happens is terminate:
        assert f"finetune --out {out} --resume" in capsys.readouterr().err.splitlines()[-1]
    assert main(["finetune", "--out", str(out), "--resume"]) == 0
    assert_equal_runs(out, whole)


@pytest.mark.full
@pytest.mark.parametrize("happens", [die, terminate])
def test_the_built_in_road_goes_on_from_its_pre_training(
    happens: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["finetune", "--pretrain-steps", "8", "--steps", "3", "--length", "64", "--checkpoint-every", "1"]
    for name in ("one", "other"):
        monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / f"cache {name}"))
        out = str(tmp_path / name)
        if name == "one":
            with pytest.MonkeyPatch.context() as patch:
                _, usual, wanted = progress("pre-training", 5)
                patch.setattr(Progress, "update", after(usual, happens, wanted))
                with suppress(Killed):
                    main([*args, "--out", out])
            assert main(["finetune", "--out", out, "--resume"]) == 0
        else:
            assert main([*args, "--out", out]) == 0
    assert metrics_of(tmp_path / "one") == metrics_of(tmp_path / "other")


SAME = {
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"] or ""),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": str(jax.config.values["jax_disable_most_optimizations"]),
    "JAX_NUM_CPU_DEVICES": str(jax.config.values["jax_num_cpu_devices"]),
}
"""What makes another process compile the same programs as this one."""


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_real_signal(number: int, tiny: list[str], folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lora_jax", *tiny, "--checkpoint-every", "1", "--steps", "40", "--out", str(out)]
    process = subprocess.Popen(
        command, env=os.environ | SAME, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and len(read_metrics(out / "metrics.jsonl")) < 5:
        time.sleep(0.02)
    assert main(["finetune", "--out", str(out), "--overwrite"]) == 2
    process.send_signal(number)
    said, complaints = process.communicate(timeout=300)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143), said + complaints
    assert main(["finetune", "--out", str(out), "--resume"]) == 0
    assert main([*tiny, "--steps", "40", "--out", str(tmp_path / "undisturbed")]) == 0
    assert_equal_runs(out, tmp_path / "undisturbed")
