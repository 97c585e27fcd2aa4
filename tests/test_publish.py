"""Directories appear whole, or what was there stays: replacing, failing, left-overs, links, writers side by side."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import random_adapter
from killed import killed_at

import lora_jax as lora
from lora_jax.adapter.site import Site
from lora_jax.errors import CheckpointError
from lora_jax.publish import discard, place, publish, publish_file, steady

DENSE = Site(path="w", shape=(4, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))


def writes(text: str):
    return lambda folder: (folder / "ours").write_text(text)


def anything(where: Path) -> None:
    """May be replaced."""


def test_what_is_there_is_replaced_in_one_step_and_the_rest_of_it_kept(tmp_path: Path) -> None:
    where = tmp_path / "a"
    publish(where, writes("old"))
    (where / "README").write_text("mine")
    (where / "best").mkdir()
    (where / "best" / "ours").write_text("another")
    publish(where, writes("new"), replace=anything)
    found = {str(path.relative_to(where)): path.read_text() for path in where.rglob("*") if path.is_file()}
    assert found == {"ours": "new", "README": "mine", "best/ours": "another"}
    assert os.listdir(tmp_path) == ["a"]


def test_nothing_is_replaced_without_leave(tmp_path: Path) -> None:
    publish(tmp_path / "a", writes("old"))
    with pytest.raises(CheckpointError, match="exists already"):
        publish(tmp_path / "a", writes("new"))
    assert (tmp_path / "a" / "ours").read_text() == "old"


def test_a_failure_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "ours").write_text("half")
        raise OSError(28, "No space left on device")

    publish(tmp_path / "a", writes("old"))
    with pytest.raises(CheckpointError, match=r"No space left on device\. What was there before is untouched"):
        publish(tmp_path / "a", fails, replace=anything)
    assert (tmp_path / "a" / "ours").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    kept: list[Path] = []
    publish(tmp_path / "a", lambda folder: kept.append(folder.parent))
    kept[0].mkdir()
    (kept[0] / "new").mkdir()
    (kept[0] / "new" / "half").write_text("")
    publish(tmp_path / "a", writes("new"), replace=anything)
    assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(tmp_path / "a") == ["ours"]


def test_writers_of_one_path_take_turns(tmp_path: Path) -> None:
    where = tmp_path / "a"
    publish(where, writes("0"))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: publish(where, writes(str(i)), replace=anything), range(40)))
    assert (where / "ours").read_text().isdigit()
    assert os.listdir(tmp_path) == ["a"]


def test_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(CheckpointError, match="where nothing is"):
        place(tmp_path / "link")
    (tmp_path / "real").mkdir()
    assert place(tmp_path / "link") == tmp_path / "real"


def test_names_that_are_too_long_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        lora.save(tmp_path / ("x" * 300), random_adapter([DENSE]))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["lr[0.1]", "a\\b", "x" * 250, "a.orbax-checkpoint-tmp"])
def test_unusual_names_of_our_own_format_come_back(name: str, tmp_path: Path) -> None:
    adapter = random_adapter([DENSE])
    lora.save(tmp_path / name, adapter)
    assert bool((lora.load(tmp_path / name)["w"].a == adapter["w"].a).all())


def test_a_reader_starts_again_if_another_directory_takes_the_place(tmp_path: Path) -> None:
    publish(tmp_path / "a", writes("old"))
    seen: list[str] = []

    def read() -> str:
        seen.append((tmp_path / "a" / "ours").read_text())
        if len(seen) == 1:
            publish(tmp_path / "a", writes("new"), replace=anything)
        return seen[-1]

    assert steady(tmp_path / "a", read) == "new"


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    where = tmp_path / "a.json"
    ends = []
    for moment in range(100):
        publish_file(where, b"old")
        died = killed_at(moment, lambda: publish_file(where, b"newer"))
        ends.append(where.read_bytes())
        if not died:
            break
    assert ends == sorted(ends, key=len) and set(ends) == {b"old", b"newer"}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_is_discarded_is_gone_at_once(kind: str, tmp_path: Path) -> None:
    where = tmp_path / "a"
    for moment in range(100):
        if kind == "directory":
            publish(where, lambda folder: [(folder / name).write_text("") for name in "xyz"] and None)
        else:
            publish_file(where, b"")
        died = killed_at(moment, lambda: discard(where))
        assert not where.exists() or kind == "file" or sorted(os.listdir(where)) == ["x", "y", "z"]
        discard(where)
        assert os.listdir(tmp_path) == []
        if not died:
            break
    assert moment > 2


def test_discarding_nothing_changes_nothing(tmp_path: Path) -> None:
    before = tmp_path.stat().st_mtime_ns
    discard(tmp_path / "a")
    assert tmp_path.stat().st_mtime_ns == before


def test_a_link_that_is_discarded_leaves_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("")
    (tmp_path / "link").symlink_to("real")
    discard(tmp_path / "link")
    assert os.listdir(tmp_path) == ["real"] and os.listdir(tmp_path / "real") == ["file"]


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_what_can_be_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="can be no path here"):
        place(f"{tmp_path}/{name}")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_rights_are_those_of_the_umask(tmp_path: Path, umask: int) -> None:
    def write(folder: Path) -> None:
        (folder / "ours").touch(0o600)

    before = os.umask(umask)
    try:
        publish(tmp_path / "a", write)
    finally:
        os.umask(before)
    found = [path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "a" / "ours")]
    assert found == [0o777 & ~umask, 0o666 & ~umask]
