"""An adapter on disk, in either format, as one without a base: to look at, not to run.

PyTorch's modules are parameters here, by their own names and in layouts of their own.
"""

from os import PathLike
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, Update
from lora_jax.io.inspect.contents import detect, stacks, strength
from lora_jax.io.own import orbax
from lora_jax.io.peft.files import PeftFiles
from lora_jax.io.peft.module import Module
from lora_jax.io.peft.read import read_peft


def bare(path: str | PathLike[str]) -> tuple[Adapter, dict[str, str]]:
    """Read the factors of an adapter; the base is not needed.

    Args:
      path: what `lora_jax.save` wrote, or a PEFT adapter: a directory or a `.safetensors` file.

    Returns:
      The adapter, and by name what its factors are not the whole of, or why there are none. What PEFT stores whole is
      in the notes only.

    Raises:
      CheckpointError: there is no adapter, or it is damaged.

    Example:
      >>> import jax, lora_jax as lora, tempfile
      >>> params = {"q": {"kernel": jnp.ones((4, 3))}}
      >>> sites = lora.find_sites(lambda p, x: x @ p["q"]["kernel"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="q", method="dora"), params, sites)
      >>> folder = f"{tempfile.mkdtemp()}/peft"
      >>> lora.peft.save(folder, adapter)
      >>> found, notes = bare(folder)
      >>> found["q"].a.shape, notes
      ((2, 4), {'q': "inside DoRA's norm"})
    """
    where = Path(path).expanduser()
    return _peft(read_peft(where)) if detect(where) == "peft" else (orbax.load(where), {})


def _peft(files: PeftFiles) -> tuple[Adapter, dict[str, str]]:
    updates: dict[str, Update] = {}
    notes: dict[str, str] = {}
    for name, module in files.modules.items():
        found = _factors(files, name, module)
        if isinstance(found, LowRank):
            updates[name] = found
        else:
            notes[name] = found
        if module.magnitude is not None:
            notes[name] = "inside DoRA's norm"
        if module.b_bias is not None:
            notes[f"{name}.lora_B.bias"] = "added to a bias"
    notes |= dict.fromkeys(files.saved, "stored whole")
    return Adapter(updates), notes


def _factors(files: PeftFiles, name: str, module: Module) -> LowRank | str:
    """The factors of a module, or why there are none to look at."""
    if module.outputs is not None:
        return "VeRA, whose file does not tell how many inputs a module has"
    rank, experts, _, scale = strength(files, name, module)
    if scale is None:
        return "the file does not tell its scale"
    plain = module.plain(len(module.b) * module.a.shape[1])
    if module.kind != "parameter" and plain.b.shape[1] != len(plain.a):
        return "a convolution in groups, whose A reads the channels of all of them"
    return _update(name, *stacks(plain, rank, experts), scale)


def _update(name: str, a: np.ndarray, b: np.ndarray, scale: float) -> LowRank:
    """Factors `[stack, rank, inputs]` and `[stack, rank, outputs]`; a stack of one is none."""
    axes: dict[str, Any] = {"in_axes": (1,), "out_axes": (2,), "batch_axes": (0,)}
    stack = len(a)
    if stack == 1:
        a, b, axes = a[0], b[0], {"in_axes": (0,), "out_axes": (1,)}
    shape = (*a.shape[:-2], a.shape[-1], b.shape[-1])
    site = Site(path=name, shape=shape, dtype="float32", kind="dense", **axes)
    scales = jnp.full(site.batch_shape, scale, jnp.float32)
    return LowRank(jnp.asarray(a), jnp.asarray(b), scales, site)
