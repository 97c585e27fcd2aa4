"""Layouts: factors, weights and vectors (DoRA magnitudes, biases) in the axes of JAX's parameters and of PyTorch's.

All are NumPy arrays, of one weight or of one stack of experts at a time.

Here `a` is `[rank, *in]` and `b` is `[rank, *out]`, on the axes of the parameter. PEFT has `A (rank, in)` and
`B (out, rank)`. Between them lies a form with PyTorch's order of inputs and outputs, in which factors of several
parameters are put together and taken apart: `[*experts, rank, in]`, or `[rank, channels, *window]` of a convolution,
and `[*experts, rank, out]`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.adapter.site import Site
from lora_jax.errors import CheckpointError
from lora_jax.io.names.fused import Part
from lora_jax.io.names.names import Target


def a_to_torch(site: Site, a: np.ndarray) -> np.ndarray:
    """`[*experts, rank, *in]` in PyTorch's order of inputs."""
    if site.kind == "conv":
        return np.moveaxis(a, 1 + _channels(site), 1)
    return a.reshape(*a.shape[: a.ndim - len(site.in_axes)], site.fan_in)


def a_from_torch(site: Site, a: np.ndarray) -> np.ndarray:
    """Inverse of `a_to_torch`."""
    if site.kind == "conv":
        return np.moveaxis(a, 1, 1 + _channels(site))
    return a.reshape(*a.shape[:-1], *site.sizes(site.in_axes))


def b_to_torch(site: Site, part: Part, b: np.ndarray) -> np.ndarray:
    """The part's share of `[..., *out]` as `[..., out]`, in PyTorch's order of outputs."""
    lead = b.ndim - len(site.out_axes)
    share = np.take(b, range(part.start, part.stop), axis=lead + part.axis)
    return _rotated(share.reshape(*b.shape[:lead], -1), part, back=False)


def b_from_torch(site: Site, part: Part, b: np.ndarray) -> np.ndarray:
    """Inverse of `b_to_torch`: the part's share of the outputs."""
    sizes = list(site.sizes(site.out_axes))
    sizes[part.axis] = part.stop - part.start
    return _rotated(b, part, back=True).reshape(*b.shape[:-1], *sizes)


def packed(a: np.ndarray, b: np.ndarray, *, stacked: bool) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A and B for factors in PyTorch's order: `[rank, *in]` and `[rank, out]`, or of experts if `stacked`."""
    if stacked:
        # Rows of A are grouped by expert, columns of B by rank, and within a rank by expert.
        return a.reshape(-1, a.shape[-1]), b.transpose(2, 1, 0).reshape(b.shape[2], -1)
    return a, b.T.reshape(*b.T.shape, *(1,) * (a.ndim - 2))


def unpacked(a: np.ndarray, b: np.ndarray, *, experts: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `packed`; `experts` is their number, or 0 for a module that is no stack."""
    if experts:
        return a.reshape(experts, -1, a.shape[-1]), b.reshape(len(b), -1, experts).transpose(2, 1, 0)
    return a, b.reshape(b.shape[:2]).T


def shapes(site: Site, target: Target, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of PEFT's A and B of the given rank, for the module that a parameter belongs to."""
    into, out = site.sizes(site.in_axes), target.part.slice.total
    if site.kind == "conv":
        channels = _channels(site)
        kernel = into[:channels] + into[channels + 1 :]
        return (rank, into[channels] * site.groups, *kernel), (out, rank // site.groups, *(1,) * len(kernel))
    stacked = rank * (site.batch_shape[-1] if target.parameter else 1)
    return (stacked, site.fan_in), (out, stacked)


def is_transposed(site: Site, fan_in_fan_out: bool) -> bool:
    """Whether PyTorch stores a whole weight `(in, out)`: as `Conv1D` does, which no model has as its output head."""
    return fan_in_fan_out and site.kind == "dense" and not site.head


def weight_to_torch(site: Site, value: np.ndarray, *, transposed: bool) -> np.ndarray:
    """A whole parameter as PyTorch stores it: `(out, in)`, `(out, in, *kernel)`, a table, a vector.

    Args:
      site: the parameter, with its axes; of kind `full` for vectors.
      value: the parameter, without stacked axes.
      transposed: whether PyTorch stores `(in, out)`, as `Conv1D` does.
    """
    if site.kind == "full":
        return value.reshape(-1) if value.ndim else value
    if site.kind == "embedding":
        return value.transpose(site.in_axes + site.out_axes).reshape(site.fan_in, -1)
    moved = value.transpose(site.out_axes + site.in_axes)
    if site.kind == "conv":
        return np.moveaxis(moved, 1 + _channels(site), 1)
    flat = moved.reshape(site.fan_out, site.fan_in)
    return flat.T if transposed else flat


def weight_from_torch(site: Site, value: np.ndarray, *, transposed: bool) -> np.ndarray:
    """Inverse of `weight_to_torch`.

    Raises:
      ValueError: the sizes differ.
    """
    if site.kind == "full":
        return value.reshape(site.shape)
    order = site.in_axes + site.out_axes if site.kind == "embedding" else site.out_axes + site.in_axes
    if site.kind == "conv":
        value = np.moveaxis(value, 1, 1 + _channels(site))
    elif transposed and site.kind == "dense":
        value = value.T
    return value.reshape(site.sizes(order)).transpose(np.argsort(order))


class ParameterVector(NamedTuple):
    """A vector `[*out]` of a parameter, of which a module has a part."""

    site: Site
    part: Part
    value: np.ndarray


class ModuleVector(NamedTuple):
    """A vector of one module, `[*out]` on the module's part of a parameter's outputs."""

    target: Target
    value: np.ndarray


def vector_from_torch(site: Site, target: Target, vector: np.ndarray) -> ModuleVector:
    """The numbers for a parameter's outputs, of a module's vector (which may have axes of length one)."""
    own = target.part.slice.take(vector.astype(np.float32).reshape(-1))
    return ModuleVector(target, b_from_torch(site, target.part, own))


def vector_to_torch(parts: Sequence[ParameterVector]) -> np.ndarray:
    """A module's vector, from the `[*out]` of its parameters; zero for those that are not given."""
    outputs = parts[0].part.slice
    vector = np.zeros((outputs.groups, outputs.size), np.float32)
    for site, part, value in parts:
        vector[part.slice.index] = part.slice.spread(b_to_torch(site, part, value))
    return vector.reshape(-1)


def fill_vector(vector: np.ndarray, site: Site, shares: Sequence[ModuleVector]) -> None:
    """Put shares where they belong in an array `[*batch, *out]`."""
    for target, value in shares:
        vector[(*target.index, *part_index(site, target.part))] = value


def part_index(site: Site, part: Part) -> tuple[slice, ...]:
    """Index of a part's outputs among the parameter's `[*out]`."""
    found = [slice(None)] * len(site.out_axes)
    found[part.axis] = slice(part.start, part.stop)
    return tuple(found)


def _channels(site: Site) -> int:
    """Which of a convolution's input axes counts channels."""
    if site.channel_axis is None:
        raise CheckpointError(
            f"{site.path!r} is a transposed convolution, which PEFT does not adapt, or its Site does not tell which "
            "axis counts channels. Leave it out, or pass sites= from find_sites (Site(channel_axis=...) by hand)."
        )
    return site.in_axes.index(site.channel_axis)


def _rotated(flat: np.ndarray, part: Part, *, back: bool) -> np.ndarray:
    """Reorder each head's features from neighbours (here) to halves (PyTorch), or back."""
    if not part.rotary:
        return flat
    half = part.rotary // 2
    split = (2, half) if back else (half, 2)
    heads = flat.reshape(*flat.shape[:-1], -1, *split)
    return np.swapaxes(heads, -1, -2).reshape(flat.shape)
