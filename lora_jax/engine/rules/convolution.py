"""The convolution rule: A convolves with the geometry of the kernel into `rank` channels, B mixes them."""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.engine import jaxprs
from lora_jax.engine.context import Context
from lora_jax.engine.contract import split_factors
from lora_jax.engine.dropout import inputs
from lora_jax.engine.hooks import observe_patches
from lora_jax.engine.lift import dense, rule
from lora_jax.engine.product import adapted_result
from lora_jax.engine.routing.slots import kept, routing_of
from lora_jax.engine.routing.uses import IMAGE, of_images
from lora_jax.engine.weight import RANK, SLOT, Labelled, Weight


@rule("conv_general_dilated")
def _convolution(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A convolves with the geometry of the kernel into `rank` channels; B mixes them at each position."""
    image, kernel = operands
    numbers = eqn.params["dimension_numbers"]
    if not isinstance(kernel, Weight) or eqn.params["batch_group_count"] != 1:
        return None
    out_axis, *window = (kernel.axes[i] for i in numbers.rhs_spec)
    slots = [SLOT] if kernel.routed else []
    pairs = split_factors(kernel.terms, window, [out_axis], slots)
    if pairs is None or (kernel.gain and {*kernel.gain.axes} != {out_axis, *slots}):
        return None
    x = dense(ctx, eqn, image, "the kernel is adapted too")
    (y,) = jaxprs.bind(eqn, [x, kernel.base])
    keeps, gain = of_images(ctx, eqn, kernel) if kernel.routed else (None, kernel.gain)
    mixes = kernel.routed and routing_of(ctx).mixes
    positions, outputs = y.size // y.shape[numbers.out_spec[1]], y.shape[numbers.out_spec[1]]
    channels = sum(a.array.size // prod(a.size(axis) for axis in window) for a, _ in pairs)
    channels *= eqn.params["feature_group_count"]
    flops = 2 * positions * channels * (kernel.base.size // outputs) + 2 * positions * channels * outputs
    facts = {**ctx.roles(kernel.path, into=window, out=[out_axis]), **_geometry(ctx, eqn, window)}
    route = "mask" if kernel.routed else "factored"
    ctx.record(kernel, eqn, route, kind="conv", flops=flops, nbytes=4 * positions * channels, **facts)
    observe_patches(ctx, eqn, kernel, x, window)
    reads = inputs(ctx, kernel, Labelled(x, ()))
    with jax.named_scope("lora"):
        terms = [
            _thin_convolution(eqn, read.array, _flat(a, slots), _flat(b, slots), keeps, mixes)
            for (a, b), read in zip(pairs, reads, strict=True)
        ]
        axes = [RANK] * y.ndim
        axes[numbers.out_spec[0]], axes[numbers.out_spec[1]] = IMAGE, out_axis
        return [adapted_result(y, axes, gain, terms)]


def _flat(factor: Labelled, slots: Sequence[int]) -> Any:
    """A factor `[*slots, rank, ...]` with the ranks of all slots in a row."""
    return factor.array.reshape(-1, *factor.array.shape[1 + len(slots) :])


def _geometry(ctx: Context, eqn: Any, window: Sequence[int]) -> dict[str, int | None]:
    """The groups, and the parameter's axis that counts channels, if it is one and the convolution no transposed one."""
    channels, *others = (ctx.log.origins[axis] for axis in window)
    transposed = any(step != 1 for step in eqn.params["lhs_dilation"])
    known = len(channels) == 1 and not transposed and not any(channels & other for other in others)
    return {"channel_axis": min(channels) if known else None, "groups": eqn.params["feature_group_count"]}


def _thin_convolution(eqn: Any, x: Any, a: Any, b: Any, keeps: Any = None, mixes: bool = False) -> Any:
    """Convolve with `a` (rank, in, *window) once per feature group, then mix by `b` (rank, out).

    Of the channels between them, each image keeps those of its own slot: `keeps` (images, slots); None for all. If it
    `mixes`, these are weights.
    """
    numbers, groups, rank = eqn.params["dimension_numbers"], eqn.params["feature_group_count"], a.shape[0]
    kernel = jnp.tile(a.astype(x.dtype), (groups,) + (1,) * (a.ndim - 1))
    kernel = jnp.transpose(kernel, [numbers.rhs_spec.index(i) for i in range(a.ndim)])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    geometry = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "precision")
    hidden = lax.conv_general_dilated(
        x, kernel, **{name: eqn.params[name] for name in geometry},
        feature_group_count=groups, preferred_element_type=wide,
    )  # fmt: skip
    batch, channel, *space = numbers.out_spec
    hidden = jnp.transpose(hidden, (batch, *space, channel)).astype(x.dtype)
    hidden = hidden.reshape(*hidden.shape[:-1], groups, rank)
    if keeps is not None:
        own = jnp.repeat(keeps, rank // keeps.shape[1], axis=1).astype(hidden.dtype)
        hidden = kept(hidden, jnp.expand_dims(own, range(1, hidden.ndim - 1)), mixes)
    b = b.astype(x.dtype).reshape(rank, groups, -1)
    mixed = jnp.einsum("...gr,rgo->...go", hidden, b, preferred_element_type=wide)
    mixed = mixed.reshape(*mixed.shape[:-2], -1)
    order = (batch, *space, channel)
    return jnp.transpose(mixed, [order.index(i) for i in range(len(order))])
