"""Routers: by how much each slot of a bank counts for an input, decided where a product meets that input."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.engine import contract
from lora_jax.engine.context import Context
from lora_jax.engine.hooks import check_whole
from lora_jax.engine.routing.isolation import finite
from lora_jax.engine.weight import SLOT, Labelled, Weight
from lora_jax.errors import ParameterError


class Router(ABC):
    """Chooses among the adapters of a bank by the inputs of every product: give it to `lora_jax.route` as ids.

    A router is a frozen dataclass, made a pytree, with a field `keys` and the method `weights`. At every use of an
    adapted parameter each row of its input, which has to be whole there, is multiplied by the keys, and `weights` makes
    of these scores by how much each adapter counts for that row. Routers that decide by something else, once for all
    parameters, need no class: weights of `[batch, slots]`, given to `lora_jax.route`, may be computed in any way.

    Attributes:
      keys: by path, `[*batch, slots - 1, *in]`: a vector like the inputs for every slot but the base's.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> from dataclasses import dataclass
      >>> @jax.tree_util.register_dataclass
      ... @dataclass(frozen=True)
      ... class Sigmoid(lora.routers.Router):
      ...     keys: dict[str, jax.Array]
      ...     def weights(self, scores):
      ...         return jax.nn.sigmoid(scores)
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> fn = lambda params, x: x @ params["w"]
      >>> sites = lora.find_sites(fn, params, x)
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> adapter = jax.tree.map(lambda leaf: leaf + 1.0, adapter)
      >>> out = lora.route(fn)(params, [adapter], Sigmoid({"w": jnp.zeros((1, 4))}), x)  # sigmoid(0) is a half
      >>> bool(jnp.allclose(out, lora.adapt(fn)(params, lora.scale(adapter, 0.5), x)))
      True
    """

    keys: Mapping[str, Any]

    @abstractmethod
    def weights(self, scores: Any) -> Any:
        """By how much each adapter counts for each row.

        Args:
          scores: `[..., slots - 1]` float32, products of the rows with the keys. The axes before depend on the use.

        Returns:
          Numbers of the same shape.
        """


def row_weights(ctx: Context, router: Router, weight: Weight, x: Labelled, out: Sequence[int]) -> Labelled:
    """What the router gives each row of an activation: `[*rows, SLOT]` float32.

    Args:
      ctx: the context.
      router: the router.
      weight: the weight, with keys.
      x: the activation.
      out: ids of the result's axes; those of the activation that are not among them are contracted.

    Raises:
      ParameterError: the parameter is applied to something else than its whole inputs, or the router gives another
        shape.
    """
    keys, numbering, into = weight.keys, weight.numbering, {*x.axes} - {*out}
    assert keys is not None
    assert numbering is not None
    strange = [axis for axis in into if axis not in keys.axes and x.size(axis) > 1]
    if strange or not {*numbering.inputs.axes} <= into or {*keys.axes} - {*x.axes, *out, SLOT}:
        raise ParameterError(
            f"A router decides by the inputs of {weight.path}, and here the program does not apply it to whole inputs: "
            "it keeps parts of them apart, or applies it the other way round. Leave it out of the bank, or give ids or "
            "weights of examples"
        )
    check_whole(weight.path, x, into, numbering.fan_in)
    read = finite(x)  # A row that is not finite leaves the keys' gradients alone, and its own scores undefined.
    scores = contract.product(read, keys.astype(x.array.dtype), {*out, SLOT}, jax.lax.Precision.HIGHEST, (x,))
    rows = tuple(axis for axis in scores.axes if axis != SLOT)
    sound = Labelled(
        jnp.isfinite(x.array).all([i for i, axis in enumerate(x.axes) if axis in into]),
        tuple(axis for axis in x.axes if axis not in into),
    )
    given = scores.ordered((*rows, SLOT)).array.astype(jnp.float32)
    given = jnp.where(sound.over((*rows, SLOT)), given, jnp.nan)
    found = router.weights(given)
    if jnp.shape(found) != given.shape:
        raise ParameterError(
            f"{type(router).__name__}.weights gave shape {jnp.shape(found)} for scores {given.shape} at {weight.path}: "
            "it has to give a number for each score"
        )
    chosen = Labelled(found.astype(jnp.float32), (*rows, SLOT))
    _show(ctx, weight.path, numbering.maps, chosen)
    return chosen


def _show(ctx: Context, path: str, entry: Labelled, chosen: Labelled) -> None:
    """Show the observer, if there is one, the weights that the rows of every map of a stack got."""
    if ctx.observe is None:
        return
    free = [axis for axis in chosen.axes if axis not in (*entry.axes, SLOT)]
    seen = chosen.over([*entry.axes, *free, SLOT])
    seen = seen.reshape(*seen.shape[: len(entry.axes)], -1, seen.shape[-1])
    ctx.observe(path, entry.array, jnp.broadcast_to(seen, (*entry.array.shape, *seen.shape[-2:])), None)
