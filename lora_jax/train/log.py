"""Metrics on disk as JSON lines, and progress on the terminal."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_LINES = 20


class Metrics:
    """One JSON object per line, each with the number of steps completed.

    Opening drops what was written after `step`, so a resumed run goes on as if it had never stopped.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> metrics = Metrics(path)
      >>> metrics.write(1, {"train/loss": 2.5})
      >>> read_metrics(path)
      [{'step': 1, 'train/loss': 2.5}]
    """

    def __init__(self, path: Path, step: int = 0):
        self._path = path
        kept = [record for record in read_metrics(path) if step and record["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(map(_line, kept)))
        partial.replace(path)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append a record."""
        with self._path.open("a") as file:
            file.write(_line({"step": step, **values}))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics file; a last line that was cut short is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


class Reporter:
    """Tells how far a run is: a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: Console, title: str, total: int, start: int = 0, unit: str = "step"):
        self._console, self._title, self._start, self._total, self._unit = console, title, start, total, unit
        self._told = start
        self._every = -(-total // _PLAIN_LINES)
        self._began = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[now]}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task(title, total=total, completed=start, now="")

    def update(self, done: int, now: str) -> None:
        """Show that `done` steps are done, and how things stand now."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, now=now)
        elif done // self._every > self._told // self._every or done == self._total:
            self._told = done
            speed = (done - self._start) / max(time.monotonic() - self._began, 1e-9)
            left = (self._total - done) / speed
            self._console.print(f"{self._title}: {self._unit} {done}/{self._total}, {now}, {left:.0f} s left")

    @contextmanager
    def shown(self) -> Iterator["Reporter"]:
        """Keep the bar on the terminal for the duration."""
        if self._bar is None:
            yield self
        else:
            with self._bar:
                yield self
