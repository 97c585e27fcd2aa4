"""A case of the shared table: a small model, and what must be found in it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from helpers import compiled, random_adapter

import lora_jax as lora
from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.site import Site, Sites
from lora_jax.adapter.updates import LowRank, Update
from lora_jax.paths import named_leaves
from table.methods import METHODS


class Model(NamedTuple):
    """A model to adapt: `fn(params, *args)`."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]


class Draw:
    """Random values, drawn without compiling anything."""

    def __init__(self, seed: str):
        self.generator = np.random.default_rng(crc32(seed.encode()))

    def __call__(self, *shape: int) -> jax.Array:
        return jax.device_put(np.float32(self.generator.normal(size=shape) / 2))

    def integers(self, limit: int, *shape: int) -> jax.Array:
        """Integers below a limit."""
        return jax.device_put(np.asarray(self.generator.integers(limit, size=shape), np.int32))

    def fill(self, tree: Any) -> Any:
        """The tree with random numbers for its abstract floating-point leaves, and zeros for the others."""
        return jax.tree.map(lambda leaf: self._filled(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, tree)

    def _filled(self, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return self(*leaf.shape)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), leaf.shape)
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype))


@dataclass(frozen=True, eq=False)
class Case:
    """A row of the table.

    Attributes:
      framework: what the model is written with.
      name: what is special about it.
      build: makes the model.
      sites: what must be found, no more and no less: for each path its kind and one letter per axis, `i` for
        in, `o` for out and `b` for stacked.
      hidden: the same for parameters that `find_sites` cannot see, so that their sites are made by hand.
      materialised: paths that must be formed somewhere, because the program leaves no choice; all others must not.
      affine: whether the output is affine in the input of every site, so that dropout keeps its expectation.
      reverse: whether the program has a gradient (a `while` loop has none).
      variant: whether it differs from another row only in its geometry, so that forward and backward say it all.
      method: the row of the table of methods that adapts it.
    """

    framework: str
    name: str
    build: Callable[[Draw], Model]
    sites: dict[str, str]
    hidden: dict[str, str] = field(default_factory=dict)
    materialised: tuple[str, ...] = ()
    affine: bool = False
    reverse: bool = True
    variant: bool = False
    method: str = "lora"

    @property
    def id(self) -> str:
        """Name of the row in test reports."""
        return f"{self.framework}-{self.name}" + (f"-{self.method}" if self.method != "lora" else "")

    @cached_property
    def model(self) -> Model:
        """The model, built once."""
        return self.build(Draw(f"{self.framework}-{self.name}"))

    def but(self, **changes: Any) -> "Case":
        """The case with other parameters or arguments."""
        model = self.model._replace(**changes)
        return replace(self, build=lambda draw: model)

    @cached_property
    def found(self) -> Sites:
        """What `find_sites` says about the model."""
        return lora.find_sites(self.model.fn, self.model.params, *self.model.args)

    @cached_property
    def targets(self) -> Sites:
        """Every site that the tests adapt: those found and those made by hand."""
        leaves, _ = named_leaves(self.model.params)
        return Sites([*self.found.values(), *(site(path, leaves[path], roles) for path, roles in self.hidden.items())])

    @cached_property
    def adapter(self) -> Adapter:
        """An adapter whose every leaf is random, of the case's method."""
        return self._adapted(METHODS[self.method].trained, self._factors)

    @property
    def starts(self) -> list[Adapter]:
        """Adapters that change nothing: those of the method, with either factor zero where that is a start."""
        zero = [
            {
                path: replace(u, **{factor: jax.device_put(np.zeros_like(getattr(u, factor)))})
                for path, u in self._factors.items()
            }
            for factor in "ab"
        ]
        return [self._adapted(METHODS[self.method].start, Adapter(each)) for each in zero]

    @cached_property
    def _factors(self) -> Adapter:
        return random_adapter(self.targets)

    def _adapted(self, make: Callable[[LowRank, Any], Update], factors: Adapter) -> Adapter:
        leaves, _ = named_leaves(self.model.params)
        given = {path: (factors[path], leaves[path]) for path in factors}
        made = lambda given: {path: make(*each) for path, each in given.items()}  # noqa: E731
        return Adapter((made if self.method == "lora" else compiled(made))(given))

    @property
    def drops(self) -> bool:
        """Whether dropout acts anywhere: on everything but look-ups and weights that are formed."""
        return any(
            not kind.startswith("embedding") and path not in self.materialised for path, kind in self.sites.items()
        )


def site(path: str, leaf: Any, roles: str) -> Site:
    """A site from its kind and one letter per axis."""
    kind, letters = roles.split()
    into, out, batch = (tuple(i for i, each in enumerate(letters) if each == letter) for letter in "iob")
    dtype = jnp.dtype(leaf.dtype).name
    return Site(path=path, shape=leaf.shape, dtype=dtype, kind=kind, in_axes=into, out_axes=out, batch_axes=batch)


def roles(site: Site) -> str:
    """A site as its kind and one letter per axis."""
    letter = dict.fromkeys(site.in_axes, "i") | dict.fromkeys(site.out_axes, "o") | dict.fromkeys(site.batch_axes, "b")
    return f"{site.kind} {''.join(letter[axis] for axis in range(len(site.shape)))}"


CASES: list[Case] = []


def case(framework: str, sites: dict[str, str], name: str = "", **facts: Any) -> Callable[[Any], Any]:
    """Add a function that builds a model to the table."""

    def add(build: Callable[[Draw], Model]) -> Callable[[Draw], Model]:
        CASES.append(Case(framework, name or build.__name__.strip("_"), build, sites, **facts))
        return build

    return add
