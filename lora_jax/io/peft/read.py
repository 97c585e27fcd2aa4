"""Reading a PEFT adapter: every tensor of `adapter_model.safetensors` means what its config says, or is refused."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.adapter.origin import note
from lora_jax.errors import CheckpointError, listed
from lora_jax.io.formats.mlx_lm import MlxAdapter, from_mlx, is_mlx, is_mlx_config
from lora_jax.io.formats.recognise import adapter_file, refuse_folder
from lora_jax.io.formats.signatures import check_bytes, check_text
from lora_jax.io.formats.spellings import respelled
from lora_jax.io.formats.variants import check_keys
from lora_jax.io.peft import config as peft_config
from lora_jax.io.peft.base import base_in
from lora_jax.io.peft.config import ADALORA, CONFIG, LORA, PeftType, peft_type_of
from lora_jax.io.peft.files import EMBEDDINGS, PeftFiles
from lora_jax.io.peft.keys import parse, unparse
from lora_jax.io.peft.match import saves, targets
from lora_jax.io.peft.module import Module, ModuleKind
from lora_jax.io.peft.scales import Source, configs_in, from_configs, from_tensors, settled
from lora_jax.io.peft.without_factors import as_lora, has_no_factors
from lora_jax.jsonfile import read_object
from lora_jax.publish import steady

_MAX_RANK = 1 << 16
_DTYPES = {"F16", "BF16", "F32", "F64"}
_COUNTS = {"I64", "I32", "BOOL"}
_SMALL = {"I16", "I8", "U8"}


def read_peft(path: str | PathLike[str], subfolder: str | None = None, *, alpha: float | None = None) -> PeftFiles:
    """Read a PEFT adapter from a directory, or from a `.safetensors` file with or without a config beside it.

    Factors of other tools are read too, under PEFT's names; `docs/files.md` lists them.

    Arrays keep their dtype. Keys are taken with or without the prefix `base_model.model.`, with `_orig_mod.` and
    `_fsdp_wrapped_module.` anywhere, and with the name of an adapter in them, as in the state of a live model.

    Args:
      path: the directory that `save_pretrained` wrote, or a file.
      subfolder: name of an adapter in a subdirectory; PEFT puts every adapter not called `default` into one.
      alpha: the `lora_alpha` of modules whose scale nothing tells: no config, no metadata, no alpha tensor. Without it
        they are in `unscaled`.

    Returns:
      The files' contents; see `PeftFiles`.

    Raises:
      CheckpointError: there is no adapter, it is damaged, it has keys that mean nothing, or its config says that
        the arrays mean something that cannot be represented.

    Example:
      >>> import tempfile
      >>> from lora_jax.io.peft.write import write_peft
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> modules = {"q": Module("linear", np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))}
      >>> write_peft(folder, PeftFiles({"r": 2, "lora_alpha": 4, "target_modules": ["q"]}, modules))
      >>> read_peft(folder).modules["q"].a.shape
      (2, 4)
    """
    weights, _ = _locate(Path(path).expanduser(), subfolder)
    return steady(weights.parent, lambda: _read(Path(path).expanduser(), subfolder, alpha))


def read_several(paths: Sequence[str | PathLike[str]], alpha: float | None = None) -> list[PeftFiles]:
    """Read several adapters; alpha goes to those whose scale nothing tells.

    Raises:
      CheckpointError: as for `read_peft`; nothing tells the scale of one of them, or of none and `alpha` is given.
    """
    found = [read_peft(path) for path in paths]
    if alpha is not None and not any(files.unscaled for files in found):
        read_peft(paths[0], alpha=alpha)
    found = [_scaled(files, alpha) if files.unscaled and alpha is not None else files for files in found]
    for files in found:
        files.check_scales()
    return found


def _scaled(files: PeftFiles, alpha: float) -> PeftFiles:
    """The same as if it had been read with this alpha."""
    ranks = {name: len(module.a) for name, module in files.modules.items()}
    told = {name: files.scale(name) for name in ranks.keys() - files.unscaled}
    scales = told | settled(files.where, [], {name: ranks[name] for name in files.unscaled}, alpha)
    guess = peft_config.inferred(ranks, [], scales)
    fields = {field: guess[field] for field in ("lora_alpha", "alpha_pattern")}
    return replace(files, config={**files.config, **fields}, unscaled=frozenset())


def _read(path: Path, subfolder: str | None, alpha: float | None) -> PeftFiles:
    weights, config_path = _locate(path, subfolder)
    for each in (config_path, weights):
        note(each)
    check_text(config_path)
    config, where = read_object(config_path), str(weights)
    if config is not None and has_no_factors(config):
        given, metadata = _read_arrays(weights, {})
        config, arrays = as_lora(where, config, given)
        peft_config.check(str(config_path), config)
        return replace(_assemble(where, config, arrays, {}, alpha), base=base_in(where, metadata))
    ours = None if is_mlx_config(where, config) else config
    if ours is not None:
        peft_config.check(str(config_path), ours)
    arrays, metadata = _read_arrays(weights, ours)
    if is_mlx(where, config, arrays):
        return _from_mlx(where, from_mlx(where, config, arrays), alpha)
    files = _assemble(where, config, arrays, configs_in(where, metadata), alpha)
    return replace(files, base=base_in(where, metadata))


def _from_mlx(where: str, found: MlxAdapter, alpha: float | None) -> PeftFiles:
    told = [Source(f"mlx-lm's {CONFIG}", found.scales)] if found.scales else []
    files = _assemble(where, None, found.arrays, {}, alpha, told)
    return replace(files, config={**files.config, **found.fields})


def _locate(path: Path, subfolder: str | None) -> tuple[Path, Path]:
    """Paths of the arrays and of the config, which may not exist."""
    if subfolder is not None and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts or not subfolder):
        raise CheckpointError(f"subfolder={subfolder!r} must name a directory below {path}")
    folder = path / subfolder if subfolder else path
    try:
        return _located(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be looked into: {error}") from None


def _located(folder: Path) -> tuple[Path, Path]:
    if folder.is_file():
        return folder, folder.parent / CONFIG
    if not folder.exists():
        raise CheckpointError(f"There is nothing at {folder}. Check the path; PEFT's save_pretrained creates it.")
    weights = adapter_file(folder)
    if weights is None:
        refuse_folder(folder)
    if not weights.is_file():
        raise CheckpointError(f"{weights} is no regular file, which belongs there")
    return weights, folder / CONFIG


def _read_arrays(path: Path, config: Mapping[str, Any] | None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of the file, in its own dtype, and its metadata; without elements only if terms may be pruned."""
    pruned = peft_type_of(config or {}) is ADALORA
    try:
        check_bytes(path)
        with safe_open(path, framework="np") as file:
            keys = list(file.keys())
            check_keys(str(path), keys, configured=config is not None)
            for key in keys:
                _check_tensor(path, key, file.get_slice(key), pruned)
            arrays, metadata = {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {error}. It is damaged or cut short; copy it again."
        ) from None
    for key, array in arrays.items():
        _check_finite(path, key, array)
    return arrays, metadata


def _check_finite(path: Path, key: str, array: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32, copy=False))
    if not finite.all():
        raise CheckpointError(
            f"{path}: {key} has {finite.size - np.count_nonzero(finite)} values that are NaN or infinite in float32. "
            "The training diverged, or the file is damaged; use an earlier checkpoint."
        )


def _check_tensor(path: Path, key: str, tensor: Any, pruned: bool) -> None:
    # Batch normalisation counts its steps; a whole module is stored with all it has.
    factor = any(part in key for part in ("lora_", ".lora.", "vera_")) and not key.endswith(".alpha")
    allowed = _DTYPES if factor else _DTYPES | _COUNTS | (_SMALL if key.endswith(".alpha") else set())
    if tensor.get_dtype() not in allowed:
        raise CheckpointError(
            f"{path}: {key} is {tensor.get_dtype()}; adapters are stored as one of {', '.join(sorted(_DTYPES))}. "
            "Quantised adapters cannot be read: save them in a floating-point dtype."
        )
    if 0 in tensor.get_shape() and factor and not (pruned and len(tensor.get_shape()) == 2):
        raise CheckpointError(
            f"{path}: {key} has shape {tuple(tensor.get_shape())}, so it holds nothing: the parameters were sharded "
            "(DeepSpeed ZeRO-3, FSDP) and not gathered when they were saved. Gather them and save again."
        )


def _assemble(
    where: str,
    given: dict[str, Any] | None,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, Mapping[str, Any]],
    alpha: float | None,
    told: Sequence[Source] = (),
) -> PeftFiles:
    spelled = respelled(where, arrays)
    # What the metadata says for all modules is a config like any other.
    config = given if given is not None else metadata.get("")
    found = _Found(where, peft_type_of(config or {}), spelled.arrays)
    ranks = {name: each["a"].shape[0] for name, each in found.parts.items() if "a" in each and each["a"].ndim}
    alphas = {parse(where, f"{name}.lora_A.weight").name: each for name, each in spelled.alphas.items()}
    sources = [*told, *([from_configs(metadata, ranks)] if metadata else [])]
    sources += [from_tensors(alphas, ranks)] if alphas else []
    sources = [from_configs({"": given}, ranks)._replace(name=CONFIG), *sources] if given is not None else sources
    scales = settled(where, sources, ranks, alpha)
    if config is None:
        config = peft_config.inferred(ranks, sorted(found.marked), scales)
    _refuse_unknown(where, [*found.unknown, *(n for n in found.whole if not _belongs(n, config, found.parts))])
    modules = {
        name: _module(where, name, found.shared | each, name in found.embeddings, config)
        for name, each in sorted(found.parts.items())
    }  # fmt: skip
    if not modules and not found.whole:
        raise CheckpointError(f"{where} holds no tensors at all")
    # A config that leaves out alpha means PEFT's default.
    unscaled = frozenset(modules.keys() - scales.keys()) if given is None and "" not in metadata else frozenset()
    return PeftFiles(_completed(config, modules), modules, dict(sorted(found.whole.items())), where, unscaled)


class _Found:
    """The tensors of a file, sorted by what their keys say they are."""

    def __init__(self, where: str, peft_type: PeftType, arrays: Mapping[str, np.ndarray]):
        self.peft_type = peft_type
        self.parts: dict[str, dict[str, np.ndarray]] = {}
        # Projections that all modules share.
        self.shared: dict[str, np.ndarray] = {}
        self.embeddings: set[str] = set()
        self.whole: dict[str, np.ndarray] = {}
        # Modules that the keys themselves, those of a live model, say are saved whole.
        self.marked: set[str] = set()
        self.unknown: list[str] = []
        for raw, array in arrays.items():
            # With bias="all" PEFT writes the biases of saved modules again, under the name of its wrapper.
            plain = arrays.get(raw.replace(".modules_to_save.", "."))
            if ".modules_to_save." not in raw or plain is None or not np.array_equal(plain, array):
                self._add(where, raw, array)

    def _add(self, where: str, raw: str, array: np.ndarray) -> None:
        key = parse(where, raw)
        if key.part is None:
            _put(where, self.whole, key.name, array, raw)
            self.marked |= {key.name.rpartition(".")[0]} if ".modules_to_save." in raw else set()
        elif key.part == "unknown":
            self.unknown.append(raw)
        elif key.part != "unused":
            if key.form not in self.peft_type.forms:
                raise CheckpointError(
                    f"{where}: {raw} is no key of an adapter of peft_type={self.peft_type.name!r}, which {CONFIG} says "
                    "(or LORA, if it is missing). One of the two files belongs to another adapter, or is lost."
                )
            _put(where, self.parts.setdefault(key.name, {}) if key.name else self.shared, key.part, array, raw)
            self.embeddings |= {key.name} if key.form == "embedding" else set()


def _put(where: str, group: dict[str, np.ndarray], name: str, array: np.ndarray, raw: str) -> None:
    if name in group:
        raise CheckpointError(
            f"{where}: {raw} and another key mean the same tensor: the file holds several adapters. Save one of them."
        )
    group[name] = array


def _belongs(name: str, config: Mapping[str, Any], modules: Iterable[str]) -> bool:
    """Whether PEFT has a reason to store a whole tensor under this name."""
    owner, _, leaf = name.rpartition(".")
    if leaf == "trainable_tokens_delta":
        return bool(config.get("trainable_token_indices"))
    if saves(config.get("modules_to_save"), name) or (owner in modules and leaf in ("weight", "bias")):
        return True
    if leaf == "bias" and peft_config.setting(config, "bias") != "none":
        return True
    return leaf in ("weight", "bias") and owner.rpartition(".")[2] in EMBEDDINGS


def _refuse_unknown(where: str, keys: list[str]) -> None:
    if keys:
        raise CheckpointError(
            f"{where}: {len(keys)} tensors are neither factors nor anything its config asks for "
            f"(modules_to_save, bias, trainable_token_indices): {listed(sorted(keys))}. "
            "They would be lost; remove them, or complete the config."
        )


def _module(
    where: str, name: str, found: Mapping[str, np.ndarray], embedding: bool, config: Mapping[str, Any]
) -> Module:
    adapter = peft_type_of(config)
    missing = [part for part in adapter.parts if part not in found]
    key = unparse(name, missing[0] if missing else "a", "embedding" if embedding else adapter.forms[0])
    if missing and key.startswith("base_model.vera_"):
        raise CheckpointError(
            f"{where}: {key} is missing (save_projection=False): PyTorch draws it again from projection_prng_key, and "
            "JAX cannot. Save the adapter in PEFT with save_projection=True; docs/from-peft.md has the lines."
        )
    if missing:
        raise CheckpointError(f"{where}: {key} is missing, although the module's other tensors are there")
    kind = _kind(name, found["a"], embedding, config)
    module = Module(kind, **found)
    _check_rank(where, name, module, peft_config.rank_of(config, name) if kind != "parameter" else None)
    if module.form == "adalora" and module.values is not None and module.values.shape[1:] == (1,):
        # PEFT's lora_E has a second axis.
        module = replace(module, values=module.values[:, 0])
    _check_vectors(where, name, module)
    return module


def _check_vectors(where: str, name: str, module: Module) -> None:
    """Refuse vectors that do not fit the factors they multiply."""
    rank, most = len(module.a), len(module.b)
    if module.values is not None and module.values.shape != (rank,):
        key = unparse(name, "values", module.form)
        raise CheckpointError(f"{where}: {key} of shape {module.values.shape} does not fit rank {rank}")
    if module.outputs is not None and (module.outputs.ndim != 1 or not 0 < module.outputs.size <= most):
        key = unparse(name, "outputs", module.form)
        raise CheckpointError(f"{where}: {key} of shape {module.outputs.shape} does not fit vera_B with {most} rows")


def _kind(name: str, a: np.ndarray, embedding: bool, config: Mapping[str, Any]) -> ModuleKind:
    if embedding:
        return "embedding"
    if peft_type_of(config) is not LORA:
        return "linear"
    if name.endswith(".base_layer") or (
        config.get("target_parameters") and not targets(config.get("target_modules"), name)
    ):
        return "parameter"
    return "conv" if a.ndim > 2 else "linear"


def _check_rank(where: str, name: str, module: Module, wanted: int | None) -> None:
    a, b = module.a.shape, module.b.shape
    key, other = f"{unparse(name, 'a', module.form)} of shape {a}", "vera_B" if module.form == "vera" else "lora_B"
    flat = module.kind != "conv"
    if len(a) != len(b) or len(a) < 2 or (flat and (len(a) > 2 or a[0] != b[1])) or a[0] % max(b[1], 1):
        raise CheckpointError(f"{where}: {key} does not fit {other} of shape {b}: they must share the rank")
    if a[0] > _MAX_RANK and module.kind != "parameter":
        raise CheckpointError(f"{where}: {key} has rank {a[0]}, more than the {_MAX_RANK} that is believable")
    if wanted is not None and wanted != a[0]:
        raise CheckpointError(
            f"{where}: {key} has rank {a[0]}, but {CONFIG} says {wanted} (r or init_r, and rank_pattern). One of the "
            "two files belongs to another adapter."
        )


def _completed(config: Mapping[str, Any], modules: Mapping[str, Module]) -> dict[str, Any]:
    """The config with the fields it lacks, from the arrays."""
    ranks = {name: len(module.a) for name, module in modules.items() if module.kind != "parameter"}
    guess = peft_config.inferred(ranks, [])
    lacking = {"r", "rank_pattern"} if config.get("r") is None and ranks and peft_type_of(config) is LORA else set()
    if not config.get("target_modules") and not config.get("target_parameters") and ranks:
        lacking.add("target_modules")
    return {**config, **{name: guess[name] for name in lacking}}
