"""Which adapters a merged checkpoint notes, and which base an adapter does: none is merged twice, or elsewhere."""

from collections.abc import Mapping, Sequence
from hashlib import file_digest
from pathlib import Path

from lora_jax.adapter.base import spell
from lora_jax.adapter.samples import differ, sampled
from lora_jax.errors import CheckpointError, listed
from lora_jax.io.hf.folder import Checkpoint
from lora_jax.io.hf.plan import PlacedAdapter
from lora_jax.io.hf.tensors import FLOATS
from lora_jax.io.peft.base import checkpoint_values
from lora_jax.io.peft.files import PeftFiles

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


def check_values(base: Checkpoint, files: PeftFiles) -> None:
    """Refuse a base that has other values than the one that the adapter was saved with, as far as its file tells.

    Raises:
      CheckpointError: it has.
    """
    recorded = checkpoint_values(files.base)
    place = PlacedAdapter(base, files, 1.0).place if recorded else str
    tensors = {name: base.tensors[place(name)] for name in recorded if place(name) in base.tensors}
    there = {name: tensor.mapped() for name, tensor in tensors.items() if tensor.dtype in FLOATS}
    alike = {name: array for name, array in there.items() if spell(array) == recorded[name][0]}
    different = sorted(name for name, value in sampled(alike).items() if differ(recorded[name][1], value))
    if different:
        raise CheckpointError(
            f"{files.where} was saved with another base than {base.path}: samples of the values differ at "
            f"{len(different)} of {len(alike)} weights: {listed(different)}. It is another revision, or holds this "
            "adapter already. Take the base that it was trained on; a merge goes on with again=True (--again)."
        )


def noted(metadata: Mapping[str, str], digests: Sequence[str]) -> dict[str, str]:
    """The metadata of a file of a merged checkpoint."""
    before = [metadata[KEY]] if metadata.get(KEY) else []
    # Where there is metadata, transformers wants to find the format in it.
    return {"format": "pt", **metadata, KEY: ",".join([*before, *digests])}
