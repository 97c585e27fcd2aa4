"""AdapterBank: many adapters of one base in a fixed number of slots, in arrays that never change their shapes."""

from collections.abc import ItemsView, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.factors import Array, is_traced
from lora_jax.adapter.serialization import exportable
from lora_jax.adapter.site import Site, Sites
from lora_jax.errors import ConfigError, ParameterError, nearest
from lora_jax.many.parcels import Parcel, blank, parcel, written
from lora_jax.many.slots import Slots, check_finite, check_fits, empty, factors, stacked, taken
from lora_jax.report.report import Printed
from lora_jax.report.tables import Table, times


@jax.tree_util.register_pytree_with_keys_class
class AdapterBank(Printed):
    """The factors of all slots by parameter path, and a pytree of their arrays.

    Slot 0 is the base and stays empty. The other slots hold adapters of any targets and of any rank up to the bank's.
    Arrays have the same shapes whatever the slots hold, so that a program that uses a bank is compiled once:
    `lora_jax.route` makes such programs.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> bank = lora.AdapterBank.empty(sites, slots=8, rank=4)
      >>> bank = bank.put(3, adapter)
      >>> bank.slots, bank.rank, bank["w"].a.shape
      (8, 4, (7, 4, 4))

    References:
      Sheng et al., S-LoRA, arXiv 2311.03285. Chen et al., Punica, arXiv 2310.18547.
    """

    def __init__(self, updates: Mapping[str, Slots]):
        self._held = dict(sorted(updates.items()))

    @classmethod
    def empty(
        cls, sites: Sites | Sequence[Site], slots: int, rank: int, *, gains: bool = False, dtype: Any = jnp.float32
    ) -> "AdapterBank":
        """A bank whose every slot is the base.

        Args:
          sites: the parameters that adapters may adapt: a selection of what `find_sites` found.
          slots: number of slots, the base's included.
          rank: the highest rank of an adapter.
          gains: whether there is room for DoRA's gains.
          dtype: of the factors.

        Raises:
          ConfigError: there is no room for an adapter.
        """
        if slots < 2 or rank < 1:
            raise ConfigError(
                f"slots={slots}, rank={rank}: slot 0 is the base, so at least 2 slots and rank 1 are needed"
            )
        found = sites.values() if isinstance(sites, Mapping) else sites
        return cls({site.path: empty(site, slots, rank, gains, dtype) for site in found})

    @classmethod
    def of(cls, adapters: Sequence[Adapter], *, slots: int | None = None, rank: int | None = None) -> "AdapterBank":
        """A bank with the given adapters in slots 1, 2, ...; differentiable in their factors.

        Args:
          adapters: the adapters, of any targets and ranks.
          slots: number of slots, the base's included; as many as needed if not given.
          rank: the bank's; the highest of the adapters' if not given.

        Raises:
          ConfigError: the adapters do not fit.
          ParameterError: an adapter holds something that is no low-rank change, or numbers that are not finite (where
            they can be seen: outside of a compiled function), or two disagree about a parameter.
        """
        slots = len(adapters) + 1 if slots is None else slots
        parts = [{path: factors(path, update) for path, update in adapter.items()} for adapter in adapters]
        for slot, part in enumerate(parts, 1):
            for path, found in part.items():
                check_finite(path, (found.a, found.b, found.gain), f" in the adapter of slot {slot}")
        sites = common_sites(adapters)
        ranks = {path: max(part[path].rank for part in parts if path in part) for path in sites}
        if slots <= len(adapters) or (rank is not None and rank < max(ranks.values(), default=0)):
            raise ConfigError(
                f"{len(adapters)} adapters of ranks up to {max(ranks.values(), default=0)} do not fit into "
                f"slots={slots} (slot 0 is the base) of rank={rank}"
            )
        return cls({
            path: stacked(site, [part.get(path) for part in parts], slots, rank or ranks[path])
            for path, site in sites.items()
        })  # fmt: skip

    @property
    def slots(self) -> int:
        """Number of slots, the base's included."""
        return max((held.count for _, held in self.items()), default=1)

    @property
    def rank(self) -> int:
        """The highest rank that a slot can hold."""
        return max((held.rank for _, held in self.items()), default=0)

    @property
    def broken(self) -> Array | None:
        """`[slots - 1]`: which slots were given numbers that are not finite; None where nobody looked."""
        flags = [held.broken for _, held in self.items() if held.broken is not None]
        return jnp.isnan(jnp.stack(flags)).any(0) if flags else None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def put(self, slot: int | Array, adapter: Adapter) -> "AdapterBank":
        """The bank with an adapter in a slot; nothing is compiled for it, whatever its rank and targets.

        The arrays are written in place: the bank that this is called on cannot be used any more. What is sent to the
        device is what the adapter holds, in the bank's dtype; the rest of the slot becomes zeros there.

        Args:
          slot: 1 or higher. Traced, a slot that there is not is left alone.
          adapter: of any targets and rank that the bank has room for. Dropout plays no part in a bank, and aLoRA's
            invocation tokens none either: give `lora_jax.route` the ids of `lora_jax.methods.invoked`.

        Raises:
          ParameterError: there is no such slot, the bank has no room for what the adapter holds, or that is not finite.
        """
        self._check_slot(slot)
        for path in adapter:
            if path not in self:
                raise ParameterError(f"The bank has no room at {path!r}; nearest: {nearest(path, self)}")
        parcels = _blanks(self)
        parcels |= {path: parcel(self[path], update, parcels[path]) for path, update in adapter.items()}
        return _write(self, jnp.asarray(slot, jnp.int32) - 1, parcels, not is_traced(slot))

    def evict(self, slot: int | Array) -> "AdapterBank":
        """The bank with a slot that is the base again; as with `put`, use what is returned."""
        return self.put(slot, Adapter({}))

    def get(self, slot: int) -> Adapter:
        """The adapter in a slot: plain factors of the bank's rank, with a scale of one.

        Raises:
          ParameterError: there is no such slot, or it has a gain, which plain factors cannot hold.
        """
        self._check_slot(slot)
        return Adapter({path: taken(path, held, slot) for path, held in self.items()})

    def _check_slot(self, slot: Any) -> None:
        if not is_traced(slot) and not 1 <= int(slot) < self.slots:
            raise ParameterError(f"slot={slot}, but this bank has slots 1 to {self.slots - 1}; slot 0 is the base")

    def items(self) -> ItemsView[str, Slots]:
        """Paths and what the bank holds there."""
        return self._held.items()

    def __getitem__(self, path: str) -> Slots:
        try:
            return self._held[path]
        except KeyError:
            raise KeyError(f"{path!r} is not in the bank; nearest: {nearest(path, self)}") from None

    def __contains__(self, path: object) -> bool:
        return path in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        """Identity: array contents are compared with `jax.tree.map`, as on any tree."""
        return self is other

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Slots]], tuple[str, ...]]:
        """The slots with their paths as keys, as JAX asks of a pytree."""
        return [(jax.tree_util.DictKey(path), held) for path, held in self._held.items()], tuple(self._held)

    @classmethod
    def tree_unflatten(cls, paths: tuple[str, ...], held: Any) -> "AdapterBank":
        """Inverse of the flattening; what is held may be anything JAX puts in its place."""
        bank = object.__new__(cls)
        bank._held = dict(zip(paths, held, strict=True))
        return bank

    def table(self) -> Table:
        """A row for every parameter."""
        headers = ("path", "slots", "rank", "a", "b", "gain")
        rows = []
        for path, held in self.items():
            gain = "" if held.gain is None else times(held.gain.shape)
            rows.append((path, str(held.count), str(held.rank), times(held.a.shape), times(held.b.shape), gain))
        return Table(headers, rows)


exportable(AdapterBank)


def common_sites(adapters: Sequence[Adapter]) -> dict[str, Site]:
    """The parameters that adapters adapt, by path; two must agree about one."""
    sites: dict[str, Site] = {}
    for adapter in adapters:
        for path, update in adapter.items():
            check_fits(sites.setdefault(path, update.site), update.site)
    return sites


def _blanks(bank: AdapterBank) -> dict[str, Parcel]:
    """The parcels of the base, of which parameters of the same shapes share one."""
    kinds = {
        path: (len(held.site.batch_axes), *map(jax.typeof, jax.tree.leaves((held.a, held.b, held.gain))))
        for path, held in bank.items()
    }
    kept = {kinds[path]: held for path, held in bank.items()}
    parcels = dict(zip(kept, _blank(list(kept.values())), strict=True))
    return {path: parcels[kind] for path, kind in kinds.items()}


@jax.jit
def _blank(each: Sequence[Slots]) -> list[Parcel]:
    return [blank(held) for held in each]


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(bank: AdapterBank, slot: Array, parcels: Mapping[str, Parcel], sure: bool) -> AdapterBank:
    return AdapterBank({path: written(held, slot, parcels[path], sure=sure) for path, held in bank.items()})
