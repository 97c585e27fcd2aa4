"""Writing an adapter as PyTorch PEFT would have written it, so that PEFT computes the same."""

import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from os import PathLike
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lora_jax.adapter import Adapter
from lora_jax.errors import CheckpointError
from lora_jax.fit import fit
from lora_jax.io import columns, layouts
from lora_jax.io.known_names import find_names
from lora_jax.io.names import Names
from lora_jax.io.peft_delta import Module, ModuleKind
from lora_jax.io.peft_files import PeftFiles
from lora_jax.io.peft_match import exact_key, shortest, targets
from lora_jax.io.peft_tables import WholeWriter, untied
from lora_jax.io.peft_write import write_peft
from lora_jax.io.rules import Target
from lora_jax.io.twin import is_tied, twin
from lora_jax.methods import Dora, Rows, Shift
from lora_jax.paths import bias_beside, named_leaves
from lora_jax.site import Site, Sites
from lora_jax.updates import LowRank, Replace


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
    overwrite: bool = False,
) -> None:
    """Write an adapter as a directory that PyTorch PEFT loads, and so vLLM and the rest of that world.

    Nothing of the base is written unless asked for: the file is as large as the adapter. PEFT writes the whole table
    when it adapts `embed_tokens` or `lm_head`.

    Scales become `lora_alpha / r` per module, so that PEFT's scale is the same number. A stack of layers becomes a
    module per layer, a fused kernel one per part, each with its own copy of A.

    Args:
      path: the directory to create.
      adapter: what to save; left untouched.
      names: what PyTorch calls the parameters, as for `load`.
      sites: every site of the model. With it, `target_modules` are the shortest endings that hit the adapted modules
        and nothing else; without, full names.
      params: the base's parameters, needed for `save_embedding_layers` and for whole modules of which only a part
        was trained.
      base_model: `base_model_name_or_path` for the config.
      task_type: `task_type` for the config, such as `"CAUSAL_LM"`.
      save_embedding_layers: True writes the tables and heads of the base too. `"auto"` does so only if
        `base_model` is a local directory whose `config.json` has another `vocab_size`. False never does.
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
    leaves = {} if params is None else named_leaves(params)[0]
    if leaves:
        fit(adapter, leaves)
    writer = _Writer(adapter, find_names(names), sites, leaves)
    files = writer.files()
    if save_embedding_layers is True or (save_embedding_layers == "auto" and writer.whole.resized(base_model)):
        files = PeftFiles(files.config, files.modules, {**writer.whole.tables(writer.twin), **files.saved})
    extra = {"base_model_name_or_path": base_model, "task_type": task_type}
    write_peft(path, PeftFiles({**files.config, **extra}, files.modules, files.saved), overwrite=overwrite)


class _Writer:
    """One adapter on its way out."""

    def __init__(self, adapter: Adapter, names: Names, sites: Sites | None, leaves: Mapping[str, Any]):
        self.names = names
        plain = {path: each if isinstance(each, Dora) else each.low_rank() for path, each in adapter.items()}
        self.low_rank = {path: each for path, each in plain.items() if each is not None}
        self.shifts = {path: each for path, each in adapter.items() if isinstance(each, Shift)}
        whole = {path: each for path, each in adapter.items() if isinstance(each, (Replace, Rows))}
        others = sorted(adapter.keys() - self.low_rank.keys() - self.shifts.keys() - whole.keys())
        if others:
            kind = type(adapter[others[0]]).__name__
            raise CheckpointError(f"PEFT's files have no place for {others[0]!r}, which is a {kind}")
        self._check_alike()
        own = [update.site for update in adapter.values()]
        self.sites = sites or Sites([site for site in own if site.kind != "full"], tuple(adapter))
        self.targets = names.resolve(update.site for update in self.low_rank.values())
        self.twin = twin(names, self.sites)
        # Endings are short only against every other name: a module without one could end alike.
        self.complete = sites is not None and not self.twin.unnamed
        self.whole = WholeWriter(whole, names, self.sites, leaves)
        # Rank and alpha by the name that PEFT's patterns go by.
        self.scales: dict[str, tuple[int, float]] = {}
        self.ties = False

    def files(self) -> PeftFiles:
        """Everything to write, in PEFT's layout."""
        modules: dict[str, Module] = {}
        stacks: dict[str, list[_Stacked]] = {}
        for path, found in self.targets.items():
            update = jax.tree.map(np.asarray, self.low_rank[path])
            for place, target in enumerate(found):
                module = self._module(update, target)
                if module is not None and target.parameter:
                    stacked = _Stacked((self.names.order(path), place), target.name, module)
                    stacks.setdefault(target.name.rpartition(".")[0], []).append(stacked)
                elif module is not None:
                    modules[target.name] = module
                    self._tie(update.site, target, module, modules)
        plain = set(modules)
        for owner, stacked in stacks.items():
            modules |= self._nested(owner, stacked)
        parameters = sorted(each.name for stacked in stacks.values() for each in stacked)
        return PeftFiles(self._config(plain, parameters), modules, self.whole.saved)

    def _module(self, update: LowRank, target: Target) -> Module | None:
        """The factors at one target, or None where a stack holds nothing."""
        site = update.site
        plain = update.low_rank()
        a, b, scale = (np.asarray(each[target.index], np.float32) for each in (plain.a, plain.b, plain.scale))
        scale = scale / np.float32(target.gain)
        if target.parameter:
            # PEFT has one scale for all experts.
            first = scale[np.flatnonzero(scale)[0]] if scale.any() else scale[0]
            ratio = np.where(scale == first, np.float32(1), scale / (first or np.float32(1)))
            b, scale = b * ratio.reshape(-1, *(1,) * (b.ndim - 1)), first
        elif site.batch_axes and not isinstance(update, Dora):
            used = [bool(a[term].any() or b[term].any()) for term in range(len(a))]
            if not any(used) and not scale:
                return None
            kept = max((term + 1 for term, any_used in enumerate(used) if any_used), default=1)
            a, b = a[:kept], b[:kept]
        rank = a.shape[1] if target.parameter else a.shape[0]
        self.scales[target.name] = (rank, _alpha(np.float32(scale), rank))
        kinds: dict[str, ModuleKind] = {"conv": "conv", "embedding": "embedding"}
        kind = "parameter" if target.parameter else kinds.get(site.kind, "linear")
        a, b = layouts.a_to_torch(site, target, a), layouts.b_to_torch(site, target, b)
        return Module(kind, a, b, self._magnitude(update, target, b), self._bias(update, target, float(scale)))

    def _magnitude(self, update: LowRank, target: Target, b: np.ndarray) -> np.ndarray | None:
        if not isinstance(update, Dora):
            return None
        if target.parameter or (np.asarray(update.strength) != 1).any():
            why = "PEFT has no DoRA for a stack of experts" if target.parameter else "PEFT cannot scale DoRA's effect"
            raise CheckpointError(f"{update.site.path!r}: {why}. Leave it out, or merge it.")
        own = np.asarray(update.magnitude[target.index], np.float32) / np.float32(target.gain)
        flat = columns.to_torch(update.site, target, own)
        return flat.reshape(1, -1, *b.shape[2:]) if b.ndim > 2 else flat

    def _bias(self, update: LowRank, target: Target, scale: float) -> np.ndarray | None:
        """The bias on B: zeros for a module without, where others have one, as PEFT has one switch for all."""
        if not self.shifts:
            return None
        site = update.site
        shift = self.shifts.get(bias_beside(site.path, self.shifts) or "")
        if target.parameter or site.kind == "embedding":
            raise CheckpointError(f"PEFT has no lora_bias for {target.name}, and one switch for all. Save it apart.")
        if shift is None:
            return np.zeros(prod(layouts.share_shape(site, target)), np.float32)
        own = np.asarray(shift.value[target.index], np.float32)
        ratio = np.float32(np.asarray(shift.scale[target.index]) / np.float32(scale * target.gain)) if scale else 0.0
        if not scale and own.any() and np.asarray(shift.scale[target.index]).any():
            raise CheckpointError(f"{shift.site.path!r}: the factors beside it have scale 0, and PEFT has one for both")
        return columns.to_torch(site, target, own if ratio == 1 else own * ratio)

    def _tie(self, site: Site, target: Target, module: Module, modules: dict[str, Module]) -> None:
        """Write a table that is the head too as `ensure_weight_tying` does: PEFT then applies it to both uses."""
        if not is_tied(site):
            return
        head = self.names.tied.get(target.name)
        if head is None:
            raise untied(site, target.name)
        self.ties = True
        self.scales[head] = self.scales[target.name]
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
        modules_to_save, bias = self.whole.config(self.twin, plain)
        ranks = Counter(rank for rank, _ in self.scales.values())
        alphas = Counter(alpha for _, alpha in self.scales.values())
        rank = ranks.most_common(1)[0][0] if ranks else 8
        alpha = alphas.most_common(1)[0][0] if alphas else 8.0
        own = {exact_key(name): each for name, each in sorted(self.scales.items())}
        return {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": _number(alpha),
            "rank_pattern": {key: each for key, (each, _) in own.items() if each != rank},
            "alpha_pattern": {key: _number(each) for key, (_, each) in own.items() if each != alpha},
            "target_modules": self._wanted(plain, modules_to_save),
            "target_parameters": parameters or None,
            "modules_to_save": modules_to_save or None,
            "bias": bias,
            "lora_dropout": 0.0 if parameters else self._dropout(),
            "fan_in_fan_out": self._fan_in_fan_out(plain, parameters),
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": any(isinstance(update, Dora) for update in self.low_rank.values()),
            "lora_bias": bool(self.shifts),
            "trainable_token_indices": self.whole.tokens or None,
            "ensure_weight_tying": self.ties or self.whole.ties,
        }

    def _fan_in_fan_out(self, plain: set[str], parameters: list[str]) -> bool:
        if self.names.fan_in_fan_out and plain and parameters:
            raise CheckpointError(
                f"PEFT adapts Conv1D layers ({min(plain)}) or single parameters ({parameters[0]}), not both in one "
                f"adapter. Save them apart: adapter.without(...)"
            )
        return self.names.fan_in_fan_out and not parameters

    def _check_alike(self) -> None:
        """PEFT has one switch for DoRA, and no bias on B without factors."""
        plain = [path for path, update in self.low_rank.items() if not isinstance(update, Dora)]
        if plain and len(plain) < len(self.low_rank):
            raise CheckpointError(
                f"Some updates are DoRA and others ({plain[0]!r}) are not, and PEFT has one use_dora for all. Save "
                "them apart: adapter.without(...)"
            )
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
        others = self.twin.known() - plain
        # Nothing inside a saved module is ever targeted.
        others = {name for name in others if not any(name.endswith(entry) for entry in modules_to_save)}
        chosen = shortest(plain, others) if self.complete else sorted(plain)
        if any(targets(chosen, other) for other in others):
            return "|".join(re.escape(name) for name in sorted(plain))
        return chosen


class _Stacked(NamedTuple):
    """A parameter that PEFT adapts by itself, and where the map has it: position of the rule, and within it."""

    order: tuple[int, int]
    name: str
    module: Module


def _alpha(scale: np.float32, rank: int) -> float:
    """The shortest number that PEFT turns into the same scale when it divides by the rank."""
    alphas = (float(f"{float(scale) * rank:.{digits}g}") for digits in range(1, 18))
    return next((alpha for alpha in alphas if np.float32(alpha / rank) == scale), float(scale) * rank)


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
