"""Routers: by how much each slot of a bank counts for an input, decided where a product meets that input."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


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
