"""The kinds of adapter that are read and written, PEFT's `peft_type`, and what each decides about its files."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_jax.io.peft.keys import Form

RANK_OFFSET = 1e-5
"""What PEFT adds to AdaLoRA's rank before it divides alpha by it."""


class Kind(NamedTuple):
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


LORA = Kind("LORA", "LoRA", ("lora", "embedding"), ("a", "b"), "r", "lora_dropout", "lora_only")
ADALORA = Kind(
    "ADALORA", "AdaLoRA", ("adalora",), ("a", "b", "values"), "init_r", "lora_dropout", "lora_only",
    frozenset({"init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}),
)  # fmt: skip
VERA = Kind(
    "VERA", "VeRA", ("vera",), ("a", "b", "values", "outputs"), "r", "vera_dropout", "vera_only",
    frozenset({"projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"}),
)  # fmt: skip

KINDS = {kind.name: kind for kind in (LORA, ADALORA, VERA)}


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The kind that a config names; LoRA if it names none.

    >>> kind_of({"peft_type": "VERA"}).rank, kind_of({}).name
    ('r', 'LORA')
    """
    return KINDS[str(config.get("peft_type", "LORA")).upper()]


def mask_of(config: Mapping[str, Any], module: str) -> list[bool] | None:
    """Which of AdaLoRA's first terms a module has kept, or None if nothing was pruned.

    >>> mask_of({"peft_type": "ADALORA", "rank_pattern": {"up.lora_E": [True, False]}}, "up")
    [True, False]
    """
    return (config.get("rank_pattern") or {}).get(f"{module}.lora_E") if kind_of(config) is ADALORA else None
