"""AdapterCache: which adapters of a larger collection are in a bank, by name, on the host's side."""

from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, get_args

import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.errors import ConfigError, ParameterError, listed
from lora_jax.many.bank import AdapterBank

Policy = Literal["lru", "fifo"]


class AdapterCache:
    """Adapters by name, loaded into the slots of a bank when a batch needs them.

    A batch asks with `ids`; what is missing is loaded, in place of what the policy gives up. The arrays keep their
    shapes, so that nothing is compiled for any of it.

    Args:
      bank: where adapters go; its slots are the cache's from now on, and it is not to be used elsewhere.
      load: gives the adapter of a name: `lora.load`, a look-up in a dictionary, or what you like. May run in a thread.
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
        self._slots: dict[str, int] = {}  # By name, what is given up first in front.
        self._coming: dict[str, Future[Adapter]] = {}
        self._thread = ThreadPoolExecutor(1, "lora-prefetch")

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that are in the bank, what is given up first in front."""
        return tuple(self._slots)

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
        self._check_room({*wanted, *(name for name in self.pinned if name in self._slots)})
        for name in wanted:
            if name in self._slots:
                self.hits += 1
                if self.policy == "lru":
                    self._slots[name] = self._slots.pop(name)
        for name in wanted:
            if name not in self._slots:
                self.misses += 1
                self._put(name, keep=wanted)
        return np.asarray([0 if name is None else self._slots[name] for name in names], np.int32)

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to load adapters that a batch will ask for, in a thread; they enter the bank when one does."""
        for name in names:
            if name not in self._slots and name not in self._coming:
                self._coming[name] = self._thread.submit(self._found, name)

    def evict(self, name: str) -> None:
        """Empty the slot of an adapter, pinned or not.

        Raises:
          ParameterError: it is not in the bank.
        """
        if name not in self._slots:
            raise ParameterError(f"{name!r} is not in the bank, which has {listed(self.names) or 'none'}")
        self.bank = self.bank.evict(self._slots.pop(name))

    def _put(self, name: str, keep: Collection[str]) -> None:
        coming = self._coming.pop(name, None)
        adapter = self._found(name) if coming is None else coming.result()
        free = set(range(1, self.bank.slots)) - {*self._slots.values()}
        given_up = None if free else next(each for each in self._slots if each not in self.pinned and each not in keep)
        slot = min(free) if given_up is None else self._slots[given_up]
        self.bank = self.bank.put(slot, adapter)
        if given_up is not None:
            del self._slots[given_up]
        self._slots[name] = slot

    def _found(self, name: str) -> Adapter:
        adapter = self._load(name)
        if adapter is None:
            raise ParameterError(f"There is no adapter {name!r}")
        return adapter

    def _check_room(self, names: Collection[str]) -> None:
        room = self.bank.slots - 1
        if len(names) > room:
            raise ConfigError(
                f"{len(names)} adapters are needed or pinned at once ({listed(sorted(names))}), and the bank has "
                f"{room} slots beside the base: make it larger, or split the batch"
            )
