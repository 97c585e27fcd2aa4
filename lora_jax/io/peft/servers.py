"""What programs that serve adapters do with each thing that a PEFT adapter may hold; as of November 2026.

docs/portability.md says where each was read, and what could not be verified.
"""

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Literal

import numpy as np

from lora_jax.io.peft import config as peft_config
from lora_jax.io.peft.config import LORA, peft_type_of
from lora_jax.io.peft.files import PeftFiles, base_tables, full_tensors, token_rows
from lora_jax.io.peft.module import Module
from lora_jax.io.peft.uniform import HEADS
from lora_jax.io.peft.without_factors import as_own_type

Server = Literal["vllm", "sglang", "llama.cpp", "mlx", "peft"]
Verdict = Literal["reads", "misreads", "refuses"]

SERVERS: tuple[Server, ...] = ("vllm", "sglang", "llama.cpp", "mlx", "peft")
"""Programs whose reading is known here, by the names that `lora-jax export --for` takes."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be; 16 is its default."""

Feature = Callable[[PeftFiles], str | None]
"""The first module or tensor that has the feature; empty where the whole adapter has it, None where nothing has."""


def _module(has: Callable[[Module], bool]) -> Feature:
    return lambda files: next((name for name, module in files.modules.items() if has(module)), None)


def _set(*fields: str) -> Feature:
    return lambda files: next((field for field in fields if files.config.get(field)), None)


def _saved(files: PeftFiles) -> str | None:
    others = (name for name in full_tensors(files.saved) if name not in base_tables(files) and not _is_bias(name))
    return next((name for name in others if name.rpartition(".")[0] not in HEADS), None)


def _head(files: PeftFiles) -> str | None:
    return next((name for name in full_tensors(files.saved) if name.rpartition(".")[0] in HEADS), None)


def _bias(files: PeftFiles) -> str | None:
    found = (name for name in files.saved if _is_bias(name) and name.rpartition(".")[0] not in HEADS)
    return next((name for name in found if name.replace(".bias", ".weight") not in files.saved), None)


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def _scaled(flat: Callable[[float, int, int, bool], float]) -> Feature:
    """The first module of which the scale is not what a program takes from `lora_alpha`, own rank, `r` and rsLoRA."""

    def found(files: PeftFiles) -> str | None:
        config = files.config
        if peft_type_of(config) is not LORA:
            return None
        alpha, root = peft_config.setting(config, "lora_alpha"), bool(config.get("use_rslora"))
        plain = [name for name, module in files.modules.items() if module.kind != "parameter"]
        for name in plain:
            taken = flat(alpha, files.rank(name), config.get("r") or files.rank(name), root)
            if np.float32(taken) != np.float32(files.scale(name)):
                return name
        # Scales of stacks of experts are known only with the stack's size.
        stacked = next((name for name in files.modules if name not in plain), None)
        return stacked if root or config.get("rank_pattern") or config.get("alpha_pattern") else None

    return found


def _rank_above(limit: int) -> Feature:
    return lambda files: next(
        (name for name, module in files.modules.items() if module.kind != "parameter" and files.rank(name) > limit),
        None,
    )


FEATURES: Mapping[str, Feature] = {
    "type": lambda files: None if peft_type_of(files.config) is LORA else peft_type_of(files.config).label,
    "own_type": lambda files: None if as_own_type(files) is None else "",
    "empty": lambda files: None if files.modules or as_own_type(files) else "",
    "dora": _module(lambda module: module.magnitude is not None),
    "dora_table": _module(lambda module: module.magnitude is not None and module.kind == "embedding"),
    "lora_bias": _module(lambda module: module.b_bias is not None),
    "own_scale": _scaled(lambda alpha, own, r, root: alpha / own),
    "scale": _scaled(lambda alpha, own, r, root: alpha / r),
    "patterns": _scaled(lambda alpha, own, r, root: alpha / (sqrt(r) if root else r)),
    "alora": _set("alora_invocation_tokens"),
    "saved": _saved,
    "head": _head,
    "bias": _bias,
    "tokens": lambda files: next(iter(token_rows(files.saved)), None),
    "tables": lambda files: next((n for n in base_tables(files) if n.rpartition(".")[0] not in files.modules), None),
    "table": lambda files: next((n for n in base_tables(files) if n.rpartition(".")[0] in files.modules), None),
    "conv": _module(lambda module: module.kind == "conv"),
    "experts": _module(lambda module: module.kind == "parameter"),
    "vllm_rank": _rank_above(VLLM_RANKS[-1]),
}

_MERGE = "merge it into the base (lora-jax merge)"
_FACTORS: tuple[Verdict, str] = ("misreads", f"it takes factors only: {_MERGE}")
_NO_FACTORS: tuple[Verdict, str] = ("refuses", f"it takes factors only: {_MERGE}")
_PLAIN: tuple[Verdict, str] = ("refuses", "it reads plain LoRA only: lora-jax export, or merge it into the base")
_OWN_TYPE: tuple[Verdict, str] = ("refuses", f"it is no LoRA, as it has no factors: {_MERGE}")
_DORA: tuple[Verdict, str] = ("refuses", f"it has no DoRA: {_MERGE}")
_CONV: tuple[Verdict, str] = ("refuses", f"it adapts no convolutions: {_MERGE}")
_BIAS: tuple[Verdict, str] = ("refuses", f"it has no bias on B: {_MERGE}")
_TABLE: tuple[Verdict, str] = ("reads", "it takes the base's own table for the one in the file")
_EXPORT = "lora-jax export makes them one"

KNOWN: Mapping[str, Mapping[Server, tuple[Verdict, str]]] = {
    "type": {"vllm": _PLAIN, "sglang": _PLAIN, "llama.cpp": _PLAIN, "mlx": _PLAIN},
    "own_type": {"vllm": _OWN_TYPE, "sglang": _OWN_TYPE, "llama.cpp": _OWN_TYPE, "mlx": _OWN_TYPE},
    "empty": {"peft": ("refuses", f"its LoRA needs a module with factors, and there is none: {_MERGE}")},
    "dora": {"vllm": _DORA, "sglang": _DORA, "llama.cpp": _DORA},
    "dora_table": {"mlx": ("misreads", f"its DoRA of a table has a magnitude for each row: {_MERGE}")},
    "lora_bias": {"vllm": _BIAS, "sglang": _FACTORS, "llama.cpp": _BIAS, "mlx": _BIAS},
    "own_scale": {"llama.cpp": ("misreads", f"it takes lora_alpha / own rank for every scale: {_EXPORT}")},
    "scale": {"sglang": ("misreads", f"it takes lora_alpha / r for every scale: {_EXPORT}")},
    "patterns": {"vllm": ("misreads", f"versions that know no patterns take one scale for all: {_EXPORT}")},
    "alora": {
        "vllm": ("refuses", "it has no aLoRA"),
        "sglang": ("misreads", "its adapters act on every token"),
        "mlx": ("misreads", "its adapters act on every token"),
    },
    "saved": {
        "vllm": ("refuses", f"of modules_to_save it takes {' and '.join(HEADS)} only: {_MERGE}"),
        "sglang": _FACTORS, "llama.cpp": _NO_FACTORS, "mlx": _NO_FACTORS,
    },
    "head": {"sglang": _FACTORS, "llama.cpp": _NO_FACTORS, "mlx": _NO_FACTORS},
    "bias": {"vllm": _NO_FACTORS, "sglang": _FACTORS, "llama.cpp": _NO_FACTORS, "mlx": _NO_FACTORS},
    "tokens": {"vllm": _NO_FACTORS, "sglang": _FACTORS, "llama.cpp": _NO_FACTORS, "mlx": _NO_FACTORS},
    "tables": {
        "vllm": ("misreads", f"it takes the base's own table for the one in the file: {_MERGE}"),
        "sglang": _FACTORS, "llama.cpp": _NO_FACTORS, "mlx": _NO_FACTORS,
    },
    "table": {"vllm": _TABLE, "sglang": _TABLE, "llama.cpp": _TABLE, "mlx": _TABLE},
    "conv": {"vllm": _CONV, "sglang": _CONV, "llama.cpp": _CONV, "mlx": _CONV},
    "experts": {
        "sglang": ("refuses", f"it takes no factors of target_parameters: {_MERGE}"),
        "llama.cpp": ("refuses", f"it takes no factors of target_parameters: {_MERGE}"),
        "mlx": ("refuses", f"its stacks of experts have other names and parts: {_MERGE}"),
    },
    "vllm_rank": {"vllm": ("refuses", f"it has no ranks above {VLLM_RANKS[-1]}: lora-jax compose --method svd --rank")},
}  # fmt: skip
"""What each program does with each feature; one that is not named reads it as PEFT does."""
