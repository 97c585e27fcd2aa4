"""Experts in a PEFT file as transformers 5 takes them: fused when they are loaded, beside a router."""

import re
from collections.abc import Collection, Mapping, Set

from lora_jax.io.peft.factors import ScaledModule
from lora_jax.io.peft.uniform import leveled

_EXPERT = re.compile(r"(.*\.|)experts\.\d+\.[^.]+")
# What transformers 5 fuses.
_PARTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def fused(made: Mapping[str, ScaledModule]) -> set[str]:
    """Modules that PEFT fuses, or takes for parameters, as transformers does: single experts, and their router.

    >>> sorted(fused(dict.fromkeys(("mlp.experts.0.up_proj", "mlp.gate", "mlp.gate_proj"))))
    ['mlp.experts.0.up_proj', 'mlp.gate']
    """
    owners = {name: found[1] for name in made if (found := _EXPERT.fullmatch(name))}
    return {*owners} | {f"{owner}gate" for owner in {*owners.values()}} & made.keys()


def one_for_experts(made: Mapping[str, ScaledModule]) -> tuple[dict[str, ScaledModule], ScaledModule | None]:
    """The modules with one rank and one scale for experts, and one of those.

    What PEFT fuses of them gets twice the config's `r` and `lora_alpha`, and no pattern reaches it.
    """
    names = fused(made)
    own = {name: each for name, each in made.items() if name in names}
    if len({(each.rank, each.scale) for each in own.values()}) > 1:
        own = leveled(own)
    return {**made, **own}, next(iter(own.values()), None)


def as_parameters(modules: Set[str], owners: Collection[str]) -> set[str]:
    """Modules whose weight PEFT has to adapt as a parameter, by the stacks of experts in the same file.

    Routers beside a stack are no linear layers of PyTorch's. And PEFT takes every linear layer that is called as a part
    of an expert, in layers without experts too, for a part of fused ones.

    >>> sorted(as_parameters({"0.mlp.gate", "0.mlp.up_proj", "gate", "1.mlp.experts.0.up_proj"}, {"0.mlp.experts"}))
    ['0.mlp.gate', '0.mlp.up_proj']
    """
    stacks = {owner.rpartition(".")[0] for owner in owners if owner.rpartition(".")[2] == "experts"}
    singles = {name for name in modules if _EXPERT.fullmatch(name)}
    beside = {f"{stack}.{router}" for stack in stacks for router in ("router", "gate")}
    dense = {name for name in modules - singles if name.rpartition(".")[2] in _PARTS} if stacks or singles else set()
    return (beside & modules) | dense
