"""What is at a path: the file of an adapter that can be read, or by name what else it is and what to do next."""

from pathlib import Path
from typing import NoReturn

from lora_jax.errors import CheckpointError, listed
from lora_jax.io.formats.signatures import check_bytes

PEFT_FILE = "adapter_model.safetensors"
"""Factors as PEFT saves them, with `adapter_config.json` beside."""

MLX_FILE = "adapters.safetensors"
"""Factors as mlx-lm saves them, likewise."""

FILES = (PEFT_FILE, MLX_FILE, "pytorch_lora_weights.safetensors")
"""What PEFT, mlx-lm and diffusers call the file of an adapter in its folder."""

OWN = "_CHECKPOINT_METADATA"
"""What every Orbax checkpoint has, and so the adapters that `lora_jax.save` writes."""

_SUFFIXES = frozenset((".bin", ".pt", ".pth", ".ckpt", ".nemo", ".npz", ".gguf", ".h5", ".pkl", ".zip", ".gz", ".tar"))


def adapter_file(folder: Path) -> Path | None:
    """The file with the factors in a folder, in the first format whose name is there; None if there is none.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> adapter_file(folder), (folder / "adapters.safetensors").touch(), adapter_file(folder).name
      (None, None, 'adapters.safetensors')
    """
    there = [folder / name for name in FILES if (folder / name).exists()]
    if len(there) > 1:
        names = " and ".join(path.name for path in there)
        raise CheckpointError(f"{folder} holds {names}, of different tools: give the one that you mean by its file")
    return there[0] if there else None


def refuse_folder(folder: Path) -> NoReturn:
    """Say what a folder holds that is no adapter that PEFT or another tool stores as safetensors.

    Raises:
      CheckpointError: always.
    """
    if (folder / OWN).exists():
        raise CheckpointError(
            f"{folder} is an Orbax checkpoint, not PEFT's files. If lora_jax.save wrote it, lora_jax.load reads it, "
            "and lora-jax convert makes a PEFT adapter of it"
        )
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        if path.suffix in _SUFFIXES:
            check_bytes(path)
    if named := [path.name for path in files if path.suffix == ".safetensors"]:
        raise CheckpointError(
            f"{folder} holds no {PEFT_FILE}, but {listed(named)}: if one of them is an adapter, give its file; else "
            "this is a model"
        )
    inner = sorted(child.name for child in folder.iterdir() if child.is_dir() and _is_one(child))
    choose = f"name one of them, or in lora_jax.peft.load pass subfolder={inner[0]!r}" if inner else ""
    hint = f" Its subdirectories {listed(inner)} are adapters: {choose}." if inner else ""
    raise CheckpointError(f"{folder} is neither a PEFT adapter ({PEFT_FILE}) nor one that lora_jax.save wrote.{hint}")


def refuse_as_own(path: Path) -> None:
    """Refuse what is given for an adapter of lora_jax's own format and shows to be something else.

    Raises:
      CheckpointError: it is a file, or a folder with another tool's adapter.
    """
    if path.is_file():
        check_bytes(path)
        raise CheckpointError(f"{path} is a file, and lora_jax.save writes a folder. {_AS_PEFT}")
    if path.is_dir() and not (path / OWN).exists() and (found := adapter_file(path)) is not None:
        raise CheckpointError(f"{path} holds {found.name}, an adapter of PEFT or another tool. {_AS_PEFT}")


_AS_PEFT = "lora_jax.peft.load reads PEFT's adapters and others; lora-jax convert makes one of lora_jax's own format."


def _is_one(folder: Path) -> bool:
    return (folder / OWN).exists() or any((folder / name).exists() for name in FILES)
