"""Rotary positions: the inverse frequencies of every kind of rope that Hugging Face's configs describe."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import CheckpointError
from lora_jax.models.fields import Fields


@dataclass(frozen=True)
class Rope:
    """How queries and keys are rotated.

    Attributes:
      inverse: inverse frequencies, one for each pair of features that is rotated.
      factor: what cosine and sine are multiplied by.
      limit: the length up to which `inverse` holds; None for all.
      beyond: inverse frequencies of longer texts; empty where those are refused.

    Example:
      >>> Rope((1.0, 0.01)).frequencies(4096)
      (1.0, 0.01)
    """

    inverse: tuple[float, ...]
    factor: float = 1.0
    limit: int | None = None
    beyond: tuple[float, ...] = ()

    def frequencies(self, length: int) -> tuple[float, ...]:
        """Inverse frequencies for texts, or a cache, of a length.

        Raises:
          CheckpointError: the model's frequencies depend on the length from there on.
        """
        if self.limit is None or length <= self.limit:
            return self.inverse
        if not self.beyond:
            raise CheckpointError(
                f"{length} tokens: this model's dynamic rope depends on the length beyond {self.limit} tokens, which "
                f"is not supported. Use at most {self.limit}, also as the length of a cache."
            )
        return self.beyond

    def angles(self, positions: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine, `[..., pairs]` in float32, of positions `[...]`."""
        inverse = jnp.asarray(self.frequencies(length), jnp.float32)
        angles = positions[..., None].astype(jnp.float32) * inverse.reshape(*(1,) * positions.ndim, -1)
        return jnp.cos(angles) * self.factor, jnp.sin(angles) * self.factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first features of heads, `[batch, time, heads, features]`, in halves; the rest stays.

    Args:
      x: queries or keys.
      cos: `[batch or 1, time, pairs]`.
      sin: likewise.
    """
    half = cos.shape[-1]
    one, other, rest = jnp.split(x, (half, 2 * half), -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = (one * cos - other * sin, other * cos + one * sin)
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], -1)


def read_rope(fields: Fields, theta: float, dim: int, longest: int, original: int | None) -> Rope:
    """The rope of `rope_parameters`, or of `rope_scaling` in files of transformers 4.

    Args:
      fields: the object; empty for the plain rope.
      theta: base of the frequencies where the object has none.
      dim: number of features of a head that are rotated.
      longest: `max_position_embeddings`.
      original: `original_max_position_embeddings` where the file has it outside.

    Raises:
      CheckpointError: the kind is unknown, or a field is missing, wrong or unknown.
    """
    kind = fields.choice("rope_type", fields.first(("rope_type", "type"), "default"), _KINDS)
    theta = fields.number("rope_theta", theta)
    first = fields.size("original_max_position_embeddings", longest)
    rope = _KINDS[kind](fields, _Base(theta, dim, longest, original or first))
    fields.check_all_read()
    return rope


@dataclass(frozen=True)
class _Base:
    theta: float
    dim: int
    longest: int
    original: int

    @property
    def inverse(self) -> np.ndarray:
        powers = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        return np.float32(1) / np.float32(self.theta) ** powers


def _tuple(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _default(fields: Fields, base: _Base) -> Rope:
    # Files of transformers 4 that were converted keep a factor of 1.
    fields.expect("factor", 1.0, "has no meaning for the rope_type 'default'")
    return Rope(_tuple(base.inverse))


def _linear(fields: Fields, base: _Base) -> Rope:
    return Rope(_tuple(base.inverse / fields.number("factor")))


def _dynamic(fields: Fields, base: _Base) -> Rope:
    fields.number("factor")
    return Rope(_tuple(base.inverse), limit=base.longest)


def _llama3(fields: Fields, base: _Base) -> Rope:
    factor, low, high = (fields.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    inverse = base.inverse
    turns = base.original * inverse / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return Rope(_tuple(inverse * (kept + (1 - kept) / factor)))


def _yarn(fields: Fields, base: _Base) -> Rope:
    factor = fields.number("factor", base.longest / base.original)

    def pair_turning(times: float) -> float:
        return base.dim * math.log(base.original / (times * 2 * math.pi)) / (2 * math.log(base.theta))

    low, high = pair_turning(fields.number("beta_fast", 32.0)), pair_turning(fields.number("beta_slow", 1.0))
    if fields.switch("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, base.dim - 1)
    pairs = np.arange(base.dim // 2, dtype=np.float32)
    kept = 1 - np.clip((pairs - low) / ((high - low) or 0.001), 0, 1)
    inverse = base.inverse
    return Rope(_tuple(inverse / factor * (1 - kept) + inverse * kept), _yarn_factor(fields, factor))


def _yarn_factor(fields: Fields, factor: float) -> float:
    """What cosine and sine are multiplied by, so that attention keeps its temperature."""
    given, scale, of_all = (fields.optional(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))

    def temperature(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given is not None:
        return given
    return temperature(scale) / temperature(of_all) if scale and of_all else temperature(1.0)


def _longrope(fields: Fields, base: _Base) -> Rope:
    factor = fields.number("factor", base.longest / base.original)
    given = fields.optional("attention_factor")
    grown = math.sqrt(1 + math.log(factor) / math.log(base.original)) if factor > 1 and base.original > 1 else 1.0
    short, long = (_each_factor(fields, name, base.dim // 2) for name in ("short_factor", "long_factor"))
    return Rope(
        _tuple(base.inverse / short), grown if given is None else given, base.original,
        _tuple(base.inverse / long),
    )  # fmt: skip


def _each_factor(fields: Fields, name: str, count: int) -> np.ndarray:
    value = fields.get(name)
    if not isinstance(value, list) or len(value) != count or not all(isinstance(each, (int, float)) for each in value):
        raise fields.error(name, value, f"must be a list of {count} numbers")
    return np.asarray(value, float)


_KINDS: Mapping[str, Callable[[Fields, _Base], Rope]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # in the first files of Phi-3
}
