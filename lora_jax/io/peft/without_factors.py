"""Files of PEFT's TRAINABLE_TOKENS and LN_TUNING, which have no factors, as what a LoRA file would say, and back.

Trained rows are its `trainable_token_indices`, and modules that are trained in full its `modules_to_save`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lora_jax.errors import CheckpointError, listed
from lora_jax.io.peft.config import setting
from lora_jax.io.peft.files import TOKEN_ROWS, PeftFiles, full_tensors, token_indices, token_rows
from lora_jax.io.peft.keys import parse
from lora_jax.io.peft.match import saves, targets

_ROWS = re.compile(r"(?P<module>.+?)\.trainable_tokens_delta(?:\.[^.]+)?")
_WHOLE = re.compile(r"(?P<module>.+?)\.ln_tuning_layers\.(?:[^.]+\.)?(?P<leaf>weight|bias)")
_KEYS = {"TRAINABLE_TOKENS": _ROWS, "LN_TUNING": _WHOLE}
_OWN = ("peft_type", "target_modules", "exclude_modules", "token_indices", "init_weights")
"""Fields that only say what was trained, which the keys say too."""
_NOTES = ("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type")
"""Fields of every type."""


class Plain(NamedTuple):
    """A config and arrays by key, as of a LoRA file."""

    config: dict[str, Any]
    arrays: dict[str, np.ndarray]


def has_no_factors(config: Mapping[str, Any] | None) -> bool:
    """Whether a config is of one of these types.

    >>> has_no_factors({"peft_type": "LN_TUNING"}), has_no_factors({"peft_type": "LORA"}), has_no_factors(None)
    (True, False, False)
    """
    return str((config or {}).get("peft_type")).upper() in _KEYS


def as_lora(where: str, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Plain:
    """Say the same as a LoRA file does.

    Raises:
      CheckpointError: the arrays are of another adapter, or not all that the config asks for.

    Example:
      >>> config = {"peft_type": "LN_TUNING", "target_modules": ["norm"]}
      >>> made = as_lora("file", config, {"base_model.model.layers.0.norm.ln_tuning_layers.weight": np.ones(4)})
      >>> made.config["modules_to_save"], list(made.arrays)
      (['layers.0.norm'], ['layers.0.norm.weight'])
    """
    name = str(config["peft_type"]).upper()
    found: dict[str, np.ndarray] = {}
    modules: set[str] = set()
    for raw, array in arrays.items():
        key = parse(where, raw)
        match = _KEYS[name].fullmatch(key.name) if key.part is None else None
        if key.part not in (None, "unused"):
            raise CheckpointError(
                f"{where}: {raw} is no key of an adapter of peft_type={name!r}: the two files belong to different ones"
            )
        if match is None:
            found[raw] = array
            continue
        modules.add(match["module"])
        leaf = f".{match['leaf']}" if name == "LN_TUNING" else TOKEN_ROWS
        found[match["module"] + leaf] = array
    _check_targets(where, config.get("target_modules"), modules)
    plain = {field: value for field, value in config.items() if field not in _OWN}
    plain |= {"peft_type": "LORA", "target_modules": [], "bias": "none"}
    if name == "LN_TUNING":
        plain["modules_to_save"] = sorted({*(config.get("modules_to_save") or ()), *modules})
    else:
        plain["trainable_token_indices"] = dict.fromkeys(sorted(modules), config.get("token_indices"))
    return Plain(plain, found)


def as_own_type(files: PeftFiles) -> PeftFiles | None:
    """The same in a type without factors, as PEFT loads no LoRA without any; None if neither type says it.

    Example:
      >>> rows = {"wte.token_adapter.trainable_tokens_delta": np.ones((2, 4))}
      >>> made = as_own_type(PeftFiles({"trainable_token_indices": {"wte": [1, 9]}}, {}, rows))
      >>> made.config["peft_type"], made.config["token_indices"], list(made.saved)
      ('TRAINABLE_TOKENS', [1, 9], ['wte.trainable_tokens_delta'])
    """
    config = files.config
    if files.modules or setting(config, "bias") != "none" or config.get("ensure_weight_tying"):
        return None  # Neither type trains a bias by itself, or ties tables that the model does not,
    if config.get("fan_in_fan_out"):
        return None  # or says how a weight lies.
    rows, whole = token_rows(files.saved), full_tensors(files.saved)
    made = _tokens(files, rows) if not whole else _norms(files, whole) if not rows else None
    if made is None:
        return None
    notes = {field: config[field] for field in _NOTES if config.get(field) is not None}
    return replace(files, config={**notes, **made.config}, saved=made.arrays)


def _tokens(files: PeftFiles, rows: Mapping[str, np.ndarray]) -> Plain | None:
    """Trained rows: PEFT has one list of their numbers for all tables."""
    numbers = {token_indices(files.where, files.config, module, value) for module, value in rows.items()}
    if len(numbers) != 1:
        return None
    config = {"peft_type": "TRAINABLE_TOKENS", "target_modules": sorted(rows), "token_indices": list(*numbers)}
    return Plain(config, {f"{module}.trainable_tokens_delta": value for module, value in rows.items()})


def _norms(files: PeftFiles, whole: Mapping[str, np.ndarray]) -> Plain | None:
    """Whole modules: the norms are what is tuned, the others are saved beside them; without norms, all are tuned."""
    entries = files.config.get("modules_to_save") or ()
    if any(not saves(entries, name) or name.rpartition(".")[2] not in ("weight", "bias") for name in whole):
        return None  # A table that is not trained, or what is no parameter of a norm.
    if not all(any(saves([entry], name) for name in whole) for entry in entries):
        return None  # Something is missing, which the config is to show.
    owners = {name: name.rpartition(".")[0] for name in whole}
    large = {owner for name, owner in owners.items() if whole[name].ndim > 1}
    saved = [entry for entry in entries if any(saves([entry], f"{owner}.weight") for owner in large)]
    tuned = {owner for name, owner in owners.items() if not saves(saved, name)}
    if not tuned:
        saved, tuned = [], {*owners.values()}
    config = {"peft_type": "LN_TUNING", "target_modules": sorted(tuned), "modules_to_save": saved or None}
    named = {name: f"{owner}.ln_tuning_layers{name.removeprefix(owner)}" for name, owner in owners.items()}
    return Plain(config, {named[name] if owners[name] in tuned else name: value for name, value in whole.items()})


def _check_targets(where: str, wanted: Any, modules: set[str]) -> None:
    """Refuse a file that lacks what its config names."""
    entries = wanted if isinstance(wanted, list) else []
    lacking = [entry for entry in entries if not any(targets([str(entry)], module) for module in modules)]
    if lacking or not modules:
        what = listed(lacking) if lacking else "any trained tensor"
        raise CheckpointError(
            f"{where} does not hold {what}, although its config names target_modules={wanted!r}. One of the two files "
            "belongs to another adapter, or is cut short; copy both again."
        )
