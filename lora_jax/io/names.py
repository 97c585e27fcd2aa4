"""Names: the declarative map between the paths of a JAX model's parameters and the modules of its PyTorch twin.

A rule pairs two templates. Most layout follows from the roles of a parameter's axes, which its `Site` knows: heads are
flattened, kernels transposed, stacked layers taken apart. A rule says only what axes cannot tell.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

from lora_jax.errors import MatchError, nearest
from lora_jax.site import Site

_HOLE = re.compile(r"\{(\w+)\}")
_PARTS = Mapping[str, str]


@dataclass(frozen=True)
class Rule:
    """One line of a map: parameters on the left, PyTorch modules on the right.

    Attributes:
      path: template of a parameter's path without the collection `params`, such as `layers_{i}/attn/query/kernel`.
        `{i}` and `{j}` stand for numbers, any other name in braces for part of one component.
      modules: template of the module's name, `model.layers.{i}.self_attn.q_proj`. A number that the path does not have
        is an index along a stacked axis: with the path `layers/attn/query/kernel` the rule unstacks scanned layers, on
        whichever axis they are. Several modules share the outputs of one fused parameter, in order. A stack that
        no number accounts for (experts) makes the name that of a 3-D parameter; rules for several parameters of one
        module stand in the order in which PyTorch's module declares them.
      axis: which of the parameter's output axes several modules share, counted among output axes.
      shares: relative sizes of the modules' shares; equal by default.
      rotary: set where the model rotates neighbouring features (0 with 1, 2 with 3) and PyTorch's rotates halves: the
        number of features of one head.

    Example:
      >>> Rule("layers_{i}/mlp/gate_up/kernel", ("layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj")).modules[1]
      'layers.{i}.mlp.up_proj'
    """

    path: str
    modules: str | tuple[str, ...]
    axis: int = 0
    shares: tuple[int, ...] = ()
    rotary: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.modules, str):
            object.__setattr__(self, "modules", (self.modules,))
        if self.shares and len(self.shares) != len(self.modules):
            raise MatchError(f"Rule for {self.path!r}: {len(self.shares)} shares for {len(self.modules)} modules")
        if self.rotary % 2:
            raise MatchError(f"Rule for {self.path!r}: rotary={self.rotary} must be even, a head's number of features")

    def match(self, path: str) -> dict[str, str] | None:
        """What stands in the braces, if the rule is for this path."""
        return _match(self.path, path)


@dataclass(frozen=True)
class Target:
    """One PyTorch module, or stacked parameter, and the slice of a JAX parameter that it holds.

    Attributes:
      name: of the module; of the parameter itself if `parameter`.
      index: position along the stacked axes that the name counts.
      part: start and stop along the output axis `axis` of the parameter.
      axis: that axis, counted among output axes.
      rotary: features per head to reorder from halves to neighbours, or 0.
      parameter: whether this is a stack of experts, which PEFT adapts as one parameter.
    """

    name: str
    index: tuple[int, ...] = ()
    part: tuple[int, int] = (0, 0)
    axis: int = 0
    rotary: int = 0
    parameter: bool = False


@dataclass(frozen=True)
class Names:
    """A map between parameter paths and PyTorch names; the identity where it has no rules.

    The identity drops the collection `params`, the last component (`kernel`) and turns `layers_0` into `layers.0`.

    Attributes:
      rules: `Rule`s, or pairs of a path and a module (or several). The first that matches decides.
      fan_in_fan_out: whether PyTorch's layers are Hugging Face's `Conv1D`, as in GPT-2.
      tied: for models whose output head is the embedding, the head's module by the embedding's.

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

    rules: Iterable[Rule | tuple[str, str | tuple[str, ...]]] = ()
    fan_in_fan_out: bool = False
    tied: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rules = tuple(rule if isinstance(rule, Rule) else Rule(*rule) for rule in self.rules)
        object.__setattr__(self, "rules", rules)

    def targets(self, site: Site) -> list[Target]:
        """What PyTorch calls a parameter that is used linearly: a target per module and index of a stack.

        Raises:
          MatchError: no rule matches, or stacked axes and numbers in the name do not fit.
        """
        rule, known = self._rule(site.path)
        stack = site.kind == "ragged" and rule is None
        templates = _modules(rule) or (_identity(f"{site.path}/" if stack else site.path),)
        holes = list(dict.fromkeys(hole for hole in _HOLE.findall("".join(templates)) if hole not in known))
        over = len(site.batch_axes) - len(holes)
        if over not in (0, 1) or (over and rule is None and not stack):
            raise MatchError(_stack_problem(site, templates[0], holes))
        parts = self._parts(rule, site)
        return [
            Target(
                _checked(_filled(template, known, holes, index), site.path),
                index, part, rule.axis if rule else 0, rule.rotary if rule else 0, bool(over),
            )
            for index in product(*map(range, site.batch_shape[: len(holes)]))
            for template, part in zip(templates, parts, strict=True)
        ]  # fmt: skip

    def resolve(self, sites: Iterable[Site]) -> dict[str, list[Target]]:
        """Targets of several sites by path.

        Raises:
          MatchError: a site has no name, or two have the same.
        """
        found = {site.path: self.targets(site) for site in sites}
        owner: dict[str, str] = {}
        for path, targets in found.items():
            for target in targets:
                if target.name in owner:
                    raise MatchError(
                        f"{owner[target.name]!r} and {path!r} are both called {target.name!r} in PyTorch. Every "
                        "parameter needs a name of its own: correct the rules of this Names."
                    )
                owner[target.name] = path
        return found

    def order(self, path: str) -> int:
        """Position of the rule for a path, for PEFT's nesting of parameters; 0 without rules."""
        rule, _ = self._rule(path)
        return self._given().index(rule) if rule else 0

    def module(self, path: str) -> str:
        """The PyTorch module that holds a parameter which no site describes, such as a bias or a norm's scale.

        A rule for one parameter of a module serves its other parameters too.

        Raises:
          MatchError: no rule matches, or the rule takes a stack or a fused parameter apart.
        """
        rule, known = self._rule(path, sibling=True)
        templates: tuple[str, ...] = _modules(rule) or (_identity(path),)
        template = templates[0]
        if len(templates) > 1 or any(hole not in known for hole in _HOLE.findall(template)):
            raise MatchError(
                f"{path!r} is stored stacked or fused and PyTorch has it in parts ({template}), which is possible "
                "for low-rank factors only. Train it in an unstacked model, or leave it out of the export: "
                f"adapter.without({path!r})"
            )
        return _filled(template, known, [], ())

    def _rule(self, path: str, sibling: bool = False) -> tuple[Rule | None, _PARTS]:
        bare = path.removeprefix("params/")
        for rule in self._given():
            known = rule.match(bare)
            if known is not None:
                return rule, known
        for rule in self._given() if sibling else ():
            known = _match(rule.path.rpartition("/")[0], bare.rpartition("/")[0])
            if known is not None:
                return rule, known
        if self._given():
            raise MatchError(
                f"No rule names {path!r} for PyTorch; nearest rules: {nearest(bare, (r.path for r in self._given()))}. "
                "Add one, Rule(path, module), or do not adapt it."
            )
        return None, {}

    def _given(self) -> tuple[Rule, ...]:
        rules: Any = self.rules
        return rules

    def _parts(self, rule: Rule | None, site: Site) -> list[tuple[int, int]]:
        sizes: tuple[int, ...] = site.sizes(site.out_axes)
        axis = rule.axis if rule else 0
        if not sizes or axis >= len(sizes):
            raise MatchError(f"The rule for {site.path!r} splits output axis {axis}, but it has {len(sizes)}")
        size, count = sizes[axis], len(rule.modules) if rule else 1
        shares = (rule.shares if rule else ()) or (1,) * count
        if size % sum(shares):
            raise MatchError(
                f"{site.path!r} has {size} outputs on axis {axis}, which cannot be shared {':'.join(map(str, shares))} "
                "among its modules. Give the rule shares=(...), such as the numbers of query, key and value heads."
            )
        if rule and rule.rotary and prod(sizes) % rule.rotary:
            raise MatchError(
                f"The rule for {site.path!r} has rotary={rule.rotary}, which does not divide {prod(sizes)}"
            )
        unit = size // sum(shares)
        ends = [unit * sum(shares[: place + 1]) for place in range(count)]
        return [(end - unit * share, end) for end, share in zip(ends, shares, strict=True)]


def _modules(rule: Rule | None) -> tuple[str, ...]:
    modules: Any = rule.modules if rule else ()
    return modules


@lru_cache(maxsize=4096)
def _compiled(template: str) -> re.Pattern[str]:
    pattern, end, seen = "", 0, set()
    for hole in _HOLE.finditer(template):
        name = hole[1]
        kind = r"\d+" if name in ("i", "j") else r"[^/]+"
        pattern += re.escape(template[end : hole.start()])
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{kind})"
        seen.add(name)
        end = hole.end()
    return re.compile(pattern + re.escape(template[end:]))


def _match(template: str, path: str) -> dict[str, str] | None:
    match = _compiled(template).fullmatch(path)
    return None if match is None else match.groupdict()


def _identity(path: str) -> str:
    module = path.removeprefix("params/").rpartition("/")[0]
    return ".".join(re.sub(r"_(\d+)$", r".\1", part) for part in module.split("/"))


def _filled(template: str, known: _PARTS, holes: list[str], index: tuple[int, ...]) -> str:
    values = {**known, **dict(zip(holes, map(str, index), strict=True))}
    return _HOLE.sub(lambda hole: values[hole[1]], template)


def _checked(name: str, path: str) -> str:
    if not name:
        raise MatchError(
            f"{path!r} belongs to no module, and PEFT adapts modules. Give it a name: Names([({path!r}, 'module')])"
        )
    return name


def _stack_problem(site: Site, template: str, holes: list[str]) -> str:
    stacked = "×".join(map(str, site.batch_shape)) or "nothing"
    return (
        f"{site.path!r} stacks {stacked} weights, but the name {template!r} leaves "
        f"{len(holes)} numbers to count them. Name the parts with a rule, as in Rule('layers/attn/query/kernel', "
        "'model.layers.{i}.self_attn.q_proj')."
    )
