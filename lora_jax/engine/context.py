"""Context: what the rules share while a program is evaluated: dropout keys, ids of axes, and the log of uses."""

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Literal, TypeAlias

import jax

from lora_jax.adapter.site import Kind
from lora_jax.engine.bases import View, base_of
from lora_jax.engine.declared import operation
from lora_jax.engine.dependence import Dependence
from lora_jax.engine.recompute import Frame
from lora_jax.engine.weight import Weight

Strategy = Literal["auto", "factored", "joined", "merged"]
Origin: TypeAlias = Mapping[str, frozenset[int]]
Roles: TypeAlias = Mapping[str, dict[str, tuple[int, ...]]]
Route = Literal["factored", "joined", "merged", "look-up", "materialised", "rows", "mask", "blocks"]


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of a parameter by the program.

    Attributes:
      path: the parameter.
      primitive: the operation that used it.
      route: `factored` (two thin products), `joined` (`[x, x·a]·[W; b]`), `merged` (`x·(W + ab)` with factored
        gradients), `look-up` (rows of A, then B), or `materialised` (`W + ab` formed on the spot); of a bank the form
        of `lora_jax.route`.
      kind: `dense`, `conv`, `embedding` or `ragged` for a linear use; None otherwise.
      in_axes, out_axes, batch_axes: original axes of the parameter by their role in a linear use.
      channel_axis, groups: of a convolution, as in `Site`.
      flops: floating-point operations the adapter adds to one forward evaluation of this use.
      nbytes: bytes of the arrays the adapter adds: rank-sized activations, or the formed weight.
      reason: why it was materialised, else empty.
      equation: identity of the equation, to recognise it again.
    """

    path: str
    primitive: str
    route: Route
    kind: Kind | None = None
    in_axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = ()
    batch_axes: tuple[int, ...] = ()
    channel_axis: int | None = None
    groups: int = 1
    flops: int = 0
    nbytes: int = 0
    reason: str = ""
    equation: int = 0


@dataclass
class Log:
    """Everything that outlives one region of the program; filled in the same way however often it is traced.

    Attributes:
      uses: every use of a weight.
      unneeded: those that no result depends on.
      origins: for each axis id, by parameter, the original axes that it stems from.
      ranks: number of axes of each parameter.
      looked_up: for each axis along which an index chose slices of a weight, the roles of the parameter's
        axes in a look-up; None where it is known to be no look-up but a choice that the program makes.
      order: the dropout number of each use.
      ids: axis ids yet to be given.
      facts: what depends on what in the program.
      coded: parameters that hold codes, which the program makes numbers of: integers, and float8 with scales.
    """

    uses: dict[tuple[Any, ...], Use] = field(default_factory=dict)
    unneeded: set[tuple[Any, ...]] = field(default_factory=set)
    origins: dict[int, Origin] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    looked_up: dict[int, Roles | None] = field(default_factory=dict)
    order: dict[tuple[str, tuple[int, ...]], int] = field(default_factory=dict)
    ids: Iterator[int] = field(default_factory=count)
    facts: Dependence = field(default_factory=Dependence)
    coded: frozenset[str] = frozenset()

    @property
    def needed(self) -> list[Use]:
        """The uses that some result depends on, in the order of the program."""
        return [use for key, use in self.uses.items() if key not in self.unneeded]


@dataclass(frozen=True)
class Context:
    """What a rule may ask and tell.

    Attributes:
      log: shared record of uses and axis identities.
      strategy: how contractions are carried out.
      keys: dropout keys of this region (each scan step has its own), one for each adapter, None for one without it;
        empty for a deterministic run.
      frame: the program around this point.
      trail: positions of the equations around this point, outermost first.
      inside: name of the opaque operation we only look into for discovery, else empty.
      look_inside: whether opaque operations are searched for uses.
      dead: whether no result depends on this point, which is then looked at for discovery only.
      observe: called where a weight with a numbering meets an input: with its path, the numbers of the linear maps
        `[*maps]`, their inputs `[*maps, tokens, fan_in]`, and which of the tokens count, None for all.
      mask: which tokens are observed, over the leading axes of every input; None for all.
    """

    log: Log
    strategy: Strategy = "auto"
    keys: tuple[Any, ...] = ()
    frame: Frame | None = None
    trail: tuple[int, ...] = ()
    inside: str = ""
    look_inside: bool = False
    dead: bool = False
    observe: Callable[[str, Any, Any, Any], None] | None = None
    mask: Any = None

    def at(self, position: int) -> "Context":
        """The context of the equation at a position of the current program."""
        return replace(self, trail=(*self.trail, position))

    def within(self, frame: Frame) -> "Context":
        """The context inside a program."""
        return replace(self, frame=frame)

    def iteration(self, number: Any) -> "Context":
        """The context of one iteration of a loop, which has dropout keys of its own."""
        keys = tuple(None if key is None else jax.random.fold_in(key, number) for key in self.keys)
        return replace(self, keys=keys)

    def fresh(self, origin: Origin | None = None) -> int:
        """A new axis id that stems from the given original axes of parameters."""
        axis = next(self.log.ids)
        self.log.origins[axis] = origin or {}
        return axis

    def merging(self, axes: Iterable[int]) -> int:
        """A new axis id that stems from all that these stem from."""
        merged: dict[str, frozenset[int]] = {}
        for axis in axes:
            for path, origin in self.log.origins[axis].items():
                merged[path] = merged.get(path, frozenset()) | origin
        return self.fresh(merged)

    def weight(self, path: str, leaf: Any) -> Weight:
        """A weight without terms, of an array or a quantised parameter, with a fresh id for every axis."""
        base, coded = base_of(leaf), path in self.log.coded
        axes = tuple(self.fresh({path: frozenset([axis])}) for axis in range(base.ndim))
        self.log.ranks[path] = base.ndim
        return Weight(base, (), axes, (path,), coded=coded)

    def alike(self, weights: Sequence[Weight], shape: Sequence[int | None]) -> list[Weight] | None:
        """The weights with the same ids for their axes, to be combined; None if they differ in more than that.

        Args:
          weights: the weights.
          shape: what they must have; None for any length.
        """
        fits = all(
            n in (None, size) for w in weights for n, size in zip(shape, w.base.shape, strict=True)
        )  # fmt: skip
        if not fits or (len(weights) > 1 and any(w.numbering or w.keys for w in weights)):
            return None
        if len({weight.axes for weight in weights}) == 1:
            return list(weights)
        columns = list(zip(*(weight.axes for weight in weights), strict=True))
        # Where two views of one parameter differ (a transposed one is added), the first says what its axes are.
        new = [self.fresh(ChainMap(*(dict(self.log.origins[axis]) for axis in column))) for column in columns]
        return [weight.renamed(dict(zip(weight.axes, new, strict=True))) for weight in weights]

    def record(
        self, weight: Weight, eqn: Any, route: Route, roles: Roles | None = None, reason: str = "", **facts: Any
    ) -> None:
        """Log a use of a weight by an equation, for each of its parameters."""
        route = "materialised" if self.inside or weight.formed else route
        if isinstance(weight.base, View) and not weight.adapted and route != "materialised":
            return  # A quantised parameter that nothing adapts, and that is not formed.
        reason = reason or (f"inside {self.inside}, which is opaque" if self.inside else weight.formed)
        primitive = operation(eqn) if eqn is not None else "return"
        for path in weight.paths:
            axes = roles[path] if roles else {}
            use = Use(
                path=path, primitive=primitive, route=route, reason=reason, equation=id(eqn), **axes, **facts
            )  # fmt: skip
            key = (path, self.trail, primitive, route, tuple(axes.items()))
            if not self.dead:
                self.log.unneeded.discard(key)
            elif key not in self.log.uses:
                self.log.unneeded.add(key)
            self.log.uses[key] = use

    def roles(self, weight: Weight, into: Sequence[int], out: Sequence[int]) -> Roles:
        """By parameter, its original axes by role, given the ids contracted and the ids left over.

        All others are stacked axes. Weights that were chosen by an index are a stack, however they are combined
        afterwards, unless the index runs along what would be their only inputs or outputs: a permutation, say.
        """
        return {path: self._roles(path, into, out) for path in weight.paths}

    def _roles(self, path: str, into: Sequence[int], out: Sequence[int]) -> dict[str, tuple[int, ...]]:
        def stem(axes: Sequence[int]) -> frozenset[int]:
            given = [axis for axis in axes if axis not in self.log.looked_up]
            own = frozenset().union(*(self.log.origins[axis].get(path, ()) for axis in given))
            return own or frozenset().union(*(self.log.origins[axis].get(path, ()) for axis in axes))

        in_axes = stem(into)
        out_axes = stem(out) - in_axes
        rest = set(range(self.log.ranks[path])) - in_axes - out_axes
        names = ("in_axes", "out_axes", "batch_axes")
        return {name: tuple(sorted(axes)) for name, axes in zip(names, (in_axes, out_axes, rest), strict=True)}
