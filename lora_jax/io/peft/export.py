"""Which kind of file an adapter becomes, and its updates as that kind holds them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.updates import Array, LowRank, Replace, Update, times
from lora_jax.errors import CheckpointError
from lora_jax.io.peft.kinds import ADALORA, LORA, VERA, Kind
from lora_jax.methods import AdaLora, ALora, Dora, Shift, Vera


class Exported(NamedTuple):
    """Factors, and what VeRA multiplies their outputs by, `[*batch, *out]`."""

    factors: LowRank
    outputs: Array | None = None


def kinds_for(adapter: Adapter) -> tuple[Kind, ...]:
    """Kinds of file that can hold the adapter, the first that turns out to fit: its method's own, or plain LoRA.

    PEFT's VeRA has linear layers only, and neither biases on B nor trained tokens.
    """
    factors = [update for update in adapter.values() if not isinstance(update, Replace)]
    if any(isinstance(update, AdaLora) for update in factors):
        return (ADALORA,)
    vera = all(isinstance(update, Vera) and update.site.kind == "dense" for update in factors)
    return (VERA, LORA) if vera and factors else (LORA,)


def exported(update: Update, kind: Kind) -> Exported | None:
    """The update in a file of that kind: plain factors, with the magnitude if it is DoRA; None if there are none."""
    if kind is ADALORA and isinstance(update, AdaLora):
        return Exported(update)
    if kind is VERA and isinstance(update, Vera):
        return _vera(update)
    factors = update.low_rank()
    if factors is None or not isinstance(update, (Dora, ALora)):
        return None if factors is None else Exported(factors)
    return Exported(replace(update, a=factors.a, b=factors.b, a_start=None, b_start=None))


def _vera(update: Vera) -> Exported:
    """AdaLoRA's form of it, `d` for the values; PEFT has no scale, so that the outputs' numbers carry it."""
    batch = update.site.batch_shape
    a, b = (jnp.broadcast_to(each, (*batch, *each.shape)) for each in update.projections())
    factors = AdaLora(a, b, jnp.ones_like(update.scale), update.site, update.dropout, values=update.d)
    return Exported(factors, times(update.scale, update.b))


def check_alike(adapter: Adapter, low_rank: Mapping[str, LowRank], kind: Kind) -> None:
    """Refuse updates that are not for one file: its kind is one for all, and so are the switches of DoRA and aLoRA.

    Raises:
      CheckpointError: updates are of several methods, or AdaLoRA is where PEFT has none.
    """
    switches = {ADALORA: {AdaLora: "AdaLoRA"}, LORA: {Dora: "DoRA", ALora: "aLoRA"}, VERA: {}}[kind]
    for method, name in switches.items():
        plain = [path for path, update in low_rank.items() if not isinstance(update, method)]
        if plain and len(plain) < len(low_rank):
            hint = " To have plain factors everywhere: lora.methods.trim(adapter)." if kind is ADALORA else ""
            raise CheckpointError(
                f"Some updates are {name} and others ({plain[0]!r}) are not, and PEFT has one switch for all. Save "
                f"them apart: adapter.without(...).{hint}"
            )
    if len(sequences := {update.invocation_tokens for update in low_rank.values() if isinstance(update, ALora)}) > 1:
        raise CheckpointError(f"Updates have different invocation tokens, {sorted(sequences)}: save them apart")
    for path, update in adapter.items() if kind is ADALORA else ():
        reason = _not_in_adalora(update)
        if reason is not None:
            raise no_adalora(path, reason)


def invocation(low_rank: Mapping[str, LowRank]) -> list[int] | None:
    """The sequence after which the factors act, or None if they always do."""
    found = (list(update.invocation_tokens) for update in low_rank.values() if isinstance(update, ALora))
    return next(found, None)


def _not_in_adalora(update: Update) -> str | None:
    site = update.site
    if isinstance(update, Shift):
        return "a bias on B"
    if not isinstance(update, AdaLora) or site.kind == "dense":
        return None
    if site.kind == "conv" and site.groups == 1:
        window = len(site.in_axes) - 1
        return None if window == 2 else f"a convolution along {window} axes"
    return "a convolution in groups" if site.kind == "conv" else f"of kind {site.kind!r}"


def no_adalora(path: str, reason: str) -> CheckpointError:
    """The error for an update that PEFT's AdaLoRA has no place for."""
    return CheckpointError(
        f"PEFT's AdaLoRA has linear layers and convolutions along two axes only, and {path!r} is {reason}. "
        "lora.methods.trim(adapter) makes the plain factors that do the same, and PEFT has a place for those."
    )
