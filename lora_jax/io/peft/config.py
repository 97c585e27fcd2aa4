"""`adapter_config.json`: what it may say for the numbers beside it to mean what they seem to mean."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lora_jax.errors import CheckpointError
from lora_jax.io.peft.kinds import ADALORA, KINDS, LORA, RANK_OFFSET, VERA, kind_of, mask_of
from lora_jax.io.peft.match import exact_key, in_pattern
from lora_jax.io.peft.types import check_types

# PEFT's defaults of the fields that decide about the numbers. A file that lacks a field means these.
_DEFAULTS = {"lora_alpha": 8, "init_r": 12, "use_rslora": False, "fan_in_fan_out": False, "bias": "none"}

# Fields that the arrays do not depend on: bookkeeping, training, and how the modules were chosen.
_NEUTRAL = {
    "alora_invocation_tokens",
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}

_VARIANTS = {
    "arrow_config": "Arrow routes every token to other adapters, which no weight can express",
    "kasa_config": "KaSA truncates the base's weights and has a diagonal between the factors",
    "layer_replication": "the model repeats layers that share weights, and each repetition has factors of its own",
    "megatron_config": "Megatron layers are split over devices, and so are the factors",
    "monteclora_config": "MonteCLoRA draws the factors anew in every training step",
    "use_bdlora": "BD-LoRA stores block-diagonal factors packed",
    "use_qalora": "QALoRA averages groups of inputs before A",
    "velora_config": "VeLoRA trains with compressed activations and stores their projections",
}

# Start values that PEFT subtracts from the base: the adapter alone then is not the change of the model.
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")

_CONVERT = (
    "With the base it was trained on: model.save_pretrained(path, path_initial_model_for_weight_conversion=...) in "
    "PEFT writes a plain adapter."
)


def check(where: str, config: Mapping[str, Any]) -> None:
    """Refuse a config under which the arrays would not mean `W + scale·B·A`, or what its kind makes of that.

    Raises:
      CheckpointError: it is of another kind, belongs to a base with other weights, or uses an unknown variant.
    """
    if str(config.get("peft_type", "LORA")).upper() not in KINDS:
        raise CheckpointError(
            f"{where}: peft_type={config['peft_type']!r} cannot be read; possible: {', '.join(KINDS)}. If PEFT "
            "can convert it (peft.save_as_lora), the result can."
        )
    kind = kind_of(config)
    for field, reason in _VARIANTS.items():
        if config.get(field):
            raise CheckpointError(f"{where}: {field} is set, and {reason}. Such an adapter cannot be represented here.")
    unknown = sorted(field for field in config.keys() - _NEUTRAL - kind.fields - _VARIANTS.keys() if config[field])
    if unknown:
        raise CheckpointError(
            f"{where}: {', '.join(f'{field}={config[field]!r}' for field in unknown)} is nothing this version knows, "
            "and it may change what the arrays mean. Remove the field if you know that it does not."
        )
    if config.get("alora_invocation_tokens") and (
        kind is not LORA or config.get("use_dora") or config.get("lora_bias")
    ):
        raise CheckpointError(f"{where}: alora_invocation_tokens go with plain LoRA only, without DoRA and biases on B")
    _check_init(where, config.get("init_lora_weights", True))
    check_types(where, config, masks=kind is ADALORA)
    if kind is ADALORA:
        _check_adalora(where, config)


def _check_adalora(where: str, config: Mapping[str, Any]) -> None:
    if setting(config, "lora_alpha") <= 0:
        raise CheckpointError(
            f"{where}: lora_alpha={config['lora_alpha']!r} must be positive. PEFT's AdaLoRA takes a rank for it, "
            "which is another one once terms are pruned."
        )
    rank = setting(config, "init_r")
    for key, mask in (config.get("rank_pattern") or {}).items():
        if len(mask) != rank:
            raise CheckpointError(f"{where}: rank_pattern[{key!r}] has {len(mask)} entries, but init_r is {rank}")


def _check_init(where: str, init: Any) -> None:
    name = str(init).lower()
    if name.startswith(_MUTATING):
        raise CheckpointError(
            f"{where}: init_lora_weights={init!r} changes the base's weights when it starts, so the factors alone are "
            f"not the difference to the base you have. {_CONVERT}"
        )
    if name not in _INITS:
        raise CheckpointError(f"{where}: init_lora_weights={init!r} is unknown; possible: true, false, {_INITS[:4]}")


def rank_of(config: Mapping[str, Any], name: str) -> int | None:
    """The rank that a config gives a module or parameter, or None if it says nothing."""
    kind, mask = kind_of(config), mask_of(config, name)
    if mask is not None:
        return sum(mask)
    found = in_pattern(config.get("rank_pattern"), name) if kind is LORA else None
    return config.get(kind.rank) if found is None else found


def alpha_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    """The alpha that a config gives a module or parameter; PEFT's default is 8, and VeRA's is the rank.

    PEFT's AdaLoRA does not look into `alpha_pattern`.
    """
    kind = kind_of(config)
    if kind is VERA:
        return float(rank)
    found = in_pattern(config.get("alpha_pattern"), name) if kind is LORA else None
    return float(setting(config, "lora_alpha") if found is None else found)


def scale_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)` under `use_rslora`; AdaLoRA's rank is the one it started from."""
    alpha = alpha_of(config, name, rank)
    if kind_of(config) is ADALORA:
        return alpha / (setting(config, "init_r") + RANK_OFFSET)
    return alpha / (math.sqrt(rank) if setting(config, "use_rslora") else rank)


def setting(config: Mapping[str, Any], field: str) -> Any:
    """A field, or PEFT's default where the file leaves it out."""
    value = config.get(field)
    return _DEFAULTS[field] if value is None else value


def inferred(ranks: Mapping[str, int], saved: list[str]) -> dict[str, Any]:
    """A config for arrays that came without one: the ranks are the arrays', and every scale is 1.

    Args:
      ranks: rank of each module.
      saved: modules stored whole.

    Example:
      >>> config = inferred({"q": 4, "k": 4, "v": 2}, [])
      >>> config["r"], config["lora_alpha"], config["rank_pattern"], config["target_modules"]
      (4, 4, {'^v': 2}, ['k', 'q', 'v'])
    """
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    pattern = {exact_key(name): rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA", "r": common, "lora_alpha": common, "target_modules": sorted(ranks),
        "rank_pattern": pattern, "alpha_pattern": dict(pattern), "modules_to_save": saved or None,
    }  # fmt: skip
