"""The folder of a run: what no run wrote is refused untouched, killed removals are finished, one run at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed import killed_at
from safetensors.numpy import save_file

from lora_jax.cli import main
from lora_jax.train.folder import Folder, FolderError

CONFIG = {"options": {"model": "m"}, "model": {"sha256": ""}, "lora": {"rank": 8}, "data": {}, "versions": {"jax": "0"}}
ARRAYS = "state/d/0"
FILES = (
    "adapter/adapter_model.safetensors",
    f"state/finetune/6/{ARRAYS}",
    "state/finetune/4/manifest.json",
    "metrics.jsonl",
    "loss.png",
)


def run_in(path: Path, *, finished: bool = False) -> Folder:
    """The files of a run."""
    folder = Folder(path)
    path.mkdir(parents=True, exist_ok=True)
    folder.start(CONFIG)
    for name in FILES:
        if not (finished and name.startswith("state")):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("old")
    return folder


def files(path: Path) -> dict[str, Any]:
    """Everything in a folder, with what it holds and when it was changed."""
    return {
        str(each.relative_to(path)): (each.lstat().st_ino, each.lstat().st_mtime_ns, each.lstat().st_size)
        for each in path.rglob("*")
    }


def visible(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if name[0] != ".")


def model(out: Path) -> None:
    (out / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    (out / "model.safetensors").write_text("days of training")
    (out / "state").mkdir()
    (out / "state" / "vectors").write_text("")


def peft_adapter(out: Path) -> None:
    (out / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({}, out / "adapter_model.safetensors")


def adapter_only(out: Path) -> None:
    run_in(out)
    (out / "config.json").unlink()


def with_config(content: bytes | str) -> Callable[[Path], object]:
    def make(out: Path) -> None:
        run_in(out)
        (out / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def pipe(out: Path) -> None:
    os.mkfifo(out / "config.json")


def linked(name: str) -> Callable[[Path], object]:
    """A run in which something is a link to what someone else has."""

    def make(out: Path) -> None:
        run_in(out)
        (out / name).rename(out.parent / "elsewhere")
        (out / name).symlink_to(out.parent / "elsewhere")

    return make


def strange_lock(out: Path) -> None:
    os.mkfifo(out / "run.lock")
    model(out)


def note_in_state(out: Path) -> None:
    run_in(out)
    (out / "state" / "notes.txt").write_text("mine")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a model": model,
    "an adapter of PEFT": peft_adapter,
    "a file of someone": lambda out: (out / "thesis.tex").write_text("mine"),
    "an adapter beside no config": adapter_only,
    "an empty config": with_config(""),
    "half a config": with_config(json.dumps(CONFIG)[:-9]),
    "a list": with_config("[1, 2]"),
    "a number": with_config("5"),
    "binary": with_config(b"\x00\x01\xff"),
    "nested": with_config("[" * 100_000),
    "huge": with_config(json.dumps({**CONFIG, "more": "x" * (1 << 21)})),
    "null for a part": with_config(json.dumps({**CONFIG, "lora": None})),
    "a part of it only": with_config('{"options": {}}'),
    "a directory for a config": lambda out: (out / "config.json").mkdir(),
    "a link for a config": linked("config.json"),
    "a pipe for a config": pipe,
    "a pipe for a lock": strange_lock,
    "a linked adapter": linked("adapter"),
    "a linked state": linked("state"),
    "a linked state of one step": linked("state/finetune/6"),
    "linked metrics": linked("metrics.jsonl"),
    "a note among the states": note_in_state,
}


@pytest.mark.parametrize("flags", ["", "--overwrite", "--resume"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_no_run_wrote_is_refused_untouched(
    kind: str, flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    FOREIGN[kind](out)
    before = files(tmp_path)
    assert main(["finetune", "--out", str(out), *flags.split()]) == 2
    said, complaint = capsys.readouterr()
    assert said == "" and complaint.count("\n") == 1 and str(out) in complaint
    assert files(tmp_path) == before


def test_a_link_to_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert main(["finetune", "--out", str(tmp_path / "out")]) == 2
    assert os.listdir(tmp_path) == ["out"]


def test_hidden_files_are_no_reason_to_refuse_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*")
    Folder(tmp_path).check(resume=False, overwrite=False)


@pytest.mark.parametrize("finished", [False, True])
def test_a_replaced_run_loses_its_own_files_only(finished: bool, tmp_path: Path) -> None:
    folder = run_in(tmp_path, finished=finished)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match=f"holds {'a ' if finished else 'an un'}finished run.*--overwrite to replace"):
        folder.check(resume=False, overwrite=False)
    folder.check(resume=False, overwrite=True)
    folder.start(CONFIG)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "notes.txt"]


def test_a_note_in_an_adapter_that_would_be_replaced_is_named(tmp_path: Path) -> None:
    folder = run_in(tmp_path)
    (folder.adapter / "notes").mkdir()
    folder.check(resume=True, overwrite=False)
    with pytest.raises(FolderError, match="holds adapter/notes, which no run wrote: move it"):
        folder.check(resume=False, overwrite=True)


@pytest.mark.parametrize("finished", [False, True])
def test_a_replacement_killed_at_any_moment_is_a_run_and_is_finished_by_the_next(
    finished: bool, tmp_path: Path
) -> None:
    seen: set[tuple[str, ...]] = set()
    for moment in range(1000):
        folder = run_in(tmp_path / str(moment), finished=finished)
        died = killed_at(moment, lambda folder=folder: folder.start({**CONFIG, "new": 1}))
        assert "new" in folder.read_config() or died
        seen.add(tuple(visible(folder.path)))
        if folder.state.exists():
            assert folder.metrics.read_text() == "old" and (folder.state / f"finetune/6/{ARRAYS}").exists()
        if folder.adapter.exists():
            assert (folder.adapter / "adapter_model.safetensors").exists()
        for flags in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
            folder.check(**flags)
        folder.start(CONFIG)
        assert os.listdir(folder.path) == ["config.json"]
        if not died:
            break
    assert len(seen) == 4 + (not finished)


def test_a_run_killed_at_any_moment_of_its_end_is_finished_or_can_go_on(tmp_path: Path) -> None:
    ends: list[bool] = []
    for moment in range(1000):
        folder = run_in(tmp_path / str(moment))
        died = killed_at(moment, folder.finish)
        ends.append(folder.finished)
        folder.check(resume=True, overwrite=False)
        assert folder.finished or (folder.state / f"finetune/6/{ARRAYS}").exists()
        folder.finish()
        assert sorted(os.listdir(folder.path)) == ["adapter", "config.json", "loss.png", "metrics.jsonl"]
        if not died:
            break
    assert len(ends) > 5 and ends == sorted(ends) and ends[0] is False


@pytest.mark.parametrize("flags", ["", "--overwrite", "--resume"])
def test_a_second_run_is_told_who_is_there_and_changes_nothing(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_in(tmp_path)
    with folder.claimed(resume=True, overwrite=False):
        before = files(tmp_path)
        assert main(["finetune", "--out", str(tmp_path), *flags.split()]) == 2
        assert f"a run is going on in {tmp_path}, by process {os.getpid()}:" in capsys.readouterr().err
        with pytest.raises(FolderError, match="a run is going on"), folder.claimed(resume=False, overwrite=True):
            pass
        assert files(tmp_path) == before
    assert not (tmp_path / "run.lock").exists()
    folder.check(resume=True, overwrite=False)


def test_what_has_changed_between_the_check_and_the_run_is_seen(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out")
    folder.check(resume=False, overwrite=True)
    folder.path.mkdir()
    model(folder.path)
    with pytest.raises(FolderError, match="holds no run"), folder.claimed(resume=False, overwrite=True):
        pass
    assert visible(folder.path) == ["config.json", "model.safetensors", "state"]


HOLD = """
import sys, time, pathlib
from lora_jax.train.lock import locked
with locked(pathlib.Path(sys.argv[1])) as other:
    print(other, flush=True)
    time.sleep(60)
"""


def test_a_lock_of_another_process_holds_until_it_is_killed(tmp_path: Path) -> None:
    folder = run_in(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run.lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "None\n"
    with pytest.raises(FolderError, match=f"by process {process.pid}:"):
        folder.check(resume=True, overwrite=False)
    process.kill()
    process.communicate()
    assert (tmp_path / "run.lock").exists()
    with folder.claimed(resume=True, overwrite=False):
        assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / "run.lock").exists()
