"""Adapters that are loaded in a thread before a batch asks for them, a bounded number of them at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Lock

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.origin import Identity, changed, noted
from lora_jax.errors import ParameterError


@dataclass(frozen=True)
class Loaded:
    """An adapter, and the files that it was read from, if any."""

    adapter: Adapter
    origin: Mapping[str, Identity]

    @property
    def stale(self) -> bool:
        """Whether these files were written again."""
        return changed(self.origin)


def loaded(load: Callable[[str], Adapter | None], name: str) -> Loaded:
    """Load an adapter and note what it is read from.

    Raises:
      ParameterError: there is none of that name.
    """
    with noted() as origin:
        adapter = load(name)
    if adapter is None:
        raise ParameterError(f"There is no adapter {name!r}")
    return Loaded(adapter, origin)


class Prefetched:
    """Adapters on their way by name, at most `room` of them; may be used from several threads."""

    def __init__(self, load: Callable[[str], Adapter | None], room: int):
        self._load, self._room = load, room
        self._lock = Lock()
        self._coming: dict[str, Future[Loaded]] = {}
        self._thread = ThreadPoolExecutor(1, "lora-prefetch")

    def ask(self, names: Iterable[str]) -> None:
        """Begin to load the first `room` names; what was asked for the longest ago makes room for them."""
        asked = list(islice(_distinct(names), self._room))
        with self._lock:
            new = [name for name in asked if name not in self._coming]
            others = [name for name in self._coming if name not in asked]
            for name in others[: max(len(self._coming) + len(new) - self._room, 0)]:
                self._coming.pop(name).cancel()
            for name in new:
                self._coming[name] = self._thread.submit(loaded, self._load, name)

    def drop(self, name: str) -> bool:
        """Forget an adapter; whether it was on its way."""
        with self._lock:
            coming = self._coming.pop(name, None)
        if coming is not None:
            coming.cancel()
        return coming is not None

    def take(self, name: str) -> Loaded | None:
        """An adapter that came or is just being loaded; None where it has to be loaded now.

        That is so if it was not asked for, is waiting behind others, could not be loaded, or was written again.
        """
        with self._lock:
            coming = self._coming.pop(name, None)
        if coming is None or coming.cancel() or coming.exception() is not None:
            return None
        return None if coming.result().stale else coming.result()


def _distinct(names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name not in seen:
            seen.add(name)
            yield name
