"""Quantised: a parameter held as codes of few bits and a scale for every block of them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.quantised.formats import FORMATS, Format

NESTED_BLOCK = 256
"""How many scales share a scale where they are quantised themselves, as in QLoRA."""


class Shaped(ABC):
    """What follows from the shape of something that stands for an array."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return prod(self.shape)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "offset", "zero", "order"],
    meta_fields=["format", "dtype", "block", "trailing", "transposed"],
)
@dataclass(frozen=True)
class Quantised(Shaped):
    """A parameter in few bits: `(levels[codes] - zero) · scale + offset`, with a scale for every block.

    Blocks run over the flattened trailing axes of the parameter. The leading axes (layers, experts, rows) are those of
    every array in it, so that slicing, scanning, mapping and sharding them does so to the parameter. It is a leaf
    of the tree to lora_jax, and a pytree of arrays to JAX.

    Attributes:
      codes: `[*leading, n]`, one for each number; those of 4 bits are int4, two to a byte on every device.
      scale: `[*leading, blocks]` float32, or quantised itself; of files also in fewer bits.
      offset: `[*leading, blocks]` or `[*leading, 1]` float32, added; None for zero.
      zero: `[*leading, blocks]` int8, the level that stands for zero in files; None for level zero.
      order: `[*leading, inputs]` int32, of files whose blocks hold inputs that are no neighbours: the place of each
        among the codes. None where codes are in the order of the numbers.
      format: `nf4`, `int4`, `int8` or `fp8`; of files also `fp4` and `mxfp4`. Static.
      dtype: of the parameter that it stands for; static.
      block: how many numbers share a scale; static.
      trailing: lengths of the axes that blocks run over; static.
      transposed: whether codes have the two trailing axes the other way round, so that blocks run over the first of
        them; static.

    Example:
      >>> import lora_jax as lora
      >>> numbers = jnp.linspace(-1, 1, 64 * 64).reshape(64, 64)
      >>> leaf = lora.quantise({"w": numbers}, "int8")["w"]
      >>> leaf, leaf.shape, leaf.nbytes, numbers.nbytes, leaf.codes.dtype
      (Quantised(int8, float32[64,64]), (64, 64), 4352, 16384, dtype('int8'))
      >>> float(jnp.abs(leaf.dense() - numbers).max()) < 0.004
      True

    References:
      Dettmers et al., QLoRA, arXiv 2305.14314.
    """

    codes: Any
    scale: Any
    offset: Any = None
    zero: Any = None
    order: Any = None
    format: str = field(default="nf4", kw_only=True)
    dtype: Any = field(default=jnp.dtype("float32"), kw_only=True)
    block: int = field(default=64, kw_only=True)
    trailing: tuple[int, ...] = field(default=(), kw_only=True)
    transposed: bool = field(default=False, kw_only=True)

    def __repr__(self) -> str:
        """Format, dtype and shape."""
        return f"Quantised({self.format}, {self.dtype}[{','.join(map(str, self.shape))}])"

    @property
    def leading(self) -> tuple[int, ...]:
        """Lengths of the axes that all arrays in it share."""
        return tuple(self.codes.shape[:-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return (*self.leading, *self.trailing)

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds on a device, where two codes of 4 bits share one."""
        return sum(-(-each.size * jax.dtypes.itemsize_bits(each.dtype) // 8) for each in jax.tree.leaves(self))

    def scales(self) -> jax.Array:
        """`[*leading, blocks]` float32."""
        return self.scale.dense() if isinstance(self.scale, Quantised) else self.scale.astype(jnp.float32)

    def dense(self) -> jax.Array:
        """The numbers, in the parameter's own shape and dtype: computed in float32, and rounded once."""
        blocks = FORMATS[self.format].decode(self._by_rows(self.codes))
        scales = self._by_rows(self.scales())
        blocks = blocks.reshape(*scales.shape, -1)
        if self.zero is not None:
            blocks = blocks - self._by_rows(self.zero).astype(jnp.float32)[..., None]
        blocks = blocks * scales[..., None]
        if self.offset is not None:
            blocks = blocks + self._by_rows(self.offset).astype(jnp.float32)[..., None]
        whole = blocks.reshape(*self.leading, -1)[..., : prod(self.trailing)].reshape(*self.leading, *self._stored)
        if self.order is not None:
            order = self.order.reshape(*self.leading, *(1,) * (len(self.trailing) - 1), -1)
            whole = jnp.take_along_axis(whole, order, -1)
        return (whole.swapaxes(-1, -2) if self.transposed else whole).astype(self.dtype)

    @property
    def _stored(self) -> tuple[int, ...]:
        """Lengths of the trailing axes as codes have them."""
        return self.trailing[::-1] if self.transposed else self.trailing

    def _by_rows(self, array: jax.Array) -> jax.Array:
        """With rows apart where blocks end with them: out of one long axis TPUs would move every number once more."""
        *rows, last = self._stored
        return array.reshape(*self.leading, *rows, -1) if last % self.block == 0 else array

    def __jax_array__(self) -> jax.Array:
        """What `jnp.asarray` makes of it."""
        return self.dense()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """What `np.asarray` makes of it."""
        return np.asarray(self.dense(), dtype)

    @property
    def sharding(self) -> Any:
        """Where the numbers lie: the leading axes as those of the codes, the first of the codes as the codes' last."""
        where = self.codes.sharding
        if not isinstance(where, NamedSharding):
            return where
        spec = (*where.spec, *[None] * (len(self.codes.shape) - len(where.spec)))
        others = [None] * (len(self.trailing) - 1)
        trailing = [*others, spec[-1]] if self.transposed else [spec[-1], *others]
        return NamedSharding(where.mesh, PartitionSpec(*spec[:-1], *trailing))

    def astype(self, dtype: Any) -> Self:
        """The same codes, for a parameter of another dtype."""
        return replace(self, dtype=jnp.dtype(dtype))

    def like(self, value: jax.Array) -> "Quantised":
        """Another parameter of the same shape, quantised in the same way."""
        nested = isinstance(self.scale, Quantised)
        turned = value.swapaxes(-1, -2) if self.transposed else value
        made = quantised(turned.astype(self.dtype), self.format, self.block, len(self.trailing), nested=nested)
        return replace(made, trailing=self.trailing, transposed=self.transposed)


def is_quantised(node: Any) -> bool:
    """Whether `node` is a quantised parameter (for `is_leaf` arguments)."""
    return isinstance(node, Quantised)


def has_quantised(tree: Any) -> bool:
    """Whether any parameter of a tree is quantised."""
    return any(map(is_quantised, jax.tree.leaves(tree, is_leaf=is_quantised)))


def dense_of(leaf: Any) -> Any:
    """The numbers of a leaf: of a quantised one in its dtype, any other as it is."""
    return leaf.dense() if isinstance(leaf, Quantised) else leaf


def abstract(leaf: Any) -> Any:
    """What a program sees of a leaf: shape and dtype of a quantised one, any other as it is."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, Quantised) else leaf


def folded_axes(shape: tuple[int, ...], block: int) -> int:
    """How many trailing axes blocks run over: as few as blocks divide, never the first of three or more.

    That one may count layers or experts. Where nothing divides, all others are taken, and the end is padded.

    Example:
      >>> folded_axes((2048, 512), 64), folded_axes((128, 4, 32), 64), folded_axes((24, 30, 10), 64)
      (1, 2, 2)
    """
    most = len(shape) if len(shape) < 3 else len(shape) - 1
    return next((count for count in range(1, most) if prod(shape[-count:]) % block == 0), most)


def quantised(
    value: jax.Array, format: str, block: int, folded: int, *, nested: bool = False, search: bool = False
) -> Quantised:
    """One array in few bits.

    Args:
      value: of any shape with at least one axis.
      format: name of the format.
      block: how many numbers share a scale.
      folded: how many trailing axes blocks run over.
      nested: quantise the scales too.
      search: for every block take the scale of least squared error, instead of that of its largest number.
    """
    shape, how = tuple(value.shape), FORMATS[format]
    leading, trailing = shape[: len(shape) - folded], shape[len(shape) - folded :]
    rows = value.astype(jnp.float32).reshape(*leading, prod(trailing))
    padded = jnp.pad(rows, [(0, 0)] * len(leading) + [(0, -rows.shape[-1] % block)])
    blocks = padded.reshape(*leading, -1, block)
    scale: Any = jnp.abs(blocks).max(-1) / how.largest
    scale = _searched(how, blocks, scale) if search else scale
    stored = scale
    if nested:
        # Scales are of one sign: without their mean they use all levels.
        mean = scale.mean(-1, keepdims=True)
        stored = quantised(scale - mean, "int8", min(NESTED_BLOCK, scale.shape[-1]), 1)
        stored = replace(stored, offset=mean)
        scale = stored.dense()
    codes = how.encode(blocks / _nonzero(scale)[..., None]).reshape(*leading, -1)
    dtype = jnp.dtype(value.dtype)
    return Quantised(codes, stored, format=format, dtype=dtype, block=block, trailing=trailing)


def _nonzero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, 1, scale)


def _searched(how: Format, blocks: jax.Array, scale: jax.Array) -> jax.Array:
    """Of some shares of the largest number, that of least squared error, for every block."""

    def error(share: jax.Array) -> jax.Array:
        tried = share * scale
        near = how.decode(how.encode(blocks / _nonzero(tried)[..., None]))
        return jnp.square(near * tried[..., None] - blocks).sum(-1)

    shares = jnp.linspace(0.6, 1.1, 51, dtype=jnp.float32)
    best, _ = jax.lax.scan(
        lambda best, share: (_better(best, (error(share), share)), None),
        (error(jnp.float32(1)), jnp.ones_like(scale)),
        shares,
    )
    return best[1] * scale


def _better(old: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    less = new[0] < old[0]
    return jnp.where(less, new[0], old[0]), jnp.where(less, new[1], old[1])
