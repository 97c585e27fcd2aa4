"""extract_checkpoint: the PEFT adapter nearest to a fine-tuned Hugging Face checkpoint, tensor by tensor."""

import re
from collections.abc import Callable, Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.compose.extract import ExtractReport, ExtractRow, Truncation, halves, row
from lora_jax.errors import CheckpointError, MatchError, nearest
from lora_jax.io.hf.folder import Checkpoint, open_checkpoint
from lora_jax.io.hf.tensors import FLOATS, Tensor
from lora_jax.io.peft import match
from lora_jax.io.peft.base import weights_of
from lora_jax.io.peft.files import PeftFiles
from lora_jax.io.peft.module import Module
from lora_jax.io.peft.write import write_peft

_WEIGHT, _BIAS = ".weight", ".bias"
_TABLE = re.compile(r"(embed\w*|\w*embedding\w*|wte|wpe|lm_head|head|score|classifier|embed_out)(\.\d+)?")
"""The last component of modules that are tables or heads, which are no targets by default, as in PEFT."""


def extract_checkpoint(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    out: str | PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    targets: str | Collection[str] | None = None,
    train: Collection[str] = (),
    bias: bool = False,
    fan_in_fan_out: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExtractReport:
    """Write the PEFT adapter nearest to what fine-tuning made of a checkpoint: `lora_jax.extract` without a model.

    Both checkpoints are read tensor by tensor, and memory holds one of them, its singular vectors and the adapter.

    Args:
      base: the directory of the checkpoint before fine-tuning, as `save_pretrained` writes it.
      tuned: that of the checkpoint afterwards, of the same tensors.
      out: the directory to create.
      rank, energy, error: how much to keep of every weight, as in `lora_jax.extract`.
      targets: modules to give factors to, as in PEFT's `target_modules`; by default every one with a matrix, but
        look-up tables and output heads.
      train: modules to take over in full, as in PEFT's `modules_to_save`: embeddings, norms, heads.
      bias: take over the biases in full.
      fan_in_fan_out: the matrices are `[in, out]`, as in GPT-2's `Conv1D`.
      progress: called with the tensors done and all of them.

    Returns:
      A report of what is lost at every tensor that differs.

    Raises:
      CheckpointError: a checkpoint cannot be read, the two do not fit, or they do not differ.
      ConfigError: nothing says how much to keep.
      MatchError: a name hits nothing.
    """
    cut = Truncation(rank=rank, energy=energy, error=error)
    before, after = open_checkpoint(Path(base)), open_checkpoint(Path(tuned))
    tensors = _fitting(before, after)
    modules = [name.removesuffix(_WEIGHT) for name, tensor in tensors.items() if _is_matrix(name, tensor)]
    chosen = _chosen(modules, targets, train)
    saves = lambda name: match.saves(train, name) or (bias and name.endswith(_BIAS))  # noqa: E731
    _check_train(train, tensors)
    made: dict[str, Module] = {}
    saved: dict[str, np.ndarray] = {}
    rows: list[ExtractRow] = []
    for done, (name, tensor) in enumerate(tensors.items(), 1):
        weight, new = _value(tensor), _value(after.tensors[name])
        progress(done, len(tensors))
        if np.array_equal(weight, new):
            continue
        difference, module = new - weight, name.removesuffix(_WEIGHT)
        if saves(name):
            saved[name] = new.astype(FLOATS[tensor.dtype])
            rows.append(row(name, "full", None, *map(jnp.asarray, (weight, difference, difference))))
        elif module in chosen and name.endswith(_WEIGHT):
            made[module] = _module(difference, cut, fan_in_fan_out)
            delta = made[module].b @ made[module].a
            delta = delta.T if fan_in_fan_out else delta
            count = len(made[module].a)
            rows.append(row(name, "low rank", count, *map(jnp.asarray, (weight, difference, delta))))
        else:
            rows.append(row(name, "left out", None, *map(jnp.asarray, (weight, difference, 0 * difference))))
    if not made:
        raise CheckpointError(
            f"{after.path} does not differ from {before.path} in any targeted matrix: nothing to extract"
        )
    config = _config(made, [module for module in modules if module not in made], train, bias, fan_in_fan_out)
    known = weights_of({f"{module}{_WEIGHT}": tensors[f"{module}{_WEIGHT}"].mapped() for module in made})
    write_peft(out, PeftFiles({**config, "base_model_name_or_path": str(base)}, made, saved, base=known))
    return ExtractReport(tuple(sorted(rows, key=lambda each: each.path)))


def _fitting(before: Checkpoint, after: Checkpoint) -> dict[str, Tensor]:
    """The floating-point tensors of the base, all of which the other checkpoint has."""
    for name, tensor in before.tensors.items():
        other = after.tensors.get(name)
        if other is None:
            raise CheckpointError(f"{after.path} has no {name}; nearest: {nearest(name, after.tensors, separator='.')}")
        if other.shape != tensor.shape:
            raise CheckpointError(f"{name} is {tensor.shape} in {before.path} and {other.shape} in {after.path}")
    floats = {name: tensor for name, tensor in before.tensors.items() if tensor.dtype in FLOATS}
    return {name: tensor for name, tensor in floats.items() if after.tensors[name].dtype in FLOATS}


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return name.endswith(_WEIGHT) and len(tensor.shape) == 2


def _chosen(modules: list[str], targets: str | Collection[str] | None, train: Collection[str]) -> set[str]:
    if targets is None:
        found = {module for module in modules if not _TABLE.fullmatch(module.rpartition(".")[2])}
    else:
        for wanted in [targets] if isinstance(targets, str) else targets:
            if not any(match.targets(targets if isinstance(targets, str) else [wanted], module) for module in modules):
                raise MatchError(
                    f"targets: {wanted!r} hits no matrix; nearest: {nearest(wanted, modules, separator='.')}"
                )
        found = {module for module in modules if match.targets(targets, module)}
    return {module for module in found if not match.saves(train, f"{module}{_WEIGHT}")}


def _check_train(train: Collection[str], tensors: Mapping[str, Tensor]) -> None:
    for wanted in train:
        if not any(match.saves([wanted], name) for name in tensors):
            raise MatchError(f"train: {wanted!r} hits no tensor; nearest: {nearest(wanted, tensors, separator='.')}")


def _value(tensor: Tensor) -> np.ndarray:
    """A tensor in float32."""
    count = int(np.prod(tensor.shape, dtype=np.int64))
    flat = np.fromfile(tensor.file, FLOATS[tensor.dtype], count, offset=tensor.begin)
    return flat.astype(np.float32).reshape(tensor.shape)


def _module(difference: np.ndarray, cut: Truncation, transposed: bool) -> Module:
    """PEFT's factors of a difference `[out, in]`."""
    found = cut.triplets(jnp.asarray(difference if transposed else difference.T))
    count = max(1, cut.count(np.asarray(found.values)))
    a, b = halves(found, count, count)
    return Module("linear", np.asarray(a), np.ascontiguousarray(np.asarray(b).T))


def _config(
    made: Mapping[str, Module], others: list[str], train: Collection[str], bias: bool, transposed: bool
) -> dict[str, Any]:
    """Scales of one: alpha is the rank, in every module its own."""
    ranks = {name: len(module.a) for name, module in made.items()}
    rank = max(ranks.values())
    patterns = {match.exact_key(name): each for name, each in ranks.items() if each != rank}
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": match.shortest(made, others),
        "rank_pattern": patterns, "alpha_pattern": patterns, "modules_to_save": sorted(train) or None,
        "bias": "all" if bias else "none", "fan_in_fan_out": transposed, "inference_mode": True,
    }  # fmt: skip
