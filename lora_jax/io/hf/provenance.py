"""Which adapters are in a merged checkpoint: noted in its files, so that none is merged into it twice."""

from collections.abc import Mapping, Sequence
from hashlib import file_digest
from pathlib import Path

from lora_jax.errors import CheckpointError
from lora_jax.io.hf.folder import Checkpoint

KEY = "lora_jax.merged"
"""Entry of a safetensors file's metadata: the SHA-256 of the file of every adapter that was merged, with commas."""


def fingerprints(files: Sequence[Path]) -> list[str]:
    """SHA-256 of every file."""
    found = []
    for path in files:
        with open(path, "rb") as file:
            found.append(file_digest(file, "sha256").hexdigest())
    return found


def check_not_merged(base: Checkpoint, files: Sequence[Path], digests: Sequence[str]) -> None:
    """Refuse an adapter that the base holds already.

    Raises:
      CheckpointError: it does.
    """
    merged = {digest for shard in base.shards for digest in shard.metadata.get(KEY, "").split(",")}
    for path, digest in zip(files, digests, strict=True):
        if digest in merged:
            raise CheckpointError(
                f"{path} is merged into {base.path} already: once more, its change would count twice. "
                "Take the base that it was trained on; a merge goes on with again=True (--again)."
            )


def noted(metadata: Mapping[str, str], digests: Sequence[str]) -> dict[str, str]:
    """The metadata of a file of a merged checkpoint."""
    before = [metadata[KEY]] if metadata.get(KEY) else []
    # Where there is metadata, transformers wants to find the format in it.
    return {"format": "pt", **metadata, KEY: ",".join([*before, *digests])}
