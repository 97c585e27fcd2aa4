"""Reading an adapter on disk for a model, whichever of both formats it has."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.site import Sites
from lora_jax.io.formats.recognise import adapter_file
from lora_jax.io.hf.folder import open_checkpoint
from lora_jax.io.hf.identity import warn_of_other_base
from lora_jax.io.hf.provenance import check_not_merged, fingerprints
from lora_jax.io.inspect import detect
from lora_jax.io.own import orbax
from lora_jax.io.peft.config import CONFIG
from lora_jax.io.peft.load import load
from lora_jax.jsonfile import read_object


def load_for(path: str | PathLike[str], params: Any, sites: Callable[[], Sites], base: Path) -> Adapter:
    """Read an adapter for parameters that were read from a directory.

    Args:
      path: what `lora_jax.save` wrote, or a PEFT adapter.
      params: of the model.
      sites: gives those of the model; asked for PEFT's format only.
      base: where the parameters were read from: what its files note about merged adapters is checked too.

    Raises:
      CheckpointError: there is no adapter, or it is damaged, belongs to another model or is merged into this one.
    """
    where = Path(path).expanduser()
    if detect(where) == "orbax":
        return orbax.load(where, params)
    if base.is_dir():
        _check_base(adapter_file(where) or where, base)
    return load(where, params, sites())


def _check_base(file: Path, base: Path) -> None:
    """Look at names and notes: most adapters of others have no samples of their base's values."""
    check_not_merged(open_checkpoint(base), [file], fingerprints([file]))
    warn_of_other_base(str(file), read_object(file.parent / CONFIG) or {}, base)
