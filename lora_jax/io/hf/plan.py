"""What adapters do to a checkpoint: every module finds its tensors, and tied tables stay tied or are told apart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import numpy as np

from lora_jax.errors import CheckpointError, listed, nearest
from lora_jax.io.formats.resolve import is_flat
from lora_jax.io.hf.changes import Change, Part, bias_part, holds, merged_with
from lora_jax.io.hf.folder import Checkpoint
from lora_jax.io.hf.identity import warn_of_other_base
from lora_jax.io.hf.tensors import Tensor
from lora_jax.io.hf.ties import is_head, resolve_ties, tied_tables
from lora_jax.io.hf.vocabulary import new_vocabulary
from lora_jax.io.peft.config import setting
from lora_jax.io.peft.files import PeftFiles, base_tables, full_tensors, table_name, token_indices, token_rows
from lora_jax.io.peft.match import saves
from lora_jax.io.peft.module import Module, matrices
from lora_jax.io.peft.rename import resolved

# Models whose dense layers are Conv1D, all but the head.
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
# Models whose stacked experts PEFT takes for (experts, in, out): it reads that off the module.
_EXPERTS_IN_FIRST = {"gpt_oss"}
_RENAMED = (
    "Or transformers renames these modules when it loads the checkpoint, as it does with experts and vision towers: "
    "then save the base once as the model holds it, model.save_pretrained(path, save_original_format=False), and merge "
    "into that."
)


@dataclass(frozen=True)
class Plan:
    """What is written.

    Attributes:
      changes: by the name of the base's tensor.
      copies: new tensors that start as one of the base's: its name and the change, by new name.
      untied: whether the config must say that tables are no longer tied.
      added: new tensors, trained whole, that the base does not have.
      vocabulary: the new number of tokens, where training changed it.
    """

    changes: Mapping[str, Change]
    copies: Mapping[str, tuple[str, Change]]
    untied: bool
    added: Mapping[str, np.ndarray] = field(default_factory=dict)
    vocabulary: int | None = None


def plan(base: Checkpoint, adapters: Sequence[tuple[PeftFiles, float]], untie: bool) -> Plan:
    """Place every tensor of the adapters.

    Args:
      base: the checkpoint.
      adapters: each with its weight.
      untie: whether tied tables may become two.

    Raises:
      CheckpointError: something fits nothing, or cannot be merged exactly.
    """
    tensors = base.tensors
    found: dict[str, Change] = {}
    for files, weight in adapters:
        for name, change in PlacedAdapter(base, files, weight).changes().items():
            found[name] = merged_with(found[name], change, name) if name in found else change
    tied = tied_tables(base)
    known = {*tensors, *(tied[:2] if tied else ())}
    added = {name: change.value for name, change in found.items() if name not in known and change.value is not None}
    planned = Plan(*resolve_ties(base, {name: change for name, change in found.items() if name not in added}, untie))
    placed = {name: (tensors[name], change) for name, change in planned.changes.items()}
    placed |= {name: (tensors[source], change) for name, (source, change) in planned.copies.items()}
    vocabulary = new_vocabulary(base, placed)
    for name, (tensor, change) in placed.items():
        change.check(change.shaped(tensor) if vocabulary and name in vocabulary.tables else tensor)
    return replace(planned, added=added, vocabulary=vocabulary.size if vocabulary else None)


def on_base(files: PeftFiles, base: Checkpoint) -> PeftFiles:
    """The adapter under the names of a checkpoint's modules, where it has names of a wrapped model or of kohya's.

    Raises:
      CheckpointError: a name means several modules, or several names mean one.
    """
    warn_of_other_base(files.where, files.config, base.path)
    tied = tied_tables(base)
    known = {name.rpartition(".")[0] for name in (*base.tensors, *(tied[:2] if tied else ()))}
    found = resolved(files, known)
    if lost := sorted(name for name in found.modules.keys() - known if is_flat(name)):
        raise CheckpointError(
            f"{files.where}: {listed(lost)} are kohya's names, with _ for every dot, and no modules of {base.path} "
            "flattened. The adapter belongs to another base, or to one that calls its modules otherwise."
        )
    return found


class PlacedAdapter:
    """One adapter on its way into one checkpoint.

    Attributes:
      place: from a name in the adapter to the one in the checkpoint.
    """

    def __init__(self, base: Checkpoint, files: PeftFiles, weight: float):
        self.base, self.files, self.weight = base, files, weight
        self._tensors = base.tensors
        self.place = _renaming(base, files)
        self.model = str(base.config.get("model_type"))

    def changes(self) -> dict[str, Change]:
        """Changes by tensor."""
        untouched = self.untouched()
        found = {
            self.place(name): self._saved(name, value)
            for name, value in full_tensors(self.files.saved).items() if name not in untouched
        }  # fmt: skip
        for name, rows in token_rows(self.files.saved).items():
            table = self.place(f"{name}.weight")
            found[table] = self._rows(name, rows, found.get(table, Change(shared=True)))
        for name, (entry, module) in self._modules().items():
            tensor = self.tensor(name)
            before = found.get(tensor.name, Change())
            change = self._low_rank(name, entry, module, before.shaped(tensor))
            if before.rows:
                raise CheckpointError(f"{self.files.where}: {name} has both factors and trained rows; merge it in PEFT")
            found[tensor.name] = replace(change, value=before.value, shared=before.shared)
            if module.b_bias is not None:
                bias = self._bias(name)
                scale = self.weight * self.files.scale(entry)
                before = found.get(bias, Change())
                found[bias] = replace(before, parts=(*before.parts, bias_part(module.b_bias, scale)))
        return found

    def untouched(self) -> set[str]:
        """Tables that the file has (save_embedding_layers, or beside their factors) as they are in the base."""
        tables = base_tables(self.files).items()
        return {name for name, value in tables if holds(self.tensor(name), value)}

    def _modules(self) -> dict[str, tuple[str, Module]]:
        """Entry and module of the file by the full name of the weight."""
        shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        try:
            owners = self.files.owners(shapes)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {_RENAMED}") from None
        modules = self.files.modules
        named = {f"{name}.weight": (name, module) for name, module in modules.items() if module.kind != "parameter"}
        return named | {parameter: (entry, modules[entry]) for parameter, entry in owners.items()}

    def tensor(self, name: str) -> Tensor:
        """The base's tensor; for a head that is tied to the table, the table."""
        placed = self.place(name)
        if placed in self._tensors:
            return self._tensors[placed]
        tied = tied_tables(self.base)
        if tied and tied.head == placed:
            return self._tensors[tied.table]._replace(name=placed)
        raise CheckpointError(f"{self.files.where}: the base has no {placed}")

    def _low_rank(self, name: str, entry: str, module: Module, tensor: Tensor) -> Change:
        parameter = module.kind == "parameter"
        experts = tensor.shape[0] if parameter and len(tensor.shape) == 3 else 1
        scale = self.files.scale(entry, name if parameter else None, experts)
        where = f"{self.files.where}: {name}"
        left, right, last = matrices(where, module, tensor.shape, self._transposed(name, module, tensor))
        part = Part(self.weight * scale, left, right)
        if not len(module.a):
            # AdaLoRA has pruned every term.
            return Change()
        if module.magnitude is None:
            return Change(parts=(part,))
        if self.weight != 1:
            raise CheckpointError(f"{where} uses DoRA, which rescales the weight itself: its weight must be 1")
        return Change(parts=(part,), magnitude=module.magnitude, outputs_last=last)

    def _transposed(self, name: str, module: Module, tensor: Tensor) -> bool | None:
        """Whether a square weight has its outputs last; the shape tells of all others."""
        conv = module.kind == "conv" or (module.kind == "linear" and len(tensor.shape) != 2)
        if tensor.shape[-1:] != tensor.shape[-2:-1] or conv or module.kind == "embedding":
            return None
        if module.kind == "parameter":
            return len(tensor.shape) == 3 and self.model in _EXPERTS_IN_FIRST
        if self.model in _CONV1D:
            return not is_head(tensor.name)
        flag = bool(setting(self.files.config, "fan_in_fan_out"))
        if self._layouts and flag not in self._layouts:
            raise CheckpointError(
                f"{self.files.where}: {name} is square, and its layout cannot be told: fan_in_fan_out={flag} in the "
                "config contradicts the shapes of other layers, as PEFT keeps one such setting for all of them. Merge "
                "it in PEFT (merge_and_unload)."
            )
        return flag

    @cached_property
    def _layouts(self) -> set[bool]:
        """How the linear weights that are not square lie: True for outputs last."""
        found = set()
        for name, module in self.files.modules.items():
            tensor = self._tensors.get(self.place(f"{name}.weight"))
            if module.kind != "linear" or tensor is None or len(tensor.shape) != 2 or is_head(tensor.name):
                continue
            shape = module.features(prod(tensor.shape))
            if shape[0] != shape[1]:
                found.add(tensor.shape == shape[::-1])
        return found

    def _bias(self, name: str) -> str:
        bias = self.place(f"{name.removesuffix('.weight')}.bias")
        if bias not in self._tensors:
            raise CheckpointError(
                f"{self.files.where}: {name} has a bias on B (lora_bias), but the base has no {bias} to add it to. "
                "PEFT refuses to merge it too."
            )
        return bias

    def _saved(self, name: str, value: np.ndarray) -> Change:
        if self.weight != 1:
            raise CheckpointError(
                f"{self.files.where}: {name} is stored whole, differs from the base's and replaces it: this "
                "adapter's weight must be 1"
            )
        return Change(value=value, shared=not saves(self.files.config.get("modules_to_save"), name))

    def _rows(self, name: str, rows: np.ndarray, before: Change) -> Change:
        if self.weight != 1:
            raise CheckpointError(f"{self.files.where}: {name} has trained rows: this adapter's weight must be 1")
        numbers = token_indices(self.files.where, self.files.config, name, rows)
        size = before.shaped(self.tensor(f"{name}.weight")).shape[0]
        if max(numbers) >= size:
            raise CheckpointError(
                f"{self.files.where}: trainable_token_indices of {name} leave its table of {size} rows"
            )
        return replace(before, rows=tuple(zip(numbers, rows, strict=True)))


def _beside_images(name: str) -> str:
    """What the Hub's files call a tensor of a model that sees images.

    >>> _beside_images("model.language_model.norm.weight"), _beside_images("model.vision_tower.norm.weight")
    ('language_model.model.norm.weight', 'vision_tower.norm.weight')
    """
    inner = name.removeprefix("model.")
    return (
        inner.replace("language_model.", "language_model.model.", 1) if inner.startswith("language_model.") else inner
    )


def _renaming(base: Checkpoint, files: PeftFiles) -> Callable[[str], str]:
    """From the adapter's names to the checkpoint's.

    It may lack the outermost module, or have one more, or name what is beside images as files of the Hub do.
    """
    tied = tied_tables(base)
    known = {*base.tensors, *(tied[:2] if tied else ())}
    wanted = _names(files)
    tries: list[Callable[[str], str]] = [lambda name: name, lambda name: name.partition(".")[2], _beside_images]
    tries += [lambda name, first=first: f"{first}.{name}" for first in sorted({name.split(".")[0] for name in known})]

    def place(rename: Callable[[str], str], name: str) -> str:
        return name if name in known or rename(name) not in known else rename(name)

    spots = {tuple(place(rename, name) for name in wanted): rename for rename in reversed(tries)}
    hits = {places: sum(name in known for name in places) for places in spots}
    most = max(hits.values(), default=0)
    equal = [places for places, count in hits.items() if count == most]
    if len(equal) > 1 and most:
        one, other = (
            next(here for here, there in zip(*pair, strict=True) if here != there) for pair in (equal[:2], equal[1::-1])
        )
        raise CheckpointError(
            f"{files.where} fits {base.path} in several places: {one} as well as {other}. Give the checkpoint of the "
            "part that the adapter was trained on."
        )
    best = spots[equal[0]]
    new = {name for name in files.saved if saves(files.config.get("modules_to_save"), name)}
    lost = [name for name in wanted if place(best, name) not in known and name not in new]
    if lost:
        raise CheckpointError(
            f"{base.path} has no {listed(lost)}, which {files.where} changes. "
            f"Nearest: {nearest(lost[0], known, separator='.')}. "
            f"The adapter belongs to another base. {_RENAMED}"
        )
    return lambda name: place(best, name)


def _names(files: PeftFiles) -> list[str]:
    """Every tensor of the base that an adapter names; of experts, any parameter would do."""
    modules = [f"{name}.weight" for name, module in files.modules.items() if module.kind != "parameter"]
    return [*modules, *map(table_name, files.saved)]
