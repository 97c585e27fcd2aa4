"""Inspecting an adapter on disk, in either format, without the base it belongs to: its contents, and its factors."""

from dataclasses import dataclass
from itertools import permutations
from math import prod, sqrt
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, Update
from lora_jax.errors import CheckpointError
from lora_jax.io.formats.recognise import OWN, adapter_file, refuse_folder
from lora_jax.io.own import manifest, orbax
from lora_jax.io.peft.config import alpha_of, rank_of, scale_of
from lora_jax.io.peft.files import PeftFiles
from lora_jax.io.peft.module import Module
from lora_jax.io.peft.read import read_peft
from lora_jax.report.report import Report
from lora_jax.report.tables import Table, times

Format = Literal["peft", "orbax"]
_MOST_PARAMETERS = 4


@dataclass(frozen=True)
class Entry:
    """One adapted parameter or module.

    Attributes:
      name: path of the parameter, or name of the PyTorch module.
      kind: `dense`, `conv`, `embedding`, `ragged` or `full`; for PEFT `linear`, `conv`, `embedding`, `parameter`, each
        with `DoRA`, `AdaLoRA` or `VeRA` if it is, `whole` for a tensor stored whole, `shared` for VeRA's projections.
      shape: of the parameter in JAX, or of B and A multiplied; of a VeRA module the outputs, as a file does not tell
        how many inputs it has.
      rank: number of rank-one terms; None for a parameter stored whole.
      alpha: scale times rank, or times its root under rsLoRA; the largest of a stack.
      scale: what the product of the factors is multiplied by; the largest of a stack.
      norms: Frobenius norms of A, of B and of the scaled product; of a parameter stored whole its own in the last
        place. The scale, and what follows from it, is None where the file does not tell it: PEFT's patterns go by
        names of parameters, which the file of several adapted parameters of one module does not have. Of a VeRA module
        only B is known, with both vectors.
      dtype: of the factors.
      nbytes: bytes of all its arrays.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    alpha: float | None
    scale: float | None
    norms: tuple[float | None, float | None, float | None]
    dtype: str
    nbytes: int


@dataclass(frozen=True, repr=False)
class Contents(Report):
    """What `inspect` found: a table when printed, and its numbers as attributes.

    Attributes:
      path: where it was read from.
      format: `"peft"` or `"orbax"`.
      entries: an `Entry` per adapted parameter or module.
    """

    path: Path
    format: Format
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(entry.nbytes for entry in self.entries)

    def table(self) -> Table:
        """A row for every entry, and totals."""
        headers = ("name", "kind", "shape", "rank", "alpha", "scale", "|A|", "|B|", "|ΔW|", "dtype", "bytes")
        rows = []
        for entry in self.entries:
            numbers = [_number(value) for value in (entry.rank, entry.alpha, entry.scale, *entry.norms)]
            rows.append((entry.name, entry.kind, times(entry.shape), *numbers, entry.dtype, f"{entry.nbytes:,d}"))
        what = "PEFT modules" if self.format == "peft" else "parameters"
        total = (f"{len(self.entries)} {what}", *[""] * 9, f"{self.nbytes:,d}")
        return Table(headers, rows, total, words=(1, 2, 9))


def inspect(path: str | PathLike[str]) -> Contents:
    """Look into an adapter on disk; the base is not needed.

    Args:
      path: what `lora_jax.save` wrote, or a PEFT adapter: a directory or a `.safetensors` file.

    Raises:
      CheckpointError: there is no adapter, or it is damaged.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, tempfile
      >>> params = {"q": {"kernel": jnp.ones((4, 3))}}
      >>> sites = lora.find_sites(lambda p, x: x @ p["q"]["kernel"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="q"), params, sites)
      >>> folder = tempfile.mkdtemp()
      >>> lora.save(f"{folder}/orbax", adapter), lora.peft.save(f"{folder}/peft", adapter)
      (None, None)
      >>> for name in ("orbax", "peft"):
      ...     found = inspect(f"{folder}/{name}")
      ...     print(found.format, found.entries[0].name, found.entries[0].rank, found.entries[0].alpha)
      orbax q/kernel 2 4.0
      peft q 2 4.0
    """
    where = Path(path).expanduser()
    found = detect(where)
    entries = _peft(read_peft(where)) if found == "peft" else _orbax(where)
    return Contents(where, found, tuple(entries))


def read_factors(path: str | PathLike[str]) -> tuple[Adapter, dict[str, str]]:
    """Read the factors of an adapter, to look at and not to run; the base is not needed.

    PyTorch's modules are parameters here, by their own names and in layouts of their own.

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
      >>> found, notes = read_factors(folder)
      >>> found["q"].a.shape, notes
      ((2, 4), {'q': "inside DoRA's norm"})
    """
    where = Path(path).expanduser()
    return _peft_factors(read_peft(where)) if detect(where) == "peft" else (orbax.load(where), {})


def detect(path: Path) -> Format:
    """Which of the two formats is at `path`.

    Raises:
      CheckpointError: neither.
    """
    if not path.exists():
        raise CheckpointError(f"There is nothing at {path}: check the path")
    if path.is_file() or adapter_file(path) is not None:
        return "peft"
    if (path / OWN).exists():
        return "orbax"
    refuse_folder(path)


def _peft(files: PeftFiles) -> list[Entry]:
    entries = [_module(files, name, module) for name, module in files.modules.items()]
    projections = next((module for module in files.modules.values() if module.form == "vera"), None)
    if projections is not None:
        a, b = projections.a, projections.b
        norms, nbytes = (_norm(a), _norm(b), None), a.nbytes + b.nbytes
        shape = (len(b), a.shape[1])
        entries.append(Entry("vera_A, vera_B", "shared", shape, len(a), None, None, norms, str(a.dtype), nbytes))
    for name, value in files.saved.items():
        norms = (None, None, _norm(value))
        entries.append(Entry(name, "whole", value.shape, None, None, None, norms, str(value.dtype), value.nbytes))
    return entries


def _module(files: PeftFiles, name: str, module: Module) -> Entry:
    rank, experts, alpha, scale = _rank_and_scale(files, name, module)
    labels = {"adalora": ", AdaLoRA", "vera": ", VeRA"}
    kind = module.kind + (labels.get(module.form, "") if module.magnitude is None else ", DoRA")
    plain = module.plain(len(module.b if module.outputs is None else module.outputs) * module.a.shape[1])
    if module.outputs is not None:
        own = {part: array for part, array in module.arrays().items() if part not in ("a", "b")}
        norms, nbytes = (None, _norm(plain.b), None), sum(array.nbytes for array in own.values())
        return Entry(name, kind, module.outputs.shape, rank, alpha, scale, norms, str(module.outputs.dtype), nbytes)
    a, b = _stacks(plain, rank, experts)
    expert = (experts, b.shape[2], a.shape[2])
    shape = expert if module.kind == "parameter" else (module.b.shape[0], *module.a.shape[1:])
    norms = (_norm(module.a), _norm(module.b), None if scale is None else abs(scale) * _product_norm(a, b))
    nbytes = sum(array.nbytes for array in module.arrays().values())
    return Entry(name, kind, shape, rank, alpha, scale, norms, str(module.a.dtype), nbytes)


def _stacks(module: Module, rank: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors of plain LoRA, `[stack, rank, inputs]` and `[stack, rank, outputs]`; a stack of one but for experts.

    Of a convolution in groups B has fewer columns than A has rows, as each reads the channels of one group.
    """
    if module.kind == "parameter":
        b = module.b.reshape(len(module.b), rank, experts).transpose(2, 1, 0)
        return module.a.reshape(experts, rank, module.a.shape[1]), b
    b = module.b.reshape(len(module.b), prod(module.b.shape[1:])).T[None]
    return module.a.reshape(1, rank, prod(module.a.shape[1:])), b


def _rank_and_scale(files: PeftFiles, name: str, module: Module) -> tuple[int, int, float | None, float | None]:
    """Rank, number of experts, alpha and scale of a PEFT module.

    Of a parameter the file does not say which one of its module's it is, and PEFT's patterns go by that: alpha and
    scale are None unless the ranks leave one possibility.
    """
    if module.kind != "parameter":
        known = name not in files.unscaled
        return len(module.a), 1, files.alpha(name) if known else None, files.scale(name) if known else None
    owner = name.replace(".base_layer", "")
    levels = [each for each in files.modules if each.replace(".base_layer", "") == owner]
    names = _parameters(files, owner)
    # A module has a few parameters; a file that says otherwise has more orders than could ever be tried.
    possible = set()
    for given in permutations(names, len(levels)) if len(names) <= _MOST_PARAMETERS else ():
        ranks = [rank_of(files.config, each) or len(module.a) for each in given]
        rows = [len(files.modules[level].a) for level in levels]
        # All parameters of a module have as many experts, and the rows of A are their number times the rank.
        if len({row / rank for row, rank in zip(rows, ranks, strict=True)}) == 1 and rows[0] % ranks[0] == 0:
            mine, rank = given[levels.index(name)], ranks[levels.index(name)]
            alpha, scale = alpha_of(files.config, mine, rank), scale_of(files.config, mine, rank)
            possible.add((rank, len(module.a) // rank, alpha, scale))
    if len(possible) == 1:
        return possible.pop()
    sizes = {(rank, experts) for rank, experts, _, _ in possible}
    rank, experts = sizes.pop() if len(sizes) == 1 else (len(module.a), 1)
    return rank, experts, None, None


def _parameters(files: PeftFiles, owner: str) -> list[str]:
    """Full names of a module's adapted parameters; the config may have the ends of them only."""
    wanted = [name.rpartition(".") for name in files.config.get("target_parameters") or ()]
    found = [f"{owner}.{leaf}" for module, _, leaf in wanted if not module or f".{owner}".endswith(f".{module}")]
    return list(dict.fromkeys(found))


def _peft_factors(files: PeftFiles) -> tuple[Adapter, dict[str, str]]:
    updates: dict[str, Update] = {}
    notes: dict[str, str] = {}
    for name, module in files.modules.items():
        found = _module_factors(files, name, module)
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


def _module_factors(files: PeftFiles, name: str, module: Module) -> LowRank | str:
    """The factors of a module, or why there are none to look at."""
    if module.outputs is not None:
        return "VeRA, whose file does not tell how many inputs a module has"
    rank, experts, _, scale = _rank_and_scale(files, name, module)
    if scale is None:
        return "the file does not tell its scale"
    plain = module.plain(len(module.b) * module.a.shape[1])
    if module.kind != "parameter" and plain.b.shape[1] != len(plain.a):
        return "a convolution in groups, whose A reads the channels of all of them"
    return _low_rank(name, *_stacks(plain, rank, experts), scale)


def _low_rank(name: str, a: np.ndarray, b: np.ndarray, scale: float) -> LowRank:
    """Factors `[stack, rank, inputs]` and `[stack, rank, outputs]`; a stack of one is none."""
    axes: dict[str, Any] = {"in_axes": (1,), "out_axes": (2,), "batch_axes": (0,)}
    stack = len(a)
    if stack == 1:
        a, b, axes = a[0], b[0], {"in_axes": (0,), "out_axes": (1,)}
    shape = (*a.shape[:-2], a.shape[-1], b.shape[-1])
    site = Site(path=name, shape=shape, dtype="float32", kind="dense", **axes)
    scales = jnp.full(site.batch_shape, scale, jnp.float32)
    return LowRank(jnp.asarray(a), jnp.asarray(b), scales, site)


def _orbax(where: Path) -> list[Entry]:
    config = orbax.load_config(where)
    root = config is not None and config.rslora
    adapter = jax.tree.map(np.asarray, orbax.load(where))
    return [_update(path, update, root) for path, update in adapter.items()]


def _update(path: str, update: Update, root: bool) -> Entry:
    arrays: dict[str, Any] = manifest.arrays(update)
    nbytes, site = sum(array.nbytes for array in arrays.values()), update.site
    plain = update.low_rank()
    if plain is None:
        value = next(iter(arrays.values()))
        return Entry(
            path, site.kind, site.shape, None, None, None, (None, None, _norm(value)), str(value.dtype), nbytes
        )
    scales = np.asarray(plain.scale, np.float32).reshape(-1)
    stack, scale = prod(site.batch_shape), float(np.abs(scales).max(initial=0))
    a, b = (np.asarray(array, np.float32).reshape(stack, plain.rank, -1) for array in (plain.a, plain.b))
    alpha = scale * (sqrt(plain.rank) if root else plain.rank)
    norms = (_norm(a), _norm(b), _product_norm(a, b * scales[:, None, None]))
    return Entry(path, site.kind, site.shape, plain.rank, alpha, scale, norms, str(plain.a.dtype), nbytes)


def _norm(value: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(value, np.float64)))


def _product_norm(a: np.ndarray, b: np.ndarray) -> float:
    """Norm of `Σ_r a[r] ⊗ b[r]` over a stack, from two Gram matrices of the rank's size."""
    grams = [np.einsum("eri,esi->ers", each, each, dtype=np.float64, optimize=True) for each in (a, b)]
    return sqrt(max(float(np.sum(grams[0] * grams[1])), 0.0))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
