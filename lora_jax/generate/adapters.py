"""Adapters of a model from disk: in PEFT's format or our own, by themselves or by name."""

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path

import jax
import jax.numpy as jnp

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.site import Sites
from lora_jax.errors import CheckpointError
from lora_jax.io.load import load_for
from lora_jax.models.load import Model
from lora_jax.sites import find_sites


def load_adapter(path: str | PathLike[str], model: Model, sites: Sites | None = None) -> Adapter:
    """Read an adapter that fits a model, whichever of both formats it has.

    Args:
      path: what `lora_jax.save` wrote, or a PEFT adapter.
      model: of `lora_jax.models.load`.
      sites: of the model, where they are known.

    Raises:
      CheckpointError: there is no adapter, or it is damaged or belongs to another model.
    """
    return load_for(path, model.params, lambda: model_sites(model) if sites is None else sites, model.directory)


def load_adapters(given: Sequence[str], model: Model) -> dict[str, Adapter]:
    """Read several adapters by name.

    Args:
      given: `NAME=PATH`, or a path, whose name is its last part, or the one before where that is `adapter`.
      model: of `lora_jax.models.load`.

    Raises:
      CheckpointError: two have the same name, or one cannot be read.

    Example:
      >>> adapter_name("french=runs/1/adapter"), adapter_name("runs/1/adapter"), adapter_name("german")
      ('french', '1', 'german')
    """
    found: dict[str, Adapter] = {}
    sites = model_sites(model) if given else None
    for each in given:
        name = adapter_name(each)
        if name in found:
            raise CheckpointError(f"two adapters are called {name!r}: give them as NAME=PATH")
        found[name] = load_adapter(each.partition("=")[2] or each, model, sites)
    return found


def adapter_name(given: str | PathLike[str]) -> str:
    """What an adapter is called that is given as `NAME=PATH` or as a path."""
    name, _, path = fspath(given).partition("=")
    if path:
        return name
    parts = [part for part in Path(name).parts if part not in ("/", ".", "..")]
    called = parts[-2] if parts[-1:] == ["adapter"] and len(parts) > 1 else (parts or [name])[-1]
    return called.removesuffix(".safetensors")


def model_sites(model: Model) -> Sites:
    """The parameters of a model that can be adapted; nothing is computed."""
    return find_sites(model.apply, model.params, jax.ShapeDtypeStruct((1, 4), jnp.int32))
