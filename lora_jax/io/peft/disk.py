"""Finding and opening the files of a PEFT adapter; everything wrong with them is an error that names file and key."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_DTYPES = {"F16", "BF16", "F32", "F64"}
_COUNTS = {"I64", "I32", "BOOL"}
_MAX_CONFIG = 1 << 24


def locate(path: Path, subfolder: str | None) -> tuple[Path, Path]:
    """Paths of the arrays and of the config, which may not exist."""
    if subfolder is not None and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts or not subfolder):
        raise CheckpointError(f"subfolder={subfolder!r} must name a directory below {path}")
    folder = path / subfolder if subfolder else path
    try:
        return _located(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be looked into: {error}") from None


def _located(folder: Path) -> tuple[Path, Path]:
    if folder.is_file():
        _refuse_pickle(folder)
        return folder, folder.parent / CONFIG
    if not folder.exists():
        raise CheckpointError(f"There is nothing at {folder}. Check the path; PEFT's save_pretrained creates it.")
    weights = folder / WEIGHTS
    if weights.is_file():
        return weights, folder / CONFIG
    if weights.exists():
        raise CheckpointError(f"{weights} is no regular file, which belongs there")
    _refuse_pickle(folder / "adapter_model.bin")
    inner = sorted(child.name for child in folder.iterdir() if (child / WEIGHTS).is_file())
    hint = f" It holds the adapters {', '.join(inner)}: pass subfolder={inner[0]!r}." if inner else ""
    raise CheckpointError(f"{folder} holds no {WEIGHTS}.{hint}")


def _refuse_pickle(path: Path) -> None:
    if path.suffix in (".bin", ".pt", ".pth") and path.exists():
        raise CheckpointError(
            f"{path} is a pickle, which can run any code when it is opened, so it is not read. Convert it once, with "
            'PyTorch installed: python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, '
            f"v in torch.load('{path}', weights_only=True).items()}}, '{path.with_name(WEIGHTS)}', "
            "{'format': 'pt'})\""
        )


def read_config(path: Path) -> dict[str, Any] | None:
    """The parsed file, or None if there is none."""
    if not path.exists() and not path.is_symlink():
        return None
    if not path.is_file():
        # Taken for no config at all it would change the scales, and reading a pipe would wait for ever.
        raise CheckpointError(f"{path} is no regular file, which belongs there")
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable as JSON ({error}). Copy it again from where it was saved."
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not the object that a config is")
    return config


def read_arrays(path: Path, *, pruned: bool = False) -> dict[str, np.ndarray]:
    """Every tensor of the file, in its own dtype; without elements only if terms may be `pruned`."""
    try:
        with safe_open(path, framework="np") as file:
            keys = list(file.keys())
            for key in keys:
                _check_tensor(path, key, file.get_slice(key), pruned)
            arrays = {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {error}. It is damaged or cut short; copy it again."
        ) from None
    for key, array in arrays.items():
        _check_finite(path, key, array)
    return arrays


def _check_finite(path: Path, key: str, array: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32, copy=False))
    if not finite.all():
        raise CheckpointError(
            f"{path}: {key} has {finite.size - np.count_nonzero(finite)} values that are NaN or infinite in float32. "
            "The training diverged, or the file is damaged; use an earlier checkpoint."
        )


def _check_tensor(path: Path, key: str, tensor: Any, pruned: bool) -> None:
    # Batch normalisation counts its steps; a whole module is stored with all it has.
    factor = "lora_" in key or "vera_" in key
    allowed = _DTYPES if factor else _DTYPES | _COUNTS
    if tensor.get_dtype() not in allowed:
        raise CheckpointError(
            f"{path}: {key} is {tensor.get_dtype()}; adapters are stored as one of {', '.join(sorted(_DTYPES))}. "
            "Quantised adapters cannot be read: save them in a floating-point dtype."
        )
    if 0 in tensor.get_shape() and factor and not (pruned and len(tensor.get_shape()) == 2):
        raise CheckpointError(
            f"{path}: {key} has shape {tuple(tensor.get_shape())}, so it holds nothing: the parameters were sharded "
            "(DeepSpeed ZeRO-3, FSDP) and not gathered when they were saved. Gather them and save again."
        )
