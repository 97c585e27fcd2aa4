"""Hooks on inputs: where a product meets an observed weight, its input is shown to an observer.

Such a weight carries a `Numbering`: the number of every linear map in a stack and of every input of a map. Rules that
slice, transpose or reshape the weight do the same to these numbers, so that at the use, however deep in loops, they say
which map of the parameter reads the input and which input is which. The observer adds to arrays that JAX calls
references, from inside any loop or branch: nothing is handed out of a region, and the program runs forward once.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from lora_jax.engine.context import Context
from lora_jax.engine.weight import Labelled, Numbering, Weight, flat_size, gathered
from lora_jax.errors import ParameterError


def numbered(weight: Weight, batch: Sequence[int], into: Sequence[int]) -> Weight:
    """The weight of a parameter with a numbering; `batch` and `into` are its stacked axes and its input axes."""
    entry, position = (_numbers(weight, axes) for axes in (batch, into))
    return replace(weight, numbering=Numbering(entry, position, position.axes, position.array.size))


def _numbers(weight: Weight, axes: Sequence[int]) -> Labelled:
    shape = [weight.base.shape[axis] for axis in axes]
    return Labelled(jnp.arange(prod(shape), dtype=jnp.int32).reshape(shape), tuple(weight.axes[axis] for axis in axes))


def observe(ctx: Context, weight: Weight, x: Labelled, into: Collection[int], kept: Any = None) -> None:
    """Show the observer the input of a weight.

    Args:
      ctx: the context.
      weight: the weight; without a numbering, nothing happens.
      x: the activation.
      into: ids of the axes that are contracted. A product over other axes than those that the weight is captured for
        (a tied table used the other way, a gradient inside the program) is not observed.
      kept: which tokens count, `[*maps, tokens]`; None for those of the context's mask.
    """
    numbering = weight.numbering
    if ctx.observe is None or numbering is None or not set(numbering.inputs.axes) <= set(into):
        return
    _check(weight.path, x, into, numbering.fan_in)
    x = gathered(x)
    own = numbering.order if set(numbering.order) == set(numbering.inputs.axes) else numbering.inputs.axes
    inner = [*own, *(axis for axis in into if axis not in own)]  # The others have length one.
    maps = numbering.maps.axes
    free = [axis for axis in x.axes if axis not in inner and axis not in maps]
    tokens = x.over([*maps, *free, *inner])
    tokens = tokens.reshape(*tokens.shape[: len(maps)], -1, numbering.fan_in)
    if own != numbering.order:
        tokens = tokens[..., jnp.argsort(numbering.inputs.ordered(own).array.reshape(-1))]
    tokens = jnp.broadcast_to(tokens, (*numbering.maps.array.shape, *tokens.shape[-2:]))
    if ctx.mask is not None:
        kept = _mask(ctx.mask, weight.path, x, free, kept is None and not {*maps} & {*x.axes})
    ctx.observe(weight.path, numbering.maps.array, tokens, kept)


def _check(path: str, x: Labelled, into: Collection[int], inputs: int) -> None:
    """Refuse an input that is not seen whole, on one device."""
    if AxisType.Manual in jax.typeof(x.array).sharding.mesh.axis_types:
        raise ParameterError(
            f"{path} is used inside shard_map, where each device sees a part of the inputs: capture a function without "
            "it, or leave the parameter out"
        )
    check_whole(path, x, into, inputs)


def check_whole(path: str, x: Labelled, into: Collection[int], inputs: int) -> None:
    """Refuse a product with a part of a weight's inputs, or with complex ones."""
    if jnp.iscomplexobj(x.array):
        raise ParameterError(f"{path} reads complex inputs, and what is made of them is real: leave it out")
    here = flat_size(x, list(into))
    if here != inputs:
        raise ParameterError(
            f"{path} has {inputs} inputs, but the program uses it in parts of {here}, which are never seen together: "
            "leave the parameter out"
        )


def _mask(mask: Any, path: str, x: Labelled, free: Sequence[int], in_order: bool) -> Any:
    """The mask of tokens for the free axes of an input, flattened."""
    shape, lead = tuple(x.size(axis) for axis in free), jnp.shape(mask)
    if not in_order or shape[: len(lead)] != lead:
        raise ParameterError(
            f"The mask has shape {lead}, but the inputs of {path} run over {shape}, or were sorted by expert: it "
            "cannot be told which of them to leave out. Capture without a mask, or leave the parameter out"
        )
    return jnp.broadcast_to(jnp.expand_dims(mask, tuple(range(len(lead), len(shape)))), shape).reshape(-1)


def observe_groups(ctx: Context, stack: Weight, rows: Any, sizes: Any, group: int, into: int) -> None:
    """Show the observer the rows of each group of a grouped product."""
    if ctx.observe is None or stack.numbering is None:
        return
    ends = jnp.cumsum(sizes)[:, None]
    numbers = jnp.arange(len(rows))[None]
    kept = (numbers < ends) & (numbers >= ends - sizes[:, None])
    observe(ctx, stack, Labelled(rows, (-2, into)), [into], kept)


def observe_patches(ctx: Context, eqn: Any, kernel: Weight, image: Any, window: Sequence[int]) -> None:
    """Show the observer what a convolution reads at each position."""
    if ctx.observe is None or kernel.numbering is None:
        return
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    if groups != 1:
        raise ParameterError(f"{kernel.path} is a convolution in {groups} groups, whose inputs cannot be captured")
    sizes = [kernel.base.shape[i] for i in numbers.rhs_spec[1:]]
    geometry = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    options = {name: eqn.params[name] for name in geometry}
    patches = lax.conv_general_dilated_patches(image, sizes[1:], **options)
    patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)
    names = (*range(-patches.ndim, -1), *window)
    observe(ctx, kernel, Labelled(patches.reshape(*patches.shape[:-1], *sizes), names), window)


def add_at(ref: Any, maps: Any, value: Any) -> None:
    """Add a value `[*maps, ...]` to the entries of a reference `[all maps, ...]` that `maps` numbers."""
    if maps.ndim == 0:
        ref[maps] += value
    else:
        # Through a value, because a number may be there twice.
        ref[...] = ref[...].at[maps].add(value)
