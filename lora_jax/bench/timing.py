"""measure: every mode timed beside the base, interleaved in random order; ratios are medians over rounds."""

import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import jax

from lora_jax.bench.cases import Case, Settings, check_distinct
from lora_jax.bench.programs import Program, programs
from lora_jax.bench.result import Benchmark, Row, batch_text
from lora_jax.errors import ConfigError, LoraError

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
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class RunError(LoraError, RuntimeError):
    """The device cannot run what is to be measured."""


_LEAD = 3  # After one call alone, merged weights of 16 MB still take up to 1.2 times as long as the base's.


def measure(
    cases: Sequence[Case],
    settings: Settings | None = None,
    *,
    progress: Callable[[int, str], object] = lambda done, now: None,
) -> Benchmark:
    """Time LoRA's modes beside the base, and count their operations and bytes.

    For every case and number of tokens: the base `Wx`; the adapter alone, `B(Ax)`; both, as `lora_jax.adapt` runs them
    (separate); the base with the adapter merged into it; and `lora_jax.route` with a bank of adapters (routed). Before
    anything is timed, results are compared: separate with merged, and routed with each adapter alone.

    All programs of a case and a number of tokens are timed in the same rounds, in random order, each right after three
    calls that are not timed, so that it finds its arrays in the caches, as where a model runs again and again. Ratios
    are those to the base in the same round. Arguments are on the device already, and results stay there. The merged
    mode runs the very program of the base: by how much its ratio is off 1 is the error of the others.

    Args:
      cases: weights or models.
      settings: what is varied; small defaults if not given.
      progress: called with the number of steps done, of `lora_jax.bench.timing.steps`, and what is done now.

    Returns:
      The numbers: a table when printed, and `json`, `report` and `save`.

    Raises:
      ConfigError: a rank is larger than a side of a weight, or a case is given twice.
      DisagreementError: two modes that are to compute the same do not.
      RunError: the device cannot run it, for lack of memory for instance.

    Example:
      >>> from lora_jax.bench import Dense
      >>> result = measure([Dense(8, 6)], Settings(ranks=(2,), tokens=(4,), adapters=(3,), rounds=1))
      >>> [(row.mode, row.flops) for row in result.rows[:2]]  # 2·4·8·6 and 2·4·2·(8 + 6)
      [('base', 384), ('adapter', 224)]
      >>> [row.mode for row in result.rows[2:]]
      ['separate', 'merged', 'routed']
    """
    settings = settings or Settings()
    check(cases, settings)
    done = count(1)
    rows: list[Row] = []
    for case in cases:
        for tokens in settings.tokens:
            what = f"{case.name}, {batch_text(tokens, tokens)}"
            tell = lambda now, what=what: progress(next(done), f"{what}: {now}")  # noqa: E731
            try:
                rows += _measured(case, tokens, settings, tell)
            except (jax.errors.JaxRuntimeError, MemoryError) as error:
                raise RunError(f"{what} cannot be run here: {error}") from error
    return Benchmark(asdict(settings), machine(), tuple(rows))


def _measured(case: Case, tokens: int, settings: Settings, tell: Callable[[str], object]) -> list[Row]:
    """What is timed in the same rounds."""
    work = case.work(settings.batch(tokens), settings.dtype, settings.seed)
    built: dict[str, Program] = {}
    for program in programs(work, settings):
        built[str(program)] = program
        tell(f"{program} compiled")
    times = rounds(built, settings.rounds, seed=settings.seed, lead=_LEAD, after=lambda: tell("timing"))
    return [_row(case.name, len(work.inputs), tokens, each, times) for each in built.values()]


def check(cases: Sequence[Case], settings: Settings) -> None:
    """Refuse cases that do not go with the settings, or with each other.

    Raises:
      ConfigError: they do not.
    """
    check_distinct("cases", [case.name for case in cases])
    for case in cases:
        if (rank := max(settings.ranks)) > case.side:
            raise ConfigError(f"rank {rank} is larger than a side of {case.name}: give ranks up to {case.side}")


def steps(cases: Sequence[Case], settings: Settings) -> int:
    """How many steps `measure` takes: every program and every round is one."""
    each = 1 + len(settings.ranks) * (3 + len(settings.adapters)) + settings.rounds
    return len(cases) * len(settings.tokens) * each


def _row(name: str, examples: int, tokens: int, program: Program, times: Times) -> Row:
    seconds = times[str(program)]
    middle, low, high = ratio(times, str(program), "base")
    return Row(
        case=name,
        tokens=tokens,
        examples=examples,
        mode=program.mode,
        form=program.form,
        rank=program.rank,
        adapters=program.adapters,
        seconds=median(seconds),
        ratio=middle,
        ratio_quartiles=(low, high),
        flops=program.counted("flops"),
        bytes=program.counted("bytes accessed"),
        temporary_bytes=program.temporary,
        times=tuple(seconds),
    )
