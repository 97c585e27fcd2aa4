"""How strong an adapter is: what config, metadata, alpha tensors and the caller say of its scales."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from lora_jax.errors import CheckpointError, listed
from lora_jax.io.peft import config as peft_config

METADATA = "lora_adapter_metadata"
"""The key of a safetensors file's metadata under which diffusers writes PEFT's configs."""


class Source(NamedTuple):
    """One place that tells scales: its name in messages, the scale of each module that it knows, and how exactly."""

    name: str
    scales: Mapping[str, float]
    tolerance: float = 1e-6


def configs_in(where: str, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The configs in a file's metadata, by the part of the pipeline they are for; one for all under an empty name.

    Raises:
      CheckpointError: they cannot be read, or mean what cannot be represented.

    Example:
      >>> configs_in("x", {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 8}'})
      {'unet': {'r': 4, 'lora_alpha': 8}}
    """
    text = metadata.get(METADATA)
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {METADATA} in its metadata is no JSON ({error})") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{where}: {METADATA} in its metadata holds a {type(fields).__name__}, not an object")
    found: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        part, _, field = key.rpartition(".")
        found.setdefault(part, {})[field] = value
    for part, config in found.items():
        name = f"{where}: {METADATA} in its metadata{f', {part}' if part else ''}"
        peft_config.check(name, config)
        if part and (config.get("alora_invocation_tokens") or config.get("target_parameters")):
            raise CheckpointError(f"{name} has aLoRA or target_parameters, which are read where a config is for all")
    return found


def from_configs(configs: Mapping[str, Mapping[str, Any]], ranks: Mapping[str, int]) -> Source:
    """What configs say of the modules whose names begin with their part."""
    scales = {}
    for name, rank in ranks.items():
        part = max((part for part in configs if not part or name.startswith(f"{part}.")), key=len, default=None)
        if part is not None:
            inside = name.removeprefix(f"{part}.") if part else name
            wanted = peft_config.rank_of(configs[part], inside)
            if part and wanted not in (None, rank):
                raise CheckpointError(f"{name} has rank {rank}, but {METADATA} in the file's metadata says {wanted}")
            scales[name] = peft_config.scale_of(configs[part], inside, rank)
    return Source(f"{METADATA} in the file's metadata", scales)


def from_tensors(alphas: Mapping[str, np.ndarray], ranks: Mapping[str, int]) -> Source:
    """What alpha tensors say."""
    scales = {name: float(alpha) / ranks[name] for name, alpha in alphas.items() if name in ranks}
    coarse = any(alpha.dtype.itemsize <= 2 and alpha.dtype.kind not in "iu" for alpha in alphas.values())
    # bfloat16 has no 0.1.
    return Source(".alpha tensors in the file", scales, 1e-2 if coarse else 1e-6)


def settled(where: str, sources: Sequence[Source], ranks: Mapping[str, int], alpha: float | None) -> dict[str, float]:
    """The scale of every module of which something tells it.

    Args:
      where: the file, for error messages.
      sources: what tells scales.
      ranks: rank of each module.
      alpha: the caller's, for modules that no source knows.

    Raises:
      CheckpointError: two sources contradict each other, or `alpha` is no number or has no module to go to.

    Example:
      >>> settled("x", [Source("one", {"q": 2.0})], {"q": 4, "k": 4}, 8)
      {'k': 2.0, 'q': 2.0}
    """
    _check_agreement(where, sources)
    told = {name: scale for source in reversed(sources) for name, scale in source.scales.items()}
    if alpha is None:
        return told
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise CheckpointError(f"alpha={alpha!r} must be a finite number: a module's scale is alpha / rank")
    if not ranks.keys() - told.keys():
        raise _needless(where, alpha, sources)
    return {name: alpha / rank for name, rank in ranks.items() if name not in told} | told


def _check_agreement(where: str, sources: Sequence[Source]) -> None:
    for one, other in combinations(sources, 2):
        for name in sorted(one.scales.keys() & other.scales.keys()):
            pair = one.scales[name], other.scales[name]
            if not math.isclose(*pair, rel_tol=max(one.tolerance, other.tolerance)):
                raise CheckpointError(
                    f"{where}: {one.name} gives {name} the scale {pair[0]:g}, and {other.name} {pair[1]:g}. Find out "
                    "which of them it was trained with, and remove the other."
                )


def _needless(where: str, alpha: float, sources: Sequence[Source]) -> CheckpointError:
    told = "; ".join(f"{one.name}: {listed([f'{n} {scale:g}' for n, scale in one.scales.items()])}" for one in sources)
    return CheckpointError(
        f"{where} tells the scales of all its modules ({told}), so alpha={alpha:g} has none to go to. Leave it out; "
        "lora_jax.scale, or --weights, makes an adapter stronger or weaker."
    )
