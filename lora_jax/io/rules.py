"""One line of a map of names: two templates, and what the axes of a parameter do not say about its layout."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod, sqrt

from lora_jax.errors import MatchError
from lora_jax.site import Site

_HOLE = re.compile(r"\{(\w+)\}")
_NUMBERS = ("i", "j")


@dataclass(frozen=True)
class Rule:
    """One line of a map: parameters on the left, PyTorch modules on the right.

    Attributes:
      path: template of a parameter's path, such as `layers_{i}/attn/query/kernel`, with or without `params/` before.
        `{i}` and `{j}` stand for numbers, any other name in braces for part of one component.
      modules: template of the module's name, `model.layers.{i}.self_attn.q_proj`. A number that the path does not have
        is an index along a stacked axis: with the path `layers/attn/query/kernel` the rule unstacks scanned layers, on
        whichever axis they are. Several modules share the outputs of one fused parameter, in order. A stack that
        no number accounts for (experts) makes the name that of a 3-D parameter; rules for several parameters of one
        module stand in the order in which PyTorch's module declares them.
      axis: which of the parameter's output axes several modules share, counted among output axes.
      shares: relative sizes of the modules' shares; equal by default.
      rotary: set where the model rotates neighbouring features (0 with 1, 2 with 3) and PyTorch's rotates halves: the
        number of features of one head, or -1 for the size of the last output axis. A tuple gives each module its own,
        0 for the value part of a fused kernel.
      query_scaled: whether the parameter is PyTorch's divided by the square root of the last output axis, as MaxText
        keeps the scale of its attention in the query kernel.

    Raises:
      MatchError: the rule contradicts itself.

    Example:
      >>> Rule("layers_{i}/mlp/gate_up/kernel", ("layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj")).modules[1]
      'layers.{i}.mlp.up_proj'
    """

    path: str
    modules: str | tuple[str, ...]
    axis: int = 0
    shares: tuple[int, ...] = ()
    rotary: int | tuple[int, ...] = 0
    query_scaled: bool = False

    def __post_init__(self) -> None:
        count = len(self.templates)
        if not count:
            raise MatchError(f"Rule for {self.path!r}: it names no module")
        if self.shares and (len(self.shares) != count or min(self.shares) < 1):
            raise MatchError(f"Rule for {self.path!r}: shares={self.shares} must be {count} positive numbers")
        if isinstance(self.rotary, tuple) and len(self.rotary) != count:
            raise MatchError(f"Rule for {self.path!r}: rotary={self.rotary} must have {count} numbers")
        if any(size < -1 or (size > 0 and size % 2) for size in self._rotary()):
            raise MatchError(f"Rule for {self.path!r}: rotary={self.rotary} must be even, a head's number of features")
        self._check_holes()

    @property
    def templates(self) -> tuple[str, ...]:
        """The names of the modules, as a tuple."""
        return (self.modules,) if isinstance(self.modules, str) else tuple(self.modules)

    @property
    def relabels(self) -> bool:
        """Whether the numbers themselves differ in PyTorch, so that a whole tensor is not merely reshaped."""
        return self.query_scaled or any(self._rotary())

    def match(self, path: str) -> dict[str, str] | None:
        """What stands in the braces, if the rule is for this path."""
        return match(_bare(self.path), _bare(path))

    def beside(self, path: str) -> dict[str, str] | None:
        """The same for another parameter of the rule's module."""
        return match(_bare(self.path).rpartition("/")[0], _bare(path).rpartition("/")[0])

    def parts(self, site: Site) -> list["Part"]:
        """How the modules share a parameter.

        Raises:
          MatchError: its sizes do not allow that.
        """
        sizes = site.sizes(site.out_axes)
        if self.axis >= len(sizes):
            raise MatchError(f"The rule for {site.path!r} splits output axis {self.axis}, but it has {len(sizes)}")
        shares = self.shares or (1,) * len(self.templates)
        unit, rest = divmod(sizes[self.axis], sum(shares))
        if rest:
            raise MatchError(
                f"{site.path!r} has {sizes[self.axis]} outputs on axis {self.axis}, which cannot be shared "
                f"{':'.join(map(str, shares))} among its modules. Give the rule shares=(...), such as the numbers of "
                "query, key and value heads."
            )
        gain = 1 / sqrt(sizes[-1]) if self.query_scaled else 1.0
        found: list[Part] = []
        for share, rotary in zip(shares, self._rotary(), strict=True):
            start = found[-1].stop if found else 0
            outputs = unit * share * prod(sizes) // sizes[self.axis]
            rotary = self._checked_rotary(site, rotary, outputs)
            found.append(Part(start, start + unit * share, self.axis, rotary, gain))
        return found

    def _rotary(self) -> tuple[int, ...]:
        return self.rotary if isinstance(self.rotary, tuple) else (self.rotary,) * len(self.templates)

    def _checked_rotary(self, site: Site, size: int, outputs: int) -> int:
        size = site.sizes(site.out_axes)[-1] if size == -1 else size
        if size and (outputs % size or size % 2):
            raise MatchError(f"The rule for {site.path!r} has rotary={size}, which does not divide {outputs} in pairs")
        return size

    def _check_holes(self) -> None:
        known = set(_HOLE.findall(self.path)) | set(_NUMBERS)
        unknown = sorted({hole for template in self.templates for hole in _HOLE.findall(template)} - known)
        if unknown:
            raise MatchError(
                f"Rule for {self.path!r}: {{{unknown[0]}}} is not in the path; only {{i}} and {{j}} count stacked axes"
            )


@dataclass(frozen=True)
class Part:
    """The share that a module has of a parameter; see `Target`."""

    start: int
    stop: int
    axis: int = 0
    rotary: int = 0
    gain: float = 1.0


@dataclass(frozen=True)
class Target:
    """One PyTorch module, or stacked parameter, and the slice of a JAX parameter that it holds.

    Attributes:
      name: of the module; of the parameter itself if `parameter`.
      index: position along the stacked axes that the name counts.
      part: start and stop along the output axis `axis` of the parameter.
      axis: that axis, counted among output axes.
      rotary: features per head to reorder from halves to neighbours, or 0.
      gain: the parameter is PyTorch's weight times this.
      parameter: whether this is a stack of experts, which PEFT adapts as one parameter.
    """

    name: str
    index: tuple[int, ...] = ()
    part: tuple[int, int] = (0, 0)
    axis: int = 0
    rotary: int = 0
    gain: float = 1.0
    parameter: bool = False


def _bare(path: str) -> str:
    return path.removeprefix("params/")


def match(template: str, path: str) -> dict[str, str] | None:
    """What stands in the braces of a template, if it is for this path.

    >>> match("layers_{i}/{name}/kernel", "layers_3/query/kernel"), match("layers_{i}/q", "layers_a/q")
    ({'i': '3', 'name': 'query'}, None)
    """
    found = _compiled(template).fullmatch(path)
    return None if found is None else found.groupdict()


@lru_cache(maxsize=4096)
def _compiled(template: str) -> re.Pattern[str]:
    pattern, end, seen = "", 0, set()
    for hole in _HOLE.finditer(template):
        name = hole[1]
        kind = r"\d+" if name in _NUMBERS else r"[^/]+"
        pattern += re.escape(template[end : hole.start()])
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{kind})"
        seen.add(name)
        end = hole.end()
    return re.compile(pattern + re.escape(template[end:]))


def holes(templates: tuple[str, ...]) -> list[str]:
    """Names in braces, in the order in which they come first."""
    return list(dict.fromkeys(_HOLE.findall("".join(templates))))


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its braces filled.

    >>> filled("layers.{i}.{name}", {"i": "3", "name": "q"})
    'layers.3.q'
    """
    return _HOLE.sub(lambda hole: values[hole[1]], template)
