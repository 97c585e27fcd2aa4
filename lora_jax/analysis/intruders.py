"""Intruder dimensions: strong singular vectors of an adapted weight that the weight did not have."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.by_path import check_parameters
from lora_jax.adapter.factors import Array, matrices, widened
from lora_jax.adapter.updates import Update, exact_sum
from lora_jax.analysis.pictures import draw_intruders
from lora_jax.analysis.rows import Row, left_out_lines, short_table
from lora_jax.compose.factors import gathered, has_factors, plain_factors, product
from lora_jax.errors import ConfigError, listed
from lora_jax.paths import named_leaves
from lora_jax.report.report import Report
from lora_jax.report.tables import Table


@dataclass(frozen=True, eq=False)
class IntruderRow(Row):
    """The strongest singular vectors of one adapted linear map.

    Attributes:
      path: path of the parameter.
      entry: its place along the stacked axes.
      similarity: for each of them, strongest first, the largest cosine between it and any singular vector of the
        weight itself.
      values: their singular values.
      base_values: the largest singular values of the weight itself.
      threshold: similarity below which one is an intruder.
    """

    similarity: np.ndarray
    values: np.ndarray
    base_values: np.ndarray
    threshold: float

    @property
    def numbers(self) -> tuple[int, ...]:
        """Which of them are intruders, counted from 0."""
        return tuple(int(i) for i in np.flatnonzero(self.similarity < self.threshold))


@dataclass(frozen=True, repr=False, eq=False)
class Intruders(Report):
    """What `intruders` returns: a table when printed, a picture, and its numbers as attributes.

    Attributes:
      rows: an `IntruderRow` per linear map.
      left_out: why an adapted parameter has none, by path.
    """

    rows: tuple[IntruderRow, ...]
    left_out: Mapping[str, str]

    @property
    def count(self) -> int:
        """Number of intruders in all rows."""
        return sum(len(row.numbers) for row in self.rows)

    def summary(self) -> Table:
        """A shorter table: all layers of a parameter in one line, with the mean and the range of each number."""
        columns = {
            "intruders": lambda row: float(len(row.numbers)),
            "least similarity": lambda row: float(row.similarity.min()),
        }
        return short_table(self.rows, columns, {"intruders": ".3g", "least similarity": ".2f"})

    def plot(self, path: str | PathLike[str], title: str = "Intruder dimensions") -> None:
        """Write a PNG: the number of intruders by parameter and layer, and every vector's similarity.

        Args:
          path: the file; one that exists is replaced.
          title: what the adapter is.

        Raises:
          ParameterError: there are no rows, so that there is nothing to draw.
          ImportError: matplotlib is not installed.
        """
        draw_intruders(path, title, self.rows)

    def table(self) -> Table:
        """A row for every linear map."""
        headers = ("parameter", "intruders", "of", "which", "least similarity", "σ₁ of W", "σ₁ of W+ΔW")
        rows = []
        for row in self.rows:
            which = listed([str(each + 1) for each in row.numbers])
            numbers = (f"{row.similarity.min():.3f}", f"{row.base_values[0]:.3g}", f"{row.values[0]:.3g}")
            rows.append((row.name, str(len(row.numbers)), str(len(row.similarity)), which, *numbers))
        total = ("all", str(self.count), "", "", "", "", "")
        return Table(headers, rows, total, notes=left_out_lines(self.left_out))


def intruders(params: Any, adapter: Adapter, *, threshold: float = 0.5, top: int = 10) -> Intruders:
    """Find intruder dimensions: strong singular vectors of `W + ΔW` that are near to none of `W`.

    Full fine-tuning moves the singular vectors of a weight a little; low-rank updates may put new ones on top of them,
    and the paper finds that models with more of those forget more. As there, the vectors are those of the outputs.
    Chance makes some similarity too: of random vectors the largest of `n` cosines is near `√(2·ln n / n)`, 0.4 at width
    64 and 0.13 at 1024, so that narrow weights seldom have intruders.

    This needs a decomposition of each weight and of each adapted weight, one after the other, so its time grows
    with the third power of the width: pass an adapter with fewer parameters (`adapter.without(...)`) for a large model.

    Args:
      params: the base's parameters.
      adapter: any adapter; what is trained in full counts too. aLoRA counts as after its invocation.
      threshold: the similarity below which a vector is an intruder, above 0, at most 1.
      top: how many of the strongest vectors of the adapted weight to look at.

    Returns:
      An object that prints as a table, writes a picture (`.plot(path)`) and holds the numbers.

    Raises:
      ConfigError: `threshold` or `top` is out of range.
      ParameterError: the adapter does not fit these parameters.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jax.random.normal(jax.random.key(0), (96, 64))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 96)))
      >>> adapter = lora.init(jax.random.key(1), lora.LoraConfig(rank=1, targets="w"), params, sites)
      >>> lora.analysis.intruders(params, adapter).count
      0
      >>> strong = jax.tree.map(lambda leaf: leaf + 2 * jax.random.normal(jax.random.key(2), leaf.shape), adapter)
      >>> lora.analysis.intruders(params, strong).rows[0].numbers
      (0,)

    References:
      Shuttleworth et al., LoRA vs full fine-tuning: an illusion of equivalence, arXiv 2410.21228.
    """
    if not 0 < threshold <= 1 or top < 1:
        raise ConfigError(f"threshold={threshold!r} must be above 0 and at most 1, and top={top!r} at least 1")
    leaves, _ = named_leaves(params)
    check_parameters(adapter, leaves)
    rows: list[IntruderRow] = []
    left_out: dict[str, str] = {}
    for path, update in gathered(adapter).items():
        if update.site.in_axes:
            rows += _rows(path, update, gathered(jnp.asarray(leaves[path])), threshold, top)
        else:
            left_out[path] = "no linear map"
    return Intruders(tuple(rows), left_out)


def _rows(path: str, update: Update, weight: Array, threshold: float, top: int) -> Iterator[IntruderRow]:
    site, wide = update.site, widened(weight)
    waits = update.waits and has_factors(update)
    after = wide + plain_factors(update).delta() if waits else exact_sum(wide, [update])
    top = min(top, site.fan_in, site.fan_out)
    found = _compared(matrices(site, wide), matrices(site, after), top)
    similarity, values, base_values = (np.asarray(each) for each in found)
    for i, entry in enumerate(np.ndindex(site.batch_shape)):
        yield IntruderRow(path, entry, similarity[i], values[i], base_values[i], threshold)


@partial(jax.jit, static_argnames="top")
def _compared(before: Array, after: Array, top: int) -> tuple[Array, Array, Array]:
    """Similarities, values and former values of stacks of matrices `[fan_in, fan_out]`."""

    def one(pair: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        (_, base_values, known), (_, values, new) = (jnp.linalg.svd(each, full_matrices=False) for each in pair)
        cosines = jnp.abs(product(new[:top], known.T))
        return jnp.minimum(cosines.max(1), 1), values[:top], base_values[:top]

    return jax.lax.map(one, (before, after))
