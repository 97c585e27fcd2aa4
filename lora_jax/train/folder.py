"""The folder of a run: what is in it, and whether a run may begin, go on, or is finished."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lora_jax.errors import LoraError


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
        self.metrics = path / "metrics.jsonl"
        self.image = path / "loss.png"
        self.config = path / "config.json"
        self.state = path / "state"

    @property
    def finished(self) -> bool:
        """Whether it holds a finished run."""
        return self.config.exists() and self.adapter.exists() and not self.state.exists()

    def _own(self) -> tuple[Path, ...]:
        return self.config, self.adapter, self.metrics, self.image, self.state

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse what would lose or mix up a run.

        Raises:
          FolderError: it does.
        """
        if resume and overwrite:
            raise FolderError("--resume continues a run and --overwrite deletes it: give one of them")
        if resume and not self.config.exists():
            raise FolderError(f"nothing to resume in {self.path}: leave out --resume to start a run there")
        if not resume and not overwrite and (present := [path.name for path in self._own() if path.exists()]):
            if self.finished:
                raise FolderError(
                    f"{self.path} holds a finished run: choose another --out, or --overwrite to replace it"
                )
            if self.config.exists():
                raise FolderError(
                    f"{self.path} holds an unfinished run: --resume to continue it, or --overwrite to replace it"
                )
            raise FolderError(
                f"{self.path} holds {', '.join(present)}: choose another --out, or --overwrite to replace them"
            )
        check_writable(self.path)

    def read_config(self) -> dict[str, Any]:
        """What `start` wrote.

        Raises:
          FolderError: it is unreadable.
        """
        try:
            return json.loads(self.config.read_text())
        except (OSError, ValueError) as error:
            raise FolderError(f"{self.config} is damaged, so the run cannot be resumed: {error}") from error

    def start(self, config: dict[str, Any]) -> None:
        """Create the folder, delete a former run's files and nothing else, and write the config."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self._own():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        partial = self.config.with_suffix(".partial")
        partial.write_text(json.dumps(config, indent=2) + "\n")
        partial.replace(self.config)

    def finish(self) -> None:
        """Delete what only resuming needs."""
        shutil.rmtree(self.state)


def check_writable(path: Path) -> None:
    """Refuse a path where nothing can be created.

    Raises:
      FolderError: what is there, or would hold it, is no directory that one may write to.
    """
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise FolderError(f"cannot write to {path}: {existing} is no directory that you may write to")
