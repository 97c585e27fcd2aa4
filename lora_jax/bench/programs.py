"""The modes as compiled programs, checked before they are timed: the time of a wrong result is worth nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank
from lora_jax.apply import adapt
from lora_jax.bench.cases import Settings, Work, normal
from lora_jax.errors import LoraError
from lora_jax.many.bank import AdapterBank
from lora_jax.many.route import route
from lora_jax.merge import merge
from lora_jax.sites import Explanation, explain

Mode = Literal["base", "adapter", "separate", "merged", "routed"]

_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


class DisagreementError(LoraError, ArithmeticError):
    """Two modes that are to compute the same do not."""


@dataclass(frozen=True, eq=False)
class Program:
    """One mode, compiled.

    Attributes:
      mode: the mode.
      compiled: what XLA made of it; takes the arrays of its arguments.
      arrays: these.
      rank: of the adapters; None for the base.
      adapters: number in the bank of a routed program, else None.
      form: how the products are carried out, as `lora_jax.explain` says; empty where there is no choice.
    """

    mode: Mode
    compiled: Any
    arrays: tuple[jax.Array, ...]
    rank: int | None = None
    adapters: int | None = None
    form: str = ""

    @classmethod
    def of(cls, mode: Mode, fn: Callable[..., Any], *args: Any, **known: Any) -> "Program":
        """Compile a function for its arguments.

        It takes their arrays one by one: taking trees apart in Python is no part of a mode's time.
        """
        arrays, tree = jax.tree.flatten(args)
        compiled = jax.jit(lambda *given: fn(*jax.tree.unflatten(tree, given))).lower(*arrays).compile()
        return cls(mode, compiled, tuple(arrays), **known)

    def given(self, *args: Any, **changes: Any) -> "Program":
        """The same program for other arguments of the same shapes."""
        return replace(self, arrays=tuple(jax.tree.leaves(args)), **changes)

    def __call__(self) -> Any:
        """Run it once."""
        return self.compiled(*self.arrays)

    def __str__(self) -> str:
        rank = "" if self.rank is None else f", rank {self.rank}"
        return f"{self.mode}{'' if self.adapters is None else f', {self.adapters} adapters'}{rank}"

    def counted(self, name: str) -> int | None:
        """What XLA counts in the program (`flops`, `bytes accessed`); None where a backend does not say."""
        cost = self.compiled.cost_analysis()
        value = cost.get(name, -1) if isinstance(cost, Mapping) else -1
        return int(value) if value >= 0 else None

    @property
    def temporary(self) -> int | None:
        """Bytes that XLA allocates beside arguments and results; None where a backend does not say."""
        return getattr(self.compiled.memory_analysis(), "temp_size_in_bytes", None)


def programs(work: Work, settings: Settings) -> Iterator[Program]:
    """Every mode of every rank, compiled and checked, the base first.

    Raises:
      DisagreementError: a mode computes something else.
    """
    base = Program.of("base", work.fn, work.params, work.inputs)
    yield base
    for rank in settings.ranks:
        yield from _of_rank(work, base, rank, settings)


def _of_rank(work: Work, base: Program, rank: int, settings: Settings) -> Iterator[Program]:
    dtype, seed = settings.dtype, settings.seed
    adapters = [drawn(work.sites, rank, dtype, (seed, number)) for number in range(max(settings.adapters))]
    alone = Program.of("adapter", thin, adapters[0], work.reads, rank=rank)
    separate = Program.of("separate", adapt(work.fn), work.params, adapters[0], work.inputs, rank=rank)
    uses = explain(work.fn, work.params, adapters[0], work.inputs)
    separate = replace(separate, form=_form(uses))
    merged = base.given(jax.jit(merge)(work.params, adapters[0]), work.inputs, mode="merged", rank=rank)
    if work.single:
        added = base().astype(jnp.float32) + alone()["w"].astype(jnp.float32).reshape(base().shape)
        _agree(separate, separate(), "base + adapter", added, dtype)
    _agree(merged, merged(), str(separate), separate(), dtype)
    yield from (alone, separate, merged)
    for count in settings.adapters:
        yield _routed(work, separate, adapters[:count], settings)


def _routed(work: Work, separate: Program, adapters: Sequence[Adapter], settings: Settings) -> Program:
    """The routed program, compared with what each adapter gives alone."""
    examples, rank = len(work.inputs), separate.rank
    ids = np.random.default_rng(settings.seed).permutation(np.arange(examples) % len(adapters) + 1)
    routed, bank = route(work.fn), AdapterBank.of(adapters)
    args = work.params, bank, jnp.asarray(ids), work.inputs
    program = Program.of("routed", routed, *args, rank=rank, adapters=len(adapters))
    result = np.asarray(program())
    for slot in np.unique(ids):
        alone = np.asarray(separate.given(work.params, adapters[slot - 1], work.inputs)())
        own = ids == slot
        _agree(program, result[own], f"adapter {slot} alone", alone[own], settings.dtype)
    return replace(program, form=_form(routed.explain(*args)))


def thin(adapter: Adapter, reads: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`B(Ax)` alone, for every adapted parameter."""
    return {path: _thin(update, reads[path]) for path, update in adapter.items()}


def _thin(update: Any, x: jax.Array) -> jax.Array:
    a, b = (factor.reshape(update.rank, -1) for factor in (update.a, update.b))
    return x.reshape(len(x), -1) @ a.T @ b


def drawn(sites: Sequence[Site], rank: int, dtype: str, seed: Sequence[int]) -> Adapter:
    """A random adapter whose effect is half as large as that of weights that keep the size of their inputs."""
    draw = np.random.default_rng(seed)
    return Adapter({
        site.path: LowRank(
            normal(draw, site.a_shape(rank), dtype, site.fan_in**-0.5),
            normal(draw, site.b_shape(rank), dtype, 0.5 * rank**-0.5),
            jnp.ones(site.batch_shape),
            site,
        )
        for site in sites
    })  # fmt: skip


def _form(explanation: Explanation) -> str:
    return " and ".join(sorted({use.route for use in explanation.uses}))


def _agree(program: Program, result: Any, other: str, expected: Any, dtype: str) -> None:
    """Refuse results that differ by more than rounding.

    Accelerators round the operands of float32 products to narrower formats.
    """
    tolerance = _TOLERANCE["bfloat16" if jax.default_backend() != "cpu" else dtype]
    result, expected = (np.asarray(value).astype(np.float64) for value in (result, expected))
    size = float(np.abs(expected).max())
    error = float(np.abs(result - expected).max())
    if not error <= tolerance * size:
        raise DisagreementError(
            f"{program} differs from {other} by {error:.1e} of {size:.1e}, more than a share of {tolerance:g}: it "
            "computes something else, so that its time means nothing"
        )
