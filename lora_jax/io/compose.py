"""Composing PEFT adapters on disk, without the model they belong to, and with its checkpoint where values need it.

PyTorch's modules become parameters of their own kind: an adapter by module name, in PyTorch's layout. What PEFT stores
whole is a value there, DoRA's magnitudes too: their differences to the base are known only with it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.base import agreed
from lora_jax.adapter.site import Kind, Site
from lora_jax.adapter.updates import LowRank, Replace, Update
from lora_jax.compose import compose_report
from lora_jax.compose.compose import ComposeReport
from lora_jax.errors import CheckpointError
from lora_jax.io.hf.changes import Change
from lora_jax.io.hf.folder import Checkpoint
from lora_jax.io.hf.plan import PlacedAdapter
from lora_jax.io.hf.tensors import Tensor
from lora_jax.io.peft import config as peft_config
from lora_jax.io.peft.config import LORA, peft_type_of
from lora_jax.io.peft.files import TOKEN_ROWS, PeftFiles, base_tables, full_tensors, token_indices, token_rows
from lora_jax.io.peft.module import Module, ModuleKind
from lora_jax.io.peft.rename import resolved
from lora_jax.methods import Rows, Shift

_KINDS: dict[str, Kind] = {"linear": "dense", "conv": "conv", "embedding": "embedding"}
_MAGNITUDE = ".lora_magnitude_vector"
"""What follows a module's name in that of its DoRA magnitudes."""

_BIAS = ".lora_B.bias"
_ROWS = 1 << 31
"""Rows of a table that is known by some of its rows only."""

_CONVERT = "Convert the adapters first (lora-jax convert), and compose them in lora_jax's own format."


def compose_files(
    files: Sequence[PeftFiles],
    weights: Sequence[float] | None = None,
    base: Mapping[str, np.ndarray] | None = None,
    **settings: Any,
) -> tuple[PeftFiles, ComposeReport]:
    """Compose PEFT adapters; see `lora_jax.compose`.

    Args:
      files: what to compose.
      weights: as for `lora_jax.compose`.
      base: from `base_values`; without it, values that replace the base's need weights that add up
        to 1.
      **settings: likewise, but for `params`.

    Returns:
      The composition, with a scale of 1 everywhere, and the report on it, by module name.

    Raises:
      CheckpointError: the adapters do not go together, or hold what cannot be composed without the model.
      LoraError: as `lora_jax.compose` does.

    Example:
      >>> module = Module("linear", np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))
      >>> files = PeftFiles({"r": 2, "lora_alpha": 2, "target_modules": ["q"]}, {"q": module})
      >>> made, report = compose_files([files, files], [1.0, -0.5])
      >>> made.rank("q"), float(made.delta("q", (3, 4))[0, 0]), report.rows[0].rank
      (4, 1.0, 4)
    """
    files = _named_alike(files)
    _check_alike(files)
    tables = _untouched(files, base)
    adapters = [_adapter(each, base or {}, tables) for each in files]
    params = None if base is None else _params(adapters, base)
    report = compose_report(adapters, weights, params=params, **settings)
    return _files(report.adapter, files, tables), report


def _named_alike(files: Sequence[PeftFiles]) -> list[PeftFiles]:
    """All under the first names that their modules have: one tool writes `unet.` before them, another does not."""
    found: list[PeftFiles] = []
    known: set[str] = set()
    for each in files:
        found.append(resolved(each, known))
        known |= {*found[-1].modules}
    return found


def _untouched(files: Sequence[PeftFiles], base: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Tables of the base that the files have as they are there: the composition has them too, and they add nothing.

    Without a base they are those that are alike in all files, or in all that have factors beside them.
    """
    found: dict[str, np.ndarray] = {}
    for name in sorted({name for each in files for name in base_tables(each)}):
        holders = [each for each in files if name in each.saved]
        first = holders[0].saved[name] if base is None else base[name]
        beside = all(name.rpartition(".")[0] in each.modules for each in holders)
        if (base is not None or beside or len(holders) == len(files)) and all(
            name in base_tables(each) and np.array_equal(each.saved[name], first) for each in holders
        ):
            found[name] = holders[0].saved[name]
    return found


def base_values(base: Checkpoint, adapters: Sequence[PeftFiles]) -> dict[str, np.ndarray]:
    """What `compose_files` needs of a base, by the adapters' names: all else is factors, which need no base.

    Raises:
      CheckpointError: the base does not have what an adapter changes, or in another shape, or it is quantised.
    """
    found: dict[str, np.ndarray] = {}
    for files in adapters:
        placed = PlacedAdapter(base, files, 1.0)
        changes, untouched = placed.changes(), placed.untouched()
        found |= {name: np.asarray(files.saved[name], np.float32) for name in untouched}
        for name in full_tensors(files.saved).keys() - untouched:
            tensor = base.tensors.get(placed.place(name))
            if tensor is None:
                raise CheckpointError(
                    f"{base.path} has no {name}, which {files.where} trains in full: compose without a base, with "
                    "weights that add up to 1"
                )
            found[name] = _read_tensor(tensor, changes[tensor.name])
        for name in token_rows(files.saved):
            tensor = placed.tensor(f"{name}.weight")
            found[name + TOKEN_ROWS] = _read_tensor(tensor, changes[placed.place(f"{name}.weight")])
        for name, module in files.modules.items():
            if module.magnitude is not None:
                tensor = placed.tensor(f"{name}.weight")
                norms = _norms(tensor, changes[tensor.name])
                found[name + _MAGNITUDE] = norms.reshape(module.magnitude.shape)
    return found


def _params(adapters: Sequence[Adapter], base: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The base as parameters; zeros without memory where only its shape counts."""
    sites = {path: update.site for adapter in adapters for path, update in adapter.items()}
    return {path: base.get(path, np.broadcast_to(np.float32(0), site.shape)) for path, site in sites.items()}


def _adapter(files: PeftFiles, base: Mapping[str, np.ndarray], untouched: Collection[str]) -> Adapter:
    updates: dict[str, Update] = {}
    dropout = float(files.config.get("lora_dropout") or 0.0)
    for name, module in files.modules.items():
        scale = jnp.float32(files.scale(name))
        updates[name] = _factors(files.where, name, module, scale, dropout)
        if module.magnitude is not None:
            updates[name + _MAGNITUDE] = _whole(files.where, name + _MAGNITUDE, module.magnitude)
        if module.b_bias is not None:
            bias = _whole(files.where, name + _BIAS, module.b_bias)
            updates[bias.site.path] = Shift(bias.value, scale, bias.site)
    for name, value in token_rows(files.saved).items():
        numbers = token_indices(files.where, files.config, name, value)
        shape = base[name + TOKEN_ROWS].shape if name + TOKEN_ROWS in base else (_ROWS, value.shape[1])
        site = Site(path=name + TOKEN_ROWS, shape=shape, dtype="float32", kind="embedding", in_axes=(0,), out_axes=(1,))
        updates[site.path] = Rows(jnp.asarray(value), site, numbers)
    for name, value in full_tensors(files.saved).items():
        if name not in untouched:
            updates[name] = _whole(files.where, name, value)
    return Adapter(updates)


def _factors(where: str, name: str, module: Module, scale: Any, dropout: float) -> LowRank:
    if module.kind == "parameter" or module.b.shape[1] != len(module.a):
        what = "a parameter adapted by itself" if module.kind == "parameter" else "a convolution in groups"
        raise CheckpointError(f"{where}: {name} is {what}, of which the files do not tell the layout. {_CONVERT}")
    outputs, inputs = len(module.b), module.a.shape[1:]
    last = module.kind == "embedding"
    shape = (*inputs, outputs) if last else (outputs, *inputs)
    into = (0,) if last else tuple(range(1, len(shape)))
    site = Site(
        path=name, shape=shape, dtype="float32", kind=_KINDS[module.kind],
        in_axes=into, out_axes=(len(shape) - 1,) if last else (0,),
    )  # fmt: skip
    return LowRank(jnp.asarray(module.a), jnp.asarray(module.b.reshape(outputs, -1).T), scale, site, dropout)


def _whole(where: str, name: str, value: np.ndarray) -> Replace:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise CheckpointError(f"{where}: {name} is {value.dtype}, and integers cannot be composed")
    site = Site(path=name, shape=value.shape, dtype="float32", kind="full")
    return Replace(jnp.asarray(value), site)


def _files(adapter: Adapter, sources: Sequence[PeftFiles], tables: Mapping[str, np.ndarray]) -> PeftFiles:
    arrays = {path: _array(update) for path, update in adapter.items() if not isinstance(update, LowRank)}
    modules: dict[str, Module] = {}
    kinds: dict[str, ModuleKind] = {name: module.kind for each in sources for name, module in each.modules.items()}
    for name, update in adapter.items():
        if isinstance(update, LowRank):
            kind = kinds[name]
            a, b = np.asarray(update.a), _laid_out(kind, np.asarray(update.b).T, update.a.ndim)
            modules[name] = Module(kind, a, b, arrays.pop(name + _MAGNITUDE, None), arrays.pop(name + _BIAS, None))
    rows = {path.removesuffix(TOKEN_ROWS): each.rows for path, each in adapter.items() if isinstance(each, Rows)}
    config = _config(modules, rows, adapter, [each.config for each in sources])
    base = agreed({each.where: each.base for each in sources})
    return PeftFiles(config, modules, {**tables, **arrays}, base=base)


def _laid_out(kind: ModuleKind, b: np.ndarray, axes: int) -> np.ndarray:
    return b.reshape(*b.shape, *[1] * (axes - 2)) if kind == "conv" else b


def _array(update: Any) -> np.ndarray:
    return np.asarray(update.value)


def _config(
    modules: Mapping[str, Module],
    rows: Mapping[str, tuple[int, ...]],
    adapter: Adapter,
    configs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What the files of the composition say: a scale of 1, and what those of its parts have in common."""
    ranks = {name: len(module.a) for name, module in modules.items()}
    known = {name: _first(configs, name) for name in ("base_model_name_or_path", "task_type", "fan_in_fan_out")}
    biases = {config.get("bias") or "none" for config in configs}
    factors = [update for update in adapter.values() if isinstance(update, LowRank)]
    return {
        **peft_config.inferred(ranks, _union(configs, "modules_to_save")),
        **known,
        "target_modules": _targets(configs) or sorted(modules),
        "bias": next((name for name in ("all", "lora_only") if name in biases), "none"),
        "lora_dropout": factors[0].dropout if factors else 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": any(module.magnitude is not None for module in modules.values()),
        "lora_bias": any(module.b_bias is not None for module in modules.values()),
        "trainable_token_indices": {name: list(numbers) for name, numbers in rows.items()} or None,
    }


def _first(configs: Sequence[Mapping[str, Any]], field: str) -> Any:
    return next((config[field] for config in configs if config.get(field)), None)


def _union(configs: Sequence[Mapping[str, Any]], field: str) -> list[str]:
    return sorted({name for config in configs for name in config.get(field) or ()})


def _targets(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The union of all targets; nothing where a regex, layers or exclusions decide too, so that names must."""
    plain = all(
        isinstance(config.get("target_modules"), list)
        and not config.get("exclude_modules")
        and config.get("layers_to_transform") is None
        for config in configs
    )
    return _union(configs, "target_modules") if plain else []


def _check_alike(files: Sequence[PeftFiles]) -> None:
    """Refuse files of which names do not tell what goes with what."""
    if len({bool(each.config.get("fan_in_fan_out")) for each in files}) > 1:
        raise CheckpointError("fan_in_fan_out differs between the adapters: they are not of the same model")
    for each in files:
        if peft_type_of(each.config) is not LORA:
            raise CheckpointError(f"{each.where} is {peft_type_of(each.config).label}, no plain LoRA. {_CONVERT}")
        if each.config.get("alora_invocation_tokens"):
            raise CheckpointError(f"{each.where} is aLoRA: adapters that act on different tokens cannot become one")
        if each.config.get("ensure_weight_tying"):
            raise CheckpointError(f"{each.where}: ensure_weight_tying stores the factors of a table twice. {_CONVERT}")
    for name in sorted({name for each in files for name in each.modules}):
        dora = {each.modules[name].magnitude is not None for each in files if name in each.modules}
        if len(dora) > 1:
            raise CheckpointError(
                f"{name} is DoRA in one adapter and not in another, which cannot become one without the base. Compose "
                "them in Python: lora_jax.methods.precompute(params, adapter) takes DoRA's norm out."
            )


def _read_tensor(tensor: Tensor, change: Change) -> np.ndarray:
    change.check(tensor)
    columns = tensor.shape[-1] if tensor.shape else 1
    rows = prod(tensor.shape) // max(columns, 1)
    return tensor._replace(shape=(rows, columns)).rows(0, rows).reshape(tensor.shape).astype(np.float32)


def _norms(tensor: Tensor, change: Change) -> np.ndarray:
    """Of the weights of every output."""
    weight = _read_tensor(tensor, replace(change, value=None, rows=()))
    flat = weight.reshape(-1, weight.shape[-1]).T if change.outputs_last else weight.reshape(len(weight), -1)
    return np.sqrt(np.square(flat, dtype=np.float64).sum(1)).astype(np.float32)
