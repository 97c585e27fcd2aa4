"""What is timed, one weight or a whole model, and what is varied: ranks, tokens, sizes of the bank, dtype."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.site import Site
from lora_jax.config.config import LoraConfig
from lora_jax.config.selection import select
from lora_jax.errors import ConfigError
from lora_jax.models import initial
from lora_jax.sites import find_sites

Dtype = Literal["float32", "bfloat16"]

VOCABULARY = 256
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


@dataclass(frozen=True)
class Work:
    """A function and its arguments.

    Attributes:
      fn: the function `fn(params, inputs)`.
      params: its parameters.
      inputs: examples on axis 0.
      sites: the parameters that adapters adapt.
      reads: by path, `[tokens, *in]` numbers to apply the adapters alone to.
      single: whether the function is one product, of `reads`, so that base and adapter add up.
    """

    fn: Callable[..., Any]
    params: Any
    inputs: jax.Array
    sites: Sequence[Site]
    reads: Mapping[str, jax.Array]
    single: bool


class Case(Protocol):
    """Something to time."""

    @property
    def name(self) -> str:
        """How tables call it."""
        ...

    @property
    def side(self) -> int:
        """The smallest side of a weight that is adapted: the highest rank that makes sense."""
        ...

    def work(self, batch: tuple[int, int], dtype: str, seed: int) -> Work:
        """Function, random parameters and random inputs, for a number of examples and tokens in each."""
        ...


_LONGEST = 1 << 24
"""Inputs or outputs of a weight that can be asked for."""


@dataclass(frozen=True)
class Dense:
    """One weight: `x @ w`.

    Attributes:
      into: number of its inputs.
      out: number of its outputs.

    Example:
      >>> Dense(8, 6).work((2, 3), "float32", seed=0).inputs.shape
      (2, 3, 8)
    """

    into: int
    out: int

    @property
    def name(self) -> str:
        """Inputs × outputs."""
        return f"{self.into}×{self.out}"

    @property
    def side(self) -> int:
        """The smaller of the two."""
        return min(self.into, self.out)

    @classmethod
    def parsed(cls, text: str) -> "Dense":
        """From text, as it is given on the command line.

        Raises:
          ConfigError: it says something else.

        Example:
          >>> Dense.parsed("1024x4096")
          Dense(into=1024, out=4096)
        """
        sizes = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
        if sizes is None:
            raise ConfigError(f"{text!r} is no shape: write inputs x outputs, such as 1024x4096")
        into, out = int(sizes[1]), int(sizes[2])
        if max(into, out) > _LONGEST:
            raise ConfigError(f"{text!r} is too large: at most {_LONGEST} inputs and outputs")
        return cls(into, out)

    def work(self, batch: tuple[int, int], dtype: str, seed: int) -> Work:
        """`x @ w` of normal numbers, that keeps their size; no axis for tokens where an example is one token."""
        draw, (examples, length) = np.random.default_rng(seed), batch
        w = normal(draw, (self.into, self.out), dtype, self.into**-0.5)
        x = normal(draw, (examples, *([length] if length > 1 else []), self.into), dtype)
        fn = lambda params, x: x @ params["w"]  # noqa: E731
        sites = tuple(find_sites(fn, {"w": w}, x).values())
        return Work(fn, {"w": w}, x, sites, {"w": x.reshape(-1, self.into)}, single=True)


@dataclass(frozen=True)
class Model:
    """A llama of `lora_jax.models` with random parameters, all linear layers of its blocks adapted.

    Attributes:
      label: what tables call it.
      layers: of the decoder. They are unrolled, as XLA counts the operations of a loop's body once only.
      width: of the residual stream.
      heads: for queries.
      kv_heads: for keys and values.
      hidden: inner width of the MLP.

    Example:
      >>> model = Model("toy", layers=1, width=16, heads=2, kv_heads=1, hidden=24)
      >>> model.name, model.side
      ('toy transformer, 1 × 16', 8)
      >>> work = model.work((2, 3), "float32", seed=0)
      >>> work.fn(work.params, work.inputs).shape, len(work.sites)
      ((2, 3, 256), 7)
    """

    label: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int

    @property
    def name(self) -> str:
        """Label, layers × width."""
        return f"{self.label} transformer, {self.layers} × {self.width}"

    @property
    def side(self) -> int:
        """The smallest side of an adapted kernel: what keys and values have together, if nothing else."""
        return min(self.width, self.hidden, self.kv_heads * self.width // self.heads)

    def work(self, batch: tuple[int, int], dtype: str, seed: int) -> Work:
        """A forward pass over random tokens."""
        config = {
            "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": self.width, "tie_word_embeddings": True,
            "num_hidden_layers": self.layers, "intermediate_size": self.hidden,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
        }  # fmt: skip
        draw = np.random.default_rng(seed)
        model = initial(config, seed=seed, dtype=dtype, unrolled=True)
        tokens = jnp.asarray(draw.integers(VOCABULARY, size=batch), jnp.int32)
        sites = select(LoraConfig(), find_sites(model.apply, model.params, tokens)).sites
        reads = {site.path: normal(draw, (tokens.size, *site.sizes(site.in_axes)), dtype) for site in sites}
        return Work(model.apply, model.params, tokens, sites, reads, single=False)


Size = Literal["tiny", "small", "medium"]

MODELS: dict[Size, Model] = {
    "tiny": Model("tiny", layers=2, width=32, heads=4, kv_heads=2, hidden=64),
    "small": Model("small", layers=4, width=128, heads=4, kv_heads=2, hidden=352),
    "medium": Model("medium", layers=6, width=256, heads=8, kv_heads=2, hidden=704),
}
"""Models that the command line knows by name."""


def normal(draw: np.random.Generator, shape: Sequence[int], dtype: str, size: float = 1.0) -> jax.Array:
    """Normal numbers of a standard deviation."""
    return jnp.asarray(draw.standard_normal(shape, np.float32) * np.float32(size), dtype)
