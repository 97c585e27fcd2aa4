"""`adapter_config.json`: checking it, the types of its fields, and what it says of ranks and scales."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from lora_jax import regex
from lora_jax.config.peft_fields import may_change_numbers, warn_of_notes
from lora_jax.errors import CheckpointError, ConfigError
from lora_jax.io.peft.keys import Form
from lora_jax.io.peft.match import exact_key, in_pattern, is_plain

CONFIG = "adapter_config.json"

_MAX_KEYS = 1 << 14
"""Of `rank_pattern` and `alpha_pattern`: modules have one each, at most."""
_MAX_REGEXES = 256
_FLOAT32_MAX = 3.4e38

RANK_OFFSET = 1e-5
"""What PEFT adds to AdaLoRA's rank before it divides alpha by it."""


class PeftType(NamedTuple):
    """What `peft_type` decides.

    Attributes:
      name: the type.
      label: what its authors call it.
      forms: how keys of its factors are spelled.
      parts: what every module has, as fields of `Module`.
      rank: the config's field for the rank of every module.
      dropout: the config's field for dropout.
      only: what `bias` says where the biases of adapted modules alone are trained.
      fields: the config's own fields that the numbers do not depend on, or that are handled.
    """

    name: str
    label: str
    forms: tuple[Form, ...]
    parts: tuple[str, ...]
    rank: str
    dropout: str
    only: str
    fields: frozenset[str] = frozenset()


LORA = PeftType("LORA", "LoRA", ("lora", "embedding"), ("a", "b"), "r", "lora_dropout", "lora_only")
ADALORA = PeftType(
    "ADALORA", "AdaLoRA", ("adalora",), ("a", "b", "values"), "init_r", "lora_dropout", "lora_only",
    frozenset({"init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}),
)  # fmt: skip
VERA = PeftType(
    "VERA", "VeRA", ("vera",), ("a", "b", "values", "outputs"), "r", "vera_dropout", "vera_only",
    frozenset({"projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"}),
)  # fmt: skip

PEFT_TYPES = {each.name: each for each in (LORA, ADALORA, VERA)}

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
_INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false", "none")

_CONVERT = (
    "With the base it was trained on: model.save_pretrained(path, path_initial_model_for_weight_conversion=...) in "
    "PEFT writes a plain adapter."
)


def peft_type_of(config: Mapping[str, Any]) -> PeftType:
    """The type that a config names; LoRA if it names none.

    >>> peft_type_of({"peft_type": "VERA"}).rank, peft_type_of({}).name
    ('r', 'LORA')
    """
    return PEFT_TYPES[str(config.get("peft_type", "LORA")).upper()]


def mask_of(config: Mapping[str, Any], module: str) -> list[bool] | None:
    """Which of AdaLoRA's first terms a module has kept, or None if nothing was pruned.

    >>> mask_of({"peft_type": "ADALORA", "rank_pattern": {"up.lora_E": [True, False]}}, "up")
    [True, False]
    """
    return (config.get("rank_pattern") or {}).get(f"{module}.lora_E") if peft_type_of(config) is ADALORA else None


def check(where: str, config: Mapping[str, Any]) -> None:
    """Refuse a config under which the arrays would not mean `W + scale·B·A`, or what its `peft_type` makes of that.

    Raises:
      CheckpointError: its `peft_type` is another, it belongs to a base with other weights, or uses an unknown variant.
    """
    if str(config.get("peft_type", "LORA")).upper() not in PEFT_TYPES:
        raise CheckpointError(
            f"{where}: peft_type={config['peft_type']!r} cannot be read; possible: {', '.join(PEFT_TYPES)}, "
            "TRAINABLE_TOKENS, LN_TUNING. If PEFT "
            "can convert it (peft.save_as_lora), the result can."
        )
    peft_type = peft_type_of(config)
    for field, reason in _VARIANTS.items():
        if config.get(field):
            raise CheckpointError(f"{where}: {field} is set, and {reason}. Such an adapter cannot be represented here.")
    others = {field for field in config.keys() - _NEUTRAL - peft_type.fields - _VARIANTS.keys() if config[field]}
    unknown = sorted(filter(may_change_numbers, others))
    warn_of_notes(where, others.difference(unknown))
    if unknown:
        shown = ", ".join(f"{field}={_shown(config[field])}" for field in unknown)
        raise CheckpointError(
            f"{where}: {shown} is nothing this version knows, "
            "and it may change what the arrays mean. Remove the field if you know that it does not."
        )
    if config.get("alora_invocation_tokens") and (
        peft_type is not LORA or config.get("use_dora") or config.get("lora_bias")
    ):
        raise CheckpointError(f"{where}: alora_invocation_tokens go with plain LoRA only, without DoRA and biases on B")
    _check_init(where, config.get("init_lora_weights", True))
    check_types(where, config, masks=peft_type is ADALORA)
    if peft_type is ADALORA:
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
        raise CheckpointError(
            f"{where}: init_lora_weights={init!r} is unknown; possible: true, false, null, {', '.join(_INITS[:4])}"
        )


def rank_of(config: Mapping[str, Any], name: str) -> int | None:
    """The rank that a config gives a module or parameter, or None if it says nothing."""
    peft_type, mask = peft_type_of(config), mask_of(config, name)
    if mask is not None:
        return sum(mask)
    found = in_pattern(config.get("rank_pattern"), name) if peft_type is LORA else None
    return config.get(peft_type.rank) if found is None else found


def alpha_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    """The alpha that a config gives a module or parameter; PEFT's default is 8, and VeRA's is the rank.

    PEFT's AdaLoRA does not look into `alpha_pattern`.
    """
    peft_type = peft_type_of(config)
    if peft_type is VERA:
        return float(rank)
    found = in_pattern(config.get("alpha_pattern"), name) if peft_type is LORA else None
    return float(setting(config, "lora_alpha") if found is None else found)


def scale_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)` under `use_rslora`; AdaLoRA's rank is the one it started from."""
    alpha = alpha_of(config, name, rank)
    if peft_type_of(config) is ADALORA:
        return alpha / (setting(config, "init_r") + RANK_OFFSET)
    return alpha / (math.sqrt(rank) if setting(config, "use_rslora") else rank)


def setting(config: Mapping[str, Any], field: str) -> Any:
    """A field, or PEFT's default where the file leaves it out."""
    value = config.get(field)
    return _DEFAULTS[field] if value is None else value


def inferred(
    ranks: Mapping[str, int], saved: list[str], scales: Mapping[str, float] = MappingProxyType({})
) -> dict[str, Any]:
    """A config for arrays that came without one: the ranks are the arrays'.

    Args:
      ranks: rank of each module.
      saved: modules stored whole.
      scales: of each module; 1 for those that it leaves out.

    Example:
      >>> config = inferred({"q": 4, "k": 4, "v": 2}, [])
      >>> config["r"], config["lora_alpha"], config["rank_pattern"], config["target_modules"]
      (4, 4, {'^v': 2}, ['k', 'q', 'v'])
    """
    alphas = {name: scales[name] * rank if name in scales else rank for name, rank in ranks.items()}
    common, alpha = (Counter(each.values()).most_common(1)[0][0] if ranks else 8 for each in (ranks, alphas))
    return {
        "peft_type": "LORA", "r": common, "lora_alpha": alpha, "target_modules": sorted(ranks),
        "rank_pattern": {exact_key(name): rank for name, rank in ranks.items() if rank != common},
        "alpha_pattern": {exact_key(name): each for name, each in alphas.items() if each != alpha},
        "modules_to_save": saved or None,
    }  # fmt: skip


def check_types(where: str, config: Mapping[str, Any], *, masks: bool = False) -> None:
    """Refuse fields that are not what PEFT writes there; absent ones and null are fine.

    Args:
      where: the file, for error messages.
      config: what it says.
      masks: whether `rank_pattern` has lists of booleans and not ranks, as AdaLoRA has.

    Raises:
      CheckpointError: a field has another type, is out of range, or is no regular expression (of the supported ones)
        where one belongs.
    """
    for field, (needs, holds) in _FIELDS.items():
        value = config.get(field)
        if value is not None and not holds(value):
            raise CheckpointError(f"{where}: {field}={_shown(value)} must be {needs}")
    for field in ("target_modules", "exclude_modules"):
        if isinstance(value := config.get(field), str):
            _check_regex(f"{where}: {field}", value)
    for field, (needs, holds) in (_PATTERNS | ({"rank_pattern": _MASK} if masks else {})).items():
        _check_keys(f"{where}: {field}", config.get(field) or {})
        for key, value in (config.get(field) or {}).items():
            if not holds(value):
                raise CheckpointError(f"{where}: {field}[{_shown(key)}]={_shown(value)} must be {needs}")


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _is_number(value: Any) -> bool:
    # An int may be larger than any float.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -_FLOAT32_MAX < value < _FLOAT32_MAX and math.isfinite(value)


def _check_keys(where: str, keys: Collection[str]) -> None:
    """Refuse keys that are no regular expressions, and more of them than could be matched in a moment."""
    expressions = [key for key in keys if not is_plain(key)]
    for count, most, what in ((len(keys), _MAX_KEYS, "keys"), (len(expressions), _MAX_REGEXES, "regular expressions")):
        if count > most:
            raise CheckpointError(
                f"{where} has {count:,d} {what}, more than the {most:,d} that are believable: matching every module "
                "with them would take too long. Give the names of modules, which are fast, or fewer."
            )
    for key in expressions:
        _check_regex(where, key)


def _check_regex(where: str, text: str) -> None:
    try:
        regex.check(text)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_mask(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, bool) for each in value)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in value)


def _are_rows(value: Any) -> bool:
    return all(map(_are_tokens, value.values())) if isinstance(value, dict) else _are_tokens(value)


def _are_targets(value: Any) -> bool:
    return _are_names(value) or isinstance(value, str)


def _is_a(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


_RANK = "a positive integer", _is_rank
_MASK = "a list of true and false", _is_mask
_NUMBER = "a finite number", _is_number
_NAMES = "a list of names", _are_names
_TARGETS = "a list of names, or one regular expression", _are_targets
_BOOL = "true or false", lambda value: not isinstance(value, (str, list, dict)) and value in (0, 1)

_PROBABILITY = "a probability below 1", lambda value: _is_number(value) and 0 <= value < 1

_PATTERNS = {"rank_pattern": _RANK, "alpha_pattern": _NUMBER}
_BIASES = ("none", "all", "lora_only", "vera_only")
_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "r": _RANK,
    "lora_alpha": _NUMBER,
    "init_r": _RANK,
    "lora_dropout": _PROBABILITY,
    "vera_dropout": _PROBABILITY,
    "projection_prng_key": ("an integer", _is_a(int)),
    "rank_pattern": ("an object", _is_a(dict)),
    "alpha_pattern": ("an object", _is_a(dict)),
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "target_parameters": _NAMES,
    "modules_to_save": _NAMES,
    "bias": ("one of none, all, lora_only, vera_only", lambda value: value in _BIASES),
    "use_rslora": _BOOL,
    "use_dora": _BOOL,
    "fan_in_fan_out": _BOOL,
    "lora_bias": _BOOL,
    "ensure_weight_tying": _BOOL,
    "alora_invocation_tokens": ("a list of token numbers", _are_tokens),
    "trainable_token_indices": ("a list of token numbers, or one for each name of a table", _are_rows),
}
