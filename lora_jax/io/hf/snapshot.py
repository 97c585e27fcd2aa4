"""Files of a repository of the Hugging Face Hub, in the cache that all of its libraries share (extra `[hub]`)."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from lora_jax.errors import CheckpointError

_INSTALL = 'This needs huggingface_hub: pip install "lora_jax[hub]"'


def hub() -> Any:
    """The package huggingface_hub.

    Raises:
      ImportError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    return huggingface_hub


def snapshot(
    repo_id: str,
    wanted: Sequence[str],
    *,
    unwanted: Sequence[str] = (),
    revision: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Path:
    """Fetch some files of a repository, but for those that are in the cache already.

    Args:
      repo_id: `user/name`.
      wanted: patterns of names of files.
      unwanted: patterns of those that are left where they are all the same.
      revision: branch, tag or commit; the main branch by default.
      cache_dir: the cache; `HF_HOME` decides by default.
      local_files_only: never use the network.
      token: for private repositories; by default the one that `hf auth login` stored.

    Raises:
      CheckpointError: there is no such repository or revision, or it cannot be reached.
      ImportError: huggingface_hub is not installed.
    """
    package = hub()
    try:
        return Path(package.snapshot_download(
            repo_id, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token,
            library_name="lora_jax", allow_patterns=list(wanted), ignore_patterns=list(unwanted) or None,
        ))  # fmt: skip
    except (package.errors.HfHubHTTPError, package.errors.HFValidationError, OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{repo_id!r}{at} could not be fetched from the Hugging Face Hub: {reason} Check the name and the network, "
            "and for private repositories run: hf auth login"
        ) from error
