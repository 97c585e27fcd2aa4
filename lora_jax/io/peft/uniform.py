"""One rank and one scale for all modules of a PEFT file: for programs that read `lora_alpha / rank` and no patterns."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import lcm

import numpy as np

from lora_jax.errors import CheckpointError
from lora_jax.io.peft.config import ADALORA, LORA, VERA, peft_type_of
from lora_jax.io.peft.factors import ScaledModule
from lora_jax.io.peft.files import PeftFiles
from lora_jax.io.peft.module import Module
from lora_jax.io.peft.peft_type import lora_fields, shortest_alpha

HEADS = ("classifier", "score")
"""Heads that vLLM takes from `modules_to_save`, by exactly these names."""

_OWN = ("rank_pattern", "alpha_pattern", "use_rslora")
"""What gives modules ranks and scales of their own."""


def uniform(files: PeftFiles) -> PeftFiles:
    """The same adapter with one rank, one `lora_alpha`, and neither patterns nor rsLoRA.

    Lower ranks are padded with zeros. Scales that differ from the most frequent one are folded into B, which then is
    float32 and rounded once; modules that have that scale keep their numbers bit for bit. `lora_alpha` is an integer.

    Args:
      files: plain LoRA, DoRA, or AdaLoRA, of which this makes plain LoRA. Left as it is.

    Raises:
      CheckpointError: it is VeRA, or adapts stacks of experts, of which a file does not tell the number, with ranks or
        scales of their own.

    Example:
      >>> one, two = (Module("linear", np.ones((r, 4), np.float32), np.ones((3, r), np.float32)) for r in (1, 2))
      >>> config = {"r": 2, "lora_alpha": 4, "rank_pattern": {"k": 1}, "target_modules": ["q", "k"]}
      >>> made = uniform(PeftFiles(config, {"q": two, "k": one}))
      >>> made.config["r"], made.config["lora_alpha"], made.modules["k"].b[0].tolist(), made.modules["q"].b[0].tolist()
      (2, 8, [1.0, 0.0], [0.5, 0.5])
    """
    if not can_be_uniform(files):
        vera = peft_type_of(files.config) is VERA
        what = "is VeRA, whose" if vera else f"has a stack of experts ({_stacked(files)}), and"
        raise CheckpointError(
            f"{files.where} {what} files do not tell every size, so ranks and scales cannot be made one. Load it "
            "into its model and save it from there: lora_jax.peft.save(..., uniform=True)."
        )
    if _stacked(files) is not None:
        return files
    made = {
        name: ScaledModule(_plain(module), files.rank(name), np.float32(files.scale(name)))
        for name, module in files.modules.items()
    }
    level = leveled(made)
    config = {field: value for field, value in files.config.items() if field not in ADALORA.fields}
    wanted = config.get("target_modules")
    config |= {
        "peft_type": LORA.name,
        **lora_fields(level).fields,
        "use_rslora": False,
        "target_modules": sorted(files.modules) if isinstance(wanted, str) else wanted,
        "modules_to_save": short_heads(config.get("modules_to_save") or (), files),
    }
    return replace(files, config=config, modules={name: each.module for name, each in level.items()})


def can_be_uniform(files: PeftFiles) -> bool:
    """Whether `uniform` makes anything of the files: not of VeRA, nor of experts that are not all alike already."""
    alike = not any(files.config.get(field) for field in _OWN)
    return peft_type_of(files.config) is not VERA and (alike or _stacked(files) is None)


def _stacked(files: PeftFiles) -> str | None:
    return next((name for name, module in files.modules.items() if module.kind == "parameter"), None)


def leveled(made: Mapping[str, ScaledModule]) -> dict[str, ScaledModule]:
    """Modules that do the same with one rank and one scale.

    >>> one, two = (ScaledModule(Module("linear", np.ones((1, 3)), np.ones((2, 1))), 1, np.float32(s)) for s in (2, 3))
    >>> found = leveled({"q": one, "k": one, "v": two})
    >>> found["v"].scale, found["v"].module.b.tolist(), found["q"].module.b.dtype
    (np.float32(2.0), [[1.5], [1.5]], dtype('float64'))
    """
    groups = lcm(*(_groups(each.module) for each in made.values()))
    rank = -(-max([1, *(each.rank for each in made.values())]) // groups) * groups
    scale = _common([each.scale for each in made.values()], rank)
    return {
        name: ScaledModule(_padded(_folded(each.module, each.scale, scale), each.rank, rank), rank, scale)
        for name, each in made.items()
    }


def short_heads(wanted: Iterable[str], files: PeftFiles) -> list[str] | None:
    """`modules_to_save` with heads of classifiers by their last name, where nothing else in the file ends so."""
    owners = {name.rpartition(".")[0] for name in files.saved} | {*files.modules}
    found = []
    for entry in wanted:
        last = entry.rpartition(".")[2]
        alone = not any(owner.endswith(last) for owner in owners if not f"{owner}.".startswith(f"{entry}."))
        found.append(last if last in HEADS and alone else entry)
    return sorted(found) or None


def _plain(module: Module) -> Module:
    return module if module.values is None else module.plain(len(module.b) * module.a.shape[1])


def _common(scales: Iterable[np.float32], rank: int) -> np.float32:
    """The most frequent scale, the largest of several, that an integer divided by the rank is; else 1."""
    whole = Counter(scale for scale in scales if scale and float(shortest_alpha(scale, rank)).is_integer())
    return max(whole, key=lambda scale: (whole[scale], abs(scale)), default=np.float32(1))


def _folded(module: Module, own: np.float32, common: np.float32) -> Module:
    """The module with its own scale in B, and in the bias on B, which PEFT scales too."""
    if own == common:
        return module
    ratio = float(own) / float(common)
    with np.errstate(over="ignore"):  # Infinity is refused when it is written.
        b = (module.b.astype(np.float64) * ratio).astype(np.float32)
        bias = None if module.b_bias is None else (module.b_bias.astype(np.float64) * ratio).astype(np.float32)
    return replace(module, b=b, b_bias=bias)


def _groups(module: Module) -> int:
    """How many groups of input channels share a rank."""
    return len(module.a) // module.b.shape[1] if module.kind == "conv" else 1


def _padded(module: Module, own: int, rank: int) -> Module:
    """The module with zeros for the terms that it lacks, in every group of channels or every expert."""
    if own == rank:
        return module
    a, b = module.a, module.b
    if module.kind == "parameter":
        stacks = len(a) // own
        a, b = a.reshape(stacks, own, -1), b.reshape(len(b), own, stacks)
        a, b = _wider(a, rank - own), _wider(b, rank - own)
        return replace(module, a=a.reshape(stacks * rank, -1), b=b.reshape(len(b), -1))
    groups = _groups(module)
    lacking = (rank - own) // groups
    wide = _wider(a.reshape(groups, own // groups, *a.shape[1:]), lacking)
    return replace(module, a=wide.reshape(rank, *a.shape[1:]), b=_wider(b, lacking))


def _wider(array: np.ndarray, zeros: int) -> np.ndarray:
    """The array with zeros at the end of its second axis."""
    return np.pad(array, [(0, 0), (0, zeros), *[(0, 0)] * (array.ndim - 2)])
