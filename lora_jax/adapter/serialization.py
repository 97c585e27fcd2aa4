"""Adapters in what JAX and Flax write themselves: programs of `jax.export`, and the bytes of `flax.serialization`."""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from typing import Any, cast

import jax
import jax.export

from lora_jax.adapter.site import Site
from lora_jax.errors import CheckpointError, listed

_SITE = "site of a parameter"


def exportable(cls: type, build: Callable[..., Any] | None = None) -> None:
    """Let `jax.export` write programs that have a class of ours among their arguments or results.

    Args:
      cls: a registered pytree whose static part is made of numbers, strings, tuples and sites.
      build: makes an instance of the static part and the children; None for what JAX's own registration does.
    """
    with suppress(ValueError):  # The name is taken: the class was defined again, as in a notebook.
        jax.export.register_pytree_node_serialization(
            cls,
            serialized_name=f"{cls.__module__}.{cls.__qualname__}",
            serialize_auxdata=lambda static: json.dumps(_plain(static)).encode(),
            deserialize_auxdata=lambda data: _static(json.loads(data)),
            from_children=build,
        )


def exportable_dataclass(cls: type, static: tuple[str, ...]) -> None:
    """`exportable` for a class that is registered by `jax.tree_util.register_dataclass`."""
    names = [field.name for field in fields(cast(Any, cls)) if field.name not in static]

    def build(aux_data: Any, children: Any) -> Any:
        instance = object.__new__(cls)  # Without its checks: JAX puts placeholders in the place of arrays.
        for name, value in [*zip(names, children, strict=True), *zip(static, aux_data, strict=True)]:
            object.__setattr__(instance, name, value)
        return instance

    exportable(cls, build)


def _plain(value: Any) -> Any:
    if isinstance(value, Site):
        return {_SITE: asdict(value)}
    return [_plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def _static(value: Any) -> Any:
    if isinstance(value, dict):
        return Site(**{name: _static(each) for name, each in value[_SITE].items()})
    return tuple(_static(each) for each in value) if isinstance(value, list) else value


def known_to_flax(cls: type) -> None:
    """Register `Adapter` with `flax.serialization`, if the program has imported that; called for every adapter made."""
    serialization = sys.modules.get("flax.serialization")
    if serialization is not None and cls not in _KNOWN:
        _KNOWN.add(cls)
        serialization.register_serialization_state(cls, _to_state, _from_state, override=True)


_KNOWN: set[type] = set()


def _children(update: Any) -> dict[str, Any]:
    """What an update holds by field, whatever JAX has put in the place of arrays."""
    entries, _ = jax.tree_util.tree_flatten_with_path(update, is_leaf=lambda node: node is not update)
    return {cast(Any, keys[0]).name: child for keys, child in entries if child is not None}


def _to_state(adapter: Any) -> dict[str, Any]:
    written = cast(Any, sys.modules["flax.serialization"]).to_state_dict
    updates = {path: written(_children(update)) for path, update in adapter.items()}
    return {"updates": updates, "checksum": written(adapter.checksum)}


def _from_state(adapter: Any, state: Mapping[str, Any]) -> Any:
    """The adapter with the arrays of a state; paths and fields must be the same, as Flax has it for dictionaries."""
    read = cast(Any, sys.modules["flax.serialization"]).from_state_dict
    _check_names("adapted parameters", set(adapter), set(state["updates"]))
    updates = {}
    for path, update in adapter.items():
        children = _children(update)
        _check_names(f"arrays at {path!r}", set(children), set(state["updates"][path]))
        updates[path] = replace(update, **read(children, state["updates"][path], name=path))
    return type(adapter)(updates, read(adapter.checksum, state["checksum"], name="checksum"))


def _check_names(what: str, target: set[str], given: set[str]) -> None:
    if target != given:
        raise CheckpointError(
            f"The bytes hold an adapter of another form: of its {what}, {listed(sorted(given - target)) or 'none'} are "
            f"not in the target, and {listed(sorted(target - given)) or 'none'} only there. Give from_bytes an adapter "
            "made with the config of the one that was written."
        )
