"""The manifest: what our checkpoints say about an adapter beside its arrays (updates, sites, config, base), as JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import jax

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.base import spell
from lora_jax.adapter.registry import METHODS
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, Replace, Update
from lora_jax.config.config import LoraConfig
from lora_jax.errors import CheckpointError
from lora_jax.io.own.base import unspelled
from lora_jax.typed import converted_fields

FORMAT = 1
"""Version of what `describe` returns; to be raised whenever an older lora_jax could not read the new one."""


def describe(adapter: Adapter, config: LoraConfig | None, base: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about an adapter that is no array; of its base what `own/base.py` says."""
    return {
        "format": FORMAT,
        "version": _version(),
        "config": None if config is None else asdict(config),
        "updates": {path: {"type": _type(path, update), **_statics(update)} for path, update in adapter.items()},
        "arrays": {
            path: {field: spell(leaf) for field, leaf in arrays(update).items()} for path, update in adapter.items()
        },
        **base,
    }


def stored(notes: Mapping[str, Any]) -> dict[str, dict[str, jax.ShapeDtypeStruct]] | None:
    """Shapes and dtypes of every update's arrays by field; None where a checkpoint is older than this record."""
    found = notes.get("arrays")
    if found is None:
        return None
    return {path: {field: unspelled(text) for field, text in fields.items()} for path, fields in found.items()}


def assemble(notes: Mapping[str, Any], leaves: Mapping[str, Mapping[str, Any]]) -> Adapter:
    """Inverse of `describe` and `arrays`: the adapter with the given leaves, by path and field."""
    return Adapter({path: _update(entry, leaves[path]) for path, entry in notes["updates"].items()})


def arrays(update: Update) -> dict[str, Any]:
    """The arrays of an update by field."""
    entries, _ = jax.tree_util.tree_flatten_with_path(update)
    return {jax.tree_util.keystr(keys, simple=True): leaf for keys, leaf in entries}


def check_sites(where: str, adapter: Adapter) -> None:
    """Refuse arrays that are not of the shapes that the sites beside them have.

    Raises:
      CheckpointError: an update is another parameter's, or its arrays have other axes.
    """
    for path, update in adapter.items():
        site, wanted = update.site, {}
        if site.path != path:
            raise CheckpointError(f"{where}: {path!r} has the site of {site.path!r}: the metadata is damaged")
        if isinstance(update, LowRank):
            rank = update.a.shape[len(site.batch_shape)]
            wanted = {"a": site.a_shape(rank), "b": site.b_shape(rank)}
        elif isinstance(update, Replace):
            wanted = {"value": site.shape}
        for field, shape in wanted.items():
            if getattr(update, field).shape != shape:
                raise CheckpointError(
                    f"{where}: {field} of {path!r} has shape {getattr(update, field).shape}, and its site, of shape "
                    f"{site.shape}, needs {shape}: the metadata is damaged. Copy it again from where it was saved."
                )


def check_format(where: str, notes: Any) -> None:
    """Refuse metadata that is missing, garbled, or from a newer version.

    Raises:
      CheckpointError: it is.
    """
    if not isinstance(notes, Mapping) or not {"format", "updates", "config", "base"} <= notes.keys():
        raise CheckpointError(
            f"{where} is a checkpoint without the metadata of an adapter: it was not written by lora_jax.save (a "
            "model's parameters, a training state, or another library's adapter such as qwix's), or its file "
            "_CHECKPOINT_METADATA is damaged. Copy it again, or save the adapter again; of another library's, read the "
            "arrays with Orbax and build lora_jax.Adapter of them."
        )
    if notes["format"] != FORMAT:
        raise CheckpointError(
            f"{where} has format {notes['format']!r}, written by lora_jax {notes.get('version')}; this is lora_jax "
            f"{_version()}, which reads format {FORMAT}. Install the version that wrote it, or a newer one."
        )


def _statics(update: Update) -> dict[str, Any]:
    names = {field.name for field in fields(cast(Any, update))} - set(arrays(update))
    values = {name: getattr(update, name) for name in sorted(names)}
    return {name: asdict(value) if isinstance(value, Site) else value for name, value in values.items()}


def _update(entry: Mapping[str, Any], leaves: Mapping[str, Any]) -> Update:
    kind = _kinds()[entry["type"]]
    statics = converted_fields({name: value for name, value in entry.items() if name != "type"}, kind)
    return kind(**leaves, **statics)


def _type(path: str, update: Update) -> str:
    """The name of an update's class, by which it is found again."""
    kind = type(update)
    found = _kinds()[kind.__name__]
    if (found.__module__, found.__qualname__) != (kind.__module__, kind.__qualname__):
        raise CheckpointError(
            f"{path} is of the class {kind.__module__}.{kind.__qualname__}, and {found.__module__} has another kind of "
            f"update named {kind.__name__}, which is what would be loaded: give one of them another name"
        )
    return kind.__name__


def _kinds() -> dict[str, Any]:
    """Every kind of update by name, so that a new one needs no entry here; of two with one name the last."""
    import_module(METHODS.home)  # A kind of update is known once its class is.
    return {kind.__name__: kind for kind in _below(Update)}


def _below(kind: Any) -> Iterator[Any]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def _version() -> str:
    try:
        return version("lora_jax")
    except PackageNotFoundError:
        return "(not installed)"
