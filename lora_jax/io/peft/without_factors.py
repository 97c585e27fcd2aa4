"""Files of PEFT's TRAINABLE_TOKENS and LN_TUNING, which have no factors, as what a LoRA file would say for the same.

Trained rows are its `trainable_token_indices`, and modules that are trained in full its `modules_to_save`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.errors import CheckpointError, listed
from lora_jax.io.peft.files import TOKEN_ROWS
from lora_jax.io.peft.keys import parse
from lora_jax.io.peft.match import targets

_ROWS = re.compile(r"(?P<module>.+?)\.trainable_tokens_delta(?:\.[^.]+)?")
_WHOLE = re.compile(r"(?P<module>.+?)\.ln_tuning_layers\.(?:[^.]+\.)?(?P<leaf>weight|bias)")
_KEYS = {"TRAINABLE_TOKENS": _ROWS, "LN_TUNING": _WHOLE}
_OWN = ("peft_type", "target_modules", "exclude_modules", "token_indices", "init_weights")
"""Fields that only say what was trained, which the keys say too."""


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
