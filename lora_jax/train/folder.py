"""The folder of a run: what is in it, and whether a run may begin, go on, or is finished."""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jax import process_index

from lora_jax.errors import LoraError
from lora_jax.publish import discard, publish_file
from lora_jax.train.lock import holder, locked

_FIELDS = {"options": "model", "model": "sha256", "lora": "rank", "data": "", "versions": "jax"}
"""What the config of a run holds, and what each of that holds at least."""
_LONGEST = 1 << 20
"""Bytes of a config that are read."""
_ARRAYS = r"(_\w+|d|array_metadatas|manifest\.ocdbt|ocdbt\.process_\d+)(/.*)?"
_ORBAX = rf"(_CHECKPOINT_METADATA|commit_success\.txt|orbax\.checkpoint|manifest\.json|(state|pytree)(/{_ARRAYS})?)"
"""What is in a directory that Orbax wrote, and its manifest."""
_PEFT = r"(adapter_config\.json|adapter_model\.safetensors|README\.md)"
_WRITTEN = re.compile(
    rf"config\.json|metrics\.jsonl|loss\.png|run\.lock|(adapter|best)(/{_PEFT})?|merged(/.*)?"
    rf"|tensorboard(/events\.[^/]+)?|state(/(pretrain|finetune)(/(best|\d+)(\.orbax-checkpoint-tmp[^/]*)?(/{_ORBAX})?)?)?"
    r"|(.*/)?\.[^/]+\.partial(/.*)?",
    re.DOTALL,
)
"""All that a run writes."""


class FolderError(LoraError, ValueError):
    """The output folder does not allow what was asked for."""


class Folder:
    """Paths of a run's files.

    `state/` exists from the first step to the end, so a run is finished when `adapter/` is there and `state/` is not.

    Example:
      >>> Folder(Path("lora-out")).metrics.as_posix()
      'lora-out/metrics.jsonl'
    """

    def __init__(self, path: Path):
        self.path = path
        self.adapter = path / "adapter"
        self.best = path / "best"
        self.merged = path / "merged"
        self.board = path / "tensorboard"
        self.metrics = path / "metrics.jsonl"
        self.image = path / "loss.png"
        self.config = path / "config.json"
        self.state = path / "state"
        self.states = self.state / "finetune"
        self._lock = path / "run.lock"

    @property
    def finished(self) -> bool:
        """Whether it holds a finished run."""
        return self.config.exists() and self.adapter.exists() and not self.state.exists()

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse what would lose or mix up a run, or anything that no run wrote.

        Raises:
          FolderError: it does.
        """
        if resume and overwrite:
            raise FolderError("--resume continues a run and --overwrite deletes it: give one of them")
        check_writable(self.path)
        if (other := holder(self._lock)) is not None:
            raise self._busy(other)
        self._check_contents(resume, overwrite)

    def _check_contents(self, resume: bool, overwrite: bool) -> None:
        if not self._present():
            if resume:
                raise FolderError(f"nothing to resume in {self.path}: leave out --resume to start a run there")
            return
        self.read_config()
        self._check_written(overwrite)
        if resume or overwrite:
            return
        if self.finished:
            raise FolderError(f"{self.path} holds a finished run: choose another --out, or --overwrite to replace it")
        raise FolderError(f"{self.path} holds an unfinished run: --resume to continue it, or --overwrite to replace it")

    def _check_written(self, overwrite: bool) -> None:
        """Refuse links, which lead out of the folder, and what is no run's where a run's files are to be removed."""
        folders = (self.adapter, self.best, self.merged, self.board, self.state)
        for root in (self.config, self.metrics, self.image, *folders):
            for path in _below(root):
                name = path.relative_to(self.path).as_posix()
                if reason := _unusual(path, directory=root in folders if path == root else None):
                    raise self._foreign(f"{name} {reason}")
                if (overwrite or root == self.state) and not _WRITTEN.fullmatch(name):
                    raise FolderError(f"{self.path} holds {name}, which no run wrote: move it, or choose another --out")

    def _present(self) -> list[str]:
        """Names in the folder. Hidden ones do not count: a run makes its files under such names."""
        names = os.listdir(self.path) if self.path.exists() else []
        return sorted(name for name in names if name[0] != "." and name != self._lock.name)

    def _foreign(self, reason: str) -> FolderError:
        return FolderError(
            f"{self.path} holds no run of lora-jax, so it is left as it is: {reason}. Choose another --out"
        )

    def _busy(self, other: str) -> FolderError:
        return FolderError(
            f"a run is going on in {self.path}, by {other}: wait for it, stop it, or choose another --out"
        )

    @contextmanager
    def claimed(self, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Create the folder and keep other runs out of it; `check` is done once more, when nobody else can change it.

        Raises:
          FolderError: another run is going on in it, or `check` refuses it.
        """
        if process_index():  # The first process holds it for all of a program.
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self._lock) as other:
            if other is not None:
                raise self._busy(other)
            self._check_contents(resume, overwrite)
            yield

    def read_config(self) -> dict[str, Any]:
        """What `start` wrote.

        Raises:
          FolderError: there is no such file, or it is not the config of a run.
        """
        if reason := _unusual(self.config):
            raise self._foreign(f"config.json {reason}")
        try:
            with self.config.open("rb") as file:
                config = json.loads(file.read(_LONGEST))
        except (OSError, ValueError, RecursionError) as error:
            raise self._foreign(f"config.json is damaged: {error}") from error
        parts = config if isinstance(config, dict) else {}
        missing = [name for name, key in _FIELDS.items() if not _holds(parts.get(name), key)]
        if missing:
            raise self._foreign(f"config.json does not hold {', '.join(missing)} of a run")
        return parts

    def start(self, config: dict[str, Any]) -> None:
        """Delete a former run's files and nothing else, and write the config.

        The former config is there until the new one takes its place, and no state without its metrics: what is left
        when this is cut short is a run that may be replaced or resumed.
        """
        for path in (self.adapter, self.best, self.merged, self.board, self.state, self.image, self.metrics):
            discard(path)
        publish_file(self.config, (json.dumps(config, indent=2) + "\n").encode())

    def finish(self) -> None:
        """Delete what only resuming needs."""
        discard(self.state)


def check_writable(path: Path) -> None:
    """Refuse a path where nothing can be created.

    Raises:
      FolderError: what is there, or would hold it, is no directory that one may write to.
    """
    existing = next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise FolderError(f"cannot write to {path}: {existing} is no directory that you may write to")


def _below(root: Path) -> Iterator[Path]:
    """A file, or a directory and everything in it; links are not followed."""
    if os.path.lexists(root):
        yield root
    if not root.is_symlink():
        for parent, folders, files in os.walk(root):
            yield from (Path(parent, name) for name in (*folders, *files))


def _unusual(path: Path, directory: bool | None = False) -> str | None:
    """What is wrong with a path that should be a file or a directory; None allows both."""
    if not os.path.lexists(path):
        return "is missing"
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "is a link"
    if (directory is not False and stat.S_ISDIR(mode)) or (directory is not True and stat.S_ISREG(mode)):
        return None
    return "is no directory" if directory else "is no regular file"


def _holds(value: Any, key: str) -> bool:
    return isinstance(value, dict) and (not key or key in value)
