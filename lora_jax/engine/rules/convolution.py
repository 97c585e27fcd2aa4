"""The convolution rule: A convolves with the geometry of the kernel into `rank` channels, B mixes them."""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.dtypes import promoted
from lora_jax.engine.bases import bind
from lora_jax.engine.context import Context
from lora_jax.engine.contract import split_factors
from lora_jax.engine.dropout import inputs
from lora_jax.engine.hooks import observe_patches
from lora_jax.engine.lift import dense, rule, simple
from lora_jax.engine.product import adapted_result
from lora_jax.engine.routing.isolation import finite, isolated
from lora_jax.engine.routing.slots import kept, routing_of
from lora_jax.engine.routing.uses import IMAGE, of_images
from lora_jax.engine.weight import RANK, SLOT, Labelled, Merged, Weight, flat_ids, flat_size, with_axis


@rule("conv_general_dilated", merged=True)
def _convolution(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A convolves with the geometry of the kernel into `rank` channels; B mixes them at each position."""
    image, kernel = operands[0], _stacked(ctx, eqn, operands[1])
    numbers = eqn.params["dimension_numbers"]
    if not isinstance(kernel, Weight) or eqn.params["batch_group_count"] != 1:
        return None if kernel is operands[1] else bind(eqn, [dense(ctx, eqn, image), dense(ctx, eqn, kernel)])
    *stack, out_axis = flat_ids([kernel.axes[numbers.rhs_spec[0]]])
    window = [kernel.axes[i] for i in numbers.rhs_spec[1:]]
    slots = [SLOT] if kernel.routed else []
    pairs = split_factors(kernel.terms, window, [out_axis], [*slots, *stack])
    if pairs is None or (kernel.gain and {*kernel.gain.axes} != {out_axis, *slots}):
        return None
    x = dense(ctx, eqn, image, "the kernel is adapted too")
    (y,) = bind(eqn, [x, kernel.base])
    keeps, choice, gain = of_images(ctx, eqn, kernel) if kernel.routed else (None, None, kernel.gain)
    positions, outputs = y.size // y.shape[numbers.out_spec[1]], y.shape[numbers.out_spec[1]]
    channels = sum(a.array.size // prod(a.size(axis) for axis in window) for a, _ in pairs)
    channels *= eqn.params["feature_group_count"]
    flops = 2 * positions * channels * (kernel.base.size // outputs) + 2 * positions * channels * outputs
    roles, geometry = ctx.roles(kernel, into=window, out=[out_axis]), _geometry(ctx, eqn, kernel, window, stack)
    route = "mask" if kernel.routed else "factored"
    ctx.record(kernel, eqn, route, roles, kind="conv", flops=flops, nbytes=4 * positions * channels, **geometry)
    observe_patches(ctx, eqn, kernel, x, window)
    reads = inputs(ctx, kernel, Labelled(x, ()))
    with jax.named_scope("lora"):
        if kernel.routed:
            terms = [_routed(ctx, eqn, read, pair, (keeps, choice)) for pair, read in zip(pairs, reads, strict=True)]
        else:
            terms = [
                _thin_convolution(eqn, read.array, _flat(a, (), stack), _flat(b, (), stack))
                for (a, b), read in zip(pairs, reads, strict=True)
            ]
        axes = [RANK] * y.ndim
        axes[numbers.out_spec[0]], axes[numbers.out_spec[1]] = IMAGE, out_axis
        return [adapted_result(y, axes, gain, terms)]


def _routed(ctx: Context, eqn: Any, x: Labelled, pair: tuple[Labelled, Labelled], images: tuple[Any, Any]) -> Any:
    """The thin convolutions of images that have adapters of their own: what each keeps of every slot, and its slots."""
    routing, (keeps, choice) = routing_of(ctx), images
    by, (a, b) = Labelled(keeps, (IMAGE, SLOT)), (_flat(each, (SLOT,), ()) for each in pair)
    result = _thin_convolution(eqn, finite(x).array, a, b, finite(by).array, routing.mixes)
    batch = eqn.params["dimension_numbers"].out_spec[0]
    axes = tuple(IMAGE if i == batch else i for i in range(result.ndim))
    return routing.spoiled(isolated(Labelled(result, axes), by, pair), choice).array


def _models(kernel: Weight, stack: Sequence[int]) -> int:
    """How many kernels are side by side."""
    merged = [axis for axis in kernel.axes if isinstance(axis, Merged)] if stack else []
    return prod(prod(axis.sizes[:-1]) for axis in merged)


def _stacked(ctx: Context, eqn: Any, kernel: Any) -> Any:
    """The kernel; one of several models, as `jax.vmap` puts them side by side, with outputs `(models, out)`.

    Axes that are merged otherwise become simple ones.
    """
    if not isinstance(kernel, Weight) or not kernel.merged:
        return kernel
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    outputs = kernel.axes[numbers.rhs_spec[0]]
    alone = isinstance(outputs, Merged) and not any(isinstance(kernel.axes[i], Merged) for i in numbers.rhs_spec[1:])
    if not alone or kernel.routed or kernel.numbering or kernel.gain:
        return simple(ctx, eqn, kernel)
    if groups > 1 and groups % prod(outputs.sizes[:-1]):
        return simple(ctx, eqn, kernel)
    sizes = dict(zip(outputs.parts[:-1], outputs.sizes[:-1], strict=True))

    def complete(factor: Labelled) -> Labelled:
        for axis, size in sizes.items():
            factor = with_axis(factor, axis, size)
        return factor

    return kernel.map(kernel.base, kernel.axes, complete)


def _flat(factor: Labelled, slots: Sequence[int], stack: Sequence[int]) -> Any:
    """A factor `[*slots, *stack, rank, ...]` as `[stack, rank, ...]`, with the ranks of all slots in a row."""
    models = flat_size(factor, stack)
    return factor.array.reshape(models, -1, *factor.array.shape[1 + len(slots) + len(stack) :])


def _geometry(ctx: Context, eqn: Any, kernel: Weight, window: Sequence[int], stack: Sequence[int]) -> dict[str, Any]:
    """The groups of one model, and its axis of channels, if that is one and the convolution no transposed one."""
    channels, *others = (ctx.log.origins[axis].get(kernel.paths[0], frozenset()) for axis in window)
    transposed = any(step != 1 for step in eqn.params["lhs_dilation"])
    known = len(channels) == 1 and not transposed and not any(channels & other for other in others)
    return {
        "channel_axis": min(channels) if known else None,
        "groups": max(eqn.params["feature_group_count"] // _models(kernel, stack), 1),
    }


def _thin_convolution(eqn: Any, x: Any, a: Any, b: Any, keeps: Any = None, mixes: bool = False) -> Any:
    """Convolve with `a` (models, rank, in, *window) once per feature group, then mix by `b` (models, rank, out).

    Of the channels between them, each image keeps those of its own slot: `keeps` (images, slots); None for all. If it
    `mixes`, these are weights.
    """
    numbers, groups, (models, rank) = eqn.params["dimension_numbers"], eqn.params["feature_group_count"], a.shape[:2]
    each = max(groups // models, 1)
    kernel = jnp.tile(a.astype(x.dtype), (1, each) + (1,) * (a.ndim - 2)).reshape(-1, *a.shape[2:])
    kernel = jnp.transpose(kernel, [numbers.rhs_spec.index(i) for i in range(kernel.ndim)])
    wide = promoted(x.dtype, jnp.float32)
    geometry = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "precision")
    hidden = lax.conv_general_dilated(
        x, kernel, **{name: eqn.params[name] for name in geometry},
        feature_group_count=groups, preferred_element_type=wide,
    )  # fmt: skip
    batch, channel, *space = numbers.out_spec
    hidden = jnp.transpose(hidden, (batch, *space, channel)).astype(x.dtype)
    hidden = hidden.reshape(*hidden.shape[:-1], models * each, rank)
    if keeps is not None:
        own = jnp.repeat(keeps, rank // keeps.shape[1], axis=1).astype(hidden.dtype)
        hidden = kept(hidden, jnp.expand_dims(own, range(1, hidden.ndim - 1)), mixes)
    hidden = hidden.reshape(*hidden.shape[:-2], models, each, rank)
    b = b.astype(x.dtype).reshape(models, rank, each, -1)
    mixed = jnp.einsum("...mgr,mrgo->...mgo", hidden, b, preferred_element_type=wide)
    mixed = mixed.reshape(*mixed.shape[:-3], -1)
    order = (batch, *space, channel)
    return jnp.transpose(mixed, [order.index(i) for i in range(len(order))])
