"""Ranks and scales of the modules of an adapter, as fields of PEFT's config, in each of its kinds."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lora_jax.io.peft.delta import Module
from lora_jax.io.peft.kinds import RANK_OFFSET
from lora_jax.io.peft.match import exact_key
from lora_jax.io.peft.module import Made


class Settled(NamedTuple):
    """Fields of a config, and the modules that they belong to, where those are not as they were made."""

    fields: dict[str, Any]
    modules: dict[str, Module]


def settle_lora(made: Mapping[str, Made]) -> Settled:
    """The most frequent rank and alpha, and a pattern for every module that has others.

    >>> one, two = (Made(Module("linear", np.ones((r, 3)), np.ones((2, r))), r, np.float32(2)) for r in (1, 4))
    >>> settle_lora({"q": one, "k": one, "v": two}).fields["rank_pattern"]
    {'^v': 4}
    """
    scales = {name: (each.rank, _alpha(each.scale, each.rank)) for name, each in made.items()}
    ranks = Counter(rank for rank, _ in scales.values())
    alphas = Counter(alpha for _, alpha in scales.values())
    rank = ranks.most_common(1)[0][0] if ranks else 8
    alpha = alphas.most_common(1)[0][0] if alphas else 8.0
    own = {exact_key(name): each for name, each in sorted(scales.items())}
    fields = {
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {key: each for key, (each, _) in own.items() if each != rank},
        "alpha_pattern": {key: _number(each) for key, (_, each) in own.items() if each != alpha},
    }
    return Settled(fields, {})


def settle_adalora(made: Mapping[str, Made]) -> Settled:
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
        "lora_alpha": _number(_alpha(scale, rank + RANK_OFFSET)),
        "rank_pattern": None if all(map(all, masks.values())) else masks,
        "total_step": 1,
    }
    return Settled(fields, modules)


def _gained(module: Module, ratio: np.float32) -> Module:
    assert module.values is not None
    return module if ratio == 1 else replace(module, values=module.values * ratio)


def _kept(module: Module) -> np.ndarray:
    """Which terms are not pruned; of a module that has no values yet, those that hold anything."""
    assert module.values is not None
    if module.values.any():
        return module.values != 0
    rank = len(module.a)
    return module.a.reshape(rank, -1).any(1) | module.b.reshape(-1, rank).any(0)


def _compact(module: Module, kept: np.ndarray) -> Module:
    assert module.values is not None
    a, b = module.a.reshape(len(kept), -1), module.b.reshape(-1, len(kept))
    return replace(module, kind="linear", a=a[kept], b=b[:, kept], values=module.values[kept])


def settle_vera(made: Mapping[str, Made], seed: int) -> Settled | None:
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
    return Settled(fields, {name: replace(each.module, a=a, b=b) for name, each in made.items()})


def _alpha(scale: np.float32, divisor: float) -> float:
    """The shortest number that PEFT turns into the same scale when it divides by the rank."""
    alphas = (float(f"{float(scale) * divisor:.{digits}g}") for digits in range(1, 18))
    return next((alpha for alpha in alphas if np.float32(alpha / divisor) == scale), float(scale) * divisor)


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
