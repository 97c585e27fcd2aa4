"""Context: what the rules share while a program is evaluated: dropout keys, ids of axes, and the log of uses."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Literal

import jax

from lora_jax.adapter.site import Kind
from lora_jax.engine.recompute import Frame
from lora_jax.engine.weight import Weight

Strategy = Literal["auto", "factored", "merged"]
Route = Literal["factored", "merged", "look-up", "materialised", "rows", "mask", "blocks"]


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of a parameter by the program.

    Attributes:
      path: the parameter.
      primitive: the operation that used it.
      route: `factored` (two thin products), `merged` (`x·(W + ab)` with factored gradients), `look-up`
        (rows of A, then B), or `materialised` (`W + ab` formed on the spot); of a bank the form of `lora_jax.route`.
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
      origins: for each axis id, the original axes of its parameter that it stems from.
      ranks: number of axes of each parameter.
      looked_up: for each axis along which an index chose slices of a weight, the roles of the parameter's
        axes if that was a look-up and no choice between whole weights.
      order: the dropout number of each use.
      ids: axis ids yet to be given.
    """

    uses: dict[tuple[Any, ...], Use] = field(default_factory=dict)
    origins: dict[int, frozenset[int]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    looked_up: dict[int, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    order: dict[tuple[str, tuple[int, ...]], int] = field(default_factory=dict)
    ids: Iterator[int] = field(default_factory=count)


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
      observe: called where a weight with a numbering meets an input: with the weight's path, the numbers of the linear
        maps `[*maps]`, their inputs `[*maps, tokens, fan_in]`, and which of the tokens count, None for all.
      mask: which tokens are observed, over the leading axes of every input; None for all.
    """

    log: Log
    strategy: Strategy = "auto"
    keys: tuple[Any, ...] = ()
    frame: Frame | None = None
    trail: tuple[int, ...] = ()
    inside: str = ""
    look_inside: bool = False
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

    def fresh(self, origin: frozenset[int] = frozenset()) -> int:
        """A new axis id that stems from the given original axes of its parameter."""
        axis = next(self.log.ids)
        self.log.origins[axis] = origin
        return axis

    def weight(self, path: str, base: Any) -> Weight:
        """A weight without terms, with a fresh id for every axis."""
        axes = tuple(self.fresh(frozenset([axis])) for axis in range(base.ndim))
        self.log.ranks[path] = base.ndim
        return Weight(base, (), axes, path)

    def record(self, weight: Weight, eqn: Any, route: Route, **facts: Any) -> None:
        """Log a use of a weight by an equation."""
        route = "materialised" if self.inside else route
        reason = facts.pop("reason", "") or (f"inside {self.inside}, which is opaque" if self.inside else "")
        self.log.uses[weight.path, self.trail, weight.axes] = Use(
            path=weight.path,
            primitive=eqn.primitive.name if eqn is not None else "return",
            route=route,
            reason=reason,
            equation=id(eqn),
            **facts,
        )

    def roles(self, path: str, into: Sequence[int], out: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Original axes by role, given the ids contracted and the ids left over; all others are stacked axes.

        Weights that were chosen by an index are a stack, however they are combined afterwards.
        """
        into, out = ([axis for axis in axes if axis not in self.log.looked_up] for axes in (into, out))
        in_axes = frozenset().union(*(self.log.origins[axis] for axis in into))
        out_axes = frozenset().union(*(self.log.origins[axis] for axis in out)) - in_axes
        rest = set(range(self.log.ranks[path])) - in_axes - out_axes
        names = ("in_axes", "out_axes", "batch_axes")
        return {name: tuple(sorted(axes)) for name, axes in zip(names, (in_axes, out_axes, rest), strict=True)}
