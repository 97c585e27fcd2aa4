"""The fields of PEFT's `LoraConfig` in terms of ours, both ways."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_jax.config.checks import pairs
from lora_jax.errors import ConfigError

# PEFT's name -> ours, where the value means the same.
_SAME = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "use_rslora": "rslora",
    "layers_to_transform": "layers",
    "layers_pattern": "layers_pattern",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "modules_to_save": "train",
    "bias": "bias",
    "lora_bias": "lora_bias",
    "trainable_token_indices": "trainable_tokens",
    "alora_invocation_tokens": "invocation_tokens",
}
_INITS = {"default": True} | {name: name for name in ("gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora")}
# Fields that do not change the arithmetic here: bookkeeping; the layout of a kernel, which the traced program
# tells; tied weights, which are one parameter anyway; settings of features that are refused if used.
_IRRELEVANT = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "fan_in_fan_out",
    "megatron_core",
    "runtime_config",
    "ensure_weight_tying",
    "qalora_group_size",
}


_SWITCHES = ("use_rslora", "lora_bias")
# What a field that is not known here is called where it is about the numbers; PEFT's own have been called so.
_TELLING = re.compile(r"use_.*|.*_config|.*(alpha|rank|scal|lora|layer|bias|target|module).*")


def may_change_numbers(field: str) -> bool:
    """Whether a field that is not known may say that the factors mean something else; it is no note, going by its name.

    >>> may_change_numbers("use_newlora"), may_change_numbers("output_scaling"), may_change_numbers("trained_by")
    (True, True, False)
    """
    return _TELLING.fullmatch(field.lower()) is not None


def warn_of_notes(where: str, fields: Iterable[str]) -> None:
    """Warn of fields that are not known and not looked at."""
    names = ", ".join(sorted(ascii(field) for field in fields))
    if names:
        warnings.warn(f"{where}: {names[:200]}: nothing of PEFT's is called so; taken for a note", stacklevel=2)


def read(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of our `LoraConfig` for those of PEFT's; see `LoraConfig.from_peft`."""
    if not isinstance(fields, Mapping):
        raise ConfigError(
            f"a {type(fields).__name__} is no PEFT config: give the object that adapter_config.json holds"
        )
    if fields.get("peft_type", "LORA") != "LORA":
        raise ConfigError(f"peft_type={fields['peft_type']!r} is not LoRA; only peft_type='LORA' can be read")
    handled = {*_SAME, *_IRRELEVANT, "init_lora_weights", "use_dora"}
    others = {str(name): value for name, value in fields.items() if name not in handled and value}
    active = {name: value for name, value in others.items() if may_change_numbers(name)}
    warn_of_notes("this PEFT config", others.keys() - active.keys())
    if active:
        shown = ", ".join(f"{name}={value!r}" for name, value in active.items())
        raise ConfigError(
            f"This PEFT config uses what LoraConfig does not offer: {shown}. Leaving them out would give "
            "another model; remove them only if that is what you want."
        )
    if not fields.get("target_modules"):
        raise ConfigError(
            "target_modules is not set, and PEFT then goes by the type of a Transformers model; name the modules"
        )
    given = {_SAME[name]: value for name, value in fields.items() if name in _SAME and not _unset(value)}
    given |= {_SAME[name]: bool(fields[name]) for name in _SWITCHES if fields.get(name) in (0, 1)}
    method = "dora" if fields.get("use_dora") else "alora" if fields.get("alora_invocation_tokens") else "lora"
    return {"alpha": 8, "method": method, "init": _init(fields.get("init_lora_weights", True)), **given}


def write(ours: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of PEFT's `LoraConfig` for the fields of ours; see `LoraConfig.to_peft`."""
    if _numbered(ours["init"]) not in _INITS:
        raise ConfigError(f"PEFT has no init={ours['init']!r}; it has {', '.join(_INITS)}")
    if ours["method"] not in ("lora", "dora", "alora"):
        raise ConfigError(f"PEFT's LoraConfig has no method={ours['method']!r}; it has lora, dora and alora")
    if ours["layers"] is not None and isinstance(ours["targets"], str):
        raise ConfigError('PEFT refuses layers_to_transform with "all-linear": give targets as names')
    ranks, alphas = dict(pairs(ours["rank_pattern"])), dict(pairs(ours["alpha_pattern"]))
    if any(isinstance(each, tuple) for each in (*ranks.values(), *alphas.values())):
        raise ConfigError("PEFT has no stacked layers, and no ranks or alphas by layer of a stack: use lora.peft.save")
    alpha = ours["alpha"]
    if alpha is None:
        alpha = 2.0 * ours["rank"]
        # Keys of alpha_pattern stay first, as they win over twice the rank.
        alphas |= {key: 2.0 * rank for key, rank in ranks.items() if key not in alphas}
    fields = {theirs: _plain(ours[name]) for theirs, name in _SAME.items()}
    fields |= {"lora_alpha": alpha, "rank_pattern": _dotted(ranks), "alpha_pattern": _dotted(alphas)}
    fields["trainable_token_indices"] = _tokens(ours["trainable_tokens"])
    fields |= {"peft_type": "LORA", "init_lora_weights": _INITS.get(ours["init"], ours["init"])}
    return fields | {"use_dora": ours["method"] == "dora"}


def _tokens(ours: Any) -> Any:
    """PEFT's `trainable_token_indices`: a list for the only table, else numbers by name."""
    found = {name.replace("/", "."): list(rows) for name, rows in pairs(ours)}
    return found.get("", found) or None


def _init(value: Any) -> str:
    for name, theirs in _INITS.items():
        if value is theirs or (isinstance(value, str) and _numbered(value) == theirs):
            return value if isinstance(value, str) else name
    raise ConfigError(f"init_lora_weights={value!r} is not supported; possible: {list(_INITS.values())}")


def _numbered(name: str) -> str:
    """A name with `N` for the number at its end."""
    return re.sub(r"_\d+$", "_N", name)


def _unset(value: Any) -> bool:
    return value is None or (isinstance(value, Collection) and len(value) == 0)


def _plain(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return [item.replace("/", ".") if isinstance(item, str) else item for item in value] or None


def _dotted(patterns: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("/", "."): value for key, value in patterns.items()}
