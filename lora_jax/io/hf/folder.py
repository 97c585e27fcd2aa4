"""A checkpoint directory as Hugging Face's `save_pretrained` writes it: shards, index, config, other files."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_jax.errors import CheckpointError
from lora_jax.io.hf.tensors import Tensor, read_header
from lora_jax.jsonfile import read_object
from lora_jax.regular import copyable

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

# Files of an adapter that lies in the same directory: the merged model would be taken for an adapter.
_ADAPTER = {"adapter_config.json"}
# The same weights in other formats. Beside a merged model they would be those of another model.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot"}


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its metadata, and its tensors in order."""

    path: Path
    metadata: Mapping[str, str]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A base model on disk.

    Attributes:
      path: the directory.
      config: `config.json`, or empty.
      index: the parsed index if the checkpoint is sharded, or None.
      shards: its safetensors files.
      others: files to copy, relative to `path`.
      left_out: files that hold weights in other formats, relative to `path`; a merged copy must not have them.
    """

    path: Path
    config: Mapping[str, Any]
    index: Mapping[str, Any] | None
    shards: tuple[Shard, ...]
    others: tuple[Path, ...]
    left_out: tuple[Path, ...]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}


def open_checkpoint(path: Path, *, quantised: bool = False) -> Checkpoint:
    """Look at a checkpoint directory; only headers are read.

    Raises:
      CheckpointError: it is no such directory, it is incomplete or damaged, or its weights are quantised.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory with a base model. Give the one that save_pretrained wrote.")
    config = read_object(path / CONFIG) or {}
    _check_config(path, config)
    if not quantised:
        _refuse_quantised(path, config)
    index = read_object(path / INDEX)
    if index is not None and (path / SINGLE).exists():
        raise CheckpointError(
            f"{path} has both {SINGLE} and {INDEX}, which may be two models, and transformers reads the first. Remove "
            "the one that is not meant."
        )
    names = _shard_names(path, index)
    shards = tuple(Shard(path / name, *_header(path / name)) for name in names)
    _check_complete(path, index, shards)
    others, left_out = _other_files(path, {*names, INDEX})
    return Checkpoint(path, config, index, shards, others, left_out)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{path / CONFIG}: architectures={names!r} must be a list of names of classes")


def _refuse_quantised(path: Path, config: Mapping[str, Any]) -> None:
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else found
        raise CheckpointError(
            f"{path} is quantised (quantization_config in {CONFIG}: {method!r}). Merging would round the update to the "
            "few values that the base can hold. Merge into the model's unquantised checkpoint and quantise the result, "
            "or keep the adapter separate."
        )


def _shard_names(path: Path, index: Mapping[str, Any] | None) -> list[str]:
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{path / INDEX} has no weight_map from tensors to files. Copy it again.")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{path / INDEX} names the file {name!r}, which is not in its own directory")
        return names
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if SINGLE in found or len(found) == 1:
        return [SINGLE] if SINGLE in found else found
    if found:
        raise CheckpointError(f"{path} has {len(found)} safetensors files and no {INDEX}, so parts may be missing")
    pickles = sorted(file.name for file in path.glob("*.bin"))
    hint = (
        f" {pickles[0]} is a pickle; convert it once in transformers: AutoModelForCausalLM.from_pretrained(path)"
        ".save_pretrained(new_path)."
        if pickles else " Give the directory of the base model, with model.safetensors in it."
    )  # fmt: skip
    raise CheckpointError(f"{path} holds no safetensors file.{hint}")


def _header(path: Path) -> tuple[Mapping[str, str], tuple[Tensor, ...]]:
    if not path.is_file():
        raise CheckpointError(f"{path} is named in {INDEX} but is not there. Download the rest of the model.")
    metadata, tensors = read_header(path)
    return metadata, tuple(tensors)


def _check_complete(path: Path, index: Mapping[str, Any] | None, shards: tuple[Shard, ...]) -> None:
    if index is None:
        return
    there = {tensor.name: shard.path.name for shard in shards for tensor in shard.tensors}
    wrong = [name for name, shard in index["weight_map"].items() if there.get(name) != shard]
    wrong += [name for name in there if name not in index["weight_map"]]
    if wrong:
        raise CheckpointError(
            f"{path / INDEX} and the files beside it disagree about {len(wrong)} tensors, such as {wrong[0]!r}: "
            "they belong to different models, or a file is missing. Download the model again."
        )


def _other_files(path: Path, known: set[str]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Files to copy and files to leave out; links that lead out of the directory are not followed."""
    copied, left_out = [], []
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(name for name in inner if name not in (".git", ".cache"))
        for name in sorted(names):
            file = (Path(folder) / name).relative_to(path)
            if str(file) in known:
                continue
            weights = (
                file.suffix in _WEIGHTS
                or str(file) in _ADAPTER
                or name.endswith((".bin.index.json", ".safetensors.index.json"))
            )
            (left_out if weights else copied).append(file)
    return tuple(copyable(path, copied)), tuple(left_out)


def dump(path: Path, value: Any) -> None:
    """Write JSON as Hugging Face does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
