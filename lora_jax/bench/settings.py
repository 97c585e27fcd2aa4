"""What a benchmark varies, checked once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lora_jax.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]

_MOST_ADAPTERS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a benchmark varies.

    Attributes:
      ranks: of the adapters.
      tokens: how many the function is applied to at once.
      adapters: how many are in the bank of the routed mode; a batch uses as many as it has examples.
      length: tokens of one example, which all meet the same adapter; a batch of fewer tokens is one example. With 1
        every token meets its own, as in decoding.
      dtype: of weights, factors and activations.
      rounds: how often everything is timed; at least 11 for numbers that mean something.
      seed: of weights, factors, inputs, the choice of adapters, and the order within a round.

    Raises:
      ConfigError: a number is out of range or given twice, or tokens cannot be cut into examples.

    Example:
      >>> Settings(tokens=(1, 64), length=16).batch(64)
      (4, 16)
    """

    ranks: tuple[int, ...] = (4, 16, 64)
    tokens: tuple[int, ...] = (1, 64, 512)
    adapters: tuple[int, ...] = (8, 32)
    length: int = 1
    dtype: Dtype = "float32"
    rounds: int = 21
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ranks", "tokens", "adapters"):
            check_distinct(name, getattr(self, name))
        for name in ("ranks", "tokens", "adapters", "length", "rounds"):
            _check_least(name, getattr(self, name), 1)
        _check_least("seed", self.seed, 0)
        if max(self.adapters) > _MOST_ADAPTERS:
            raise ConfigError(f"adapters={max(self.adapters)} is too large: at most {_MOST_ADAPTERS}")
        if self.dtype not in get_args(Dtype):
            raise ConfigError(f"dtype={self.dtype!r}; choose one of {', '.join(get_args(Dtype))}")
        if uneven := [count for count in self.tokens if count > self.length and count % self.length]:
            raise ConfigError(
                f"tokens={uneven[0]} cannot be cut into examples of length={self.length}: give a multiple of it"
            )

    def batch(self, tokens: int) -> tuple[int, int]:
        """Number of examples, and tokens in each."""
        length = min(tokens, self.length)
        return tokens // length, length


def check_distinct(name: str, values: Sequence[Any]) -> None:
    """Refuse an empty list, and one with something twice.

    Raises:
      ConfigError: it is.
    """
    if not values:
        raise ConfigError(f"{name}: give at least one")
    if twice := [value for value in values if list(values).count(value) > 1]:
        raise ConfigError(f"{name}: {twice[0]} is given twice")


def _check_least(name: str, given: int | Sequence[int], least: int) -> None:
    values = [given] if isinstance(given, int) else given
    if low := [value for value in values if value < least]:
        raise ConfigError(f"{name} must be at least {least}, got {low[0]}")
