"""`lora_jax.save` and `load`: adapter checkpoints through Orbax, with enough to know what they belong to.

The directory is an ordinary Orbax checkpoint: a tree `{path: {field: array}}`, and under `lora_jax` in its custom
metadata everything that is no array. It appears at its path whole: a save that is cut short leaves what was there.

An `Adapter` is a plain pytree too: to resume training exactly, save it together with the optimizer's state through
`ocp.training.Checkpointer` or `CheckpointManager`, with the freshly made state as the abstract tree to restore into.
"""

import json
from collections.abc import Callable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.base import check_choice, check_values
from lora_jax.adapter.by_path import check_parameters
from lora_jax.adapter.checksum import warn_if_moved
from lora_jax.adapter.origin import note
from lora_jax.adapter.sharding import checksum_place
from lora_jax.config.config import LoraConfig
from lora_jax.errors import CheckpointError, LoraError, listed
from lora_jax.io.formats.recognise import OWN, refuse_as_own
from lora_jax.io.own import manifest
from lora_jax.io.own.base import (
    adapted_shapes,
    base_shapes,
    check_shapes,
    describe_base,
    describe_recorded,
    recorded_values,
)
from lora_jax.io.own.stored import check_stored
from lora_jax.io.own.write import TURNS, plain_name, write
from lora_jax.io.own.write import guarded as _guarded_writing
from lora_jax.paths import named_leaves
from lora_jax.processes import gathered
from lora_jax.publish import place, steady
from lora_jax.regular import check_regular

_KEY = "lora_jax"
_Result = TypeVar("_Result")
_BROKEN = (ValueError, TypeError, LookupError, AttributeError, OSError, RuntimeError)


def save(
    path: str | PathLike[str],
    adapter: Adapter,
    *,
    config: LoraConfig | None = None,
    params: Any = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter, and nothing of the base, to a directory.

    Arrays are kept bit for bit, bfloat16 and sharded ones included. Every process of a multi-host program must call it:
    the first one writes, once all have sent it their parts.

    Differs from PEFT, which needs `adapter_config.json` and the base model to make sense of the arrays: here the
    checkpoint says by itself what it holds.

    Args:
      path: the directory to create, or a link to it; on remote storage anything that `epath` understands, such as
        `gs://bucket/adapter`.
      adapter: what to save.
      config: the config it was made with, to be read back by `load_config`.
      params: the base's parameters (arrays or `jax.ShapeDtypeStruct`). Paths, shapes and dtypes of all of them are
        recorded, and checked when the adapter is loaded for a base. Without it, those of adapted parameters are.
      overwrite: replace an adapter that is there already, in one step: at every moment the old one or the new one is
        there. Anything else found at `path`, or in it, is never deleted. Not on remote storage, which has no such step.

    Raises:
      CheckpointError: `path` exists, it cannot be written, what was written does not read back, or the adapter is
        empty.
      ParameterError: the adapter does not fit `params`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, tempfile
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> lora.save(folder, adapter, params=params)
      >>> bool((lora.load(folder, params)["w"].a == adapter["w"].a).all())
      True
    """
    if params is not None:
        check_parameters(adapter, named_leaves(params)[0])
    warn_if_moved([adapter])
    _save(path, adapter, config, describe_base(params), overwrite)


def save_recorded(
    path: str | PathLike[str],
    adapter: Adapter,
    shapes: Mapping[str, jax.ShapeDtypeStruct] | None,
    values: Mapping[str, float],
) -> None:
    """Write an adapter for a base that is not at hand, with what other files say of it.

    Args:
      path: the directory to create.
      adapter: what to save.
      shapes: shapes and dtypes of all of the base's parameters by path, if they are known.
      values: samples of the base's values, as `load_samples` gives them.

    Raises:
      CheckpointError: as for `save`.
    """
    _save(path, adapter, None, describe_recorded(shapes, values), overwrite=False)


def _save(
    path: str | PathLike[str], adapter: Adapter, config: LoraConfig | None, base: Mapping[str, Any], overwrite: bool
) -> None:
    where = _resolve(path)
    if not adapter:
        raise CheckpointError(f"Nothing to save at {where}: the adapter is empty")
    arrays = {name: {field: _array(leaf) for field, leaf in manifest.arrays(adapter[name]).items()} for name in adapter}
    arrays = gathered(arrays)
    if bad := _not_finite(arrays):
        raise CheckpointError(
            f"{listed(bad)} of the adapter holds NaN or infinity, so nothing is written to {where}: the training "
            "diverged. Save an earlier state."
        )
    notes: Any = {_KEY: manifest.describe(adapter, config, base)}
    if _is_remote(path):
        _check_new(where)
        _guarded_writing(where, lambda: ocp.save(where, arrays, custom_metadata=notes))
    else:
        write(place(path), arrays, notes, replace=_check_replaceable if overwrite else None)


def load(
    path: str | PathLike[str],
    params: Any = None,
    *,
    base: Literal["same", "any"] = "same",
    sharding: Sharding | Callable[[Adapter], Any] | None = None,
) -> Adapter:
    """Read an adapter back; nothing else is needed.

    Args:
      path: the directory that `save` wrote.
      params: the base's parameters (arrays or `jax.ShapeDtypeStruct`), to make sure that they are the ones the
        adapter was trained on: their paths, shapes and dtypes, and of arrays also samples of the values, if `save` was
        given `params`. None skips the check.
      base: `"any"` takes parameters with other values, such as those of another revision of the model.
      sharding: where to put the arrays: one sharding for all, or a function from the abstract adapter (with
        `jax.ShapeDtypeStruct` leaves) to a tree of shardings, or a prefix of one. By default they are
        uncommitted, like freshly made arrays, and follow whatever they are used with.

    Returns:
      The adapter, bit for bit.

    Raises:
      CheckpointError: there is no adapter at `path`, it is damaged or from a newer lora_jax, or it belongs to
        another base, in which case the message names the parameters that differ, or is merged into it already.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, tempfile
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> lora.save(folder, adapter)
      >>> try:
      ...     lora.load(folder, {"w": jnp.ones((4, 7))})
      ... except lora.CheckpointError as error:
      ...     print("w is float32[4,7], not float32[4,3]" in str(error))
      True
    """
    return _steadily(path, lambda where, shown: _load(where, shown, params, base, sharding))


def _load(where: Any, shown: str, params: Any, base: str, sharding: Any) -> Adapter:
    check_choice(base)
    note(shown)
    notes = _read(where, shown)
    if params is not None:
        _guarded(shown, check_shapes, shown, notes, params)
    adapter = _with_arrays(where, shown, notes, sharding)
    if params is not None:
        leaves, _ = named_leaves(params)
        check_parameters(adapter, leaves)
        if base == "same":
            recorded = _guarded(shown, recorded_values, notes)
            _guarded(shown, check_values, shown, recorded, leaves, adapter)
    return adapter


def _with_arrays(where: Any, shown: str, notes: Any, sharding: Any) -> Adapter:
    abstract = _guarded(shown, _abstract, where, notes)
    _guarded(shown, manifest.check_sites, shown, abstract)
    _check_dtypes(shown, abstract)
    expected = {path: manifest.arrays(update) for path, update in abstract.items()}
    _guarded(shown, check_stored, shown, where, expected)
    places = sharding(abstract) if callable(sharding) and not isinstance(sharding, Sharding) else sharding
    target = _target(abstract, places)
    with TURNS:
        arrays = _guarded(shown, ocp.load, where, {name: manifest.arrays(target[name]) for name in target})
    if bad := _not_finite(arrays):
        raise CheckpointError(
            f"{shown} holds NaN or infinity at {listed(bad)}: its training diverged, or the file is damaged. Take an "
            "earlier checkpoint."
        )
    if places is None:
        return manifest.assemble(notes, jax.tree.map(jnp.asarray, arrays))
    adapter = manifest.assemble(notes, arrays)
    return Adapter(dict(adapter), jax.device_put(adapter.checksum, checksum_place(places)))


def load_config(path: str | PathLike[str]) -> LoraConfig | None:
    """Read the config that an adapter was saved with.

    Args:
      path: the directory that `save` wrote.

    Returns:
      The config, or None if it was saved without one.

    Raises:
      CheckpointError: there is no adapter at `path`, or it is damaged.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, tempfile
      >>> params, config = {"w": jnp.ones((4, 3))}, lora.LoraConfig(rank=2, targets="w")
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> lora.save(folder, lora.init(jax.random.key(0), config, params, sites), config=config)
      >>> load_config(folder) == config
      True
    """
    fields = _notes(path)["config"]
    return None if fields is None else _guarded(fspath(path), lambda: LoraConfig(**fields))


def load_base(path: str | PathLike[str]) -> dict[str, jax.ShapeDtypeStruct] | None:
    """Read which base an adapter was saved for.

    Args:
      path: the directory that `save` wrote.

    Returns:
      Shapes and dtypes of the base's parameters by path, or None if it was saved without `params`.

    Raises:
      CheckpointError: there is no adapter at `path`, or it is damaged.
    """
    return _guarded(fspath(path), base_shapes, _notes(path))


def load_samples(path: str | PathLike[str]) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, float]]:
    """Read what tells an adapter's base from others of the same shapes.

    Args:
      path: the directory that `save` wrote.

    Returns:
      Shapes and dtypes of the base's parameters by path, at least of the adapted ones, and samples of their values,
      empty if none were recorded.

    Raises:
      CheckpointError: there is no adapter at `path`, or it is damaged.
    """
    notes = _notes(path)
    return _guarded(fspath(path), lambda: (base_shapes(notes) or adapted_shapes(notes), recorded_values(notes)))


def _notes(path: str | PathLike[str]) -> dict[str, Any]:
    return _steadily(path, _read)


def _is_remote(path: str | PathLike[str]) -> bool:
    return "://" in fspath(path)


def _resolve(path: str | PathLike[str]) -> Any:
    where = ocp.path.Path(fspath(path))
    return where if _is_remote(path) else where.expanduser().absolute()


def _steadily(path: str | PathLike[str], read: Callable[[Any, str], _Result]) -> _Result:
    """Read what is at a path, again if another adapter takes its place meanwhile."""
    where = _resolve(path)
    if _is_remote(path):
        return read(where, str(where))

    def under_a_plain_name() -> _Result:
        with plain_name(Path(where)) as plain:
            return read(ocp.path.Path(plain), str(where))

    return steady(Path(where), under_a_plain_name)


def _check_new(where: Any) -> None:
    if where.exists():
        raise CheckpointError(
            f"{where} exists already, and nothing is replaced on remote storage: choose another path."
        )


def _check_replaceable(where: Path) -> None:
    try:
        _notes(where)
    except CheckpointError as error:
        raise CheckpointError(
            f"{where} exists and is no adapter that could be replaced, so it is left alone. Choose another path, or "
            "delete it yourself."
        ) from error


def _array(leaf: Any) -> jax.Array | np.ndarray:
    return leaf if isinstance(leaf, (jax.Array, np.ndarray)) else jnp.asarray(leaf)


def _not_finite(arrays: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Paths and fields of the arrays with NaN or infinity in them."""
    named = {f"{path} ({field})": leaf for path, fields in arrays.items() for field, leaf in fields.items()}
    floats = {name: leaf for name, leaf in named.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    on_host = {name: isinstance(leaf, np.ndarray) or leaf.is_fully_addressable for name, leaf in floats.items()}
    # Of what is spread over several processes each has a part.
    finite = {
        name: (np.isfinite(np.asarray(leaf)) if on_host[name] else jnp.isfinite(leaf)).all()
        for name, leaf in floats.items()
    }
    return [name for name, sound in finite.items() if not bool(sound)]


def _read(where: Any, shown: str) -> dict[str, Any]:
    """What a checkpoint says about its adapter, checked."""
    if not where.exists():
        raise CheckpointError(f"There is nothing at {shown}. Check the path; lora_jax.save creates such a directory.")
    if not _is_remote(shown):
        refuse_as_own(Path(shown))
        check_regular(Path(where))
    notes = _guarded(shown, _custom_metadata, where)
    manifest.check_format(shown, notes)
    return notes


def _custom_metadata(where: Any) -> Any:
    """Ours of the metadata of a checkpoint, from its file: what `ocp.metadata` reads it keeps (200 kB every time)."""
    found = json.loads((where / OWN).read_text(encoding="utf-8"))
    return (found.get("custom_metadata") or {}).get(_KEY)


def _guarded(where: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except LoraError:
        raise
    except _BROKEN as error:
        reason = str(error).partition("\n")[0][:300]
        raise CheckpointError(
            f"{where} cannot be read as an adapter: it is incomplete, damaged, or something else. Copy it again from "
            f"where it was saved, or save it again. Reason: {type(error).__name__}: {reason}"
        ) from error


def _abstract(where: Any, notes: Any) -> Adapter:
    stored = manifest.stored(notes)
    if stored is None:
        with TURNS:
            stored = ocp.metadata(where).metadata
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), manifest.assemble(notes, stored))


def _check_dtypes(where: str, abstract: Adapter) -> None:
    for leaf in jax.tree.leaves(abstract):
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise CheckpointError(
                f"{where} holds {leaf.dtype} arrays, which JAX would truncate: "
                'call jax.config.update("jax_enable_x64", True) before loading it.'
            )


def _target(abstract: Adapter, places: Any) -> dict[str, Any]:
    """What Orbax restores into: NumPy arrays when no placement is asked for, because its JAX arrays are committed."""
    updates = dict(abstract)
    if places is None:
        return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), updates)
    placed = jax.tree.broadcast(dict(places) if isinstance(places, Adapter) else places, updates)
    return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), updates, placed)
