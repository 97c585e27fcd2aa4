"""Adapter: the pytree of everything that trains, one update per adapted parameter."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapter.checksum import checksum
from lora_jax.adapter.serialization import exportable, known_to_flax
from lora_jax.adapter.stack import check_alike, lanes_of
from lora_jax.adapter.updates import Update, map_updates
from lora_jax.errors import MatchError, ParameterError, nearest
from lora_jax.paths import inside, pattern_hits
from lora_jax.report.report import Printed
from lora_jax.report.tables import Table


@jax.tree_util.register_pytree_with_keys_class
class Adapter(Printed, Mapping[str, Update]):
    """A read-only mapping from parameter path to update, and a pytree of their arrays.

    Everything that works on trees works on it: `jax.tree.map`, `jax.vmap` over stacked adapters, optax,
    Orbax, `jax.device_put`. Facts that shape the compiled program (paths, axes, dropout rates) are in its
    tree structure; everything else, the scales included, is an array, so a swapped adapter of the same
    shapes never recompiles. Beside the updates the tree has one leaf more, `checksum`: a sum over what does not train,
    by which `merge`, `save`, `summary` and `explain` see whether an optimizer moved it.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
      >>> fn = lambda params, x: x @ params["dense"]["kernel"]
      >>> sites = lora.find_sites(fn, params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="dense"), params, sites)
      >>> list(adapter), adapter["dense/kernel"].a.shape
      (['dense/kernel'], (2, 4))
    """

    def __init__(self, updates: Mapping[str, Update], checksum_of_frozen: Any = None):
        known_to_flax(Adapter)
        self._updates = dict(sorted(updates.items()))
        self.checksum = checksum(self._updates) if checksum_of_frozen is None else checksum_of_frozen
        """Of each update what is frozen, squared and summed, `[updates]`; computed if not given."""

    def __getitem__(self, path: str) -> Update:
        try:
            return self._updates[path]
        except KeyError:
            raise KeyError(f"{path!r} is not adapted; nearest adapted paths: {nearest(path, self)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._updates)

    def __len__(self) -> int:
        return len(self._updates)

    def __contains__(self, path: object) -> bool:
        return path in self._updates

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        """Identity: array contents are compared with `jax.tree.map`, as on any tree."""
        return self is other

    def without(self, *paths: str) -> "Adapter":
        """The adapter with the given paths left out.

        Raises:
          ParameterError: a path is not adapted.
        """
        for path in paths:
            if path not in self._updates:
                raise ParameterError(f"{path!r} is not adapted; nearest adapted paths: {nearest(path, self)}")
        return Adapter({path: update for path, update in self.items() if path not in paths})

    @classmethod
    def stack(cls, adapters: Sequence["Adapter"]) -> "Adapter":
        """Several adapters of one form in one tree, to be trained in one step, as a sweep or a population is.

        Every array gets an axis in front, for `jax.vmap`. Each adapter is a lane along it; their optimizers are those
        of `lora_jax.optim.lanes`. Values of arrays may differ from lane to lane: factors, and scales, so `alpha` too.

        Args:
          adapters: of the same paths, methods, ranks, dropout rates, shapes and dtypes.

        Returns:
          The stack; `unstack` takes it apart.

        Raises:
          ParameterError: there is no adapter, or two differ in form; the message names the first path where they do.

        Example:
          >>> import jax, jax.numpy as jnp, lora_jax as lora
          >>> params = {"w": jnp.ones((4, 3))}
          >>> fn, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
          >>> sites = lora.find_sites(fn, params, x)
          >>> config = lora.LoraConfig(rank=2, targets="w")
          >>> seeds = [lora.init(jax.random.key(seed), config, params, sites) for seed in range(5)]
          >>> stacked = lora.Adapter.stack(seeds)
          >>> stacked["w"].a.shape
          (5, 2, 4)
          >>> jax.vmap(lora.adapt(fn), in_axes=(None, 0, None))(params, stacked, x).shape
          (5, 2, 3)
          >>> len(stacked.unstack())
          5
        """
        check_alike(adapters)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)

    def unstack(self) -> list["Adapter"]:
        """The adapters in a stack, bit for bit as they are in it.

        Raises:
          ParameterError: the adapter is not a stack.
        """
        lanes_of(self)
        leaves, structure = jax.tree.flatten(self)
        return [jax.tree.unflatten(structure, lane) for lane in zip(*map(jnp.unstack, leaves), strict=True)]

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        """The updates with their paths as keys, and the checksum, as JAX asks of a pytree."""
        children: list[tuple[Any, Any]] = [(jax.tree_util.DictKey(path), update) for path, update in self.items()]
        return [*children, (jax.tree_util.GetAttrKey("checksum"), self.checksum)], tuple(self._updates)

    @classmethod
    def tree_unflatten(cls, paths: tuple[str, ...], children: Any) -> "Adapter":
        """Inverse of the flattening; the children may be anything JAX puts in their place."""
        known_to_flax(Adapter)
        adapter = object.__new__(cls)
        *updates, adapter.checksum = children
        adapter._updates = dict(zip(paths, updates, strict=True))
        return adapter

    def table(self) -> Table:
        """A row for every parameter."""
        rows = [
            (path, type(update).__name__, "  ".join(map(_spelled, leaves_by_name(update))))
            for path, update in self.items()
        ]
        return Table(("path", "update", "leaves"), rows, words=(1, 2))


exportable(Adapter)


def _spelled(named: tuple[str, Any]) -> str:
    """A leaf as `a float32[8,64]`, or as it prints itself if it is no array (a mask, say)."""
    name, leaf = named
    shape = getattr(leaf, "shape", None)
    return f"{name} {leaf}" if shape is None else f"{name} {leaf.dtype}[{','.join(map(str, shape))}]"


def leaves_by_name(update: Any) -> list[tuple[str, Any]]:
    """The leaves of an update with the names of their fields."""
    entries, _ = jax.tree_util.tree_flatten_with_path(update)
    return [(jax.tree_util.keystr(keys, simple=True), leaf) for keys, leaf in entries]


def trainable(tree: Any) -> Any:
    """Mark what trains: a tree like `tree` with True on the trained leaves of adapters, False elsewhere.

    Args:
      tree: an `Adapter`, or any tree that contains some, such as `{"params": base, "lora": adapter}`.

    Returns:
      A tree of the same structure, with booleans for leaves. This is the mask for `optax.masked` and
      friends; `lora_jax.optimizer` applies it for you.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> lora.trainable({"params": params, "lora": adapter})["params"]
      {'w': False}
      >>> jax.tree.leaves(lora.trainable(adapter["w"]))  # a, b and the frozen scale
      [True, True, False]
    """
    return map_updates(lambda update: update.trains(), tree, lambda leaf: False)


def scale(adapter: Adapter, factor: Any, where: str | Collection[str] | None = None) -> Adapter:
    """Multiply the effect of an adapter by `factor`, without recompiling anything that uses it.

    Args:
      adapter: the adapter.
      factor: a number or a scalar array, traced ones too; 0 gives the base model, 1 leaves the adapter as it is. Or
        a mapping from patterns to such factors; what no pattern hits stays as it is.
      where: patterns of what to scale; None for all. A pattern is the name of a module with all in it, as in
        `LoraConfig.train` (`block_0`), or a regex for the end of a module's path, as in `rank_pattern`.

    Returns:
      A new adapter that shares the factors and has the scales multiplied.

    Raises:
      MatchError: a pattern hits nothing that is adapted, or two of a mapping hit the same.
      TypeError: a parameter that is to be scaled is trained in full, and has no scale.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"up": jnp.ones((4, 3)), "down": jnp.ones((3, 4))}
      >>> fn = lambda p, x: x @ p["up"] @ p["down"]
      >>> sites = lora.find_sites(fn, params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets=("up", "down")), params, sites)
      >>> float(adapter["up"].scale), float(lora.scale(adapter, 0.5)["up"].scale)
      (2.0, 1.0)
      >>> weaker = lora.scale(adapter, {"down": 0.5})
      >>> float(weaker["up"].scale), float(weaker["down"].scale)
      (2.0, 1.0)
    """
    patterns = factor if isinstance(factor, Mapping) else {each: factor for each in _patterns(where)}
    if isinstance(factor, Mapping) and where is not None:
        raise ParameterError(f"where={where!r} beside a mapping of patterns {list(factor)}: give one of both")
    if where is None and not isinstance(factor, Mapping):
        return Adapter({path: update.scaled(factor) for path, update in adapter.items()})
    hit = _hit(patterns, adapter, twice=not isinstance(factor, Mapping))
    return Adapter({path: each.scaled(patterns[hit[path]]) if path in hit else each for path, each in adapter.items()})


def _patterns(where: str | Collection[str] | None) -> tuple[str, ...]:
    return (where,) if isinstance(where, str) else tuple(where or ())


def _hit(patterns: Iterable[str], adapter: Adapter, *, twice: bool) -> dict[str, str]:
    """The pattern that hits each path; `twice` says whether several may, as all mean the same."""
    found: dict[str, str] = {}
    for pattern in patterns:
        paths = [path for path in adapter if inside(pattern, path) or pattern_hits(pattern, path)]
        if not paths:
            raise MatchError(f"scale: {pattern!r} hits nothing that is adapted; nearest: {nearest(pattern, adapter)}")
        both = [path for path in paths if path in found]
        if both and not twice:
            raise MatchError(f"scale: {found[both[0]]!r} and {pattern!r} both hit {both[0]!r}: name it in one of them")
        found |= dict.fromkeys(paths, pattern)
    return found
