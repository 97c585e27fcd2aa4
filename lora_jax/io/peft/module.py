"""The factors of a PEFT module, from the updates of the one parameter or the several that it is made of."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.updates import LowRank
from lora_jax.errors import CheckpointError, ParameterError
from lora_jax.io.names import layouts
from lora_jax.io.names.layouts import ParameterVector
from lora_jax.io.names.names import Target
from lora_jax.io.names.torch_model import TorchModel
from lora_jax.io.peft.concatenate import Piece, concatenate, grouped
from lora_jax.io.peft.delta import Module, ModuleKind
from lora_jax.methods import AdaLora, Dora, Shift
from lora_jax.methods.norms import squares
from lora_jax.paths import bias_beside


class Own(NamedTuple):
    """An update, its arrays as NumPy, and the part of a module that its parameter has.

    Attributes:
      update: its factors; of VeRA, the projections, with `d` for AdaLoRA's values.
      target: the module, and the part of it.
      outputs: `[*batch, *out]`, what the outputs of VeRA are multiplied by.
    """

    update: LowRank
    target: Target
    outputs: np.ndarray | None = None


class Made(NamedTuple):
    """A module, with the rank of a weight and the scale of its product."""

    module: Module
    rank: int
    scale: np.float32


class ModuleMaker:
    """What the modules of one adapter are made with: biases that change too, and the rest of the model."""

    def __init__(self, shifts: Mapping[str, Shift], torch_model: TorchModel, leaves: Mapping[str, Any]):
        self.shifts, self.torch_model, self.leaves = shifts, torch_model, leaves

    def make(self, owned: Sequence[Own]) -> Made | None:
        """A module, from the updates of some or all of its parameters; None where a stack holds nothing."""
        pieces = [piece for own in owned if (piece := _piece(own)) is not None]
        if not pieces:
            return None
        site, target = owned[0].update.site, owned[0].target
        outputs, stacked = target.part.slice, target.parameter
        a, b, scale, values = concatenate(pieces, (outputs.groups, outputs.size), stacked=stacked)
        a, b = layouts.packed(a, b.reshape(*b.shape[:-2], outputs.total), stacked=stacked)
        if site.groups > 1:
            a, b = grouped(a, b, site.groups)
        rank = len(a) // (site.batch_shape[-1] if stacked else 1)
        kinds: dict[str, ModuleKind] = {"conv": "conv", "embedding": "embedding"}
        kind = "parameter" if stacked else kinds.get(site.kind, "linear")
        vectors = self._magnitude(owned, b), self._bias(owned, float(scale)), values, _outputs(owned)
        return Made(Module(kind, a, b, *vectors), rank, np.float32(scale))

    def _magnitude(self, owned: Sequence[Own], b: np.ndarray) -> np.ndarray | None:
        """DoRA's magnitudes. Outputs without an update keep the norms that they have in the base."""
        found = [_magnitudes(own.update, own.target) for own in owned if isinstance(own.update, Dora)]
        if not found:
            return None
        flat = layouts.vector_to_torch([*found, *self._norms(owned)])
        return flat.reshape(1, -1, *b.shape[2:]) if b.ndim > 2 else flat

    def _norms(self, owned: Sequence[Own]) -> list[ParameterVector]:
        """Norms of the columns of those parameters of a module that have no update."""
        target, adapted = owned[0].target, {own.update.site.path for own in owned}
        places = [place for place in self.torch_model.modules.get(target.name, ()) if place.site.path not in adapted]
        found = []
        for site, other in places:
            leaf = self.leaves.get(site.path)
            if leaf is None or isinstance(leaf, jax.ShapeDtypeStruct):
                raise ParameterError(
                    f"{target.name} is one module in PyTorch, and DoRA's magnitudes of its part {site.path!r}, which "
                    "is not adapted, are the norms of the base: pass params=, with arrays"
                )
            norms = np.asarray(jnp.sqrt(squares(site, jnp.asarray(leaf))))[other.index]
            found.append(ParameterVector(site, other.part, norms / np.float32(other.part.gain)))
        if sum(each.target.part.slice.count for each in (*owned, *places)) < target.part.slice.total:
            raise CheckpointError(f"DoRA's magnitudes of {target.name} need all of its parameters: pass sites=")
        return found

    def _bias(self, owned: Sequence[Own], scale: float) -> np.ndarray | None:
        """The bias on B: zeros for a module without, where others have one, as PEFT has one switch for all."""
        if not self.shifts:
            return None
        site, target = owned[0].update.site, owned[0].target
        if target.parameter or site.kind == "embedding":
            raise CheckpointError(f"PEFT has no lora_bias for {target.name}, and one switch for all. Save it apart.")
        return layouts.vector_to_torch([self._shifted(own, scale) for own in owned])

    def _shifted(self, own: Own, scale: float) -> ParameterVector:
        site, target = own.update.site, own.target
        shift = self.shifts.get(bias_beside(site.path, self.shifts) or "")
        if shift is None:
            return ParameterVector(site, target.part, np.zeros(site.sizes(site.out_axes), np.float32))
        value = np.asarray(shift.value[target.index], np.float32)
        own_scale = np.asarray(shift.scale[target.index])
        if not scale and value.any() and own_scale.any():
            raise CheckpointError(f"{shift.site.path!r}: the factors beside it have scale 0, and PEFT has one for both")
        ratio = np.float32(own_scale / np.float32(scale * target.part.gain)) if scale else np.float32(0)
        return ParameterVector(site, target.part, value if ratio == 1 else value * ratio)


def _piece(own: Own) -> Piece | None:
    """Factors of one parameter of a module, in PyTorch's order, or None where a stack holds nothing."""
    if isinstance(own.update, AdaLora):
        return _valued(own, own.update)
    update, target = own.update, own.target
    a, b, scale = (np.asarray(each[target.index], np.float32) for each in (update.a, update.b, update.scale))
    scale = scale / np.float32(target.part.gain)
    if target.parameter:
        # PEFT has one scale for all experts.
        first = scale[np.flatnonzero(scale)[0]] if scale.any() else scale[0]
        ratio = np.where(scale == first, np.float32(1), scale / (first or np.float32(1)))
        b, scale = b * ratio.reshape(-1, *(1,) * (b.ndim - 1)), first
    elif update.site.batch_axes and not isinstance(update, Dora):
        used = [bool(a[term].any() or b[term].any()) for term in range(len(a))]
        if not any(used) and not scale:
            return None
        kept = max((term + 1 for term, any_used in enumerate(used) if any_used), default=1)
        a, b = a[:kept], b[:kept]
    return _laid_out(own, a, b, float(scale))


def _valued(own: Own, update: AdaLora) -> Piece | None:
    """The same of factors with values between them: a pruned term stays where it is, with a value of zero."""
    index, gain = own.target.index, np.float32(own.target.part.gain)
    a, b, scale, values = (
        np.asarray(each[index], np.float32) for each in (update.a, update.b, update.scale, update.values)
    )
    if own.outputs is None:
        if update.site.batch_axes and not (scale or a.any() or b.any()):
            return None
        return _laid_out(own, a, b, float(scale / gain), values)
    if update.site.batch_axes and not (values.any() or own.outputs[index].any()):
        return None
    piece = _laid_out(own, a, b, float(scale), values)
    # Several modules in one parameter: the terms of each are zero for the others.
    kept = piece.b.any((1, 2))
    return piece._replace(a=piece.a[kept], b=piece.b[kept], values=values[kept])


def _laid_out(own: Own, a: np.ndarray, b: np.ndarray, scale: float, values: np.ndarray | None = None) -> Piece:
    site, part = own.update.site, own.target.part
    spread = part.slice.spread(layouts.b_to_torch(site, part, b))
    return Piece(layouts.a_to_torch(site, a), spread, scale, part.slice.index, values)


def _outputs(owned: Sequence[Own]) -> np.ndarray | None:
    """What VeRA multiplies the outputs by."""
    found = [
        ParameterVector(site, target.part, outputs[target.index] / np.float32(target.part.gain))
        for (site, target, outputs) in ((own.update.site, own.target, own.outputs) for own in owned)
        if outputs is not None
    ]
    return layouts.vector_to_torch(found) if found else None


def _magnitudes(update: Dora, target: Target) -> ParameterVector:
    if target.parameter or update.site.groups > 1 or (np.asarray(update.strength) != 1).any():
        kind = "a stack of experts" if target.parameter else "a convolution in groups"
        scaled = not target.parameter and update.site.groups == 1
        why = "PEFT cannot scale DoRA's effect" if scaled else f"PEFT has no DoRA for {kind}"
        raise CheckpointError(f"{update.site.path!r}: {why}. Leave it out, or merge it.")
    own = np.asarray(update.magnitude[target.index], np.float32)
    return ParameterVector(update.site, target.part, own / np.float32(target.part.gain))
