"""What the benchmarks share: the timing and the tables of `lora-jax bench`, and counts of compilations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from lora_jax.bench.timing import CLOCKS as CLOCKS
from lora_jax.bench.timing import machine as machine
from lora_jax.bench.timing import ratio as ratio
from lora_jax.bench.timing import rounds as rounds
from lora_jax.report.tables import Tables as Tables


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
