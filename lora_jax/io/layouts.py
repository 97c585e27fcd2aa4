"""Factors between this library's layout and PyTorch's: NumPy arrays, one weight (or one stack of experts) at a time.

Here `a` is `[rank, *in]` and `b` is `[rank, *out]`, on the axes of the parameter. PEFT has `A (rank, in)` and
`B (out, rank)`.
"""

from math import prod

import numpy as np

from lora_jax.errors import CheckpointError
from lora_jax.io.rules import Target
from lora_jax.site import Site


def a_to_torch(site: Site, target: Target, a: np.ndarray) -> np.ndarray:
    """PEFT's A for `a` of `[rank, *in]`, or `[experts, rank, *in]`."""
    if site.kind == "conv":
        return np.moveaxis(a, 1 + _channels(site), 1)
    return a.reshape(-1, site.fan_in) if target.parameter else a.reshape(len(a), -1)


def a_from_torch(site: Site, target: Target, a: np.ndarray) -> np.ndarray:
    """Inverse of `a_to_torch`."""
    if site.kind == "conv":
        return np.moveaxis(a, 1, 1 + _channels(site))
    if target.parameter:
        experts = site.batch_shape[-1]
        return a.reshape(experts, len(a) // experts, *site.sizes(site.in_axes))
    return a.reshape(len(a), *site.sizes(site.in_axes))


def b_to_torch(site: Site, target: Target, b: np.ndarray) -> np.ndarray:
    """PEFT's B for the target's share of `b` of `[rank, *out]`, or of `[experts, rank, *out]`."""
    lead = 2 if target.parameter else 1
    share = np.take(b, range(*target.part), axis=lead + target.axis)
    flat = _rotated(share.reshape(*b.shape[:lead], -1), target, back=False)
    if target.parameter:
        # Columns of B are grouped by rank, and within a rank by expert.
        return flat.transpose(2, 1, 0).reshape(flat.shape[2], -1)
    return flat.T.reshape(flat.shape[1], flat.shape[0], *(1,) * _kernel_axes(site))


def b_from_torch(site: Site, target: Target, b: np.ndarray) -> np.ndarray:
    """Inverse of `b_to_torch`: the target's share of `b`."""
    if target.parameter:
        experts = site.batch_shape[-1]
        flat = b.reshape(len(b), -1, experts).transpose(2, 1, 0)
    else:
        flat = b.reshape(b.shape[:2]).T
    return _rotated(flat, target, back=True).reshape(*flat.shape[:-1], *share_shape(site, target))


def share_shape(site: Site, target: Target) -> tuple[int, ...]:
    """Sizes of the output axes that a target has."""
    sizes = list(site.sizes(site.out_axes))
    sizes[target.axis] = target.part[1] - target.part[0]
    return tuple(sizes)


def shapes(site: Site, target: Target, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of PEFT's A and B of the given rank."""
    into, out = site.sizes(site.in_axes), prod(share_shape(site, target))
    if site.kind == "conv":
        channels = _channels(site)
        kernel = into[:channels] + into[channels + 1 :]
        return (rank, into[channels], *kernel), (out, rank, *(1,) * len(kernel))
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


def _channels(site: Site) -> int:
    """Which of a convolution's input axes counts channels: the one beside the outputs, as in `HWIO` and `OIHW`."""
    distances = [abs(axis - site.out_axes[0]) for axis in site.in_axes]
    if distances.count(min(distances)) > 1:
        raise CheckpointError(
            f"{site.path!r} has its outputs (axis {site.out_axes[0]}) between its input axes, as a transposed "
            "convolution has, and PEFT adapts none. Leave it out."
        )
    return distances.index(min(distances))


def _kernel_axes(site: Site) -> int:
    return len(site.in_axes) - 1 if site.kind == "conv" else 0


def _rotated(flat: np.ndarray, target: Target, *, back: bool) -> np.ndarray:
    """Reorder each head's features from neighbours (here) to halves (PyTorch), or back."""
    if not target.rotary:
        return flat
    half = target.rotary // 2
    split = (2, half) if back else (half, 2)
    heads = flat.reshape(*flat.shape[:-1], -1, *split)
    return np.swapaxes(heads, -1, -2).reshape(flat.shape)
