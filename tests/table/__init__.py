"""The rows of the shared table: every model with LoRA, and what the other methods add to it."""

from dataclasses import replace

from table import combined, equinox_models, fallbacks, haiku_models, linen_models, nnx_models, plain_ops, plain_programs
from table.registry import CASES as CASES
from table.registry import Case as Case

BROAD = (
    "linen-attention", "linen-conv2d_circular", "linen-scan_of_remat", "nnx-tied_attend", "nnx-scan",
    "plain-ragged_dot", "plain-gathered_experts", "plain-fused_qkv_reshaped", "plain-look_up_then_tied_attend",
    "plain-scan_over_other_axes", "plain-vmapped_ensemble", "plain-used_both_ways", "plain-key_value_2kdh",
)  # fmt: skip
"""Models of every layer and control flow, for methods that change how the engine evaluates."""

NARROW = ("linen-attention", "linen-scan_of_remat", "linen-conv2d_circular", "plain-look_up_then_tied_attend")
"""Models for methods that only make factors differently."""

FEW = ("linen-attention", "plain-scan_over_other_axes")

FULL = {
    "dora": BROAD, "away": NARROW, "dora_away": FEW[1:], "lora-fa": FEW, "lora-xs": FEW, "adalora": FEW, "vera": FEW,
}  # fmt: skip

# DoRA's gain meets every rule of the engine, so every model has a row with it.
CASES += [
    replace(case, method=method, variant=case.id not in names)
    for method, names in FULL.items()
    for case in CASES
    if (case.sites or case.hidden) and (case.id in names or method == "dora")
]


def row(name: str) -> Case:
    """The case of a name, as test reports show it."""
    return next(case for case in CASES if case.id == name)
