"""`lora_jax.peft.load`: a PEFT adapter into a JAX model; every tensor finds its place, or is listed."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from os import PathLike
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.base import check_choice, check_values
from lora_jax.adapter.by_path import check_parameters
from lora_jax.adapter.site import Sites
from lora_jax.adapter.updates import Update
from lora_jax.errors import CheckpointError, listed, nearest
from lora_jax.io.formats.resolve import is_flat
from lora_jax.io.names import layouts
from lora_jax.io.names.known import find_names
from lora_jax.io.names.names import Names
from lora_jax.io.names.torch_model import Place, TorchModel, is_tied, torch_model
from lora_jax.io.peft.base import recorded_for
from lora_jax.io.peft.config import peft_type_of
from lora_jax.io.peft.factors import EMPTY, FactorsReader, ModulePart
from lora_jax.io.peft.files import PeftFiles
from lora_jax.io.peft.match import saves, targets
from lora_jax.io.peft.module import Module
from lora_jax.io.peft.modules_to_save import FullTensorReader
from lora_jax.io.peft.read import read_peft
from lora_jax.io.peft.rename import resolved
from lora_jax.methods import ALora
from lora_jax.paths import named_leaves


class Unmatched(NamedTuple):
    """What `load(..., strict=False)` left out.

    Attributes:
      missing: modules that the adapter's config names and the model has, but the file does not.
      unexpected: modules and tensors of the file that the model does not have.
      mismatched: modules and tensors that are shaped differently, with both shapes.

    Example:
      >>> left_out = Unmatched(missing=(), unexpected=("layers.7.q_proj",), mismatched=())
      >>> any(left_out), left_out.unexpected
      (True, ('layers.7.q_proj',))
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


@overload
def load(
    path: str | PathLike[str],
    params: Any,
    sites: Sites,
    names: Names | str | None = None,
    *,
    subfolder: str | None = None,
    alpha: float | None = None,
    base: Literal["same", "any"] = "same",
    strict: Literal[True] = True,
) -> Adapter: ...
@overload
def load(
    path: str | PathLike[str],
    params: Any,
    sites: Sites,
    names: Names | str | None = None,
    *,
    subfolder: str | None = None,
    alpha: float | None = None,
    base: Literal["same", "any"] = "same",
    strict: Literal[False],
) -> tuple[Adapter, Unmatched]: ...
def load(
    path: str | PathLike[str],
    params: Any,
    sites: Sites,
    names: Names | str | None = None,
    *,
    subfolder: str | None = None,
    alpha: float | None = None,
    base: Literal["same", "any"] = "same",
    strict: bool = True,
) -> Adapter | tuple[Adapter, Unmatched]:
    """Read an adapter that PyTorch PEFT wrote, or a tool that stores LoRA's factors in its own way (`docs/files.md`).

    Unlike in PEFT, a tensor that fits nothing is an error, and so is a module that the config names and the file lacks.
    As in PEFT, factors become float32 whatever they are stored in.

    Args:
      path: the directory that `save_pretrained` wrote, or a `.safetensors` file.
      params: the base's parameters; left untouched. Values are needed only for DoRA, and where the file holds whole
        tables of the base, to see whether they changed; otherwise `jax.ShapeDtypeStruct` leaves do.
      sites: from `find_sites`.
      names: what PyTorch calls the parameters: a `Names`, the name of a known map (`"lora_jax"`, `"hf_flax"`,
        `"hf_flax_gpt2"`, `"tunix"`, `"gemma"`, ...), or None for the identity: `layers_0/attn/query/kernel` is
        `layers.0.attn.query`.
      subfolder: name of an adapter in a subdirectory.
      alpha: the `lora_alpha` of the training, for modules whose scale nothing tells: a file without a config, without
        `lora_adapter_metadata` (diffusers) and without `.alpha` tensors (kohya, ComfyUI).
      base: `"any"` takes parameters with other values than those that `save` was given as `params`, if it was.
      strict: raise if anything is left over. If False, return what was left out instead.

    Returns:
      The adapter: a `LowRank` per adapted parameter (`Dora` where the file has magnitudes, `ALora` where it has
      invocation tokens, `AdaLora` or `Vera` if its `peft_type` says so), a `Shift` for each bias on B, a `Replace` per
      parameter stored whole and `Rows` for trained tokens; without `strict` also an `Unmatched`. Layers of a stack that
      the file leaves out, or that have lower ranks, are padded with zeros, which changes nothing. Of a module that
      PyTorch fuses, each parameter has a copy of A and its outputs of B, without the terms that are zero for it and not
      for others.

    Raises:
      CheckpointError: the file is damaged, does not fit the model, or holds what cannot be represented; nothing tells
        its scale, or two things contradict each other; it was saved with another base, or is merged into this one.
      MatchError: the map gives two parameters the same name.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, tempfile
      >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
      >>> sites = lora.find_sites(lambda p, x: x @ p["dense"]["kernel"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="dense"), params, sites)
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> lora.peft.save(folder, adapter)
      >>> loaded = lora.peft.load(folder, params, sites)
      >>> bool((loaded["dense/kernel"].a == adapter["dense/kernel"].a).all()), float(loaded["dense/kernel"].scale)
      (True, 2.0)
    """
    check_choice(base)
    files = read_peft(path, subfolder, alpha=alpha)
    files.check_scales()
    leaves, _ = named_leaves(params)
    reader = _Reader(files, leaves, sites, find_names(names))
    adapter, unmatched = reader.adapter()
    check_parameters(adapter, leaves)
    if base == "same":
        check_values(files.where, recorded_for(files.base, leaves), leaves, adapter)
    if not strict:
        return adapter, unmatched
    if any(unmatched):
        raise CheckpointError(reader.complaint(unmatched))
    if not adapter:
        raise CheckpointError(f"{files.where} holds nothing for these parameters")
    return adapter


def load_like(
    path: str | PathLike[str],
    like: Adapter,
    shapes: Mapping[str, Any],
    names: Names | str | None = None,
    *,
    alpha: float | None = None,
) -> tuple[Adapter, dict[str, float]]:
    """Read an adapter that PyTorch PEFT wrote for the base of another adapter, without that base.

    Args:
      path: as for `load`.
      like: an adapter with an update for every parameter that the file changes, DoRA's where that has magnitudes.
      shapes: shapes and dtypes of the base's parameters by path.
      names: as for `load`.
      alpha: likewise.

    Returns:
      The adapter, and samples of its base's values by path, where the file has some.

    Raises:
      CheckpointError: as for `load`.
      MatchError: likewise.
    """
    sites = Sites([update.site for update in like.values() if update.site.kind != "full"], tuple(shapes))
    files = read_peft(path, alpha=alpha)
    reader = _Reader(files, shapes, sites, find_names(names), like)
    adapter, unmatched = reader.adapter()
    if any(unmatched) or not adapter:
        raise CheckpointError(reader.complaint(unmatched))
    return adapter, recorded_for(files.base, shapes)


class _Reader:
    """One adapter on its way into one model."""

    def __init__(
        self,
        files: PeftFiles,
        leaves: Mapping[str, Any],
        sites: Sites,
        names: Names,
        like: Mapping[str, Update] = EMPTY,
    ):
        self.leaves, self.sites, self.names = leaves, sites, names
        self.torch_model: TorchModel = torch_model(names, sites)
        self.files = resolved(files, self.torch_model.owners())
        config = files.config
        dropout, seed = config.get(peft_type_of(config).dropout) or 0.0, config.get("projection_prng_key") or 0
        self.factors = FactorsReader(files.where, leaves, float(dropout), seed, like)
        self.unexpected: list[str] = []
        self.mismatched: list[str] = []

    def adapter(self) -> tuple[Adapter, Unmatched]:
        """The adapter, and what is left over."""
        found: dict[str, list[ModulePart]] = {}
        placed = self._placed()
        for name, (places, owner) in placed.items():
            module = _shaped(self.files.whole(owner), places[0])
            for place in places if self._fits(name, places, module) else ():
                scale = self.files.scale(owner, name, _experts(place))
                each = self.factors.part(name, place, module, scale)
                found.setdefault(place.site.path, []).extend([] if each is None else [each])
        found = {path: each for path, each in found.items() if each}
        updates: dict[str, Any] = {path: self.factors.update(self.sites[path], each) for path, each in found.items()}
        shifts = [shift for path, each in found.items() for shift in self.factors.shift(self.sites[path], each)]
        if sequence := self.files.config.get("alora_invocation_tokens"):
            updates = {path: ALora.after(update, sequence) for path, update in updates.items()}
        updates |= {shift.site.path: shift for shift in shifts}
        full = FullTensorReader(self.files, self.leaves, self.sites, self.names, self.torch_model)
        updates |= full.updates(updates.keys())
        unexpected, mismatched = self.unexpected + full.unexpected, self.mismatched + full.mismatched
        missing = self._missing({*placed, *self.files.modules})
        return Adapter(updates), Unmatched(missing, tuple(unexpected), tuple(mismatched))

    def complaint(self, unmatched: Unmatched) -> str:
        """All that is left over, with the nearest names."""
        lines = [f"{self.files.where} does not fit these parameters."]
        if unmatched.unexpected:
            first = unmatched.unexpected[0]
            known = self.torch_model.tensors if first in self.files.saved else self.torch_model.modules
            near = nearest(first, known, separator=".")
            lines.append(f"Unexpected: {listed(unmatched.unexpected, '; ')}. Nearest to {first}: {near}.")
            if is_flat(first):
                lines.append("These are kohya's names, with _ for every dot: none of this model's is one of them.")
        if unmatched.missing:
            lines.append(f"Missing, although its config names them: {listed(unmatched.missing, '; ')}.")
        if unmatched.mismatched:
            lines.append(f"Shaped differently: {listed(unmatched.mismatched, '; ')}.")
        if self.torch_model.unnamed:
            path, error = next(iter(self.torch_model.unnamed.items()))
            lines.append(f"{len(self.torch_model.unnamed)} sites have no PyTorch name, e.g. {path}: {error}")
        return "\n".join([*lines, "Pass the map of names for this model (names=), or strict=False to leave these out."])

    def _placed(self) -> dict[str, tuple[tuple[Place, ...], str]]:
        """Places and entries of the file, by the name that PEFT's patterns go by."""
        modules = dict(self.files.modules)
        found: dict[str, tuple[tuple[Place, ...], str]] = {}
        stacked = {name for name, module in modules.items() if module.kind == "parameter"}
        if stacked:
            shapes = self.torch_model.shapes(self.names)
            for name, owner in self.files.owners(shapes, ordered=bool(tuple(self.names.rules))).items():
                found[name] = (
                    self.torch_model.modules.get(name) or self.torch_model.modules[name.removesuffix(".weight")],
                    owner,
                )
        heads = self._tied_heads(modules)
        for name in modules:
            places = self.torch_model.modules.get(name)
            if name in stacked or name in heads:
                continue
            if places is None or places[0].target.parameter:
                self.unexpected.append(name)
            else:
                found[name] = (places, name)
        return found

    def _tied_heads(self, modules: Mapping[str, Module]) -> set[str]:
        """Output heads that are the embedding; PEFT stores the embedding's factors for them again, transposed."""
        heads = set()
        for name, (place, *_) in self.torch_model.modules.items():
            head = self.names.tied.get(name, "")
            embedding, other = modules.get(name), modules.get(head)
            if embedding is None and other is None:
                continue
            if not is_tied(place.site, name, self.names, self.torch_model):
                continue
            same = (
                embedding is not None and other is not None
                and np.array_equal(other.a, embedding.b.T) and np.array_equal(other.b, embedding.a.T)
            )  # fmt: skip
            if not same:
                only = f"{name} alone" if other is None else f"{head}, and not {name} alike"
                raise CheckpointError(
                    f"{self.files.where} adapts {only}, but here {place.site.path!r} is one table for both look-up and "
                    "output head, and an update of it acts on both. PEFT applies it to one use only, unless trained "
                    "with ensure_weight_tying=True."
                )
            heads.add(head)
        return heads

    def _fits(self, name: str, places: tuple[Place, ...], module: Module) -> bool:
        """Whether a module has the shapes that its parameters need; if not, that is noted."""
        site, target = places[0]
        wanted = layouts.shapes(site, target, len(module.a) // _experts(places[0]))
        if (module.a.shape, module.b.shape) != wanted:
            given = f"A {module.a.shape} and B {module.b.shape}"
            self.mismatched.append(f"{name} has {given}, where {site.path} needs {wanted[0]} and {wanted[1]}")
            return False
        known = sum(place.target.part.slice.count for place in places)
        if known < target.part.slice.total:
            named = " and ".join(place.site.path for place in places)
            self.mismatched.append(
                f"{name} has {target.part.slice.total} outputs, and only {known} of them are those of sites ({named})"
            )
        return known == target.part.slice.total

    def _missing(self, present: set[str]) -> tuple[str, ...]:
        """Modules that the config adapts or saves, and that the file does not have."""
        config = self.files.config
        saved = {name.rpartition(".")[0] for name in self.files.saved}
        absent: list[str] = []
        for entry in config.get("modules_to_save") or ():
            # A module may hold others, as RoBERTa's classifier does: all of them are saved.
            inside = sorted(owner for owner in self.torch_model.owners() if saves([entry], f"{owner}.weight"))
            lacking = [owner for owner in inside if owner not in saved]
            absent += [entry] if lacking and lacking == inside else lacking
        # What layers_to_transform leaves out is left out on purpose.
        if config.get("layers_to_transform") is None:
            absent += [
                name for name, (place, *_) in self.torch_model.modules.items()
                if name not in present and not place.target.parameter
                and targets(config.get("target_modules"), name) and not targets(config.get("exclude_modules"), name)
                and not saves(config.get("modules_to_save"), f"{name}.weight")
            ]  # fmt: skip
        return tuple(absent)


def _experts(place: Place) -> int:
    return place.site.batch_shape[-1] if place.target.parameter else 1


def _shaped(module: Module, place: Place) -> Module:
    """The module with LoRA's shapes: its own part of VeRA's projections, and a window where AdaLoRA is flat."""
    a, b = layouts.shapes(place.site, place.target, len(module.a))
    cut = module.cut(a[1])
    if cut.form != "adalora" or (cut.a.size, cut.b.size) != (prod(a), prod(b)):
        return cut
    return replace(cut, a=cut.a.reshape(a), b=cut.b.reshape(b))
