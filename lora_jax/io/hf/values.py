"""What a checkpoint has where adapters hold values of their own: whole tensors, tables, norms of DoRA's weights."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np

from lora_jax.errors import CheckpointError
from lora_jax.io.hf.changes import Change
from lora_jax.io.hf.folder import Checkpoint
from lora_jax.io.hf.plan import OnBase
from lora_jax.io.hf.tensors import Tensor
from lora_jax.io.peft.compose import MAGNITUDE
from lora_jax.io.peft.files import TOKEN_ROWS, PeftFiles, full_tensors, token_rows


def base_values(base: Checkpoint, adapters: Sequence[PeftFiles]) -> dict[str, np.ndarray]:
    """What `compose_files` needs of a base, by the adapters' names: all else is factors, which need no base.

    Raises:
      CheckpointError: the base does not have what an adapter changes, or in another shape, or it is quantised.
    """
    found: dict[str, np.ndarray] = {}
    for files in adapters:
        placed = OnBase(base, files, 1.0)
        changes = placed.changes()
        for name in full_tensors(files.saved):
            tensor = base.tensors.get(placed.place(name))
            if tensor is None:
                raise CheckpointError(
                    f"{base.path} has no {name}, which {files.where} trains in full: compose without a base, with "
                    "weights that add up to 1"
                )
            found[name] = _read(tensor, changes[tensor.name])
        for name in token_rows(files.saved):
            tensor = placed.tensor(f"{name}.weight")
            found[name + TOKEN_ROWS] = _read(tensor, changes[placed.place(f"{name}.weight")])
        for name, module in files.modules.items():
            if module.magnitude is not None:
                tensor = placed.tensor(f"{name}.weight")
                norms = _norms(tensor, changes[tensor.name])
                found[name + MAGNITUDE] = norms.reshape(module.magnitude.shape)
    return found


def _read(tensor: Tensor, change: Change) -> np.ndarray:
    change.check(tensor)
    columns = tensor.shape[-1] if tensor.shape else 1
    rows = prod(tensor.shape) // max(columns, 1)
    return tensor._replace(shape=(rows, columns)).rows(0, rows).reshape(tensor.shape).astype(np.float32)


def _norms(tensor: Tensor, change: Change) -> np.ndarray:
    """Of the weights of every output."""
    weight = _read(tensor, replace(change, value=None, rows=()))
    flat = weight.reshape(-1, weight.shape[-1]).T if change.outputs_last else weight.reshape(len(weight), -1)
    return np.sqrt(np.square(flat, dtype=np.float64).sum(1)).astype(np.float32)
