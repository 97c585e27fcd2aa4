"""The `peft_type` that an adapter is saved as, LoRA, AdaLoRA or VeRA, with the ranks and alphas of its config."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.factors import Array, times
from lora_jax.adapter.updates import LowRank, Replace, Update
from lora_jax.errors import CheckpointError
from lora_jax.io.peft.config import ADALORA, LORA, RANK_OFFSET, VERA, PeftType
from lora_jax.io.peft.factors import ScaledModule
from lora_jax.io.peft.match import exact_key
from lora_jax.io.peft.module import Module
from lora_jax.methods import AdaLora, ALora, Dora, Shift, Vera


class Exported(NamedTuple):
    """Factors, and what VeRA multiplies their outputs by, `[*batch, *out]`."""

    factors: LowRank
    outputs: Array | None = None


def peft_types_for(adapter: Adapter) -> tuple[PeftType, ...]:
    """Types of file that can hold the adapter, the first that turns out to fit: its method's own, or plain LoRA.

    PEFT's VeRA has linear layers only, and neither biases on B nor trained tokens.
    """
    factors = [update for update in adapter.values() if not isinstance(update, Replace)]
    if any(isinstance(update, AdaLora) for update in factors):
        return (ADALORA,)
    vera = all(isinstance(update, Vera) and update.site.kind == "dense" for update in factors)
    return (VERA, LORA) if vera and factors else (LORA,)


def exported(update: Update, peft_type: PeftType) -> Exported | None:
    """The update in a file of that type: plain factors, with the magnitude if it is DoRA; None if there are none."""
    if peft_type is ADALORA and isinstance(update, AdaLora):
        return Exported(update)
    if peft_type is VERA and isinstance(update, Vera):
        return _vera(update)
    factors = update.low_rank()
    if factors is None or not isinstance(update, (Dora, ALora)):
        return None if factors is None else Exported(factors)
    return Exported(replace(update, a=factors.a, b=factors.b, a_start=None, b_start=None))


def _vera(update: Vera) -> Exported:
    """AdaLoRA's form of it, `d` for the values; PEFT has no scale, so that the outputs' numbers carry it."""
    batch = update.site.batch_shape
    a, b = (jnp.broadcast_to(each, (*batch, *each.shape)) for each in update.projections())
    factors = AdaLora(a, b, jnp.ones_like(update.scale), update.site, update.dropout, values=update.d)
    return Exported(factors, times(update.scale, update.b))


def check_alike(adapter: Adapter, low_rank: Mapping[str, LowRank], peft_type: PeftType) -> None:
    """Refuse updates that are not for one file: its type is one for all, and so are the switches of DoRA and aLoRA.

    Raises:
      CheckpointError: updates are of several methods, or AdaLoRA is where PEFT has none.
    """
    switches = {ADALORA: {AdaLora: "AdaLoRA"}, LORA: {Dora: "DoRA", ALora: "aLoRA"}, VERA: {}}[peft_type]
    for method, name in switches.items():
        plain = [path for path, update in low_rank.items() if not isinstance(update, method)]
        if plain and len(plain) < len(low_rank):
            hint = " To have plain factors everywhere: lora.methods.trim(adapter)." if peft_type is ADALORA else ""
            raise CheckpointError(
                f"Some updates are {name} and others ({plain[0]!r}) are not, and PEFT has one switch for all. Save "
                f"them apart: adapter.without(...).{hint}"
            )
    if len(sequences := {update.invocation_tokens for update in low_rank.values() if isinstance(update, ALora)}) > 1:
        raise CheckpointError(f"Updates have different invocation tokens, {sorted(sequences)}: save them apart")
    for path, update in adapter.items() if peft_type is ADALORA else ():
        reason = _not_in_adalora(update)
        if reason is not None:
            raise not_adalora(path, reason)


def invocation_tokens(low_rank: Mapping[str, LowRank]) -> list[int] | None:
    """The sequence after which the factors act, or None if they always do."""
    found = (list(update.invocation_tokens) for update in low_rank.values() if isinstance(update, ALora))
    return next(found, None)


def _not_in_adalora(update: Update) -> str | None:
    site = update.site
    if isinstance(update, Shift):
        return "a bias on B"
    if not isinstance(update, AdaLora) or site.kind == "dense":
        return None
    if site.kind == "conv" and site.groups == 1:
        window = len(site.in_axes) - 1
        return None if window == 2 else f"a convolution along {window} axes"
    return "a convolution in groups" if site.kind == "conv" else f"of kind {site.kind!r}"


def not_adalora(path: str, reason: str) -> CheckpointError:
    """The error for an update that PEFT's AdaLoRA has no place for."""
    return CheckpointError(
        f"PEFT's AdaLoRA has linear layers and convolutions along two axes only, and {path!r} is {reason}. "
        "lora.methods.trim(adapter) makes the plain factors that do the same, and PEFT has a place for those."
    )


class TypeFields(NamedTuple):
    """Fields of a config, and the modules that they belong to, where those are not as they were made."""

    fields: dict[str, Any]
    modules: dict[str, Module]


def lora_fields(made: Mapping[str, ScaledModule], default: ScaledModule | None = None) -> TypeFields:
    """The rank and alpha of `default`, or the most frequent ones, and a pattern for every module that has others.

    >>> one, two = (ScaledModule(Module("linear", np.ones((r, 3)), np.ones((2, r))), r, np.float32(2)) for r in (1, 4))
    >>> lora_fields({"q": one, "k": one, "v": two}).fields["rank_pattern"]
    {'^v': 4}
    """
    scales = {name: (each.rank, shortest_alpha(each.scale, each.rank)) for name, each in made.items()}
    given = scales.values() if default is None else [(default.rank, shortest_alpha(default.scale, default.rank))]
    rank, alpha = (Counter(each).most_common(1)[0][0] for each in zip(*given, strict=True)) if given else (8, 8.0)
    own = {exact_key(name): each for name, each in sorted(scales.items())}
    fields = {
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {key: each for key, (each, _) in own.items() if each != rank},
        "alpha_pattern": {key: _number(each) for key, (_, each) in own.items() if each != alpha},
    }
    return TypeFields(fields, {})


def adalora_fields(made: Mapping[str, ScaledModule]) -> TypeFields:
    """One rank and one alpha for all: pruned terms are left out, and values carry what scales differ by.

    PEFT needs a schedule in the config; there is none in an adapter, so it gets the shortest.
    """
    rank = max((each.rank for each in made.values()), default=12)
    scale = np.float32(max((abs(each.scale) for each in made.values()), default=0) or 1)
    modules, masks = {}, {}
    for name, each in made.items():
        module = _gained(each.module, each.scale / scale)
        kept = _kept(module)
        modules[name] = _compact(module, kept)
        masks[f"{name}.lora_E"] = [*kept.tolist(), *[False] * (rank - each.rank)]
    average = sum(map(sum, masks.values())) / max(len(masks), 1)
    fields = {
        "init_r": rank,
        "target_r": max(round(average), 1),
        "lora_alpha": _number(shortest_alpha(scale, rank + RANK_OFFSET)),
        "rank_pattern": None if all(map(all, masks.values())) else masks,
        "total_step": 1,
    }
    return TypeFields(fields, modules)


def _gained(module: Module, ratio: np.float32) -> Module:
    assert module.values is not None
    return module if ratio == 1 else replace(module, values=module.values * ratio)


def _kept(module: Module) -> np.ndarray:
    """Which terms are not pruned; of a module that has no values yet, those that hold anything."""
    assert module.values is not None
    if module.values.any():
        return module.values != 0
    rank = len(module.a)
    return np.asarray(module.a.reshape(rank, -1).any(1) | module.b.reshape(-1, rank).any(0))


def _compact(module: Module, kept: np.ndarray) -> Module:
    assert module.values is not None
    a, b = module.a.reshape(len(kept), -1), module.b.reshape(-1, len(kept))
    return replace(module, kind="linear", a=a[kept], b=b[:, kept], values=module.values[kept])


def vera_fields(made: Mapping[str, ScaledModule], seed: int) -> TypeFields | None:
    """One pair of projections for all, or None if they are not parts of one."""
    found = [each.module for each in made.values()]
    if not found:
        return None
    a = max((module.a for module in found), key=lambda a: a.shape[1])
    b = max((module.b for module in found), key=len)
    for module in found:
        if not np.array_equal(a[:, : module.a.shape[1]], module.a) or not np.array_equal(b[: len(module.b)], module.b):
            return None
    fields = {"r": len(a), "projection_prng_key": seed, "save_projection": True}
    return TypeFields(fields, {name: replace(each.module, a=a, b=b) for name, each in made.items()})


def shortest_alpha(scale: np.float32, divisor: float) -> float:
    """The shortest number that PEFT turns into the same scale when it divides by the rank."""
    alphas = (float(f"{float(scale) * divisor:.{digits}g}") for digits in range(1, 18))
    return next((alpha for alpha in alphas if np.float32(alpha / divisor) == scale), float(scale) * divisor)


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
