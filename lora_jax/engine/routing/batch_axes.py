"""Batch axes: along which axes of which values the examples and the tokens of a call run, read off its program.

Each axis of each value is followed from the arguments on, equation by equation. What an operation mixes beyond
recognition (a sort, a reversal, an unknown kernel) is simply not labelled any more, and the operation's name is kept
for the message of a site that needs to know.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lora_jax.engine import jaxprs
from lora_jax.engine.declared import declared
from lora_jax.engine.jaxprs import Program
from lora_jax.engine.routing.axes import (
    LOST,
    Axes,
    Axis,
    all_lost,
    both,
    joined,
    length,
    lost,
    marked,
    marks,
    plain,
    reshaped,
)
from lora_jax.engine.routing.indices import Indices, counted

Trail: TypeAlias = tuple[int, ...]
Rule: TypeAlias = Callable[[Any, list[Axes]], list[Axes]]

RULES: dict[str, Rule] = {}
"""For primitives by name: what runs along the axes of the results, given the equation and what does of its operands."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the primitives of the given names."""

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def unlabelled(atom: Any) -> Axes:
    """The axes of a value along which nothing labelled runs."""
    return tuple(plain(size) for size in getattr(atom.aval, "shape", ()))


@dataclass
class BatchAxes:
    """What was found in one call.

    Attributes:
      operands: axes of the operands of each equation that has a labelled one, by its place in the program.
      lost: names of the primitives whose results lack a label that their operands have.
      keywords: arguments given by keyword, which are not followed.
      counted: for index vectors, by the place of the equation, the columns that count positions, and along which axis.
    """

    operands: dict[Trail, list[Axes]] = field(default_factory=dict)
    lost: dict[str, None] = field(default_factory=dict)
    keywords: tuple[str, ...] = ()
    counted: dict[Trail, Mapping[int, int]] = field(default_factory=dict)

    def follow(self, program: Program, inputs: Sequence[Axes], trail: Trail = ()) -> list[Axes]:
        """Walk through a program, given the axes of its inputs; returns those of its outputs."""
        env = dict(zip(program.jaxpr.invars, inputs, strict=True))
        indices = Indices(program)

        def read(atom: Any) -> Axes:
            return unlabelled(atom) if jaxprs.is_literal(atom) or atom not in env else env[atom]

        for position, eqn in enumerate(program.jaxpr.eqns):
            operands = [read(atom) for atom in eqn.invars]
            here = (*trail, position)
            self.operands.pop(here, None)
            if any(map(marked, operands)):
                self.operands[here] = operands
                if eqn.primitive.name in _INDEXED:
                    self.counted[here] = counted(indices.of(eqn.invars[1]))
                env.update(zip(eqn.outvars, self.results(eqn, operands, here), strict=True))
        return [read(atom) for atom in program.jaxpr.outvars]

    def results(self, eqn: Any, operands: list[Axes], here: Trail) -> list[Axes]:
        """What runs along the axes of an equation's results, given that of its operands and its place."""
        name = eqn.primitive.name
        if name in _REGIONS:
            return _REGIONS[name](self, eqn, operands, here)
        if name in _INDEXED:
            results = _INDEXED[name](eqn, operands, self.counted.get(here, {}))
        else:
            results = RULES[name](eqn, operands) if name in RULES else [unlabelled(var) for var in eqn.outvars]
        before, after = marks(operands), marks(results)
        if name in _ENDS or before <= after:
            return results
        if before - after - {LOST}:
            self.lost[name] = None
        return [all_lost(axes) for axes in results]

    def _inlined(self, eqn: Any, operands: list[Axes], here: Trail) -> list[Axes]:
        letters = declared(eqn)
        if letters is not None:
            runs = dict(zip(letters.kernel, operands[1], strict=True))
            for letter, axis in zip(letters.x, operands[0], strict=True):
                runs[letter] = both(axis, runs[letter]) if letter in runs else axis
            return [tuple(runs[letter] for letter in letters.out)]
        return self.follow(jaxprs.sub_programs(eqn)[0], operands, here)

    def _scan(self, eqn: Any, operands: list[Axes], here: Trail) -> list[Axes]:
        """What is scanned over is seen in slices; what is collected gets an axis."""
        loop = jaxprs.loop(eqn)
        consts, carries = operands[: loop.consts], operands[loop.consts : loop.consts + loop.carries]
        scanned = operands[loop.consts + loop.carries :]
        slices, steps = [axes[1:] for axes in scanned], plain(eqn.params["length"])
        if any(marked(axes[:1]) for axes in scanned):
            self.lost["scan"] = None
            (steps,) = all_lost([steps])
        results = _settled(lambda carry: self.follow(loop.body, [*consts, *carry, *slices], here), carries)
        return [*results[: loop.carries], *((steps, *axes) for axes in results[loop.carries :])]

    def _while(self, eqn: Any, operands: list[Axes], here: Trail) -> list[Axes]:
        test, body = (jaxprs.program(eqn.params[name]) for name in ("cond_jaxpr", "body_jaxpr"))
        carries = len(eqn.outvars)
        split = len(test.jaxpr.invars) - carries
        for_test, for_body = operands[:split], operands[split:-carries]

        def iteration(carry: list[Axes]) -> list[Axes]:
            self.follow(test, [*for_test, *carry], (*here, 0))
            return self.follow(body, [*for_body, *carry], (*here, 1))

        return _settled(iteration, operands[-carries:])

    def _cond(self, eqn: Any, operands: list[Axes], here: Trail) -> list[Axes]:
        branches = map(jaxprs.program, eqn.params["branches"])
        found = [self.follow(branch, operands[1:], (*here, i)) for i, branch in enumerate(branches)]
        return [_together(each, either=True) for each in zip(*found, strict=True)]


_REGIONS: dict[str, Callable[[BatchAxes, Any, list[Axes], Trail], list[Axes]]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "remat"), BatchAxes._inlined),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"), BatchAxes._inlined),
    "scan": BatchAxes._scan,
    "while": BatchAxes._while,
    "cond": BatchAxes._cond,
}

_ENDS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"}
"""Primitives that are meant to do away with an axis."""


def _settled(iteration: Callable[[list[Axes]], list[Axes]], carries: list[Axes]) -> list[Axes]:
    """Results of a loop's body, once what it carries is the same before and after every iteration, and without any."""
    while True:
        results = iteration(carries)
        after = [_together(each, either=True) for each in zip(carries, results[: len(carries)], strict=True)]
        if after == carries:
            return [*carries, *results[len(carries) :]]
        carries = after


def _together(operands: Sequence[Axes], either: bool = False) -> Axes:
    """What runs along the axes of a result that has those of every operand, or is either of them."""
    first, *rest = operands
    for other in rest:
        first = tuple(both(mine, its, either) for mine, its in zip(first, other, strict=True))
    return first


_ELEMENTWISE = [
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
    "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex", "conj", "convert_element_type", "copy", "cos", "cosh",
    "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "digamma", "div", "eq", "eq_to", "erf", "erf_inv",
    "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igamma_grad_a", "igammac", "imag",
    "integer_pow", "is_finite", "le", "le_to", "lgamma", "log", "log1p", "log2", "logistic", "lt", "lt_to", "max",
    "min", "mul", "name", "ne", "neg", "nextafter", "not", "one_minus_square", "or", "polygamma",
    "population_count", "pow", "pvary", "random_gamma_grad", "real", "reduce_precision",
    "regularized_incomplete_beta", "rem", "reshard", "round", "rsqrt", "sharding_constraint",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor", "zeta",
]  # fmt: skip


ALIGNED = {*_ELEMENTWISE, "select_n"}
"""Primitives whose operands have the axes of their result."""


@rule(*_ELEMENTWISE)
def _elementwise(eqn: Any, operands: list[Axes]) -> list[Axes]:
    """Axes of length one are repeated along those of the others."""
    whole = unlabelled(eqn.outvars[0])
    alike = [axes for axes in operands if len(axes) == len(whole)]
    return [_together([tuple(axis or other for axis, other in zip(axes, whole, strict=True)) for axes in alike])]


@rule("fft")
def _fft(eqn: Any, operands: list[Axes]) -> list[Axes]:
    """A transform mixes the positions along its own axes, the last ones."""
    kept = len(operands[0]) - len(eqn.params["fft_lengths"])
    return [(*operands[0][:kept], *unlabelled(eqn.outvars[0])[kept:])]


@rule("select_n")
def _select(eqn: Any, operands: list[Axes]) -> list[Axes]:
    chosen = _together(operands[1:], either=True)
    return [_together([chosen, operands[0]]) if len(operands[0]) == len(chosen) else chosen]


@rule("stack")
def _stack(eqn: Any, operands: list[Axes]) -> list[Axes]:
    axes, place = list(_together(operands, either=True)), eqn.params["axis"]
    return [(*axes[:place], plain(len(operands)), *axes[place:])]


@rule("unstack")
def _unstack(eqn: Any, operands: list[Axes]) -> list[Axes]:
    return [tuple(axis for i, axis in enumerate(operands[0]) if i != eqn.params["axis"])] * len(eqn.outvars)


@rule("tile")
def _tile(eqn: Any, operands: list[Axes]) -> list[Axes]:
    return [tuple(joined([plain(times), axis]) for times, axis in zip(eqn.params["reps"], operands[0], strict=True))]


@rule("optimization_barrier", "device_put")
def _each_its_own(eqn: Any, operands: list[Axes]) -> list[Axes]:
    return operands


@rule("transpose")
def _transpose(eqn: Any, operands: list[Axes]) -> list[Axes]:
    return [tuple(operands[0][i] for i in eqn.params["permutation"])]


@rule("reshape")
def _reshape(eqn: Any, operands: list[Axes]) -> list[Axes]:
    order = eqn.params.get("dimensions")
    given = operands[0] if order is None else tuple(operands[0][i] for i in order)
    return [reshaped(given, eqn.params["new_sizes"])]


@rule("squeeze")
def _squeeze(eqn: Any, operands: list[Axes]) -> list[Axes]:
    return [tuple(axis for i, axis in enumerate(operands[0]) if i not in eqn.params["dimensions"])]


@rule("broadcast_in_dim")
def _broadcast(eqn: Any, operands: list[Axes]) -> list[Axes]:
    axes = list(unlabelled(eqn.outvars[0]))
    for i, axis in zip(eqn.params["broadcast_dimensions"], operands[0], strict=True):
        axes[i] = axis or axes[i]
    return [tuple(axes)]


@rule(*_ENDS, "reduce_xor")
def _reduce(eqn: Any, operands: list[Axes]) -> list[Axes]:
    return [tuple(axis for i, axis in enumerate(operands[0]) if i not in eqn.params["axes"])]


@rule("reduce_window_max", "reduce_window_min", "reduce_window_sum", "slice", "split", "dynamic_slice", "rev", "pad")
@rule("sort", "reduce_window", "top_k", "approx_top_k")
def _along_others(eqn: Any, operands: list[Axes]) -> list[Axes]:
    """Axes that keep their length are untouched, but for those that a reversal, a sort or a shift runs along."""
    moved = {*eqn.params.get("dimensions", ()), eqn.params.get("dimension", -1)}
    if eqn.primitive.name == "top_k":
        moved.add(eqn.params.get("axis", len(operands[0]) - 1) % len(operands[0]))
    if eqn.primitive.name == "approx_top_k":
        moved.add(eqn.params["reduction_dimension"] % len(operands[0]))
    if eqn.primitive.name == "pad":
        moved |= {i for i, config in enumerate(eqn.params["padding_config"]) if any(config)}
    one = eqn.primitive.name in ("slice", "split", "dynamic_slice", "pad", "top_k", "approx_top_k")
    given = operands[:1] * len(eqn.outvars) if one else operands
    return [_kept(axes, var, moved) for axes, var in zip(given, eqn.outvars, strict=False)]


def _kept(axes: Axes, var: Any, moved: set[int]) -> Axes:
    new = zip(axes, unlabelled(var), strict=True)
    return tuple(axis if length(axis) == length(now) and i not in moved else now for i, (axis, now) in enumerate(new))


@rule("concatenate")
def _concatenate(eqn: Any, operands: list[Axes]) -> list[Axes]:
    (out,), along = eqn.outvars, eqn.params["dimension"]
    mixed = any(marked(axes[along : along + 1]) for axes in operands)
    whole: Axis = ((LOST, out.aval.shape[along]),) if mixed else plain(out.aval.shape[along])
    cut = [(*axes[:along], whole, *axes[along + 1 :]) for axes in operands]
    return [_together(cut, either=True)]


@rule("dynamic_update_slice")
def _dynamic_update_slice(eqn: Any, operands: list[Axes]) -> list[Axes]:
    """An axis that is written in full, as that of the examples in a cache, has what is written."""
    return [_filled(operands[0], operands[1])]


def _filled(whole: Axes, part: Axes) -> Axes:
    """An axis of which some positions are written keeps its label only if nothing labelled is written there."""
    return tuple(
        both(old, new, either=True) if length(old) == length(new) else lost(old) if marked([new]) else old
        for old, new in zip(whole, part, strict=True)
    )


@rule("dot_general")
def _dot_general(eqn: Any, operands: list[Axes]) -> list[Axes]:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    lhs, rhs = operands
    shared = [both(lhs[i], rhs[j]) for i, j in zip(lb, rb, strict=True)]
    free = [
        [axis for i, axis in enumerate(axes) if i not in used] for axes, used in ((lhs, (*lc, *lb)), (rhs, (*rc, *rb)))
    ]
    return [(*shared, *free[0], *free[1])]


@rule("conv_general_dilated")
def _convolution(eqn: Any, operands: list[Axes]) -> list[Axes]:
    """Positions keep their places where the window moves by one and the length stays."""
    numbers, image = eqn.params["dimension_numbers"], operands[0]
    axes = list(unlabelled(eqn.outvars[0]))
    steps = zip(eqn.params["window_strides"], eqn.params["lhs_dilation"], strict=True)
    still = [step == (1, 1) for step in steps]
    pairs = zip(numbers.lhs_spec, numbers.out_spec, [True, False, *still], strict=True)
    for source, target, same in pairs:
        if same and length(image[source]) == length(axes[target]):
            axes[target] = image[source]
    return [tuple(axes)]


def _gather(eqn: Any, operands: list[Axes], counted: Mapping[int, int]) -> list[Axes]:
    """Rows of the result are those of the indices; axes that every slice has whole stay as they are.

    Indices that count positions along an axis of the operand keep that axis.
    """
    operand, indices = operands
    numbers, (out,) = eqn.params["dimension_numbers"], eqn.outvars
    sizes = eqn.params["slice_sizes"]
    paired = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    columns = {counted[i]: d for i, d in enumerate(numbers.start_index_map) if i in counted and sizes[d] == 1}
    paired |= {i: d for i, d in columns.items() if eqn.invars[1].aval.shape[i] == eqn.invars[0].aval.shape[d]}
    rows = iter([both(axis, operand[paired[i]]) if i in paired else axis for i, axis in enumerate(indices[:-1])])
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    left = iter([(axis, plain(sizes[i])) for i, axis in enumerate(operand) if i not in gone])
    axes = []
    for i in range(len(out.aval.shape)):
        if i in numbers.offset_dims:
            axis, taken = next(left)
            axes.append(axis if length(axis) == length(taken) else taken)
        else:
            axes.append(next(rows))
    return [tuple(axes)]


_SCATTERS = ("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")


def _scatter(eqn: Any, operands: list[Axes], counted: Mapping[int, int]) -> list[Axes]:
    """What is written into is as it was; an axis that is written in full has what is written."""
    operand, indices, updates = operands
    numbers = eqn.params["dimension_numbers"]
    places = [i for i in range(len(updates)) if i not in numbers.update_window_dims]
    written = [both(updates[i], axis) for i, axis in zip(places, indices[:-1], strict=True)]
    own = dict(zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True))
    own |= {d: counted[i] for i, d in enumerate(numbers.scatter_dims_to_operand_dims) if i in counted}
    shape, rows = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    own = {d: i for d, i in own.items() if shape[d] == rows[i]}
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = iter([updates[i] for i in numbers.update_window_dims])
    others = [axis for i, axis in enumerate(written) if i not in own.values()]
    kept = tuple(
        lost(axis) if i in gone and i not in own and marked(others) else axis for i, axis in enumerate(operand)
    )
    part = tuple(
        written[own[i]] if i in own else kept[i] if i in gone else next(window) for i in range(len(operand))
    )  # fmt: skip
    return [_filled(kept, part)]


_INDEXED: dict[str, Callable[[Any, list[Axes], Mapping[int, int]], list[Axes]]] = {
    "gather": _gather,
    **dict.fromkeys(_SCATTERS, _scatter),
}
