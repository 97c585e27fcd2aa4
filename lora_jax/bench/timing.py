"""Paired timing: programs run interleaved in random order, and ratios are medians over rounds."""

import os
import platform
import random
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import jax

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""`wall` is what a user waits; `cpu`, the processor time of all threads, is hardly disturbed by other programs."""

Times = dict[str, list[float]]


def rounds(
    runs: Mapping[str, Callable[[], Any]],
    count: int,
    warm_up: int = 2,
    clock: str = "wall",
    seed: int = 0,
    *,
    lead: int = 0,
    after: Callable[[], object] = lambda: None,
) -> Times:
    """Seconds that every run took in each of `count` rounds; the order within a round is random.

    Args:
      runs: by name, functions without arguments; what they return is waited for.
      count: number of rounds.
      warm_up: calls of each before the first round.
      clock: a key of `CLOCKS`.
      seed: of the order.
      lead: calls of a run right before each that is timed, so that it finds its own arrays in the caches, and not those
        of the run before it.
      after: called after each round.

    Example:
      >>> times = rounds({"one": lambda: 1, "two": lambda: 2}, count=3)
      >>> {name: len(seconds) for name, seconds in times.items()}
      {'one': 3, 'two': 3}
    """
    for run in runs.values():
        for _ in range(warm_up):
            jax.block_until_ready(run())
    order, now = random.Random(seed), CLOCKS[clock]
    times: Times = {name: [] for name in runs}
    for _ in range(count):
        for name in order.sample(list(runs), len(runs)):
            for _ in range(lead):
                jax.block_until_ready(runs[name]())
            start = now()
            jax.block_until_ready(runs[name]())
            times[name].append(now() - start)
        after()
    return times


def ratio(times: Times, name: str, base: str) -> tuple[float, float, float]:
    """Median and quartiles, over the rounds, of one run's time divided by another's in the same round.

    Example:
      >>> ratio({"base": [1.0, 2.0, 4.0], "twice": [2.0, 4.0, 8.0]}, "twice", "base")
      (2.0, 2.0, 2.0)
    """
    ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return median(ratios), low, high


def machine() -> dict[str, str]:
    """What the numbers were measured on and with."""
    devices = jax.devices()
    facts = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "device": f"{len(devices)} × {devices[0].device_kind}",
        "python": platform.python_version(),
    }
    for name in ("lora_jax", "jax", "jaxlib", "flax", "optax", "qwix"):
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
