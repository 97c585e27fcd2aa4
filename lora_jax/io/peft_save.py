"""Writing an adapter as PyTorch PEFT would have written it, so that PEFT computes the same."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lora_jax.adapter import Adapter
from lora_jax.errors import CheckpointError
from lora_jax.fit import fit
from lora_jax.io.known_names import find_names
from lora_jax.io.names import Names
from lora_jax.io.peft_delta import Module
from lora_jax.io.peft_files import PeftFiles
from lora_jax.io.peft_match import exact_key, shortest, targets
from lora_jax.io.peft_module import ModuleMaker, Own
from lora_jax.io.peft_tables import WholeWriter, untied
from lora_jax.io.peft_write import write_peft
from lora_jax.io.twin import is_tied, twin
from lora_jax.methods import Dora, Rows, Shift
from lora_jax.paths import bias_beside, named_leaves
from lora_jax.site import Site, Sites
from lora_jax.updates import LowRank, Replace, Update


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
    module per layer, a fused kernel one per part, each with its own copy of A. Parameters that PyTorch fuses become one
    module: they share their ranks where they have the same A, otherwise ranks add up, with zeros in B.

    Args:
      path: the directory to create.
      adapter: what to save; left untouched.
      names: what PyTorch calls the parameters, as for `load`.
      sites: every site of the model. With it, `target_modules` are the shortest endings that hit the adapted modules
        and nothing else; without, full names. Needed too where PyTorch fuses an adapted parameter with others.
      params: the base's parameters, needed for `save_embedding_layers`, for whole modules of which only a part
        was trained, and for DoRA on a part of a fused module.
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
        plain = {path: _plain(each) for path, each in adapter.items()}
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
        self.targets = names.resolve((update.site for update in self.low_rank.values()), self.sites)
        self.twin = twin(names, self.sites)
        # Endings are short only against every other name: a module without one could end alike.
        self.complete = sites is not None and not self.twin.unnamed
        self.whole = WholeWriter(whole, names, self.sites, leaves)
        self.maker = ModuleMaker(self.shifts, self.twin, leaves)
        # Rank and alpha by the name that PEFT's patterns go by.
        self.scales: dict[str, tuple[int, float]] = {}
        self.ties = False

    def files(self) -> PeftFiles:
        """Everything to write, in PEFT's layout."""
        modules: dict[str, Module] = {}
        stacks: dict[str, list[_Stacked]] = {}
        for name, (order, owned) in self._owned().items():
            made = self.maker.make(owned)
            if made is None:
                continue
            self.scales[name] = (made.rank, made.alpha)
            if owned[0].target.parameter:
                stacks.setdefault(name.rpartition(".")[0], []).append(_Stacked(order, name, made.module))
            else:
                modules[name] = made.module
                self._tie(owned[0].update.site, name, made.module, modules)
        plain = set(modules)
        for owner, stacked in stacks.items():
            modules |= self._nested(owner, stacked)
        parameters = sorted(each.name for stacked in stacks.values() for each in stacked)
        return PeftFiles(self._config(plain, parameters), modules, self.whole.saved)

    def _owned(self) -> dict[str, tuple[tuple[int, int], list[Own]]]:
        """For each module its place in the map, and the updates that it is made of."""
        found: dict[str, tuple[tuple[int, int], list[Own]]] = {}
        for path, named in self.targets.items():
            update = jax.tree.map(np.asarray, self.low_rank[path])
            for place, target in enumerate(named):
                _, owned = found.setdefault(target.name, ((self.names.order(path), place), []))
                owned.append(Own(update, target))
        return found

    def _tie(self, site: Site, name: str, module: Module, modules: dict[str, Module]) -> None:
        """Write a table that is the head too as `ensure_weight_tying` does: PEFT then applies it to both uses."""
        if not is_tied(site):
            return
        head = self.names.tied.get(name)
        if head is None:
            raise untied(site, name)
        self.ties = True
        self.scales[head] = self.scales[name]
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


def _plain(update: Update) -> LowRank | None:
    """The update as PEFT has it: plain factors, with the magnitude if it is DoRA; None if there are none."""
    factors = update.low_rank()
    if factors is None or not isinstance(update, Dora):
        return factors
    return replace(update, a=factors.a, b=factors.b, a_start=None, b_start=None)


class _Stacked(NamedTuple):
    """A parameter that PEFT adapts by itself, and where the map has it: position of the rule, and within it."""

    order: tuple[int, int]
    name: str
    module: Module


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
