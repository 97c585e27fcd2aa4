"""Site: one parameter that a program uses linearly, and the role each of its axes plays there."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import jax.numpy as jnp

from lora_jax.errors import ParameterError
from lora_jax.report.report import Report
from lora_jax.report.tables import Table, times

Kind = Literal["dense", "conv", "embedding", "ragged", "full"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """One parameter that a program uses linearly, with the role of each axis.

    Attributes:
      path: `/`-joined path of the parameter in the tree, e.g. `params/layers_0/attn/query/kernel`.
      shape: shape of the parameter.
      dtype: name of the parameter's dtype.
      kind: `dense`, `conv`, `embedding` (a look-up table), `ragged` (grouped matmul of experts), or
        `full` for a parameter that is trained whole and needs no axes.
      in_axes: axes contracted with the input. For a look-up table, the axis that is indexed.
      out_axes: axes that appear in the output.
      batch_axes: axes over which the parameter is a stack of independent weights: scanned layers,
        experts, vmapped ensembles. Every index along them has factors of its own.
      uses: how many times the program uses the parameter linearly (a scan body counts once).
      head: whether the result is an output of the program (an output head), possibly after a
        bias, a cast or another function of each element.
      channel_axis: of a convolution, the input axis that counts channels (those of one group); the others are its
        window. None where the program does not tell, or convolves as no layer of PyTorch's does (transposed).
      groups: of a convolution, how many groups of channels are convolved apart (`feature_group_count`).
      codes: whether the parameter holds codes that the program makes numbers of; its adapter is beside the numbers.

    Raises:
      ParameterError: the axes do not account for every axis of the shape exactly once, or `channel_axis` is no input
        axis.

    Example:
      >>> site = Site(path="w", shape=(3, 4, 5), dtype="float32", kind="dense",
      ...             in_axes=(1,), out_axes=(2,), batch_axes=(0,))
      >>> site.fan_in, site.fan_out, site.a_shape(8), site.b_shape(8)
      (4, 5, (3, 8, 4), (3, 8, 5))
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    in_axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = ()
    batch_axes: tuple[int, ...] = ()
    uses: int = 1
    head: bool = False
    channel_axis: int | None = None
    groups: int = 1
    codes: bool = False

    def __post_init__(self) -> None:
        if self.channel_axis is not None and self.channel_axis not in self.in_axes:
            raise ParameterError(f"Site {self.path!r}: channel_axis={self.channel_axis} is none of {self.in_axes}")
        axes = (*self.in_axes, *self.out_axes, *self.batch_axes)
        if self.kind != "full" and sorted(axes) != list(range(len(self.shape))):
            raise ParameterError(
                f"Site {self.path!r} of shape {self.shape} has in_axes={self.in_axes}, out_axes={self.out_axes} and "
                f"batch_axes={self.batch_axes}. Together they must name each of its {len(self.shape)} axes once."
            )

    def sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the given axes, in the order given."""
        return tuple(self.shape[axis] for axis in axes)

    @property
    def fan_in(self) -> int:
        """Number of inputs of one linear map: receptive field included, stacked axes excluded."""
        return prod(self.sizes(self.in_axes))

    @property
    def fan_out(self) -> int:
        """Number of outputs of one linear map, stacked axes excluded."""
        return prod(self.sizes(self.out_axes))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the stacked axes."""
        return self.sizes(self.batch_axes)

    def a_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of the factor A: `[*batch, rank, *in]`."""
        return (*self.batch_shape, rank, *self.sizes(self.in_axes))

    def b_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of the factor B: `[*batch, rank, *out]`."""
        return (*self.batch_shape, rank, *self.sizes(self.out_axes))

    @property
    def nbytes(self) -> int:
        """Bytes the parameter occupies."""
        return prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Missed:
    """A parameter that reaches a product, a convolution or a look-up, and is no site.

    Attributes:
      path: its path.
      shape: its shape.
      reason: why it is none.
      codes: whether it holds codes, which the program makes numbers of.

    Example:
      >>> print(Missed("mixer/kernel", (6, 6), "tanh has no low-rank form"))
      mixer/kernel (6×6) is no site: tanh has no low-rank form. Train it in full (train=), or write its Site by hand: \
lora_jax.Site(path='mixer/kernel', ...)
    """

    path: str
    shape: tuple[int, ...]
    reason: str
    codes: bool = False

    def __str__(self) -> str:
        way = "Quantise the plain base with lora_jax.quantise" if self.codes else "Train it in full (train=)"
        return (
            f"{self.path} ({times(self.shape)}) is no site: {self.reason}. "
            f"{way}, or write its Site by hand: lora_jax.Site(path={self.path!r}, ...)"
        )


class Sites(Report, Mapping[str, Site]):
    """Read-only mapping from parameter path to `Site`; printing it shows a table.

    Example:
      >>> sites = Sites([Site(path="w", shape=(4, 5), dtype="float32", kind="dense",
      ...                     in_axes=(0,), out_axes=(1,))])
      >>> sites["w"].fan_in, list(sites)
      (4, ['w'])
    """

    def __init__(
        self,
        sites: Iterator[Site] | list[Site] | tuple[Site, ...],
        all_paths: tuple[str, ...] = (),
        missed: tuple[Missed, ...] = (),
    ):
        self._sites = {site.path: site for site in sites}
        self.all_paths = all_paths or tuple(self._sites)
        """Paths of every array in the parameter tree, sites or not (for full training and errors)."""
        self.missed = missed
        """Parameters that reach a product, a convolution or a look-up and are no sites."""

    def __getitem__(self, path: str) -> Site:
        return self._sites[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def table(self) -> Table:
        """A row for every site."""
        headers = ("path", "kind", "shape", "dtype", "in", "out", "stacked", "uses")
        rows = []
        for site in self.values():
            uses = f"{site.uses}{' (head)' if site.head else ''}"
            axes = [_sizes(site, axes) for axes in (site.in_axes, site.out_axes, site.batch_axes)]
            rows.append((site.path, site.kind, times(site.shape) or "scalar", site.dtype, *axes, uses))
        return Table(headers, rows, notes=[str(each) for each in self.missed], words=range(1, 8))


def _sizes(site: Site, axes: tuple[int, ...]) -> str:
    return f"{times(site.sizes(axes))} @{','.join(map(str, axes))}" if axes else ""


def full_site(path: str, leaf: Any) -> Site:
    """A parameter that is trained whole, and needs no axes."""
    return Site(path=path, shape=tuple(leaf.shape), dtype=str(leaf.dtype), kind="full")
