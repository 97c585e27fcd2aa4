"""`lora_jax.peft.save`: an adapter as PyTorch PEFT would have written it, so that PEFT computes the same."""

import re
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.by_path import check_parameters
from lora_jax.adapter.checksum import warn_if_moved
from lora_jax.adapter.samples import sampled
from lora_jax.adapter.site import Site, Sites
from lora_jax.adapter.updates import Replace
from lora_jax.errors import CheckpointError
from lora_jax.io.names.known import find_names
from lora_jax.io.names.names import Names
from lora_jax.io.names.torch_model import is_tied, torch_model
from lora_jax.io.peft.base import base_of, modules_of
from lora_jax.io.peft.config import ADALORA, LORA, VERA, PeftType
from lora_jax.io.peft.experts import as_parameters, one_for_experts
from lora_jax.io.peft.factors import FactorsWriter, ScaledModule, Source
from lora_jax.io.peft.files import PeftFiles
from lora_jax.io.peft.match import saves, shortest, targets
from lora_jax.io.peft.module import Module
from lora_jax.io.peft.modules_to_save import FullTensorWriter, untied
from lora_jax.io.peft.peft_type import (
    TypeFields,
    adalora_fields,
    check_alike,
    exported,
    invocation_tokens,
    lora_fields,
    not_adalora,
    peft_types_for,
    vera_fields,
)
from lora_jax.io.peft.uniform import leveled, short_heads
from lora_jax.io.peft.write import write_peft
from lora_jax.methods import Dora, Rows, Shift, Vera
from lora_jax.paths import bias_beside, named_leaves
from lora_jax.processes import gathered, written_by_the_first


def save(
    path: str | PathLike[str],
    adapter: Adapter,
    names: Names | str | None = None,
    *,
    sites: Sites | None = None,
    params: Any = None,
    base_model: str | None = None,
    task_type: str | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    uniform: bool = False,
    overwrite: bool = False,
) -> None:
    """Write an adapter as a directory that PyTorch PEFT loads, and so vLLM and the rest of that world.

    Nothing of the base is written unless asked for: the file is as large as the adapter. PEFT writes the whole table
    when it adapts `embed_tokens` or `lm_head`.

    The file has the method's own type where PEFT has one. AdaLoRA becomes `ADALORA`, without pruned terms;
    `lora_jax.methods.trim` makes plain factors, for all that reads LoRA only. VeRA becomes `VERA` if all projections
    are slices of one pair, as PEFT has it: those that were read from such a file, and those that a seed draws for
    linear layers of one shape. Everything else is `LORA`, VeRA's projections included.

    Scales become `lora_alpha / r` per module, so that PEFT's scale is the same number. A stack of layers becomes a
    module per layer, a fused kernel one per part, each with its own copy of A. Parameters that PyTorch fuses become one
    module: they share their ranks where they have the same A, otherwise ranks add up, with zeros in B.

    Args:
      path: the directory to create.
      adapter: what to save; left untouched.
      names: what PyTorch calls the parameters, as for `load`.
      sites: every site of the model. With it, `target_modules` are the shortest endings that hit the adapted modules
        and nothing else; without, full names. Needed too where PyTorch fuses an adapted parameter with others.
      params: the base's parameters, needed for `save_embedding_layers`, for whole modules of which only a part
        was trained, and for DoRA on a part of a fused module. Samples of their values are noted in the file, so that
        `load` knows another base.
      base_model: `base_model_name_or_path` for the config.
      task_type: `task_type` for the config, such as `"CAUSAL_LM"`.
      save_embedding_layers: True writes the tables and heads of the base too. `"auto"` does so only if
        `base_model` is a local directory whose `config.json` has another `vocab_size`. False never does.
      uniform: plain LoRA with one rank, padded with zeros, one `lora_alpha` for all modules, and no patterns: for
        servers that take `lora_alpha / r` for every scale. Other scales are folded into B in float32.
      overwrite: replace an adapter that is there already.

    Raises:
      CheckpointError: `path` exists, or PEFT could not compute what the adapter computes.
      MatchError: an adapted parameter has no name, or two have the same.
      ParameterError: the adapter does not fit `params`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, tempfile
      >>> params = {"layers_0": {"query": {"kernel": jnp.ones((4, 3))}}}
      >>> fn = lambda p, x: x @ p["layers_0"]["query"]["kernel"]
      >>> sites = lora.find_sites(fn, params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="layers_0.query"), params, sites)
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> lora.peft.save(folder, adapter, sites=sites)
      >>> files = lora.peft.read_peft(folder)
      >>> files.config["target_modules"], files.modules["layers.0.query"].a.shape
      (['query'], (2, 4))
    """
    files = peft_files(
        gathered(adapter), names, sites=sites, params=params, base_model=base_model, task_type=task_type,
        save_embedding_layers=save_embedding_layers, uniform=uniform,
    )  # fmt: skip
    written_by_the_first(path, lambda: write_peft(path, files, overwrite=overwrite))


def peft_files(
    adapter: Adapter,
    names: Names | str | None = None,
    *,
    sites: Sites | None = None,
    params: Any = None,
    base_model: str | None = None,
    task_type: str | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    uniform: bool = False,
    base: Mapping[str, float] | None = None,
) -> PeftFiles:
    """What `save` writes, with the same arguments.

    Args:
      base: what another file has recorded of the base, as `base_of` has it; by default what `params` are.

    Raises:
      LoraError: as `save` does.
    """
    warn_if_moved([adapter])
    leaves = {} if params is None else named_leaves(params)[0]
    if leaves:
        check_parameters(adapter, leaves)
    types = (LORA,) if uniform else peft_types_for(adapter)
    writers = (_Writer(adapter, find_names(names), sites, leaves, peft_type) for peft_type in types)
    written = ((writer, writer.files(uniform=uniform)) for writer in writers)
    writer, files = next((writer, files) for writer, files in written if files is not None)
    if save_embedding_layers is True or (save_embedding_layers == "auto" and writer.full.resized(base_model)):
        files = PeftFiles(files.config, files.modules, {**writer.full.tables(writer.torch_model), **files.saved})
    extra: dict[str, Any] = {"base_model_name_or_path": base_model, "task_type": task_type}
    if uniform:
        extra["modules_to_save"] = short_heads(files.config["modules_to_save"] or (), files)
    known = base or base_of(leaves, sampled(leaves)) | writer.samples(leaves)
    return PeftFiles({**files.config, **extra}, files.modules, files.saved, base=known)


class _Writer:
    """One adapter on its way out, into a file of one `peft_type`."""

    def __init__(
        self, adapter: Adapter, names: Names, sites: Sites | None, leaves: Mapping[str, Any], peft_type: PeftType
    ):
        self.names, self.peft_type = names, peft_type
        plain = {path: exported(each, peft_type) for path, each in adapter.items()}
        self.low_rank = {path: each.factors for path, each in plain.items() if each is not None}
        self.outputs = {path: each.outputs for path, each in plain.items() if each is not None}
        self.seed = min((each.seed for each in adapter.values() if isinstance(each, Vera)), default=0)
        self.shifts = {path: each for path, each in adapter.items() if isinstance(each, Shift)}
        full = {path: each for path, each in adapter.items() if isinstance(each, (Replace, Rows))}
        others = sorted(adapter.keys() - self.low_rank.keys() - self.shifts.keys() - full.keys())
        if others:
            held = type(adapter[others[0]]).__name__
            raise CheckpointError(f"PEFT's files have no place for {others[0]!r}, which is a {held}")
        check_alike(adapter, self.low_rank, peft_type)
        self._check_biases()
        own = [update.site for update in adapter.values()]
        self.sites = sites or Sites([site for site in own if site.kind != "full"], tuple(adapter))
        self.targets = names.resolve((update.site for update in self.low_rank.values()), self.sites)
        self.torch_model = torch_model(names, self.sites)
        # Endings are short only against every other name: a module without one could end alike.
        self.complete = sites is not None and not self.torch_model.unnamed
        self.full = FullTensorWriter(full, names, self.sites, leaves, self.torch_model)
        self.factors = FactorsWriter(self.shifts, self.torch_model, leaves)
        # By the name that PEFT's patterns go by.
        self.made: dict[str, ScaledModule] = {}
        self.expert: ScaledModule | None = None
        self.ties = False

    def files(self, *, uniform: bool) -> PeftFiles | None:
        """Everything to write, in PEFT's layout; None if a file of this type cannot hold it."""
        modules: dict[str, Module] = {}
        stacks: dict[str, list[_Stacked]] = {}
        all_sources = self._sources()
        flat = (source for _, sources in all_sources.values() for source in sources)
        if self.peft_type is not LORA and not self._fits(flat):
            return None
        found = {name: self.factors.module(sources) for name, (_, sources) in all_sources.items()}
        self.made = {name: each for name, each in found.items() if each is not None}
        self.made = leveled(self.made) if uniform else self.made
        if self.peft_type is LORA:
            self.made, self.expert = one_for_experts(self.made)
        for name, made in [*self.made.items()]:
            order, sources = all_sources[name]
            if sources[0].target.parameter:
                stacks.setdefault(name.rpartition(".")[0], []).append(_Stacked(order, name, made.module))
            else:
                modules[name] = made.module
                self._tie(sources[0].update.site, name, made.module, modules)
        apart = as_parameters(modules.keys(), stacks) if self.peft_type is LORA else set()
        self.made = {f"{name}.weight" if name in apart else name: each for name, each in self.made.items()}
        plain = set(modules) - apart
        for owner, stacked in stacks.items():
            modules |= self._nested(owner, stacked)
        parameters = [each.name for stacked in stacks.values() for each in stacked]
        parameters = sorted([*parameters, *(f"{name}.weight" for name in apart)])
        typed = self._type_fields()
        if typed is None:
            return None
        config = self._config(plain, parameters) | typed.fields
        return PeftFiles(config, modules | typed.modules, self.full.saved)

    def samples(self, leaves: Mapping[str, Any]) -> dict[str, float]:
        """Of the base's weights, as PyTorch has them."""
        if self.names.fan_in_fan_out:
            return {}
        return modules_of(self.targets, {path: update.site for path, update in self.low_rank.items()}, leaves)

    def _fits(self, sources: Iterable[Source]) -> bool:
        """Whether a type other than LoRA has a place for everything: for stacks of experts none has."""
        experts = next((source.update.site.path for source in sources if source.target.parameter), None)
        if experts is not None and self.peft_type is ADALORA:
            raise not_adalora(experts, "a stack of experts")
        # VeRA's config has no ensure_weight_tying.
        return experts is None and not (self.peft_type is VERA and self.full.ties)

    def _type_fields(self) -> TypeFields | None:
        if self.peft_type is VERA:
            return vera_fields(self.made, self.seed)
        return adalora_fields(self.made) if self.peft_type is ADALORA else lora_fields(self.made, self.expert)

    def _sources(self) -> dict[str, tuple[tuple[int, int], list[Source]]]:
        """For each module its place in the map, and the updates that it is made of."""
        found: dict[str, tuple[tuple[int, int], list[Source]]] = {}
        for path, named in self.targets.items():
            update, outputs = jax.tree.map(np.asarray, (self.low_rank[path], self.outputs[path]))
            for place, target in enumerate(named):
                _, sources = found.setdefault(target.name, ((self.names.order(path), place), []))
                sources.append(Source(update, target, outputs))
        return found

    def _tie(self, site: Site, name: str, module: Module, modules: dict[str, Module]) -> None:
        """Write a table that is the head too as `ensure_weight_tying` does: PEFT then applies it to both uses."""
        if not is_tied(site, name, self.names, self.torch_model):
            return
        head = self.names.tied.get(name)
        if head is None:
            raise untied(site, name)
        self.ties = True
        self.made[head] = self.made[name]
        modules[head] = Module("linear", module.b.T, module.a.T)

    def _nested(self, owner: str, stacked: list["_Stacked"]) -> dict[str, Module]:
        """Names of several parameters of one module: the first that PyTorch declares is nested deepest."""
        if len({each.order for each in stacked}) < len(stacked):
            raise CheckpointError(
                f"{owner} has several adapted parameters ({', '.join(each.name for each in stacked)}), and PEFT tells "
                "them apart by the order in which the module declares them. Give names with rules in that order."
            )
        ordered = [each.module for each in sorted(stacked, key=lambda each: each.order)]
        depth = len(ordered)
        return {owner + ".base_layer" * (depth - 1 - place): module for place, module in enumerate(ordered)}

    def _config(self, plain: set[str], parameters: list[str]) -> dict[str, Any]:
        """What a config says beside ranks and scales."""
        modules_to_save, bias = self.full.config(self.torch_model, plain, complete=self.complete)
        common = {
            "peft_type": self.peft_type.name,
            "target_modules": self._wanted(plain, modules_to_save),
            "modules_to_save": modules_to_save or None,
            "bias": self.peft_type.only if bias == "lora_only" else bias,
            self.peft_type.dropout: 0.0 if parameters else self._dropout(),
            "fan_in_fan_out": self._fan_in_fan_out(plain, parameters),
        }
        if self.peft_type is VERA:
            return common
        return common | {
            "target_parameters": parameters or None,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": any(isinstance(update, Dora) for update in self.low_rank.values()),
            "lora_bias": bool(self.shifts),
            "alora_invocation_tokens": invocation_tokens(self.low_rank),
            "trainable_token_indices": self.full.tokens or None,
            "ensure_weight_tying": self.ties or self.full.ties,
        }

    def _fan_in_fan_out(self, plain: set[str], parameters: list[str]) -> bool:
        if self.names.fan_in_fan_out and plain and parameters:
            raise CheckpointError(
                f"PEFT adapts Conv1D layers ({min(plain)}) or single parameters ({parameters[0]}), not both in one "
                f"adapter. Save them apart: adapter.without(...)"
            )
        return self.names.fan_in_fan_out and not parameters

    def _check_biases(self) -> None:
        """PEFT has no bias on B without factors."""
        owners = {bias_beside(path, self.shifts) for path in self.low_rank}
        alone = sorted(self.shifts.keys() - owners)
        if alone:
            raise CheckpointError(
                f"{alone[0]!r} is added to, but nothing beside it has factors, and PEFT keeps it with those"
            )

    def _dropout(self) -> float:
        rates = {update.dropout for update in self.low_rank.values()}
        if len(rates) > 1:
            raise CheckpointError(
                f"The updates have different dropout rates ({sorted(rates)}), and PEFT has one for all"
            )
        return rates.pop() if rates else 0.0

    def _wanted(self, plain: set[str], modules_to_save: list[str]) -> list[str] | str:
        """`target_modules` that hit the adapted modules and nothing else that is known."""
        others = self.torch_model.known() - plain
        # Nothing inside a saved module is ever targeted.
        others = {name for name in others if not saves(modules_to_save, f"{name}.weight")}
        chosen = shortest(plain, others) if self.complete else sorted(plain)
        if any(targets(chosen, other) for other in others):
            return "|".join(re.escape(name) for name in sorted(plain))
        return chosen


class _Stacked(NamedTuple):
    """A parameter that PEFT adapts by itself, and where the map has it: position of the rule, and within it."""

    order: tuple[int, int]
    name: str
    module: Module
