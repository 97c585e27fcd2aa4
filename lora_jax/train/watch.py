"""What a run costs while it goes on: tokens a second, and the most memory that was in use."""

import sys
import time
from collections import deque

import jax

try:
    import resource
except ImportError:  # Windows does not tell.
    resource = None  # type: ignore[assignment]

_STEPS = 20


class Throughput:
    """Tokens a second over the last steps; the first one, which is compiled, does not count.

    Example:
      >>> speed = Throughput(clock=iter([0.0, 2.0, 4.0]).__next__)
      >>> [speed.seen(100) for _ in range(3)]
      [None, 50.0, 50.0]
    """

    def __init__(self, clock: object = time.monotonic):
        self._clock: object = clock
        self._seen: deque[tuple[float, int]] = deque(maxlen=_STEPS)

    def seen(self, tokens: int) -> float | None:
        """Note a step that read so many tokens."""
        self._seen.append((self._clock(), tokens))  # type: ignore[operator]
        began, ended = self._seen[0][0], self._seen[-1][0]
        if ended <= began:
            return None
        return sum(count for _, count in list(self._seen)[1:]) / (ended - began)


def peak_memory() -> int | None:
    """Bytes: the most in use so far on the first device, or by the process where the device is the CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
