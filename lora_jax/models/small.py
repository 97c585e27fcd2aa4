"""Decoders and encoders in few bits: which parameters are quantised as they are read, and where their codes lie."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.adapter.sharding import shards
from lora_jax.errors import CheckpointError, listed
from lora_jax.io.hf.quantised.packed import Packed, stacked
from lora_jax.models.tensors import Leaf
from lora_jax.quantise import SMALLEST, Scheme, quantise
from lora_jax.quantised.leaf import Quantised


@dataclass(frozen=True)
class Small:
    """How a model is quantised as it is read.

    Attributes:
      format: a format of `lora_jax.quantise`; None for what the files hold.
      router: the name of the module that chooses experts, which stays as it is; None without one.
    """

    format: Scheme | None
    router: str | None

    def takes(self, leaf: Leaf) -> bool:
        """Whether a parameter is quantised: kernels of layers; tables, heads, norms and routers are not."""
        numbered = "{}" in leaf.template or any(part.isdigit() for part in leaf.path)
        chooses = self.router is not None and self.router.rpartition(".")[2] in leaf.path
        kernel = len(leaf.shape) > 1 and prod(leaf.shape) >= SMALLEST and not leaf.path[-1].endswith("bias")
        return self.format is not None and numbered and kernel and not chooses

    def made(self, value: np.ndarray) -> Quantised:
        """A tensor in few bits."""
        assert self.format is not None
        return quantise({"": value}, self.format, where=lambda path, leaf: True)[""]


def in_few_bits(
    leaf: Leaf, tensors: Mapping[str, Any], small: Small, read: Callable[[str], np.ndarray], where: Any, dtype: Any
) -> Quantised | None:
    """A parameter whose tensors are codes, or become codes one by one, so that no more than one is there as numbers.

    Args:
      leaf: the parameter.
      tensors: the checkpoint's.
      small: what becomes codes.
      read: a tensor's numbers, by its name.
      where: its sharding as numbers; None for the default device.
      dtype: of the numbers; None for that of the files.

    Returns:
      None for a parameter that stays as it is.

    Raises:
      CheckpointError: some of its tensors are codes and others are not.
    """
    names = [name for _, name in leaf.members()]
    packed = [name for name in names if isinstance(tensors[name], Packed)]
    if not packed and not small.takes(leaf):
        return None
    if packed and len(packed) < len(names):
        plain = [name for name in names if name not in packed]
        raise CheckpointError(
            f"{listed(plain)} is not quantised, and other layers are: they cannot be stacked. Load the model with "
            "unrolled=True."
        )
    parts = [tensors[name].read() if packed else small.made(read(name)) for name in names]
    if len({jax.tree.structure(each) for each in parts}) > 1:
        raise CheckpointError(f"{listed(names)} are quantised in different ways: load the model with unrolled=True")
    whole = stacked(parts, leaf.stack)
    whole = whole if dtype is None else whole.astype(dtype)
    return whole if where is None else jax.device_put(whole, placed(whole, where))


def placed(whole: Quantised, where: NamedSharding) -> Any:
    """Shardings of the arrays: the leading axes as those of the numbers, the last as the first that codes have."""
    every = (*where.spec, *[None] * (whole.ndim - len(where.spec)))
    count = len(whole.leading)
    spec = (*every[:count], every[-1 if whole.transposed else count])

    def place(array: Any) -> NamedSharding:
        axes = [axis if n % shards(where.mesh, axis) == 0 else None for axis, n in zip(spec, array.shape, strict=True)]
        return NamedSharding(where.mesh, PartitionSpec(*axes))

    return jax.tree.map(place, whole)
