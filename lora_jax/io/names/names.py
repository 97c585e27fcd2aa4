"""Names: the map from the paths of a JAX model's parameters to the names of PyTorch's modules, as in PEFT's files.

A rule pairs two templates. Most layout follows from the roles of a parameter's axes, which its `Site` knows: heads are
flattened, kernels transposed, stacked layers taken apart. A rule says only what axes cannot tell.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

from lora_jax.adapter.site import Site
from lora_jax.errors import MatchError, nearest
from lora_jax.io.names.fused import OutputSlice, Part
from lora_jax.io.names.rules import NUMBERS, Rule, filled, holes, without_params

LAYERS = ("layers", "layer", "blocks", "block", "h")
"""What a stack of layers is called, so that the identity numbers them after that."""

_EXPERTS = ("experts",)
"""The same for experts whose weights are modules of their own, with PyTorch's `weight` as the last component."""

_DECLARED = ("gate_up_proj", "down_proj")
"""Parameters of one module of experts, in the order in which transformers declares them, which decides PEFT's names."""


_TIED = {"model.embed_tokens": "lm_head", "transformer.wte": "lm_head", "gpt_neox.embed_in": "embed_out"}
"""Heads of transformers' models that the identity knows, where one table is both."""


@dataclass(frozen=True)
class Target:
    """One PyTorch module, or stacked parameter, and the part of it that a JAX parameter has.

    Attributes:
      name: of the module; of the parameter itself if `parameter`.
      part: the outputs in common.
      index: position along the stacked axes that the name counts.
      parameter: whether this is a stack of experts, which PEFT adapts as one parameter.
    """

    name: str
    part: Part
    index: tuple[int, ...] = ()
    parameter: bool = False


@dataclass(frozen=True)
class Names:
    """A map between parameter paths and PyTorch names; the identity where it has no rules.

    The identity drops the collection `params`, the last component (`kernel`) and turns `layers_0` into `layers.0`,
    unless `literal`. Layers that are stacked for `scan` below one `layers` (or `layer`, `blocks`, `block`, `h`) are
    numbered there: `layers/attn/query/kernel` is `layers.{i}.attn.query`. Experts are numbered below `experts` if the
    last component is PyTorch's: `layers/experts/up/weight` is `layers.{i}.experts.{j}.up`.

    Attributes:
      rules: `Rule`s, or pairs of a path and a module, either of which may be several. The first that matches decides.
      fan_in_fan_out: whether PyTorch's layers are Hugging Face's `Conv1D`, as in GPT-2.
      tied: for models whose output head is the embedding, the head's module by the embedding's. The identity knows
        those of transformers' decoders.
      literal: whether the components of a path are PyTorch's already, so that the identity keeps `ln_1`.

    Raises:
      MatchError: a rule contradicts itself.

    Example:
      >>> site = Site(path="params/layers/q/kernel", shape=(2, 4, 6), dtype="float32", kind="dense",
      ...             in_axes=(1,), out_axes=(2,), batch_axes=(0,))
      >>> names = Names([("layers/q/kernel", "model.layers.{i}.q_proj")])
      >>> [target.name for target in names.targets(site)]
      ['model.layers.0.q_proj', 'model.layers.1.q_proj']
      >>> Names().module("params/layers_0/attn/query/kernel")
      'layers.0.attn.query'
    """

    rules: Iterable[Rule | tuple[str | tuple[str, ...], str | tuple[str, ...]]] = ()
    fan_in_fan_out: bool = False
    tied: Mapping[str, str] = field(default_factory=dict)
    literal: bool = False

    def __post_init__(self) -> None:
        rules = tuple(rule if isinstance(rule, Rule) else Rule(*rule) for rule in self.rules)
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "tied", self.tied if rules or self.tied else _TIED)

    def targets(self, site: Site, others: Mapping[str, Site] | None = None) -> list[Target]:
        """What PyTorch calls a parameter that is used linearly: a target per module and index of a stack.

        Args:
          site: the parameter.
          others: the model's other sites by path; a module of several parameters needs to know their sizes.

        Raises:
          MatchError: no rule matches, or stacked axes and numbers in the name do not fit.
        """
        rule, known = self._rule(site.path)
        stack = rule is None and _is_parameter(site)
        templates = rule.templates if rule else (self._numbered(site),)
        counted = sorted(hole for hole in holes(templates) if hole not in known)
        over = len(site.batch_axes) - len(counted)
        if over not in (0, 1) or (over and rule is None and not stack):
            raise MatchError(_stack_problem(site, templates[0], counted))
        parts = rule.parts(site, others or {}) if rule else [_all_of(site)]
        return [
            Target(
                _checked(filled(template, {**known, **dict(zip(counted, map(str, index), strict=True))}), site.path),
                part, index, bool(over),
            )
            for index in product(*map(range, site.batch_shape[: len(counted)]))
            for template, part in zip(templates, parts, strict=True)
        ]  # fmt: skip

    def resolve(self, sites: Iterable[Site], others: Mapping[str, Site] | None = None) -> dict[str, list[Target]]:
        """Targets of several sites by path; `others` as for `targets`.

        Raises:
          MatchError: a site has no name, or two have the same outputs of a module.
        """
        sites = list(sites)
        others = {**(others or {}), **{site.path: site for site in sites}}
        found = {site.path: self.targets(site, others) for site in sites}
        owners: dict[str, dict[OutputSlice, str]] = {}
        for path, target in ((path, target) for path, targets in found.items() for target in targets):
            taken = owners.setdefault(target.name, {})
            self._check_apart(path, target, taken)
            taken[target.part.slice] = path
        return found

    def _check_apart(self, path: str, target: Target, taken: Mapping[OutputSlice, str]) -> None:
        """Parameters of one module stand in one rule, which gives each its outputs."""
        rule, _ = self._rule(path)
        for outputs, owner in taken.items():
            if outputs == target.part.slice or not outputs.is_fused or rule is not self._rule(owner)[0]:
                raise MatchError(
                    f"{owner!r} and {path!r} are both called {target.name!r} in PyTorch. Every parameter needs a name "
                    "of its own: correct the rules of this Names. Where PyTorch has them in one module, one rule names "
                    "all of them, in the order of its outputs: Rule((path, path), module)."
                )

    def order(self, path: str) -> int:
        """Position of the rule for a path, for PEFT's nesting of parameters; transformers' order without rules."""
        rule, _ = self._rule(path)
        leaf = path.rpartition("/")[2]
        return self._given().index(rule) if rule else _DECLARED.index(leaf) if leaf in _DECLARED else -1

    def module(self, path: str) -> str:
        """The PyTorch module that holds a whole parameter, such as a bias or a norm's scale.

        A rule for one parameter of a module serves its other parameters too.

        Raises:
          MatchError: no rule matches, or the rule splits or joins parameters, unstacks them, or changes their values.
        """
        rule, known = self._rule(path, sibling=True)
        template = rule.templates[0] if rule else self._identity(path)
        if rule and (not rule.whole or any(hole not in known for hole in holes((template,)))):
            raise MatchError(
                f"{path!r} is stored stacked, fused, or with other numbers than in PyTorch ({template}), or PyTorch "
                "fuses it with others, which is possible for low-rank factors only. Train it in a model without that, "
                f"or leave it out of the export: adapter.without({path!r})"
            )
        return filled(template, known)

    def _rule(self, path: str, sibling: bool = False) -> tuple[Rule | None, Mapping[str, str]]:
        for rule in self._given():
            known = rule.match(path)
            if known is not None:
                return rule, known
        for rule in self._given() if sibling and "/" in without_params(path) else ():
            known = rule.beside(path)
            if known is not None:
                return rule, known
        if self._given():
            near = nearest(without_params(path), (own for rule in self._given() for own in rule.paths))
            raise MatchError(
                f"No rule names {path!r} for PyTorch; nearest rules: {near}. Add one, Rule(path, module), or do not "
                "adapt it."
            )
        return None, {}

    def _numbered(self, site: Site) -> str:
        """The identity, with numbers for the layers and experts of a stack where the path has a place for each."""
        stack = _is_parameter(site)
        path = f"{site.path}/" if stack else site.path
        folder = without_params(path).rpartition("/")[0].split("/")
        counted = LAYERS if stack or site.kind != "ragged" else (*LAYERS, *_EXPERTS)
        found = [place for place, part in enumerate(folder[:-1], 1) if part in counted and not folder[place].isdigit()]
        layers = sum(folder[place - 1] in LAYERS for place in found)
        if len(site.batch_axes) - stack != len(found) or layers > 1:
            return self._identity(path)
        pieces = (folder[start:stop] for start, stop in pairwise([0, *found, len(folder)]))
        named = [self._identity("/".join((*piece, ""))) for piece in pieces]
        numbers = [*(f".{{{number}}}." for number in NUMBERS[: len(found)]), ""]
        return "".join(part for pair in zip(named, numbers, strict=True) for part in pair)

    def _identity(self, path: str) -> str:
        module = without_params(path).rpartition("/")[0]
        return ".".join(part if self.literal else re.sub(r"_(\d+)$", r".\1", part) for part in module.split("/"))

    def _given(self) -> tuple[Rule, ...]:
        rules: Any = self.rules
        return rules


def _is_parameter(site: Site) -> bool:
    """Whether the identity takes a stack of experts for one parameter, which is called as the path."""
    return site.kind == "ragged" and not site.path.endswith("/weight")


def _all_of(site: Site) -> Part:
    """A parameter that is one module, as it is."""
    return Part(0, site.sizes(site.out_axes)[0], OutputSlice(0, site.fan_out, site.fan_out))


def _checked(name: str, path: str) -> str:
    if not name:
        raise MatchError(
            f"{path!r} belongs to no module, and PEFT adapts modules. Give it a name: Names([({path!r}, 'module')])"
        )
    return name


def _stack_problem(site: Site, template: str, counted: list[str]) -> str:
    stacked = "×".join(map(str, site.batch_shape)) or "nothing"
    own, numbers = without_params(site.path), [f"{{{number}}}" for number in NUMBERS[: len(site.batch_axes)]]
    folder = own.split("/")[:-1]
    names = (".".join((*folder[:end], *numbers, *folder[end:])) for end in _ends(folder))
    return (
        f"{site.path!r} stacks {stacked} weights, but the name {template!r} leaves {len(counted)} numbers to count "
        f"them. Say where they go, as in {' or '.join(f'Names([({own!r}, {name!r})])' for name in names)}."
    )


def _ends(folder: list[str]) -> list[int]:
    """After which components of a path a number may stand: those that are called so, or the first."""
    return [end for end, part in enumerate(folder, 1) if part in LAYERS] or [1]
