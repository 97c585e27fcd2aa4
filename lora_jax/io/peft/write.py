"""Writing a PEFT adapter to disk, `adapter_model.safetensors` and `adapter_config.json`, whole or not at all."""

import json
import os
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_jax.errors import CheckpointError
from lora_jax.io.peft.config import CONFIG
from lora_jax.io.peft.files import PeftFiles
from lora_jax.io.peft.keys import PREFIX, WEIGHTS, unparse


def write_peft(path: str | PathLike[str], files: PeftFiles, *, overwrite: bool = False) -> None:
    """Write a PEFT adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

    Both are written beside `path` and renamed at the end, so that a write cut short leaves nothing under that name.

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
    where = Path(path).expanduser().absolute()
    if not files.modules and not files.saved:
        raise CheckpointError(f"Nothing to write to {where}: the adapter is empty")
    if where.exists() or where.is_symlink():
        _check_replaceable(where, overwrite)
    arrays = _tensors(files)
    text = _config(files)
    try:
        _write(where, arrays, text)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be written: {error}") from None


def _write(where: Path, arrays: dict[str, np.ndarray], text: str) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where.parent, prefix=f".{where.name}-") as folder:
        beside = Path(folder) / "adapter"
        beside.mkdir()
        save_file(arrays, beside / WEIGHTS, metadata={"format": "pt"})
        (beside / CONFIG).write_text(text)
        if where.exists():
            for name in (WEIGHTS, CONFIG):
                os.replace(beside / name, where / name)
        else:
            os.replace(beside, where)


def _tensors(files: PeftFiles) -> dict[str, np.ndarray]:
    """Arrays by key. Contiguous: safetensors 0.8.0 writes wrong values for strided ones without a word."""
    keyed = {
        unparse(name, part, module.form): array[:, None] if (module.form, part) == ("adalora", "values") else array
        for name, module in files.modules.items()
        for part, array in module.arrays().items()
    }
    for name, array in files.saved.items():
        owner, _, leaf = name.rpartition(".")
        keyed[f"{PREFIX}{owner}.base_layer.{leaf}" if owner in files.modules else f"{PREFIX}{name}"] = array
    for key, array in keyed.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"{key} holds NaN or infinity, so nothing is written: the training diverged")
    return {key: np.asarray(array, order="C") for key, array in sorted(keyed.items())}


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


def _check_replaceable(where: Path, overwrite: bool) -> None:
    if not overwrite:
        raise CheckpointError(f"{where} exists already. Choose another path, or pass overwrite=True to replace it.")
    if not (where / CONFIG).is_file() and not (where / WEIGHTS).is_file():
        raise CheckpointError(f"{where} exists and is no PEFT adapter, so it is left alone. Choose another path.")
    for name in (WEIGHTS, CONFIG):
        if (where / name).is_dir():
            raise CheckpointError(f"{where / name} is a directory where a file belongs, so {where} is left alone.")
