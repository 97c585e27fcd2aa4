"""Paired timing: programs run interleaved in random order, and ratios are medians over rounds."""

import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""`wall` is what a user waits; `cpu`, the processor time of all threads, is hardly disturbed by other programs."""

Times = dict[str, list[float]]


def rounds(
    runs: Mapping[str, Callable[[], Any]], count: int, warm_up: int = 2, clock: str = "wall", seed: int = 0
) -> Times:
    """Seconds that every run took in each of `count` rounds; the order within a round is random.

    Args:
      runs: by name, functions without arguments; what they return is waited for.
      count: number of rounds.
      warm_up: calls of each before the first round.
      clock: a key of `CLOCKS`.
      seed: of the order.
    """
    for run in runs.values():
        for _ in range(warm_up):
            jax.block_until_ready(run())
    order, now = random.Random(seed), CLOCKS[clock]
    times: Times = {name: [] for name in runs}
    for _ in range(count):
        for name in order.sample(list(runs), len(runs)):
            start = now()
            jax.block_until_ready(runs[name]())
            times[name].append(now() - start)
    return times


def ratio(times: Times, name: str, base: str) -> tuple[float, float, float]:
    """Median and quartiles, over the rounds, of one run's time divided by another's in the same round."""
    ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return median(ratios), low, high


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects one entry for every program that XLA compiles inside."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def machine() -> dict[str, str]:
    """What the numbers were measured on and with."""
    devices = jax.devices()
    facts = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "device": f"{len(devices)} × {devices[0].device_kind}",
        "python": platform.python_version(),
    }
    for name in ("jax", "jaxlib", "flax", "optax", "qwix"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass
class Report:
    """Tables with a heading, for a terminal or as Markdown.

    Attributes:
      facts: what was measured on and with.
      tables: title, column names and rows of text.
    """

    facts: Mapping[str, str]
    tables: list[tuple[str, Sequence[str], list[Sequence[str]]]] = field(default_factory=list)

    def add(self, title: str, columns: Sequence[str], rows: list[Sequence[str]]) -> None:
        """Add a table."""
        self.tables.append((title, columns, rows))

    def print(self) -> None:
        """Show on the terminal."""
        console = Console()
        console.print(self._heading())
        for title, columns, rows in self.tables:
            table = Table(title=title, title_justify="left")
            for i, column in enumerate(columns):
                table.add_column(column, justify="right" if i else "left")
            for row in rows:
                table.add_row(*row)
            console.print(table)

    def markdown(self) -> str:
        """The same as Markdown."""
        blocks = [self._heading()]
        for title, columns, rows in self.tables:
            rule = ["---", *["---:"] * (len(columns) - 1)]
            blocks.append(
                "\n".join([f"**{title}**", "", *(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))])
            )
        return "\n\n".join(blocks)

    def _heading(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.facts.items())
