"""Experts in a PEFT file as transformers 5 takes them: fused when they are loaded, beside a router."""

import re
from collections.abc import Collection, Mapping

from lora_jax.io.peft.factors import ScaledModule
from lora_jax.io.peft.uniform import leveled

_EXPERT = re.compile(r"(.*\.|)experts\.\d+\.[^.]+")


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


def routers(modules: Collection[str], owners: Collection[str]) -> set[str]:
    """Routers beside stacks of experts: no linear layers of PyTorch's, so that PEFT adapts their weight itself.

    >>> routers({"mlp.router", "router", "mlp.up"}, {"mlp.experts"})
    {'mlp.router'}
    """
    beside = {f"{owner.rpartition('.')[0]}.router" for owner in owners if owner.rpartition(".")[2] == "experts"}
    return beside & {*modules}
