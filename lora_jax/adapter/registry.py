"""The tables of initialisers and methods that `LoraConfig(init=..., method=...)` chooses from."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import jax

from lora_jax.adapter.site import Site
from lora_jax.errors import ConfigError

Initialiser: TypeAlias = Callable[..., tuple[jax.Array, jax.Array]]
"""`(key, site, rank, dtype, **data) -> (a, b)` for one linear map: `a` is `[rank, fan_in]` and `b` is
`[rank, fan_out]`."""

Data: TypeAlias = Literal["weight", "scale", "inputs", "components", "gradient"]
"""What an initialiser may ask for: the frozen matrix `[fan_in, fan_out]` in float32, the scale of the product, and what
`lora_jax.capture` collected of the map: `Inputs` or `Components` of one map, or the gradient `[fan_in, fan_out]`."""

_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class Table(Generic[_Entry]):
    """Things by the name that users write for them.

    Attributes:
      setting: the field of `LoraConfig` that chooses among them.
      what: what one of them is called.
      home: the package whose modules register this library's own, imported when one is looked for.
      entries: the things by name.
    """

    setting: str
    what: str
    home: str
    entries: dict[str, _Entry] = field(default_factory=dict)

    def check_free(self, name: str) -> None:
        """Raise a `ConfigError` if a name is taken."""
        if name in self.entries:
            raise ConfigError(f"{self.what} named {name!r} exists already; taken names: {', '.join(self)}")

    def find(self, name: Any) -> _Entry:
        """The thing of a name; a `ConfigError` that lists them all if there is none."""
        if not isinstance(name, str) or name not in self:
            raise ConfigError(f"{self.setting}={name!r} is not {self.what.lower()}; choose one of: {', '.join(self)}")
        return self.entries[name]

    def __contains__(self, name: object) -> bool:
        import_module(self.home)
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        import_module(self.home)
        return iter(sorted(self.entries))


@dataclass(frozen=True)
class Entry:
    """An initialiser, and what it needs.

    Attributes:
      draw: the function.
      reads: data it is called with, as keywords.
      away: whether its product is not zero, so that adapters keep a frozen copy of the start to take off again.
      number: what stands for `N` in its name.
    """

    draw: Initialiser
    reads: tuple[Data, ...] = ()
    away: bool = False
    number: int | None = None


INITS: Table[Entry] = Table("init", "An initialiser", "lora_jax.init")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a method starts from at one site.

    Attributes:
      site: the parameter.
      rank: number of rank-one terms.
      scale: `[*batch]` float32.
      dropout: probability of dropping an element of the input of A.
      dtype: of what trains.
      key: of this site.
      seed: of frozen random numbers that are drawn again wherever they are used.
      invocation_tokens: after which the update acts.
      factors: draws `a`, `b` from the config's initialiser, and two more or None, those to take off again.
      weight: gives the frozen parameter; raises a `ParameterError` where it has no value.
    """

    site: Site
    rank: int
    scale: jax.Array
    dropout: float
    dtype: str
    key: jax.Array
    seed: int
    invocation_tokens: tuple[int, ...]
    factors: Callable[[], tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]]
    weight: Callable[[], jax.Array]


@dataclass(frozen=True)
class Method:
    """A variant of LoRA, and what it combines with.

    Attributes:
      update: its class, an `Update` with a classmethod `start` that takes a `Start`.
      draws: whether it starts from the factors of an initialiser, so that any `init` will do.
      lora_bias: whether a bias on B may stand beside it.
    """

    update: Any
    draws: bool = True
    lora_bias: bool = True


METHODS: Table[Method] = Table("method", "A method", "lora_jax.methods")


def register(name: str, *, reads: tuple[Data, ...] = (), away: bool = False) -> Callable[[Initialiser], Initialiser]:
    """Decorator that makes an initialiser available as `LoraConfig(init=name)`.

    The function draws the factors of *one* linear map, with its input axes in one and its output axes in one;
    they are reshaped afterwards. For a stacked parameter (scanned layers, experts)
    `lora_jax.init` loops it over the stack, with a key for each entry. It is traced, with the site's `path` left blank:
    sites of one shape share a compilation. A `ConfigError` it raises is shown with the path.

    Args:
      name: the name users write.
      reads: what it is called with beside key, site, rank and dtype, as keywords: `"weight"`, the frozen matrix
        `[fan_in, fan_out]` in float32; `"scale"`, that of the product; `"inputs"`, `"components"` and `"gradient"`,
        from `lora_jax.capture`. A name that ends in `_N` stands for every number there, which comes as `number`.
      away: its product is not zero. The adapter then keeps the factors it started from and takes their product off
        again, so that the model still starts as the base; see `LowRank`.

    Raises:
      ConfigError: the name is taken.

    Example:
      >>> import jax.numpy as jnp
      >>> @register("example-ones")
      ... def ones(key, site, rank, dtype):
      ...     return jnp.ones((rank, site.fan_in), dtype), jnp.zeros((rank, site.fan_out), dtype)
      >>> "example-ones" in initialisers()
      True
    """
    INITS.check_free(name)

    def add(initialiser: Initialiser) -> Initialiser:
        INITS.entries[name] = Entry(initialiser, reads, away)
        return initialiser

    return add


def find_init(name: Any) -> Entry:
    """The initialiser of a name, which may have a number where the table has `N`.

    Raises:
      ConfigError: there is none; the message lists those there are.
    """
    number = re.search(r"(?<=_)[1-9]\d*$", name) if isinstance(name, str) else None
    family = f"{name[: number.start()]}N" if number else None
    return (
        INITS.find(name)
        if number is None or family not in INITS
        else replace(INITS.find(family), number=int(number[0]))
    )


def initialisers() -> tuple[str, ...]:
    """Names that `LoraConfig(init=...)` accepts.

    Example:
      >>> import lora_jax as lora
      >>> {"default", "gaussian", "orthogonal", "pissa"} <= set(lora.initialisers())
      True
    """
    return tuple(INITS)


_Method = TypeVar("_Method", bound=type)


def register_method(name: str, *, draws: bool = True, lora_bias: bool = True) -> Callable[[_Method], _Method]:
    """Class decorator that makes an update available as `LoraConfig(method=name)`.

    The class is an `Update` with a classmethod `start`; `docs/add-a-method.md` writes one.

    Args:
      name: the name users write.
      draws: whether it starts from the factors of an initialiser; if not, `init=` is refused beside it.
      lora_bias: whether a bias on B may stand beside it.

    Raises:
      ConfigError: the name is taken.

    Example:
      >>> from lora_jax.adapter.updates import LowRank
      >>> @register_method("example-lora")
      ... class Mine(LowRank): ...
      >>> "example-lora" in method_names()
      True
    """
    METHODS.check_free(name)

    def add(method: _Method) -> _Method:
        METHODS.entries[name] = Method(method, draws, lora_bias)
        return method

    return add


def method_names() -> tuple[str, ...]:
    """Names that `LoraConfig(method=...)` accepts.

    Example:
      >>> import lora_jax as lora
      >>> {"lora", "dora"} <= set(lora.methods.names())
      True
    """
    return tuple(METHODS)
