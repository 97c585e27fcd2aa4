"""Two ways to make a weight smaller, at equal bytes: fewer singular values, or INT8, INT4 or NF4 for every entry."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.factors import Array, matrices, widened
from lora_jax.adapter.site import Site
from lora_jax.analysis.pictures import draw_rounding
from lora_jax.analysis.rows import Row, number, short_table
from lora_jax.capture import Inputs
from lora_jax.compose.factors import gathered, product
from lora_jax.errors import ParameterError, listed, nearest
from lora_jax.paths import is_array, named_leaves
from lora_jax.quantised.formats import FORMATS as CODES
from lora_jax.quantised.leaf import quantised
from lora_jax.report.report import Report
from lora_jax.report.tables import Table

SCALE_BYTES = 4
"""Of every block, for its scale in float32."""

_BLOCK = 64


@dataclass(frozen=True)
class Format:
    """A format of `lora_jax.quantise`, in blocks along the inputs of an output; the largest number is exact.

    Attributes:
      name: of the format.
      scheme: its name for `lora_jax.quantise`.
      block: numbers that share a scale; None for all inputs of an output.
    """

    name: str
    scheme: str
    block: int | None

    def nbytes(self, fan_in: int, fan_out: int) -> int:
        """Bytes of a matrix, scales included.

        >>> [(each.name, each.nbytes(128, 10)) for each in FORMATS]
        [('INT8', 1320), ('INT4', 720), ('NF4', 720)]
        """
        scales = fan_out * -(-fan_in // (self.block or fan_in))
        return -(-fan_in * fan_out * CODES[self.scheme].bits // 8) + SCALE_BYTES * scales

    def rounded(self, matrix: Array) -> Array:
        """A matrix `[fan_in, fan_out]` float32, with every number at the nearest of its block's levels.

        >>> [round(float(each), 3) for each in FORMATS[1].rounded(jnp.float32([[2.0], [0.9], [0.1]]))[:, 0]]
        [2.0, 0.857, 0.0]
        """
        return quantised(matrix.T, self.scheme, self.block or len(matrix), 1).dense().T


FORMATS = (Format("INT8", "int8", None), Format("INT4", "int4", _BLOCK), Format("NF4", "nf4", _BLOCK))


FACTOR_BYTES = 2
"""Of every number in the factors of a truncation: bfloat16 or float16."""

FRACTIONS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Shares of the entries, those of largest error first; a report says how much of the squared error is in each."""

COMPARED = {
    "INT8": ("INT8", "rounded"),
    "SVD, as big": ("INT8", "truncated"),
    "INT4": ("INT4", "rounded"),
    "NF4": ("NF4", "rounded"),
    "SVD, as big as both": ("NF4", "truncated"),
}
"""What a summary shows; INT4 and NF4 take the same bytes, so that one truncation stands for both."""


@dataclass(frozen=True, eq=False)
class Deviation:
    """How far an approximation is from a weight.

    Attributes:
      total: Frobenius norm of the error over that of the weight.
      held: by `FRACTIONS`: the share of the squared error in so many of the entries, those of largest error.
      peak: the largest error over the root of the mean square.
      outputs: the error of the outputs `Wx` relative to them, over all inputs; None for a weight whose inputs were not
        given although those of others were.
    """

    total: float
    held: np.ndarray
    peak: float
    outputs: float | None

    @property
    def top(self) -> float:
        """Share of the squared error in the 1 % of entries where it is largest.

        3 % if errors are uniform up to a bound, 8 % if they are normal, near 100 % if few entries are all of it.
        """
        return float(self.held[FRACTIONS.index(0.01)])


@dataclass(frozen=True, eq=False)
class RoundingRow(Row):
    """A linear map in one format, and truncated to as many bytes.

    Attributes:
      path: path of the parameter.
      entry: its place along the stacked axes.
      form: `INT8`, `INT4` or `NF4`.
      nbytes: what it occupies, scales included.
      bits: the same per entry.
      rank: of the truncation that occupies no more.
      rounded: what the format does.
      truncated: what the truncation does.
    """

    form: str
    nbytes: int
    bits: float
    rank: int
    rounded: Deviation
    truncated: Deviation


@dataclass(frozen=True, repr=False, eq=False)
class Rounding(Report):
    """What `rounding` returns: a table when printed, a picture, and its numbers as attributes.

    Attributes:
      rows: a `RoundingRow` for each format of each linear map.
      inputs: which inputs the errors of outputs are for: `"given"`, or `"normal"`.
    """

    rows: tuple[RoundingRow, ...]
    inputs: str

    def summary(self) -> Table:
        """A shorter table for the errors of outputs: all layers of a parameter in one line, with mean and range."""
        columns: dict[str, Any] = {}
        for header, (form, kind) in COMPARED.items():
            columns[header] = lambda row, form=form, kind=kind: _outputs(row, kind) if row.form == form else None
        return short_table(self.rows, columns, dict.fromkeys(columns, ".1%"))

    def plot(self, path: str | PathLike[str], title: str = "Rounding against truncation, at equal bytes") -> None:
        """Write a PNG: errors of weights and of outputs, and how evenly they are spread over entries.

        Args:
          path: the file; one that exists is replaced.
          title: what the weights are.

        Raises:
          ParameterError: there are no rows, so that there is nothing to draw.
          ImportError: matplotlib is not installed.
        """
        draw_rounding(path, title, self.rows, FRACTIONS, self.inputs)

    def table(self) -> Table:
        """Rows for every linear map: a format of numbers each, and the truncation of as many bytes."""
        headers = ("parameter", "form", "bits", "error", "of outputs", "in 1 % of entries", "max/rms")
        rows: list[tuple[str, ...]] = []
        for row, after in zip(self.rows, (*self.rows[1:], None), strict=True):
            rows.append((row.name, row.form, f"{row.bits:.3g}", *_numbers(row.rounded)))
            # Formats of as many bytes have the same truncation.
            if after is None or (after.name, after.nbytes) != (row.name, row.nbytes):
                rows.append((row.name, f"SVD, rank {row.rank}", f"≤ {row.bits:.3g}", *_numbers(row.truncated)))
        note = f"Outputs for {self.inputs} inputs; scales in float32, factors in 16 bits"
        return Table(headers, rows, notes=[note], words=(1,))


def rounding(params: Any, sites: Mapping[str, Site] | Iterable[Site] | None = None, inputs: Any = None) -> Rounding:
    """Compare truncating a weight's singular values with rounding its entries, at equal bytes.

    The formats are INT8 with a scale for each output, INT4 with a scale for each block of 64 inputs of an output, and
    NF4 with the same blocks; scales are the largest absolute value and take four bytes. A truncation keeps as
    many singular values as fit into the same bytes with factors of 16 bits, whose own rounding is not counted.

    For each the table has the relative error; the share of the squared error in the worst 1 % of the entries (3 % where
    errors are uniform up to a bound, 8 % where they are normal, more where they are concentrated); and the relative
    error of the outputs. That is measured on the inputs given, from their second moment. Without any it is that
    for normal inputs, which is the error of the weight itself: inputs that differ in size between directions can
    make it much smaller or larger.

    Every weight is decomposed, so choose sites of a large model.

    Args:
      params: parameters, or one weight `[fan_in, fan_out]`.
      sites: which of them: some of what `lora_jax.find_sites` found. Not for one weight.
      inputs: what `lora_jax.capture(..., "inputs")` returned, or a mapping from path to inputs
        `[*batch, tokens, fan_in]`; for one weight its inputs `[tokens, fan_in]`.

    Returns:
      An object that prints as a table, writes a picture (`.plot(path)`) and holds the numbers.

    Raises:
      ParameterError: a site is missing, has another shape, or is no linear map, or inputs do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> weight = jax.random.normal(jax.random.key(0), (256, 128))
      >>> report = lora.analysis.rounding(weight)
      >>> [(row.form, row.bits, row.rank) for row in report.rows]
      [('INT8', 8.125, 43), ('INT4', 4.5, 24), ('NF4', 4.5, 24)]
      >>> int8, int4, nf4 = [row.rounded.total for row in report.rows]
      >>> int8 < nf4 < int4 < report.rows[0].truncated.total
      True

    References:
      Dettmers et al., QLoRA, arXiv 2305.14314.
    """
    leaves, chosen, given = _chosen(params, sites, inputs)
    rows: list[RoundingRow] = []
    for site in chosen:
        second = _second(site, given[site.path]) if site.path in given else None
        rows += _rows(site, leaves[site.path], second, blank=bool(given) and second is None)
    return Rounding(tuple(rows), "given" if given else "normal")


def _chosen(params: Any, sites: Any, inputs: Any) -> tuple[dict[str, Any], list[Site], Mapping[str, Any]]:
    """Weights by path, the sites among them, and inputs by path."""
    if is_array(params):
        if params.ndim != 2 or sites is not None:
            raise ParameterError(f"One weight has two axes, inputs and outputs, and no sites; got {params.shape}")
        facts: dict[str, Any] = {"shape": params.shape, "dtype": str(params.dtype), "kind": "dense"}
        site = Site(path="weight", in_axes=(0,), out_axes=(1,), **facts)
        return {"weight": params}, [site], {} if inputs is None else {"weight": inputs}
    leaves, _ = named_leaves(params)
    if sites is None:
        raise ParameterError("Pass sites=lora_jax.find_sites(...) or some of them: their axes tell inputs from outputs")
    chosen = list(sites.values() if isinstance(sites, Mapping) else sites)
    for site in chosen:
        _check(site, leaves)
    given = {} if inputs is None else inputs
    if unknown := sorted(set(given) - {site.path for site in chosen}):
        raise ParameterError(f"There are inputs for {listed(unknown)}, which are not among the sites")
    return leaves, chosen, given


def _check(site: Site, leaves: Mapping[str, Any]) -> None:
    if site.path not in leaves:
        raise ParameterError(f"The parameters have no {site.path!r}; nearest: {nearest(site.path, leaves)}")
    if np.shape(leaves[site.path]) != site.shape:
        raise ParameterError(f"{site.path!r} has shape {np.shape(leaves[site.path])}, and its site {site.shape}")
    if not site.in_axes:
        raise ParameterError(f"{site.path!r} is no linear map, which has inputs and outputs: leave it out of the sites")


def _rows(site: Site, weight: Any, second: Array | None, blank: bool) -> Iterator[RoundingRow]:
    """What happens to a parameter; without errors of outputs where those would be for other inputs than the rest."""
    weights = matrices(site, widened(gathered(jnp.asarray(weight))))
    found = jax.tree.map(np.asarray, _compared(weights, second))
    count = site.fan_in * site.fan_out
    for i, entry in enumerate(np.ndindex(site.batch_shape)):
        for form, rank, (rounded, truncated) in zip(FORMATS, _ranks(site.fan_in, site.fan_out), found, strict=True):
            nbytes = form.nbytes(site.fan_in, site.fan_out)
            both = (_deviation(each, i, blank) for each in (rounded, truncated))
            yield RoundingRow(site.path, entry, form.name, nbytes, 8 * nbytes / count, rank, *both)


def _ranks(fan_in: int, fan_out: int) -> list[int]:
    """How many singular values fit into the bytes of each format."""
    most = min(fan_in, fan_out)
    return [min(form.nbytes(fan_in, fan_out) // (FACTOR_BYTES * (fan_in + fan_out)), most) for form in FORMATS]


def _second(site: Site, given: Any) -> Array:
    """`[weights, fan_in, fan_in]`: the second moment of the inputs of every linear map."""
    many, size = prod(site.batch_shape), site.fan_in
    if isinstance(given, Inputs):
        return jnp.asarray(given.second).reshape(many, size, size)
    tokens = widened(jnp.asarray(given))
    if tokens.ndim < 2 or (*tokens.shape[:-2], tokens.shape[-1]) != (*site.batch_shape, size):
        wanted = "×".join(map(str, (*site.batch_shape, "tokens", size)))
        raise ParameterError(f"The inputs of {site.path!r} have shape {tokens.shape}; it reads {wanted}")
    flat = tokens.reshape(many, -1, size)
    return jnp.einsum("nti,ntj->nij", flat, flat, precision=jax.lax.Precision.HIGHEST)


class _Measured(NamedTuple):
    """A `Deviation` of every linear map of a stack."""

    total: Any
    held: Any
    peak: Any
    outputs: Any


def _deviation(found: _Measured, i: int, blank: bool) -> Deviation:
    outputs = None if blank else float(found.outputs[i])
    return Deviation(float(found.total[i]), found.held[i], float(found.peak[i]), outputs)


@jax.jit
def _compared(weights: Array, second: Array | None) -> list[tuple[_Measured, _Measured]]:
    """What every format and its truncation do to matrices `[fan_in, fan_out]`, one after the other."""

    def one(given: tuple[Array, Array | None]) -> list[tuple[_Measured, _Measured]]:
        matrix, moment = given
        left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
        ranks = _ranks(*matrix.shape)
        rests = {rank: product(left[:, rank:] * values[None, rank:], right[rank:]) for rank in ranks}
        truncated = {rank: _measured(matrix, rest, moment) for rank, rest in rests.items()}
        rounded = [_measured(matrix, matrix - form.rounded(matrix), moment) for form in FORMATS]
        return [(mine, truncated[rank]) for mine, rank in zip(rounded, ranks, strict=True)]

    return jax.lax.map(one, (weights, second))


def _measured(matrix: Array, error: Array, moment: Array | None) -> _Measured:
    squares = jnp.sort(jnp.square(error).reshape(-1), descending=True)
    counts = [max(round(share * squares.size), 1) for share in FRACTIONS]
    sums = jnp.stack([squares[:count].sum() for count in counts])
    whole, held = sums[-1], sums / _positive(sums[-1])
    peak = jnp.sqrt(squares[0] / _positive(whole / squares.size))
    total = _ratio(whole, jnp.sum(jnp.square(matrix)))
    if moment is None:
        return _Measured(total, held, peak, total)
    energies = [jnp.sum(each * product(moment, each)) for each in (error, matrix)]
    return _Measured(total, held, peak, _ratio(*energies))


def _ratio(error: Array, whole: Array) -> Array:
    """The root of a share of energy."""
    return jnp.sqrt(jnp.maximum(error, 0) / _positive(whole))


def _positive(value: Array) -> Array:
    return jnp.where(value > 0, value, 1)


def _numbers(found: Deviation) -> list[str]:
    return [f"{found.total:.2%}", number(found.outputs, ".2%"), f"{found.top:.1%}", f"{found.peak:.1f}"]


def _outputs(row: RoundingRow, kind: str) -> float | None:
    return getattr(row, kind).outputs
