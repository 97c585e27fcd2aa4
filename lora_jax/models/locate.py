"""Where a model is: a directory, a file, one that comes in a package, or a repository of the Hugging Face Hub."""

import re
from os import PathLike, fspath
from pathlib import Path
from typing import NamedTuple

from lora_jax.errors import CheckpointError
from lora_jax.io.hf.folder import CONFIG, open_checkpoint
from lora_jax.io.hf.identity import identity
from lora_jax.io.hf.snapshot import snapshot
from lora_jax.models.packaged import PACKAGED, packaged

_ON_THE_HUB = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_WANTED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt")
_UNWANTED = ("*/*.safetensors", "consolidated*", "original/*", "onnx/*", "openvino/*")
"""The same weights again, in folders and in forms of others."""


class Located(NamedTuple):
    """A model on disk.

    Attributes:
      path: its directory or file.
      name: what it is called on the Hub, where that is known; empty otherwise.
    """

    path: Path
    name: str = ""


def locate(model: str | PathLike[str]) -> Located:
    """Find a model.

    Args:
      model: a path; or the name of one that comes in a package; or `user/name` of the Hugging Face Hub, with or without
        `@revision`, which is looked for in the cache of its libraries first (extra `[hub]`).

    Raises:
      CheckpointError: it is none of these, its package is not installed, or the Hub cannot be reached.

    Example:
      >>> locate("/models/mine").path.as_posix()
      '/models/mine'
    """
    path, given = Path(model).expanduser(), fspath(model)
    if path.exists():
        known = identity(path)
        return Located(path, known.repository if known else "")
    if given in PACKAGED:
        return Located(packaged(given), PACKAGED[given].name)
    if (match := _ON_THE_HUB.fullmatch(given)) and path.suffix != ".gguf":
        return Located(_from_hub(match["id"], match["revision"]), match["id"])
    return Located(path)


def _from_hub(name: str, revision: str | None) -> Path:
    """The directory of a repository in the cache, with all that a model needs."""
    try:
        cached = snapshot(name, _WANTED, unwanted=_UNWANTED, revision=revision, local_files_only=True)
        if _lack(cached) is None:
            return cached
    except ImportError as error:
        raise CheckpointError(
            f"{name} is no directory here, and repositories of the Hugging Face Hub are not read: {error}"
        ) from None
    except CheckpointError:
        pass  # It is not there.
    help_offline = f"Where there is a network, `hf download {name} --local-dir DIR` makes a directory to give instead."
    try:
        fetched = snapshot(name, _WANTED, unwanted=_UNWANTED, revision=revision)
    except CheckpointError as error:
        raise CheckpointError(
            f"{name} is no directory here and not in the cache of the Hugging Face Hub. {error}. {help_offline}"
        ) from error
    # Without a network it is what the cache has.
    if lack := _lack(fetched):
        raise CheckpointError(f"{name} is not whole, on the Hugging Face Hub or in its cache: {lack} {help_offline}")
    return fetched


def _lack(path: Path) -> str | None:
    """Why a directory is no whole model, or None if it is one."""
    if not (path / CONFIG).is_file():
        return f"there is no {CONFIG}."
    try:
        open_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    return None
