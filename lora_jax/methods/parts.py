"""Parts of a fused kernel: the columns of queries and values, say, each with an A, a rank and an alpha of their own."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.factors import Array
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, pytree


class Part(NamedTuple):
    """Some columns of a fused kernel.

    Attributes:
      name: what they are called.
      start, stop: where they are.
      axis: of the parameter, along which they are.
      rank: number of the terms that are theirs.
      strength: by how much these terms count beside those of the first part.
    """

    name: str
    start: int
    stop: int
    axis: int
    rank: int
    strength: float


@pytree("site", "dropout", "parts")
@dataclass(frozen=True, kw_only=True)
class Parts(LowRank):
    """Low-rank factors of which each term acts on one part of the outputs; made by `LoraConfig(parts=...)`.

    The terms of all parts stand in one `a` and one `b`, so that the input is read once. What `b` holds outside of a
    term's own part has no effect and no gradient. PEFT has one A for the whole of a fused module: `lora.peft.save`
    writes these factors as they are, with zeros outside of the parts, and PEFT computes the same.

    Attributes:
      a: `[*batch, rank, *in]`, trained; `rank` is the sum of the parts'.
      b: `[*batch, rank, *out]`, trained inside of the parts.
      parts: the parts, in the order of their terms; static.
      scale, site, dropout, a_start, b_start: as in `LowRank`; the scale is the first part's.

    Example:
      >>> import jax, lora_jax as lora
      >>> params = {"c_attn": {"kernel": jnp.ones((4, 12))}}  # queries, keys and values
      >>> sites = lora.find_sites(lambda p, x: x @ p["c_attn"]["kernel"], params, jnp.ones((2, 4)))
      >>> config = lora.LoraConfig(targets=("c_attn",), parts={"c_attn": {"q": (0, 4), "v": (8, 12)}}, rank=2)
      >>> adapter = jax.tree.map(jnp.ones_like, lora.init(jax.random.key(0), config, params, sites))
      >>> delta = lora.merge(params, adapter)["c_attn"]["kernel"] - params["c_attn"]["kernel"]
      >>> delta[0].tolist()
      [2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0]
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        """Parts come back from JSON as lists."""
        object.__setattr__(self, "parts", tuple(Part(*part) for part in self.parts))

    def of_layer(self, site: Site) -> Self:
        """The update on one layer: the axis of its parts is one place further in front."""
        return replace(self, site=site, parts=tuple(part._replace(axis=part.axis - 1) for part in self.parts))

    def pairs(self) -> tuple[tuple[Array, Array], ...]:
        """Pairs of factors, of which the second ones act on their own parts only."""
        kept = np.expand_dims(self._kept(), tuple(range(len(self.site.batch_axes))))
        return tuple((a, b * jnp.asarray(kept, b.dtype)) for a, b in super().pairs())

    def _kept(self) -> np.ndarray[Any, Any]:
        """`[rank, *out]`: the strength of each term on each output."""
        rows = []
        for part in self.parts:
            places = np.zeros(self.site.shape[part.axis], np.float32)
            places[part.start : part.stop] = part.strength
            along = [-1 if axis == part.axis else 1 for axis in self.site.out_axes]
            rows += [np.broadcast_to(places.reshape(along), self.site.sizes(self.site.out_axes))] * part.rank
        return np.stack(rows)
