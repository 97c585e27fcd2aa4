"""Tries a writer again and again, killed or failed at its 1st, 2nd, ... change of a file, and prints what was found.

`LD_PRELOAD=faults.so python driver.py WRITER FAULT [EVERY]` prints a line of JSON: how many moments were tried, after
how many the path held the old or the new, and what must not be: `lost`, a `mixture`, an `escape` (an error that is no
`LoraError`), `silent` (no error, and not the new), `hung`, `stuck` (the next write fails), `litter` beside the path.
No array of JAX's is made before the process forks, which is what lets it fork.
"""

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import lora_jax as lora
import lora_jax.cli.parse  # Forks would import it, each anew.
from lora_jax.cli import main

FAULTS = {"kill": 0, "ENOSPC": errno.ENOSPC, "ENOSPC+": errno.ENOSPC, "EIO": errno.EIO, "EIO+": errno.EIO}
PATIENCE = 60
ARGUMENTS = {
    "merge": ["merge", "base", "peft"],
    "convert": ["convert", "own"],
    "back": ["convert", "peft", "--like", "own"],
    "compose": ["compose", "peft", "other_peft", "--out"],
    "compose_own": ["compose", "own", "other_own", "--out"],
}
OVERWRITES = ("own", "peft")

C = ctypes.CDLL(None)
FACTS: Any = {"shape": (4, 3), "dtype": "float32", "kind": "dense", "in_axes": (0,), "out_axes": (1,)}
EACH = {path: lora.Site(path=path, **FACTS) for path in ("q/kernel", "v/kernel")}
SITES = lora.Sites(list(EACH.values()), tuple(EACH))
PARAMS = {name: {"kernel": np.ones((4, 3), np.float32)} for name in "qv"}


def adapter(size: float, scale: float) -> lora.Adapter:
    full = lambda *shape: np.full(shape, size, np.float32)  # noqa: E731
    updates = {path: lora.LowRank(full(2, 4), full(2, 3), np.float32(scale), site) for path, site in EACH.items()}
    return lora.Adapter(updates)


OLD, NEW = adapter(1, 2), adapter(3, 5)


def prepare(writer: str, inputs: Path, target: Path) -> None:
    """What the writer reads, and what it is to overwrite."""
    for name, each in (("own", NEW), ("other_own", OLD)):
        lora.save(inputs / name, each)
    for name, each in (("peft", NEW), ("other_peft", OLD)):
        lora.peft.save(inputs / name, each, sites=SITES)
    (inputs / "base").mkdir()
    save_file({f"{n}.weight": np.ones((3, 4), np.float32) for n in "qv"}, inputs / "base" / "model.safetensors")
    (inputs / "base" / "config.json").write_text('{"model_type": "none"}\n', encoding="utf-8")
    if writer in OVERWRITES:
        shutil.copytree(inputs / f"other_{writer}", target)


def write(writer: str, inputs: Path, target: Path) -> None:
    if writer == "own":
        lora.save(target, NEW, overwrite=True)
    elif writer == "peft":
        lora.peft.save(target, NEW, sites=SITES, overwrite=True)
    else:
        os.chdir(inputs)
        verb, *rest = ARGUMENTS[writer]
        options = [rest.index(word) for word in rest if word.startswith("--") and word != "--out"] or [len(rest)]
        if status := main([verb, *rest[: options[0]], str(target), *rest[options[0] :]]):
            raise lora.LoraError(f"exit status {status}")


def read(writer: str, target: Path) -> str:
    """What there is, as text that can be compared."""
    if not target.exists():
        return "nothing"
    if writer == "merge":
        found: Any = {name: value.tolist() for name, value in load_file(target / "model.safetensors").items()}
        found["config"] = (target / "config.json").read_text(encoding="utf-8")
    else:
        peft = writer in ("peft", "convert", "compose")
        got = lora.peft.load(target, PARAMS, SITES) if peft else lora.load(target)
        found = {p: [np.asarray(leaf).tolist() for leaf in (u.a, u.b, u.scale)] for p, u in got.items()}
    return json.dumps(found, sort_keys=True)


def apart(function: Callable[[], Any]) -> tuple[str, Any, int]:
    """Run in a fork: how it ended, what it returned or said, and how many changes were counted."""
    mine, its = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(PATIENCE)
        try:
            answer: tuple[str, Any] = "done", function()
        except lora.LoraError as error:
            answer = "refused", str(error)
        except BaseException as error:
            answer = "escape", repr(error)
        C.faults_disarm()
        os.write(its, json.dumps([*answer, C.faults_count()]).encode())
        os._exit(0)
    os.close(its)
    with os.fdopen(mine, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        return tuple(json.loads(text))
    return ("hung" if os.waitstatus_to_exitcode(status) == -signal.SIGALRM else "killed"), "", 0


def must(function: Callable[[], Any]) -> Any:
    kind, value, count = apart(function)
    if kind != "done":
        raise SystemExit(f"without a fault: {kind} {value}")
    return value, count


def judged(writer: str, ended: str, found: tuple[str, Any, int], old: str, new: str) -> list[str]:
    """What one moment adds to the counts."""
    kind, value, _ = found
    state = {"nothing": "lost", old: "old", new: "new"}.get(value, "mixture") if kind == "done" else "lost"
    silent = ["silent"] if ended == "done" and state != "new" else []
    return [state, *silent, *(word for word in ("escape", "hung") if word in (ended, kind))]


def sweep(writer: str, fault: str, every: int) -> Counter[str]:
    root = Path(tempfile.mkdtemp())
    inputs, place, kept = root / "inputs", root / "place", root / "kept"
    target, counts = place / "adapter", Counter[str]()
    inputs.mkdir(), place.mkdir()

    def attempt(at: int) -> None:
        C.faults_arm(os.fsencode(place), at, FAULTS[fault], fault.endswith("+"))
        write(writer, inputs, target)

    must(lambda: prepare(writer, inputs, target))
    old, _ = must(lambda: read(writer, target))
    shutil.copytree(place, kept)
    _, calls = must(lambda: attempt(0))
    new, _ = must(lambda: read(writer, target))
    for at in range(1, calls + 1, every):
        shutil.rmtree(place)
        shutil.copytree(kept, place)
        ended = apart(lambda at=at: attempt(at))[0]
        found = judged(writer, ended, apart(lambda: read(writer, target)), old, new)
        if writer in OVERWRITES or "new" not in found:
            again = apart(lambda: attempt(0))[0] == "done" and apart(lambda: read(writer, target))[1] == new
            found += ([] if again else ["stuck"]) + (["litter"] if os.listdir(place) != [target.name] else [])
        counts.update(["moments", *found])
    shutil.rmtree(root)
    return counts


if __name__ == "__main__":
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # What the verbs print is not what this prints.
    found = sweep(sys.argv[1], sys.argv[2], int((*sys.argv, "1")[3]))
    os.write(out, json.dumps(found).encode() + b"\n")
