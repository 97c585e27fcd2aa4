"""Ids of a routed call: which slot of the bank each example, or token, meets, and where these run in the arguments."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.factors import is_traced
from lora_jax.engine.routing.axes import Axes, plain
from lora_jax.engine.routing.router import Router
from lora_jax.engine.sizes import several
from lora_jax.errors import ConfigError, ParameterError, nearest
from lora_jax.many.bank import AdapterBank
from lora_jax.paths import is_array


def check_ids(ids: Any, bank: AdapterBank, tokens: bool) -> tuple[Any, tuple[int, ...]]:
    """What each example meets, as `Routing` has it, and the lengths of the axes of ids; none with a router.

    Raises:
      ParameterError: ids of a wrong shape, dtype or range, or a router for another bank.
    """
    if isinstance(ids, Router):
        _check_router(ids, bank)
        return ids, ()
    return _checked(ids, bank.slots, tokens)


@dataclass(frozen=True, eq=False)
class Arguments:
    """The positional arguments of a routed call.

    Attributes:
      leaves: of the tree of arguments.
      tree: its structure.
      axes: for each leaf what runs along its axes; None where no examples or tokens do.
    """

    leaves: list[Any]
    tree: Any
    axes: list[Axes | None]

    @classmethod
    def of(cls, args: tuple[Any, ...], batch_axes: Any, token_axes: Any, sizes: tuple[int, ...]) -> "Arguments":
        """Find the examples and tokens in the arguments, given the options of `lora_jax.route`.

        Raises:
          ConfigError: the options do not match the arguments.
          ParameterError: an argument has another number of examples or tokens than the ids, whose `sizes` are given.
        """
        leaves, tree = jax.tree.flatten(args)
        places = _places(args, batch_axes, token_axes)
        return cls(leaves, tree, [_axes(leaf, each, sizes) for leaf, each in zip(leaves, places, strict=True)])

    def abstract(self) -> Any:
        """The arguments, with shapes for those that have examples or tokens."""
        pairs = zip(self.leaves, self.axes, strict=True)
        return jax.tree.unflatten(self.tree, [leaf if axes is None else _abstract(leaf) for leaf, axes in pairs])

    def labelled(self) -> list[tuple[Any, Axes]]:
        """The arrays that have examples or tokens, and what runs along their axes."""
        return [(leaf, axes) for leaf, axes in zip(self.leaves, self.axes, strict=True) if axes is not None]


def _check_router(router: Router, bank: AdapterBank) -> None:
    """Refuse a router that is not for the bank."""
    for path, held in bank.items():
        wanted = held.keys_shape
        given = jnp.shape(router.keys[path]) if path in router.keys else f"none; nearest: {nearest(path, router.keys)}"
        if given != wanted:
            raise ParameterError(
                f"At {path!r} the bank needs keys of shape {wanted}, and the router has {given}: make it for this bank"
            )


def _checked(ids: Any, slots: int, tokens: bool) -> tuple[Any, tuple[int, ...]]:
    """Positions along the axis of slots (or their weights), and the lengths of the axes of ids.

    The base, and what is out of range, is past the end of the axis.
    """
    try:
        ids = jnp.asarray(ids)
    except TypeError:
        raise ParameterError(
            f"ids of type {type(ids).__name__}: give slots as integers, weights of slots as floating-point numbers, or "
            "a router, an object of a subclass of lora_jax.routers.Router"
        ) from None
    mixes, rank = jnp.issubdtype(ids.dtype, jnp.floating), 1 + tokens
    if ids.ndim != rank + mixes or (mixes and ids.shape[-1] != slots) or ids.dtype == bool:
        wanted = f"[{', '.join(('batch', 'tokens')[:rank])}]"
        raise ParameterError(
            f"ids of shape {ids.shape} and dtype {ids.dtype}: give slots as integers {wanted}, or weights of all "
            f"{slots} slots as floating-point numbers {wanted[:-1]}, slots]"
            + ("" if tokens else "; for ids of every token say where tokens run, with token_axes")
        )
    if mixes:
        return ids[..., 1:], ids.shape[:-1]
    # In a narrow dtype, numbers of slots may not be.
    known = jnp.clip(ids, 0, 1 << 30) if ids.dtype.itemsize >= 4 and ids.dtype.kind == "u" else ids
    ids = known.astype(jnp.int32)
    inside = (ids >= 0) & (ids < slots)
    if not is_traced(inside) and not bool(inside.all()):
        raise ParameterError(f"ids {sorted({*np.asarray(ids[~inside]).tolist()})} are no slots of a bank of {slots}")
    return jnp.where(inside & (ids > 0), ids - 1, slots - 1), ids.shape


def _places(args: tuple[Any, ...], *given: Any) -> list[tuple[int | None, ...]]:
    """For each leaf of the arguments, which of its axes each axis of the ids is."""
    found = []
    for axes in given:
        prefix = tuple(axes) if isinstance(axes, (tuple, list)) else (axes,) * len(args)
        try:
            found.append(_broadcast(prefix, args))
        except ValueError as error:
            raise ConfigError(
                f"{axes!r} does not match the {len(args)} positional arguments after params: {error}"
            ) from None
    return list(zip(*found, strict=True))


def _broadcast(prefix: Any, tree: Any) -> list[Any]:
    """For each leaf of a tree the leaf of a prefix of it, which may be None; arguments that are None have no leaves."""
    found: list[Any] = []

    def repeat(axis: Any, part: Any) -> None:
        found.extend([axis] * len(jax.tree.leaves(part)))

    jax.tree.map(repeat, prefix, tree, is_leaf=lambda node: node is None)
    return found


def _axes(leaf: Any, places: tuple[int | None, ...], sizes: tuple[int, ...]) -> Axes | None:
    """What runs along the axes of an argument; None if nothing labelled does, or it is no array."""
    if not is_array(leaf) or not leaf.shape or all(place is None for place in places[: len(sizes)]):
        return None
    axes = list(map(plain, leaf.shape))
    for label, (place, size) in enumerate(zip(places, sizes, strict=False)):
        if place is None:
            continue
        if not -leaf.ndim <= place < leaf.ndim or leaf.shape[place] != size:
            what, option = (("examples", "batch_axes"), ("tokens", "token_axes"))[label]
            raise ParameterError(
                f"ids have {size} {what}, but an argument of shape {leaf.shape} is said to have them along axis "
                f"{place}: set {option}, with None for arguments without them"
            )
        axes[place] = ((label, size),) if several(size) else ()
    return tuple(axes)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    kind = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=getattr(kind, "weak_type", False))
