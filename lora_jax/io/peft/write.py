"""Writing a PEFT adapter to disk, `adapter_model.safetensors` and `adapter_config.json`, whole or not at all."""

import errno
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora_jax.errors import CheckpointError
from lora_jax.io.peft.base import BASE
from lora_jax.io.peft.config import CONFIG
from lora_jax.io.peft.files import PeftFiles
from lora_jax.io.peft.keys import PREFIX, WEIGHTS, unparse
from lora_jax.io.peft.rename import check_names
from lora_jax.io.peft.without_factors import as_own_type
from lora_jax.publish import place, publish


def write_peft(path: str | PathLike[str], files: PeftFiles, *, overwrite: bool = False) -> None:
    """Write a PEFT adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

    Both are written beside `path`, read back, and take their place together, so that a write that is cut short changes
    nothing, and a reader never gets one of each. Rows or modules that are trained in full, without any factors, are
    written as PEFT's TRAINABLE_TOKENS or LN_TUNING where those can say it, as PEFT loads no LoRA without factors.

    Args:
      path: the directory to create.
      files: what to write. Nothing of it is changed.
      overwrite: replace the two files of an adapter that is there already; other files beside them stay.

    Raises:
      CheckpointError: `path` exists (and, with `overwrite`, holds something other than an adapter), or there is
        nothing to write, or what there is holds NaN or infinity.

    Example:
      >>> import os, tempfile
      >>> from lora_jax.io.peft.module import Module
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> modules = {"q": Module("linear", np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))}
      >>> write_peft(folder, PeftFiles({"r": 2, "target_modules": {"q"}}, modules))
      >>> sorted(os.listdir(folder))
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    where = place(path)
    if not files.modules and not files.saved:
        raise CheckpointError(f"Nothing to write to {where}: the adapter is empty")
    files.check_scales()
    check_names(files)
    files = as_own_type(files) or files
    arrays, text = _tensors(files), _config(files)
    metadata = {"format": "pt"} | ({BASE: json.dumps(dict(files.base))} if files.base else {})
    write = lambda folder: fill(folder, WEIGHTS, arrays, metadata, text)  # noqa: E731
    publish(where, write, replace=_check_replaceable if overwrite else None)


def storable(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by key, as a file may have them: finite, and contiguous.

    safetensors 0.8.0 writes wrong values for strided ones without a word.

    Raises:
      CheckpointError: one holds NaN or infinity.
    """
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"{key} holds NaN or infinity, so nothing is written: the training diverged")
    return {key: np.asarray(array, order="C") for key, array in sorted(arrays.items())}


def fill(folder: Path, weights: str, arrays: dict[str, np.ndarray], metadata: dict[str, str], text: str) -> None:
    """Write the weights and the config of an adapter into a new directory, and read them back.

    Raises:
      OSError: the disk is full or broken.
    """
    try:
        save_file(arrays, folder / weights, metadata=metadata)
        (folder / CONFIG).write_text(text, encoding="utf-8")
        found = load_file(folder / weights)
    except SafetensorError as error:  # An error of the disk too.
        raise OSError(f"{weights}: {error}") from None
    same = found.keys() == arrays.keys() and all(_alike(found[key], array) for key, array in arrays.items())
    if not same or (folder / CONFIG).read_text(encoding="utf-8") != text:
        raise OSError(errno.EIO, "what was written reads back as something else")


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()


def _tensors(files: PeftFiles) -> dict[str, np.ndarray]:
    """Arrays by key."""
    keyed = {
        unparse(name, part, module.form): array[:, None] if (module.form, part) == ("adalora", "values") else array
        for name, module in files.modules.items()
        for part, array in module.arrays().items()
    }
    for name, array in files.saved.items():
        owner, _, leaf = name.rpartition(".")
        keyed[f"{PREFIX}{owner}.base_layer.{leaf}" if owner in files.modules else f"{PREFIX}{name}"] = array
    return storable(keyed)


def _config(files: PeftFiles) -> str:
    fields = _plain({"peft_type": "LORA", **files.config, "inference_mode": True})
    try:
        return json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except ValueError as error:
        raise CheckpointError(f"The config holds what JSON cannot ({error}), so nothing is written") from None


def _plain(value: Any) -> Any:
    """The value with sets as sorted lists, as JSON needs."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _check_replaceable(where: Path) -> None:
    if not (where / CONFIG).is_file() and not (where / WEIGHTS).is_file():
        raise CheckpointError(f"{where} exists and is no PEFT adapter, so it is left alone. Choose another path.")
    for name in (WEIGHTS, CONFIG):
        if (where / name).is_dir():
            raise CheckpointError(f"{where / name} is a directory where a file belongs, so {where} is left alone.")
