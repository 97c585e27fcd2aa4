"""AdapterCache: which adapters of a larger collection are in a bank, by name, on the host's side."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from threading import RLock
from typing import Literal, NamedTuple, Self, get_args

import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.origin import Identity, changed
from lora_jax.errors import ConfigError, ParameterError, listed
from lora_jax.many.bank import AdapterBank
from lora_jax.many.prefetch import Prefetched, loaded

Policy = Literal["lru", "fifo"]


class _Entry(NamedTuple):
    slot: int
    origin: Mapping[str, Identity]


class AdapterCache:
    """Adapters by name, loaded into the slots of a bank when a batch needs them.

    A batch asks with `ids`; what is missing is loaded, in place of what the policy gives up. The arrays keep their
    shapes, so that nothing is compiled for any of it.

    An adapter whose files were written again since `load` read them with `lora.load` or `lora.peft.load` is loaded
    again by the next batch that names it. What comes from elsewhere is loaded again after `evict`.

    Threads may share a cache: every method takes its one lock. Loading writes into the arrays of `bank`, so a thread
    holds the lock, `with cache:`, from `ids` to the call that gets the bank.

    Args:
      bank: where adapters go; its slots are the cache's from now on, and it is not to be used elsewhere.
      load: gives the adapter of a name: `lora.load`, a look-up in a dictionary, or what you like. Once `prefetch` is
        used, it may run in two threads at once.
      policy: what is given up for a new adapter: `"lru"`, the one that no batch asked for the longest, or `"fifo"`, the
        one that came first.
      pinned: names that stay once they are there.

    Raises:
      ConfigError: the policy is unknown, or there are more pinned names than slots.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(targets="w", rank=2), params, sites)
      >>> shelf = {"a": adapter, "b": adapter, "c": adapter}
      >>> cache = lora.AdapterCache(lora.AdapterBank.empty(sites, slots=3, rank=2), shelf.get)
      >>> cache.ids(["a", None, "b", "a"]).tolist(), cache.ids(["c", "b"]).tolist()
      ([1, 0, 2, 1], [1, 2])
      >>> sorted(cache.names), cache.hits, cache.misses
      (['b', 'c'], 1, 3)
    """

    def __init__(
        self,
        bank: AdapterBank,
        load: Callable[[str], Adapter | None],
        *,
        policy: Policy = "lru",
        pinned: Collection[str] = (),
    ):
        if policy not in get_args(Policy):
            raise ConfigError(f"policy={policy!r}; choose one of {', '.join(get_args(Policy))}")
        self.bank, self.policy, self.pinned = bank, policy, set(pinned)
        self._check_room(self.pinned)
        self.hits = self.misses = 0
        self._load = load
        self._lock = RLock()
        self._entries: dict[str, _Entry] = {}  # By name, what is given up first in front.
        self._prefetched = Prefetched(load, bank.slots - 1)

    def __enter__(self) -> Self:
        """Keep other threads out, so that nothing changes between `ids` and the use of `bank`."""
        self._lock.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        """Let other threads in again."""
        self._lock.release()

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that are in the bank, what is given up first in front."""
        return tuple(self._entries)

    def ids(self, names: Sequence[str | None]) -> np.ndarray:
        """Slots for the examples of a batch, with every adapter that they need in `bank`.

        Args:
          names: for each example the name of its adapter; None for the base.

        Returns:
          `[batch]` int32, for `lora_jax.route`; take `bank` after this call.

        Raises:
          ConfigError: the batch needs more adapters than there are slots.
          ParameterError: a name has no adapter.
        """
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        with self._lock:
            self._check_room({*wanted, *(name for name in self.pinned if name in self._entries)})
            missing = [name for name in wanted if not self._current(name)]
            self.hits += len(wanted) - len(missing)
            if self.policy == "lru":
                self._entries |= {name: self._entries.pop(name) for name in wanted if name in self._entries}
            for name in missing:
                self.misses += 1
                self._put(name, keep=wanted)
            return np.asarray([0 if name is None else self._entries[name].slot for name in names], np.int32)

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to load adapters that a batch will ask for, in a thread; they enter the bank when one does.

        Never waits. At most as many are kept waiting as the bank has slots beside the base: names beyond that are left
        out, and what waits the longest without a batch that asks for it makes room.
        """
        self._prefetched.ask(name for name in names if not self._current(name))

    def evict(self, name: str) -> None:
        """Empty the slot of an adapter, pinned or not, and forget what was prefetched under its name.

        Raises:
          ParameterError: it is not in the bank, and not on its way there.
        """
        with self._lock:
            coming, entry = self._prefetched.drop(name), self._entries.get(name)
            if entry is not None:
                self.bank = self.bank.evict(entry.slot)
                del self._entries[name]
            elif not coming:
                raise ParameterError(f"{name!r} is not in the bank, which has {listed(self.names) or 'none'}")

    def _current(self, name: str) -> bool:
        entry = self._entries.get(name)
        return entry is not None and not changed(entry.origin)

    def _put(self, name: str, keep: Collection[str]) -> None:
        adapter = self._prefetched.take(name) or loaded(self._load, name)
        slot, given_up = self._room(name, keep)
        self.bank = self.bank.put(slot, adapter.adapter)
        if given_up is not None:
            del self._entries[given_up]
        self._entries[name] = _Entry(slot, adapter.origin)

    def _room(self, name: str, keep: Collection[str]) -> tuple[int, str | None]:
        """A slot for an adapter, and the name of what is there now."""
        if name in self._entries:
            return self._entries[name].slot, name
        free = set(range(1, self.bank.slots)) - {entry.slot for entry in self._entries.values()}
        if free:
            return min(free), None
        given_up = next(each for each in self._entries if each not in self.pinned and each not in keep)
        return self._entries[given_up].slot, given_up

    def _check_room(self, names: Collection[str]) -> None:
        room = self.bank.slots - 1
        if len(names) > room:
            raise ConfigError(
                f"{len(names)} adapters are needed or pinned at once ({listed(sorted(names))}), and the bank has "
                f"{room} slots beside the base: make it larger, or split the batch"
            )
