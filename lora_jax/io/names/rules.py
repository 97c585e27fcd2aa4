"""Rules: the lines of a map of names, `layers_{i}/q/kernel` to `layers.{i}.q_proj`, with what tells their layouts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import sqrt
from typing import TypeVar

from lora_jax.adapter.site import Site
from lora_jax.errors import MatchError
from lora_jax.io.names.fused import OutputSlice, Part, fused_slice

_HOLE = re.compile(r"\{(\w+)(?:\+(\d+))?\}")
NUMBERS = ("i", "j")
"""What stands for numbers; any other name in braces is part of one component."""

_Each = TypeVar("_Each", int, bool)


@dataclass(frozen=True)
class Rule:
    """One line of a map: parameters on the left, PyTorch modules on the right.

    Either side may be several: a fused parameter is split over modules, and a fused module over parameters.

    Attributes:
      path: template of a parameter's path, such as `layers_{i}/attn/query/kernel`, with or without `params/` before.
        `{i}` and `{j}` stand for numbers, any other name in braces for part of one component. Several paths are the
        parts of one fused module, in the order of its outputs, with the same names in braces.
      modules: template of the module's name, `model.layers.{i}.self_attn.q_proj`. A number that the path does not have
        is an index along a stacked axis: with the path `layers/attn/query/kernel` the rule unstacks scanned layers, on
        whichever axis they are. Of two stacked axes `{i}` counts the first and `{j}` the second, wherever they stand in
        the name; `{i+3}` is the number that is 3 more. Several modules share the outputs of one fused parameter, in
        order. A stack that
        no number accounts for (experts) makes the name that of a 3-D parameter; rules for several parameters of one
        module stand in the order in which PyTorch's module declares them.
      axis: which of the parameter's output axes several modules share, counted among output axes.
      shares: relative sizes of the shares. Those of several modules are equal by default; those of several parameters
        are their sizes, so that they are needed only where not all of them are known.
      rotary: set where the model rotates neighbouring features (0 with 1, 2 with 3) and PyTorch's rotates halves: the
        number of features of one head, or -1 for the size of the last output axis. A tuple gives each part its own,
        0 for the value part.
      query_scaled: whether the parameter is PyTorch's divided by the square root of the last output axis, as MaxText
        keeps the scale of its attention in the query kernel. A tuple gives each part its own.
      interleaved: for several paths, in how many groups the module has its outputs: each group has a piece of every
        parameter, as in the `query_key_value` of GPT-NeoX, BLOOM and Falcon, with a group per head. -1 is the smallest
        first output axis: the number of key and value heads.

    Raises:
      MatchError: the rule contradicts itself.

    Example:
      >>> Rule("layers_{i}/mlp/gate_up/kernel", ("layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj")).templates[1]
      'layers.{i}.mlp.up_proj'
      >>> Rule(("layers_{i}/mlp/gate/kernel", "layers_{i}/mlp/up/kernel"), "layers.{i}.mlp.gate_up_proj").paths[1]
      'layers_{i}/mlp/up/kernel'
    """

    path: str | tuple[str, ...]
    modules: str | tuple[str, ...]
    axis: int = 0
    shares: tuple[int, ...] = ()
    rotary: int | tuple[int, ...] = 0
    query_scaled: bool | tuple[bool, ...] = False
    interleaved: int = 1

    def __post_init__(self) -> None:
        self._check_sides()
        if self.shares and (len(self.shares) != self._count or min(self.shares) < 1):
            raise self._error(f"shares={self.shares} must be {self._count} positive numbers")
        for name in ("rotary", "query_scaled"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self._count:
                raise self._error(f"{name}={value} must have {self._count} entries")
        if any(size < -1 or (size > 0 and size % 2) for size in self._each(self.rotary)):
            raise self._error(f"rotary={self.rotary} must be even, a head's number of features")
        self._check_holes()

    @property
    def paths(self) -> tuple[str, ...]:
        """Templates of the parameters' paths, as a tuple."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)

    @property
    def templates(self) -> tuple[str, ...]:
        """The names of the modules, as a tuple."""
        return (self.modules,) if isinstance(self.modules, str) else tuple(self.modules)

    @property
    def whole(self) -> bool:
        """Whether a parameter is a tensor of PyTorch with the same numbers, so that it is merely reshaped."""
        return self._count == 1 and not any((*self._each(self.query_scaled), *self._each(self.rotary)))

    def match(self, path: str) -> dict[str, str] | None:
        """What stands in the braces, if the rule is for this path."""
        found = (match(without_params(own), without_params(path)) for own in self.paths)
        return next((known for known in found if known is not None), None)

    def beside(self, path: str) -> dict[str, str] | None:
        """The same for another parameter of the rule's module."""
        folder = without_params(path).rpartition("/")[0]
        found = (match(without_params(own).rpartition("/")[0], folder) for own in self.paths)
        return next((known for known in found if known is not None), None)

    def parts(self, site: Site, others: Mapping[str, Site]) -> list[Part]:
        """What each module has of a parameter, and where.

        Args:
          site: the parameter.
          others: the model's other sites by path, for the sizes of what is fused with it.

        Raises:
          MatchError: its sizes do not allow that.
        """
        return self._split(site) if len(self.paths) == 1 else [self._in_fused(site, others)]

    def _split(self, site: Site) -> list[Part]:
        sizes = site.sizes(site.out_axes)
        if site.groups > 1 and self._count > 1:
            raise MatchError(f"{site.path!r} is a convolution in groups, whose outputs several modules cannot share")
        if self.axis >= len(sizes):
            raise MatchError(f"The rule for {site.path!r} splits output axis {self.axis}, but it has {len(sizes)}")
        shares = self.shares or (1,) * self._count
        unit, rest = divmod(sizes[self.axis], sum(shares))
        if rest:
            raise MatchError(
                f"{site.path!r} has {sizes[self.axis]} outputs on axis {self.axis}, which cannot be shared "
                f"{':'.join(map(str, shares))} among its modules. Give the rule shares=(...), such as the numbers of "
                "query, key and value heads."
            )
        ends = [unit * sum(shares[:end]) for end in range(len(shares) + 1)]
        inner = site.fan_out // sizes[self.axis]
        slices = [OutputSlice(0, (stop - start) * inner, (stop - start) * inner) for start, stop in pairwise(ends)]
        return [self._part(site, place, slices[place], ends[place : place + 2]) for place in range(self._count)]

    def _in_fused(self, site: Site, others: Mapping[str, Site]) -> Part:
        place = next(
            at for at, own in enumerate(self.paths) if match(without_params(own), without_params(site.path)) is not None
        )
        known, root = self.match(site.path) or {}, "params/" if site.path.startswith("params/") else ""
        paths = [root + filled(without_params(own), known) for own in self.paths]
        outputs = fused_slice(site.path, paths, {**others, site.path: site}, self.shares, self.interleaved)
        return self._part(site, place, outputs, [0, site.sizes(site.out_axes)[0]])

    def _part(self, site: Site, place: int, outputs: OutputSlice, ends: list[int]) -> Part:
        gain = 1 / sqrt(site.sizes(site.out_axes)[-1]) if self._each(self.query_scaled)[place] else 1.0
        rotary = self._checked_rotary(site, self._each(self.rotary)[place], outputs.count)
        return Part(ends[0], ends[1], outputs, self.axis, rotary, gain)

    @property
    def _count(self) -> int:
        """How many parts there are: of parameters, or of modules."""
        return max(len(self.paths), len(self.templates))

    def _each(self, value: _Each | tuple[_Each, ...]) -> tuple[_Each, ...]:
        return value if isinstance(value, tuple) else (value,) * self._count

    def _checked_rotary(self, site: Site, size: int, outputs: int) -> int:
        size = site.sizes(site.out_axes)[-1] if size == -1 else size
        if size and (outputs % size or size % 2):
            raise MatchError(f"The rule for {site.path!r} has rotary={size}, which does not divide {outputs} in pairs")
        return size

    def _check_sides(self) -> None:
        if not self.templates or not self.paths:
            raise self._error("it names no module" if self.paths else "it names no path")
        several = len(self.paths) > 1
        if several and len(self.templates) > 1:
            raise self._error("several parameters or several modules, not both. Write a rule for each module")
        if several and self.axis:
            raise self._error("axis is for several modules: several parameters have all outputs of a module")
        if self.interleaved != 1 and (not several or self.interleaved < -1 or not self.interleaved):
            raise self._error(f"interleaved={self.interleaved} is a number of groups (or -1), for several paths")
        if len({without_params(path) for path in self.paths}) < len(self.paths):
            raise self._error("it names a parameter twice, and every output belongs to one")

    def _check_holes(self) -> None:
        known = set(holes(self.paths[:1]))
        if any(set(holes((path,))) != known for path in self.paths):
            raise self._error("its paths must have the same names in braces, which tell what belongs together")
        unknown = sorted({*holes(self.templates)} - known - {*NUMBERS})
        if unknown:
            raise self._error(f"{{{unknown[0]}}} is not in the path; only {{i}} and {{j}} count stacked axes")

    def _error(self, why: str) -> MatchError:
        return MatchError(f"Rule for {self.path!r}: {why}")


def without_params(path: str) -> str:
    """The path without the collection `params`."""
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
        kind = r"\d+" if name in NUMBERS else r"[^/]+"
        pattern += re.escape(template[end : hole.start()])
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{kind})"
        seen.add(name)
        end = hole.end()
    return re.compile(pattern + re.escape(template[end:]))


def holes(templates: tuple[str, ...]) -> list[str]:
    """Names in braces, in the order in which they come first."""
    return list(dict.fromkeys(hole[1] for hole in _HOLE.finditer("".join(templates))))


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its braces filled.

    >>> filled("layers.{i}.{name}", {"i": "3", "name": "q"}), filled("layers.{i+2}", {"i": "3"})
    ('layers.3.q', 'layers.5')
    """
    return _HOLE.sub(lambda hole: str(int(values[hole[1]]) + int(hole[2])) if hole[2] else values[hole[1]], template)
