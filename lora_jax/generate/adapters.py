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
from lora_jax.io.peft.config import CONFIG
from lora_jax.jsonfile import read_object
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

    Example:
      >>> adapter = load_adapter("runs/1/adapter", model)  # doctest: +SKIP
      >>> lora.adapt(model.apply)(model.params, adapter, tokens).shape  # doctest: +SKIP
      (1, 12, 49152)
    """
    try:
        return load_for(path, model.params, lambda: model_sites(model) if sites is None else sites, model.directory)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_of_classes(Path(path).expanduser(), model)}") from error


def _of_classes(where: Path, model: Model) -> str:
    """What to do where an adapter does not fit as one of the two is for classes, or for other ones."""
    if not model.continues:
        return f" The model is {model.what}: are these all that the adapter was trained on? --labels names them."
    if (read_object(where / CONFIG) or {}).get("task_type") != "SEQ_CLS":
        return ""
    return " The adapter was trained to tell classes apart (task_type SEQ_CLS): lora-jax evaluate takes it."


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
