"""Updates of JAX parameters, from the PEFT modules that hold them or parts of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.site import Site, full_site
from lora_jax.adapter.updates import LowRank
from lora_jax.errors import CheckpointError
from lora_jax.io.names import layouts
from lora_jax.io.names.layouts import ModuleVector
from lora_jax.io.names.names import Target
from lora_jax.io.names.torch_model import Place
from lora_jax.io.peft.concatenate import Concatenated, Piece, Stacked, concatenate, stack, ungrouped
from lora_jax.io.peft.delta import Module
from lora_jax.methods import AdaLora, Dora, Shift, Vera
from lora_jax.paths import bias_beside


class Found(NamedTuple):
    """What a module holds for one weight of a parameter, or one stack of experts."""

    target: Target
    piece: Piece
    magnitude: ModuleVector | None
    bias: ModuleVector | None
    outputs: ModuleVector | None


class UpdateMaker:
    """What the updates of one adapter are made with: the base's parameters, the adapter's dropout, and VeRA's seed."""

    def __init__(self, where: str, leaves: Mapping[str, Any], dropout: float, seed: int):
        self.where, self.leaves, self.dropout, self.seed = where, leaves, dropout, seed

    def find(self, name: str, place: Place, module: Module, scale: float) -> Found | None:
        """A parameter's own of a module's factors; None if the module has nothing but zeros for it."""
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
        return Found(target, piece, magnitude, bias, outputs)

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

    def update(self, site: Site, found: Sequence[Found]) -> LowRank | Vera:
        """Low-rank factors, or what the file's kind has instead, of everything that was found for a parameter."""
        by_index: dict[tuple[int, ...], list[Piece]] = {}
        for each in found:
            by_index.setdefault(each.target.index, []).append(each.piece)
        out, stacked = site.sizes(site.out_axes), found[0].target.parameter
        joined = {index: concatenate(pieces, out, stacked=stacked) for index, pieces in by_index.items()}
        whole = stack(site, joined)
        if found[0].outputs is not None:
            return self._vera(site, found, joined, whole)
        a, b, scale = (jnp.asarray(each) for each in (whole.a, whole.b, whole.scale))
        if whole.values is not None:
            return AdaLora(a, b, scale, site, self.dropout, values=jnp.asarray(whole.values))
        factors = LowRank(a, b, scale, site, self.dropout)
        shares = [each.magnitude for each in found if each.magnitude is not None]
        if not shares:
            return factors
        if len(shares) < len(found):
            raise CheckpointError(
                f"{self.where}: only some of the modules that {site.path!r} is made of have DoRA magnitudes"
            )
        return self._dora(factors, shares)

    def _dora(self, factors: LowRank, shares: Sequence[ModuleVector]) -> Dora:
        """Columns that the file says nothing about keep the length they have."""
        leaf, site = self.leaves[factors.site.path], factors.site
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"{self.where} has DoRA magnitudes for {site.path!r}, whose effect depends on the base's value, "
                "and abstract parameters have none: pass arrays."
            )
        update = Dora.around(factors, jnp.asarray(leaf))
        magnitude = np.array(update.magnitude)
        layouts.fill_vector(
            magnitude, site, [ModuleVector(to, value * np.float32(to.part.gain)) for to, value in shares]
        )
        return replace(update, magnitude=jnp.asarray(magnitude))

    def _vera(
        self, site: Site, found: Sequence[Found], joined: Mapping[tuple[int, ...], Concatenated], whole: Stacked
    ) -> Vera:
        """Weights that the file leaves out have vectors of zeros."""
        first, *others = joined.values()
        if not all(np.array_equal(first.a, each.a) and np.array_equal(first.b, each.b) for each in others):
            raise CheckpointError(
                f"{self.where} adapts other parts of some layers of {site.path!r} than of others, and all layers of a "
                "stack have the same projections here: leave the layers unstacked"
            )
        b = np.zeros(site.batch_shape + site.sizes(site.out_axes), np.float32)
        shares = [each.outputs for each in found if each.outputs is not None]
        layouts.fill_vector(b, site, [ModuleVector(to, value * np.float32(to.part.gain)) for to, value in shares])
        d, b, scale, *pair = (jnp.asarray(each) for each in (whole.values, b, whole.scale, first.a, first.b))
        return Vera(d, b, scale, site, self.seed, self.dropout, *pair)

    def shift(self, site: Site, found: Sequence[Found]) -> list[Shift]:
        """What biases on B add to the bias beside a site; where there is none, they must be zero."""
        given = [(each.piece.scale, each.bias) for each in found if each.bias is not None]
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
        return [Shift(jnp.asarray(value), jnp.asarray(scale), full_site(path, self.leaves[path]))]


def _used(target: Target, b: np.ndarray) -> np.ndarray:
    """Which terms are a parameter's own: those that are zero for it and not for others are another's.

    So factors of several parameters that were written as one module, with zeros in B, come back as they were.
    """
    outputs = target.part.slice
    groups = np.abs(outputs.grouped(b, outputs.size)).max(-2)
    own, others = groups[..., outputs.start : outputs.stop], np.delete(groups, np.s_[outputs.start : outputs.stop], -1)
    own, others = (each.any(-1).reshape(-1, b.shape[-2]).any(0) for each in (own, others))
    return own | ~others
