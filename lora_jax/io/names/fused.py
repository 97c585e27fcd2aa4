"""Fused modules (`qkv_proj`, `gate_up_proj`): which outputs of a PyTorch module belong to which JAX parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_jax.adapter.site import Site
from lora_jax.errors import MatchError


@dataclass(frozen=True)
class OutputSlice:
    """The outputs of a module that one parameter has, in PyTorch's order.

    Attributes:
      start: first of them, in each group.
      stop: past the last.
      size: number of outputs of a group, those of other parameters included.
      groups: how often that repeats: more than once where a module interleaves its parts.

    Example:
      >>> OutputSlice(1, 2, 3, groups=2).take(np.arange(6))
      array([1, 4])
    """

    start: int
    stop: int
    size: int
    groups: int = 1

    @property
    def is_fused(self) -> bool:
        """Whether the module has outputs of other parameters too."""
        return self.stop - self.start != self.size

    @property
    def total(self) -> int:
        """Number of outputs of the module."""
        return self.size * self.groups

    @property
    def count(self) -> int:
        """Number of outputs of the parameter."""
        return (self.stop - self.start) * self.groups

    @property
    def index(self) -> tuple[slice, slice]:
        """The same as an index into the module's outputs, with groups and outputs of a group on two axes."""
        return slice(None), slice(self.start, self.stop)

    def take(self, values: np.ndarray) -> np.ndarray:
        """`[..., count]`: the parameter's own of the module's outputs `[..., total]`."""
        return self.grouped(values, self.size)[..., *self.index].reshape(*values.shape[:-1], self.count)

    def spread(self, own: np.ndarray) -> np.ndarray:
        """`[..., groups, count / groups]`: the parameter's outputs as they are in each group."""
        return self.grouped(own, self.stop - self.start)

    def grouped(self, values: np.ndarray, size: int) -> np.ndarray:
        """The last axis in groups of a size."""
        return values.reshape(*values.shape[:-1], self.groups, size)


@dataclass(frozen=True)
class Part:
    """The outputs that a parameter and a module have in common.

    Attributes:
      start, stop: range along the output axis `axis` of the parameter.
      slice: the same outputs, counted among the module's.
      axis: counted among output axes.
      rotary: features per head to reorder from neighbours to halves, or 0.
      gain: the parameter is PyTorch's weight times this.
    """

    start: int
    stop: int
    slice: OutputSlice
    axis: int = 0
    rotary: int = 0
    gain: float = 1.0


def fused_slice(
    own: str, paths: Sequence[str], sites: Mapping[str, Site], shares: Sequence[int], interleaved: int
) -> OutputSlice:
    """Where a parameter is in the module that fuses it with others.

    Args:
      own: path of the parameter.
      paths: of all parameters of the module, in the order of its outputs.
      sites: those that are known, the parameter's included.
      shares: relative numbers of outputs of all of them, or nothing.
      interleaved: number of groups, or -1 for the smallest first output axis, which counts key and value heads.

    Raises:
      MatchError: sizes are unknown, or contradict each other.

    Example:
      >>> axes = {"dtype": "float32", "kind": "dense", "in_axes": (0,), "out_axes": (1,)}
      >>> sites = {"q": Site(path="q", shape=(6, 8), **axes), "k": Site(path="k", shape=(6, 2), **axes)}
      >>> fused_slice("k", ["q", "k"], sites, (), 1)
      OutputSlice(start=8, stop=10, size=10, groups=1)
    """
    missing = [path for path in paths if path not in sites]
    if missing and (not shares or interleaved < 0):
        raise MatchError(
            f"{own!r} shares a module of PyTorch with {missing[0]!r}, whose size is not known here, as it is no site. "
            "Pass sites=, from find_sites, or give the rule shares=(...), the relative sizes of its parameters."
        )
    for path in paths:
        _check_alike(sites[own], sites.get(path, sites[own]))
    sizes = _sizes(own, paths, sites, shares)
    groups = _groups(paths, sites, sizes, interleaved)
    place = list(paths).index(own)
    start, stop = (sum(sizes[:end]) // groups for end in (place, place + 1))
    return OutputSlice(start, stop, sum(sizes) // groups, groups)


def _sizes(own: str, paths: Sequence[str], sites: Mapping[str, Site], shares: Sequence[int]) -> list[int]:
    """Numbers of outputs; those of parameters that are no sites follow from the shares."""
    if not shares:
        return [sites[path].fan_out for path in paths]
    unit = sites[own].fan_out / shares[list(paths).index(own)]
    known = {path: sites[path].fan_out for path in paths if path in sites}
    wanted = {path: unit * share for path, share in zip(paths, shares, strict=True)}
    if unit % 1 or any(wanted[path] != size for path, size in known.items()):
        given = ", ".join(f"{path!r} has {size}" for path, size in known.items())
        raise MatchError(f"The rule for {', '.join(paths)} has shares={tuple(shares)}, but {given} outputs")
    return [int(size) for size in wanted.values()]


def _groups(paths: Sequence[str], sites: Mapping[str, Site], sizes: list[int], interleaved: int) -> int:
    groups = interleaved if interleaved > 0 else min(sites[path].sizes(sites[path].out_axes)[0] for path in paths)
    if any(size % groups for size in sizes):
        raise MatchError(
            f"The rule for {', '.join(paths)} interleaves {groups} groups, which do not divide {sizes} outputs evenly. "
            "Give it interleaved=, the number of key and value heads."
        )
    return groups


def _check_alike(own: Site, other: Site) -> None:
    """Parameters of one module read the same inputs, and are stacked alike."""
    for site in (own, other):
        if site.kind not in ("dense", "ragged"):
            raise MatchError(f"{site.path!r} is {site.kind}, and only linear layers are fused into one module")
    for fact in ("fan_in", "batch_shape"):
        one, two = getattr(own, fact), getattr(other, fact)
        if one != two:
            raise MatchError(
                f"{own.path!r} and {other.path!r} cannot be one module of PyTorch: {fact} is {one} and {two}"
            )
