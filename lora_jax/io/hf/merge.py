"""Merging PEFT adapters into a Hugging Face checkpoint, tensor by tensor."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.base import agreed
from lora_jax.errors import CheckpointError, MergeError, StorageError
from lora_jax.io.hf.changes import Rounding, changed
from lora_jax.io.hf.folder import CONFIG, INDEX, Checkpoint, Shard, dump, open_checkpoint
from lora_jax.io.hf.plan import Plan, on_base, plan
from lora_jax.io.hf.provenance import check_not_merged, check_values, fingerprints, noted
from lora_jax.io.hf.tensors import Item, Tensor, new_item, opened, write_file
from lora_jax.io.hf.ties import untied_config
from lora_jax.io.hf.vocabulary import resized_config
from lora_jax.io.peft.files import PeftFiles
from lora_jax.io.peft.read import read_several
from lora_jax.merge import round_stochastically
from lora_jax.publish import publish

_SPARE = 64 << 20
_THREADS = min(os.cpu_count() or 1, 4)
"""Tensors that are changed and written at once."""


@dataclass(frozen=True)
class Merged:
    """What `merge_checkpoint` wrote.

    Attributes:
      path: the new directory.
      changed: names of the tensors that the adapters changed.
      added: names of the tensors that the base did not have.
      tensors: number of tensors in all.
      nbytes: their bytes.
      left_out: files of the base that hold the unmerged weights in other formats, and were not copied.

    Example:
      >>> merged = Merged(Path("merged"), ("q.weight",), (), tensors=9, nbytes=1024, left_out=(Path("old.bin"),))
      >>> f"{len(merged.changed)} of {merged.tensors} tensors changed"
      '1 of 9 tensors changed'
    """

    path: Path
    changed: tuple[str, ...]
    added: tuple[str, ...]
    tensors: int
    nbytes: int
    left_out: tuple[Path, ...]


def merge_checkpoint(
    base: str | PathLike[str],
    adapters: str | PathLike[str] | Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    alpha: float | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
    untie: bool = False,
    again: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Merged:
    """Merge PEFT adapters into a Hugging Face checkpoint on disk.

    No model is built and nothing is loaded whole: tensors are read, changed in float32, rounded once and written a few
    rows at a time, so that memory holds the adapters and some megabytes. What no adapter changes is copied as bytes.
    DoRA, trained biases, whole modules and token rows are merged too. The directory is written beside `out` and
    renamed at the end: a merge cut short leaves nothing there.

    Unlike PEFT's `merge_and_unload`, updates are not rounded before they are added, and a table that is also the output
    head is not changed for both uses if the adapter changes one.

    Args:
      base: directory with `model.safetensors`, or shards and their index.
      adapters: one PEFT adapter, or several, whose updates are added.
      out: the directory to create.
      weights: a factor for every adapter's update; 1 by default. Adapters with tensors stored whole, or with DoRA,
        take 1 only.
      alpha: the `lora_alpha` of adapters whose scale nothing tells, as for `lora_jax.peft.load`.
      rounding: `"stochastic"` rounds up or down with probabilities that keep the expectation, which preserves updates
        smaller than the base's rounding step on average.
      seed: for stochastic rounding.
      untie: write two tables where the adapter changes a tied table for one of its uses.
      again: merge an adapter even if the base holds it already, as files of merged models note, or has other values
        than the one that `lora_jax.peft.save` was given.
      progress: called with the bytes written so far, and the bytes of all tensors.

    Raises:
      CheckpointError: `out` exists, a file is damaged, the base is quantised, or the adapter belongs to another base
        or is merged into this one already.
      MergeError: the weights mean nothing, or the result is not finite.

    Example:
      >>> import tempfile, numpy as np
      >>> from safetensors.numpy import load_file, save_file
      >>> from lora_jax.io.peft import Module, PeftFiles, write_peft
      >>> folder = Path(tempfile.mkdtemp())
      >>> (folder / "base").mkdir()
      >>> save_file({"q.weight": np.zeros((3, 4), np.float32)}, folder / "base" / "model.safetensors")
      >>> factors = Module("linear", np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))
      >>> write_peft(folder / "lora", PeftFiles({"r": 2, "lora_alpha": 4, "target_modules": ["q"]}, {"q": factors}))
      >>> merge_checkpoint(folder / "base", folder / "lora", folder / "merged").changed
      ('q.weight',)
      >>> float(load_file(folder / "merged" / "model.safetensors")["q.weight"][0, 0])
      4.0
    """
    paths = [adapters] if isinstance(adapters, (str, PathLike)) else list(adapters)
    factors = _checked(paths, weights, rounding)
    source, where = open_checkpoint(Path(base).expanduser()), Path(out).expanduser().absolute()
    read = [on_base(files, source) for files in _mergeable(paths, alpha)]
    files = [Path(each.where) for each in read]
    digests = fingerprints(files)
    if not again:
        check_not_merged(source, files, digests)
        for each in read:
            check_values(source, each)
    planned = plan(source, list(zip(read, factors, strict=True)), untie)
    _check_place(source, where)
    shards = _items(source, planned, _rounding(rounding, seed))
    total = sum(item.nbytes for _, items in shards for item in items)
    _check_space(where.parent, total)

    def write(beside: Path) -> None:
        _copy_others(source, planned, beside)
        _write(
            source, [(shard, noted(shard.metadata, digests), items) for shard, items in shards], beside, total, progress
        )

    publish(where, write)
    added = (*planned.copies, *planned.added)
    changes = tuple(sorted(name for name, change in planned.changes.items() if not change.empty))
    return Merged(where, changes, added, sum(len(items) for _, items in shards), total, source.left_out)


def _checked(paths: Sequence[Any], weights: Sequence[float] | None, rounding: str) -> list[float]:
    if not paths:
        raise MergeError("There is no adapter to merge")
    if rounding not in ("nearest", "stochastic"):
        raise MergeError(f'rounding={rounding!r} must be "nearest" or "stochastic"')
    factors = [1.0] * len(paths) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(paths) or not np.isfinite(factors).all():
        names = ", ".join(map(fspath, paths))
        raise MergeError(f"weights={factors} must be one finite number for each adapter: {names}")
    return factors


def _mergeable(paths: Sequence[str | PathLike[str]], alpha: float | None) -> list[PeftFiles]:
    found = read_several(paths, alpha)
    agreed({files.where: files.base for files in found})
    for files in found:
        if files.config.get("alora_invocation_tokens"):
            raise CheckpointError(f"{files.where} is aLoRA: it acts only after its invocation tokens, as no weight can")
    return found


def _check_place(source: Checkpoint, where: Path) -> None:
    if where.exists() or where.is_symlink():
        raise CheckpointError(f"{where} exists already. Choose another directory: a merge overwrites nothing.")
    if where.resolve().is_relative_to(source.path.resolve()):
        raise CheckpointError(f"{where} is inside the base {source.path}. Choose a directory outside of it.")


def _check_space(parent: Path, needed: int) -> None:
    there = next(folder for folder in (parent, *parent.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed + _SPARE:
        raise StorageError(f"{there} has {free / 1e9:.1f} GB free, and the merged model needs {needed / 1e9:.1f} GB")


def _rounding(kind: str, seed: int) -> Callable[[str], Rounding]:
    """How a tensor is rounded, by its name: stochastic rounding draws different numbers for each."""

    def nearest(name: str) -> Rounding:
        return lambda exact, dtype, _: exact.astype(dtype, copy=False)

    def stochastic(name: str) -> Rounding:
        own = jax.random.fold_in(jax.random.key(seed), crc32(name.encode()))

        def round_(exact: np.ndarray, dtype: np.dtype[Any], position: int) -> np.ndarray:
            if dtype.itemsize >= exact.dtype.itemsize:
                return exact.astype(dtype, copy=False)
            # A tensor may have more entries than 32 bits count.
            key = jax.random.fold_in(jax.random.fold_in(own, position >> 32), position & 0xFFFFFFFF)
            return np.asarray(round_stochastically(jnp.asarray(exact), dtype, key))

        return round_

    return nearest if kind == "nearest" else stochastic


def _items(source: Checkpoint, planned: Plan, rounding: Callable[[str], Rounding]) -> list[tuple[Shard, list[Item]]]:
    """What every shard of the result holds."""

    def item(tensor: Tensor) -> Item:
        change = planned.changes.get(tensor.name)
        if change is None or change.empty:
            return Item(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, tensor.pieces())
        if change.value is not None and change.replaces(tensor):
            return new_item(tensor.name, change.value)
        return changed(tensor, change, rounding(tensor.name))

    shards = [(shard, [item(tensor) for tensor in shard.tensors]) for shard in source.shards]
    tensors = source.tensors
    for name, (start, change) in planned.copies.items():
        copy = changed(tensors[start], change, rounding(name))._replace(name=name)
        next(items for shard, items in shards if shard.path == tensors[start].file).append(copy)
    shards[-1][1].extend(new_item(name, value) for name, value in planned.added.items())
    return shards


def _copy_others(source: Checkpoint, planned: Plan, beside: Path) -> None:
    for file in source.others:
        target = beside / file
        target.parent.mkdir(parents=True, exist_ok=True)
        with opened(source.path / file) as given, target.open("xb") as copy:
            shutil.copyfileobj(given, copy)
    config = source.config
    if planned.untied:
        config = untied_config(config)
    if planned.vocabulary is not None:
        config = resized_config(config, planned.vocabulary)
    if config is not source.config:
        dump(beside / CONFIG, config)


def _write(
    source: Checkpoint,
    shards: list[tuple[Shard, Mapping[str, str], list[Item]]],
    beside: Path,
    total: int,
    progress: Callable[[int, int], None],
) -> None:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for shard, metadata, items in shards:
        write_file(beside / shard.path.name, metadata, items, advance, threads=_THREADS)
    if source.index is not None:
        weight_map = {item.name: shard.path.name for shard, _, items in shards for item in items}
        metadata = {**(source.index.get("metadata") or {}), "total_size": total}
        dump(beside / INDEX, {**source.index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
