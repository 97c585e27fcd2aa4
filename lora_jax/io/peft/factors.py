"""LoRA factors between the updates of JAX parameters and the modules of a PEFT file, both ways."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.site import Site, full_site
from lora_jax.adapter.updates import LowRank, Update
from lora_jax.errors import CheckpointError, ParameterError
from lora_jax.io.names import layouts
from lora_jax.io.names.layouts import ModuleVector, ParameterVector
from lora_jax.io.names.names import Target
from lora_jax.io.names.torch_model import Place, TorchModel
from lora_jax.io.peft.concatenate import Concatenated, Piece, Stacked, concatenate, grouped, stack, ungrouped
from lora_jax.io.peft.module import Module, ModuleKind
from lora_jax.methods import AdaLora, Dora, Shift, Vera
from lora_jax.methods.dora import squares
from lora_jax.paths import bias_beside

EMPTY: Mapping[str, Update] = {}


class ModulePart(NamedTuple):
    """What a module holds for one weight of a parameter, or one stack of experts."""

    target: Target
    piece: Piece
    magnitude: ModuleVector | None
    bias: ModuleVector | None
    outputs: ModuleVector | None


class FactorsReader:
    """From the modules of one file to updates: with the base's parameters, the file's dropout, and VeRA's seed.

    Where the parameters are abstract, DoRA's norms are another adapter's for the same base, by path.
    """

    def __init__(
        self, where: str, leaves: Mapping[str, Any], dropout: float, seed: int, like: Mapping[str, Update] = EMPTY
    ):
        self.where, self.leaves, self.dropout, self.seed, self.like = where, leaves, dropout, seed, like

    def part(self, name: str, place: Place, module: Module, scale: float) -> ModulePart | None:
        """What a module holds for a parameter; None if that is nothing but zeros."""
        (site, target), experts = place, place.site.batch_shape[-1] if place.target.parameter else 0
        a, b = (array.astype(np.float32) for array in (module.a, module.b))
        a, b = ungrouped(f"{self.where}: {name}", a, b, site.groups) if site.groups > 1 else (a, b)
        a, b = layouts.unpacked(a, b, experts=experts)
        values = None if module.values is None else module.values.astype(np.float32)
        vectors = (module.magnitude, module.b_bias, module.outputs)
        magnitude, bias, outputs = (self._vector(name, place, each) for each in vectors)
        if magnitude is None and outputs is None and target.part.slice.is_fused:
            used = _used(target, b)
            if not used.any() and (bias is None or not bias.value.any()):
                return None
            kept = used if used.any() else slice(None)
            a, b = (np.moveaxis(np.moveaxis(each, -2, 0)[kept], 0, -2) for each in (a, b))
            values = None if values is None else values[kept]
        a, b = layouts.a_from_torch(site, a), layouts.b_from_torch(site, target.part, target.part.slice.take(b))
        # VeRA's projections stay as they are: what the parameter is multiplied by goes into the outputs' numbers.
        scale = scale if outputs is not None else scale * target.part.gain
        piece = Piece(a, b, scale, layouts.part_index(site, target.part), values)
        return ModulePart(target, piece, magnitude, bias, outputs)

    def _vector(self, name: str, place: Place, vector: np.ndarray | None) -> ModuleVector | None:
        """The place's share of a vector with a number for each output."""
        if vector is None:
            return None
        site, target = place
        if target.parameter or vector.size != target.part.slice.total:
            raise CheckpointError(
                f"{self.where}: {name} has a vector of {vector.size} numbers for its outputs (DoRA magnitudes, a bias "
                f"on B or VeRA's), which does not fit {site.path!r} with {target.part.slice.total}"
            )
        return layouts.vector_from_torch(site, target, vector)

    def update(self, site: Site, parts: Sequence[ModulePart]) -> LowRank | Vera:
        """Low-rank factors, or what the file's `peft_type` has instead, of all parts of a parameter."""
        by_index: dict[tuple[int, ...], list[Piece]] = {}
        for each in parts:
            by_index.setdefault(each.target.index, []).append(each.piece)
        out, experts = site.sizes(site.out_axes), parts[0].target.parameter
        joined = {index: concatenate(pieces, out, stacked=experts) for index, pieces in by_index.items()}
        stacked = stack(site, joined)
        if parts[0].outputs is not None:
            return self._vera(site, parts, joined, stacked)
        a, b, scale = (jax.device_put(each) for each in (stacked.a, stacked.b, stacked.scale))
        if stacked.values is not None:
            return AdaLora(a, b, scale, site, self.dropout, values=jax.device_put(stacked.values))
        factors = LowRank(a, b, scale, site, self.dropout)
        shares = [each.magnitude for each in parts if each.magnitude is not None]
        if not shares:
            return factors
        if len(shares) < len(parts):
            raise CheckpointError(
                f"{self.where}: only some of the modules that {site.path!r} is made of have DoRA magnitudes"
            )
        return self._dora(factors, shares)

    def _dora(self, factors: LowRank, shares: Sequence[ModuleVector]) -> Dora:
        """Columns that the file says nothing about keep the length they have."""
        leaf, site = self.leaves[factors.site.path], factors.site
        known = self.like.get(site.path)
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            update = Dora.around(factors, jnp.asarray(leaf))
        elif isinstance(known, Dora):
            update = Dora.beside(factors, known.base_squares)
        else:
            raise CheckpointError(
                f"{self.where} has DoRA magnitudes for {site.path!r}, whose effect depends on the base's value, "
                "and abstract parameters have none: pass arrays. For lora-jax convert, give a DoRA adapter of the same "
                "base as --like, which has its norms."
            )
        magnitude = np.array(update.magnitude)
        layouts.fill_vector(
            magnitude, site, [ModuleVector(to, value * np.float32(to.part.gain)) for to, value in shares]
        )
        return replace(update, magnitude=jax.device_put(magnitude))

    def _vera(
        self, site: Site, parts: Sequence[ModulePart], joined: Mapping[tuple[int, ...], Concatenated], stacked: Stacked
    ) -> Vera:
        """Weights that the file leaves out have vectors of zeros."""
        first, *others = joined.values()
        if not all(np.array_equal(first.a, each.a) and np.array_equal(first.b, each.b) for each in others):
            raise CheckpointError(
                f"{self.where} adapts other parts of some layers of {site.path!r} than of others, and all layers of a "
                "stack have the same projections here: leave the layers unstacked"
            )
        b = np.zeros(site.batch_shape + site.sizes(site.out_axes), np.float32)
        shares = [each.outputs for each in parts if each.outputs is not None]
        layouts.fill_vector(b, site, [ModuleVector(to, value * np.float32(to.part.gain)) for to, value in shares])
        d, b, scale, *pair = (jax.device_put(each) for each in (stacked.values, b, stacked.scale, first.a, first.b))
        return Vera(d, b, scale, site, self.seed, self.dropout, *pair)

    def shift(self, site: Site, parts: Sequence[ModulePart]) -> list[Shift]:
        """What biases on B add to the bias beside a site; where there is none, they must be zero."""
        given = [(each.piece.scale, each.bias) for each in parts if each.bias is not None]
        path = bias_beside(site.path, self.leaves)
        shape = site.batch_shape + site.sizes(site.out_axes)
        fits = path is not None and np.shape(self.leaves[path]) == shape
        if not given or (not fits and not any(share.value.any() for _, share in given)):
            return []
        if path is None or not fits:
            has = "no bias beside it" if path is None else f"{path!r} of shape {np.shape(self.leaves[path])} beside it"
            raise CheckpointError(
                f"{self.where} has a bias on B (lora_bias) for {site.path!r}, which has {has} instead of one of "
                f"shape {shape} to add it to. PEFT cannot merge such an adapter either."
            )
        value, scale = np.zeros(shape, np.float32), np.zeros(site.batch_shape, np.float32)
        for own, share in given:
            # The largest, so that the others become factors below one, as for B.
            scale[share.target.index] = max(scale[share.target.index], own, key=abs)
        for own, (target, vector) in given:
            layouts.fill_vector(
                value, site, [ModuleVector(target, vector * np.float32(own / (scale[target.index] or 1)))]
            )
        return [Shift(jax.device_put(value), jax.device_put(scale), full_site(path, self.leaves[path]))]


def _used(target: Target, b: np.ndarray) -> np.ndarray:
    """Which terms are a parameter's own: those that are zero for it and not for others are another's.

    So factors of several parameters that were written as one module, with zeros in B, come back as they were.
    """
    outputs = target.part.slice
    groups = np.abs(outputs.grouped(b, outputs.size)).max(-2)
    own, others = groups[..., outputs.start : outputs.stop], np.delete(groups, np.s_[outputs.start : outputs.stop], -1)
    own, others = (each.any(-1).reshape(-1, b.shape[-2]).any(0) for each in (own, others))
    return own | ~others


class Source(NamedTuple):
    """An update, its arrays as NumPy, and the part of a module that its parameter has.

    Attributes:
      update: its factors; of VeRA, the projections, with `d` for AdaLoRA's values.
      target: the module, and the part of it.
      outputs: `[*batch, *out]`, what the outputs of VeRA are multiplied by.
    """

    update: LowRank
    target: Target
    outputs: np.ndarray | None = None


class ScaledModule(NamedTuple):
    """A module, with the rank of a weight and the scale of the product of its factors."""

    module: Module
    rank: int
    scale: np.float32


class FactorsWriter:
    """From the updates of one adapter to modules: with the biases that change too, and the rest of the model."""

    def __init__(self, shifts: Mapping[str, Shift], torch_model: TorchModel, leaves: Mapping[str, Any]):
        self.shifts, self.torch_model, self.leaves = shifts, torch_model, leaves

    def module(self, sources: Sequence[Source]) -> ScaledModule | None:
        """A module, from the updates of some or all of its parameters; None where a stack holds nothing."""
        pieces = [piece for source in sources if (piece := _piece(source)) is not None]
        if not pieces:
            return None
        site, target = sources[0].update.site, sources[0].target
        outputs, stacked = target.part.slice, target.parameter
        a, b, scale, values = concatenate(pieces, (outputs.groups, outputs.size), stacked=stacked)
        a, b = layouts.packed(a, b.reshape(*b.shape[:-2], outputs.total), stacked=stacked)
        if site.groups > 1:
            a, b = grouped(a, b, site.groups)
        rank = len(a) // (site.batch_shape[-1] if stacked else 1)
        kinds: dict[str, ModuleKind] = {"conv": "conv", "embedding": "embedding"}
        kind = "parameter" if stacked else kinds.get(site.kind, "linear")
        vectors = self._magnitude(sources, b), self._bias(sources, float(scale)), values, _outputs(sources)
        return ScaledModule(Module(kind, a, b, *vectors), rank, np.float32(scale))

    def _magnitude(self, sources: Sequence[Source], b: np.ndarray) -> np.ndarray | None:
        """DoRA's magnitudes. Outputs without an update keep the norms that they have in the base."""
        found = [_magnitude_of(source.update, source.target) for source in sources if isinstance(source.update, Dora)]
        if not found:
            return None
        flat = layouts.vector_to_torch([*found, *self._norms(sources)])
        return flat.reshape(1, -1, *b.shape[2:]) if b.ndim > 2 else flat

    def _norms(self, sources: Sequence[Source]) -> list[ParameterVector]:
        """Norms of the columns of those parameters of a module that have no update."""
        target, adapted = sources[0].target, {source.update.site.path for source in sources}
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
        if sum(each.target.part.slice.count for each in (*sources, *places)) < target.part.slice.total:
            raise CheckpointError(f"DoRA's magnitudes of {target.name} need all of its parameters: pass sites=")
        return found

    def _bias(self, sources: Sequence[Source], scale: float) -> np.ndarray | None:
        """The bias on B: zeros for a module without, where others have one, as PEFT has one switch for all."""
        if not self.shifts:
            return None
        site, target = sources[0].update.site, sources[0].target
        if target.parameter or site.kind == "embedding":
            raise CheckpointError(f"PEFT has no lora_bias for {target.name}, and one switch for all. Save it apart.")
        return layouts.vector_to_torch([self._shifted(source, scale) for source in sources])

    def _shifted(self, source: Source, scale: float) -> ParameterVector:
        site, target = source.update.site, source.target
        shift = self.shifts.get(bias_beside(site.path, self.shifts) or "")
        if shift is None:
            return ParameterVector(site, target.part, np.zeros(site.sizes(site.out_axes), np.float32))
        value = np.asarray(shift.value[target.index], np.float32)
        own_scale = np.asarray(shift.scale[target.index])
        if not scale and value.any() and own_scale.any():
            raise CheckpointError(f"{shift.site.path!r}: the factors beside it have scale 0, and PEFT has one for both")
        ratio = np.float32(own_scale / np.float32(scale * target.part.gain)) if scale else np.float32(0)
        return ParameterVector(site, target.part, value if ratio == 1 else value * ratio)


def _piece(source: Source) -> Piece | None:
    """Factors of one parameter of a module, in PyTorch's order, or None where a stack holds nothing."""
    if isinstance(source.update, AdaLora):
        return _valued(source, source.update)
    update, target = source.update, source.target
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
    return _laid_out(source, a, b, float(scale))


def _valued(source: Source, update: AdaLora) -> Piece | None:
    """The same of factors with values between them: a pruned term stays where it is, with a value of zero."""
    index, gain = source.target.index, np.float32(source.target.part.gain)
    a, b, scale, values = (
        np.asarray(each[index], np.float32) for each in (update.a, update.b, update.scale, update.values)
    )
    if source.outputs is None:
        if update.site.batch_axes and not (scale or a.any() or b.any()):
            return None
        return _laid_out(source, a, b, float(scale / gain), values)
    if update.site.batch_axes and not (values.any() or source.outputs[index].any()):
        return None
    piece = _laid_out(source, a, b, float(scale), values)
    # Several modules in one parameter: the terms of each are zero for the others.
    kept = piece.b.any((1, 2))
    return piece._replace(a=piece.a[kept], b=piece.b[kept], values=values[kept])


def _laid_out(source: Source, a: np.ndarray, b: np.ndarray, scale: float, values: np.ndarray | None = None) -> Piece:
    site, part = source.update.site, source.target.part
    spread = part.slice.spread(layouts.b_to_torch(site, part, b))
    return Piece(layouts.a_to_torch(site, a), spread, scale, part.slice.index, values)


def _outputs(sources: Sequence[Source]) -> np.ndarray | None:
    """What VeRA multiplies the outputs by."""
    found = [
        ParameterVector(site, target.part, outputs[target.index] / np.float32(target.part.gain))
        for (site, target, outputs) in ((source.update.site, source.target, source.outputs) for source in sources)
        if outputs is not None
    ]
    return layouts.vector_to_torch(found) if found else None


def _magnitude_of(update: Dora, target: Target) -> ParameterVector:
    if target.parameter or update.site.groups > 1 or (np.asarray(update.strength) != 1).any():
        kind = "a stack of experts" if target.parameter else "a convolution in groups"
        scaled = not target.parameter and update.site.groups == 1
        why = "PEFT cannot scale DoRA's effect" if scaled else f"PEFT has no DoRA for {kind}"
        raise CheckpointError(f"{update.site.path!r}: {why}. Leave it out, or merge it.")
    own = np.asarray(update.magnitude[target.index], np.float32)
    return ParameterVector(update.site, target.part, own / np.float32(target.part.gain))
