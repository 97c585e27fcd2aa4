"""What a command says: tables, lines and progress on a terminal, plain text in a pipe, or one JSON object."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lora_jax.report.report import Printed, plain_value
from lora_jax.report.tables import Table, Tables, escaped, show

_PLAIN_LINES = 20
"""How often progress is told where there is no bar."""


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal that can draw; one that calls itself dumb cannot move its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Terminal:
    """Standard output as a verb uses it.

    Progress and errors go to standard error, so that a pipe gets results only.

    Args:
      as_json: say nothing but one JSON object at the end.
      silent: say nothing at all, as a process of several that is not the first.

    Example:
      >>> terminal = Terminal()
      >>> terminal.say("done\\x1b[2J")
      done\\x1b[2J
      >>> terminal.show(Table(("path", "rank"), [("head", "16")]))
      path  rank
      head    16
    """

    def __init__(self, as_json: bool = False, silent: bool = False):
        self.as_json, self._silent, self._shown = as_json or silent, silent, False

    def say(self, text: str) -> None:
        """Print a line as it is: no markup, no wrapping, control bytes spelled out."""
        if not self.as_json:
            print(escaped(text), flush=True)
            self._shown = False

    def write(self, text: str) -> None:
        """Print a part of a text, without an end of line; lines and tabs stay, other control bytes are spelled out."""
        if not self.as_json:
            print("".join(each if each in "\n\t" else escaped(each) for each in text), end="", flush=True)
            self._shown = False

    def title(self, text: str) -> None:
        """Print a heading after an empty line, bold on a terminal."""
        if not self.as_json:
            bold = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
            print(f"\n\x1b[1m{escaped(text)}\x1b[0m" if bold else f"\n{escaped(text)}", flush=True)
            self._shown = False

    def show(self, what: Table | Tables | Printed) -> None:
        """Print a table, after an empty line if it follows another."""
        if not self.as_json:
            print(end="\n" if self._shown else "")
            self._shown = True
            show(what.table() if isinstance(what, Printed) else what)

    def quote(self, title: str, text: str) -> None:
        """Print a text of several lines below a title, indented."""
        if not self.as_json:
            lines = (f"  {escaped(line)}".rstrip() for line in text.split("\n"))
            print("\n".join([f"{escaped(title)}:", *lines]), flush=True)

    def result(self, values: Mapping[str, Any]) -> None:
        """Print what `--json` prints; what no terminal shows is spelled out, C1 control bytes included."""
        if self.as_json and not self._silent:
            text = json.dumps(plain_value(values), indent=1, ensure_ascii=False)
            print(
                "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text),
                flush=True,
            )


class Progress:
    """How far a job is, on standard error: a bar on a terminal, a line now and then elsewhere.

    Args:
      title: what is done.
      total: number of steps.
      start: steps that are done already.
      unit: what a step is.
    """

    def __init__(self, title: str, total: int, start: int = 0, unit: str = "step"):
        self._title, self._start, self._total, self._unit = title, start, total, unit
        self._told = start
        self._every = -(-total // _PLAIN_LINES)
        self._began = time.monotonic()
        self._bar: Any = None

    def update(self, done: int, now: str) -> None:
        """Show that `done` steps are done, and how things stand now."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, now=escaped(now))
        elif done // self._every > self._told // self._every or done == self._total:
            self._told = done
            speed = (done - self._start) / max(time.monotonic() - self._began, 1e-9)
            left = (self._total - done) / speed
            told = f"{self._title}: {self._unit} {done}/{self._total}, {now}, {left:.0f} s left"
            print(escaped(told), file=sys.stderr, flush=True)

    @contextmanager
    def shown(self) -> Iterator["Progress"]:
        """Keep the bar on the terminal for the duration."""
        if not is_terminal(sys.stderr):
            yield self
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = [TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[now]")]
        bar = Bar(
            columns[0], BarColumn(), MofNCompleteColumn(), columns[1], TimeRemainingColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self._task = bar.add_task(escaped(self._title), total=self._total, completed=self._start, now="")
        with bar:
            self._bar = bar
            yield self
        self._bar = None
