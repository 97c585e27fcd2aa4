"""LoRA-GA: factors from the gradient, so that the first step goes where full fine-tuning would go."""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lora_jax import svd
from lora_jax.adapter.registry import register
from lora_jax.adapter.site import Site
from lora_jax.capture.statistics import oriented
from lora_jax.errors import ConfigError

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]
Scale = Literal["stable", "weight_svd", "gd_scale", "unit"]


def lora_ga(
    key: jax.Array,
    site: Site,
    rank: int,
    dtype: str,
    *,
    weight: jax.Array,
    scale: jax.Array,
    gradient: jax.Array,
    direction: Direction = "ArB2r",
    size: Scale = "stable",
    gamma: float = 16.0,
) -> tuple[jax.Array, jax.Array]:
    """Factors from the first `2·rank` singular vectors of the gradient: A from those of its inputs, B of its outputs.

    `"lora-ga"` is PEFT's default; `"lora-ga:DIRECTION:SCALE"` is any other. Directions: `ArB2r` gives A the first half
    and B the second, `A2rBr` the other way round, `ArBr` A the odd and B the even ones, `random` both the same random
    half. Scales: `stable` multiplies B by `fan_out^¼ / √γ`, `weight_svd` by the largest singular value of the weight
    over the first of B, `gd_scale` divides A and B by the scale, `unit` changes nothing. Before that, as in PEFT but
    not in the paper, B is multiplied by the singular values of the gradient.

    The start is kept and taken off again, where PEFT subtracts it from the base and rounds. The decomposition is exact
    where PEFT's is randomised, and signs do not depend on the solver. PEFT starts at random where it has no gradients.

    Args:
      key: for `random`.
      site: the site.
      rank: at most half the smaller side of the matrix.
      dtype: of the factors.
      weight: `[fan_in, fan_out]`.
      scale: of the product.
      gradient: `[fan_in, fan_out]`.
      direction: which singular vectors go where.
      size: how large they are.
      gamma: of `stable`.

    Raises:
      ConfigError: the rank is too high.

    Example:
      >>> site = Site(path="w", shape=(3, 2), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> gradient = jnp.array([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
      >>> given = {"weight": jnp.ones((3, 2)), "scale": jnp.float32(2), "gradient": gradient}
      >>> a, b = lora_ga(jax.random.key(0), site, 1, "float32", **given, size="unit")
      >>> jnp.round(abs(a), 3).tolist(), jnp.round(abs(b), 3).tolist()
      ([[1.0, 0.0, 0.0]], [[0.0, 2.0]])

    References:
      Wang et al., LoRA-GA, arXiv 2407.05000.
    """
    if 2 * rank > min(gradient.shape):
        raise ConfigError(
            f"init='lora-ga' uses {2 * rank} singular vectors, twice the rank, and the matrix {gradient.shape} has "
            "fewer: lower the rank"
        )
    left, values, right = svd.exact(gradient, 2 * rank)
    for_a, for_b = _halves(key, rank, direction)
    a, b = oriented(left)[for_a], oriented(right)[for_b] * values[for_b, None]
    if size == "stable":
        b = b * site.fan_out**0.25 / gamma**0.5
    elif size == "weight_svd":
        first = values[for_b[0]]
        b = b * jnp.where(first > 0, jnp.linalg.norm(weight, 2) / jnp.where(first > 0, first, 1), 1)
    elif size == "gd_scale":
        a, b = a / scale, b / scale
    return a.astype(dtype), b.astype(dtype)


def _halves(key: jax.Array, rank: int, direction: Direction) -> tuple[jax.Array, jax.Array]:
    """Which of the first `2·rank` singular vectors A gets, and which B."""
    numbers = jnp.arange(2 * rank)
    if direction == "random":
        chosen = jax.random.permutation(key, numbers)[:rank]
        return chosen, chosen
    halves = {"ArB2r": (numbers[:rank], numbers[rank:]), "A2rBr": (numbers[rank:], numbers[:rank])}
    return halves.get(direction, (numbers[1::2], numbers[0::2]))


_READS = ("weight", "scale", "gradient")
register("lora-ga", reads=_READS, away=True)(lora_ga)
for _direction in get_args(Direction):
    for _size in get_args(Scale):
        _named = partial(lora_ga, direction=_direction, size=_size)
        register(f"lora-ga:{_direction}:{_size}", reads=_READS, away=True)(_named)
