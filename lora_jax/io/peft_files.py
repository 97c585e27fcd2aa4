"""PEFT adapter directories as plain NumPy: what `adapter_model.safetensors` and `adapter_config.json` say, both ways.

Neither a model nor a JAX program is involved. Names are those of PyTorch modules relative to the base model.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_jax.errors import CheckpointError
from lora_jax.io import peft_config
from lora_jax.io.peft_delta import Module, ModuleKind, delta, owners
from lora_jax.io.peft_disk import CONFIG, WEIGHTS, locate, read_arrays, read_config
from lora_jax.io.peft_keys import PREFIX, parse, unparse
from lora_jax.io.peft_match import saves, targets

_MAX_RANK = 1 << 16
_SHOWN = 5
# Layers that `save_embedding_layers` writes although no config names them.
EMBEDDINGS = (
    "embed_tokens", "lm_head", "wte", "shared", "word_embeddings", "embed_in", "embed_out", "tok_embeddings",
    "token_embedding", "embed", "embedding", "embeddings", "output", "head",
)  # fmt: skip


@dataclass(frozen=True)
class PeftFiles:
    """An adapter as PEFT stores it.

    Attributes:
      config: `adapter_config.json` as it is; what it lacks is completed from the arrays.
      modules: factors by the name of their module, as in `model.layers.0.self_attn.q_proj`. Where several parameters
        of one module are adapted, PEFT nests them: `experts` is the outermost, `experts.base_layer` the next.
      saved: whole tensors by the name they have in the base model (`modules_to_save`, biases, saved embeddings), and
        rows as `<module>.token_adapter.trainable_tokens_delta`.
      where: the file they come from, for error messages.

    Example:
      >>> files = PeftFiles({"r": 2, "lora_alpha": 4}, {"q": Module("linear", np.ones((2, 4)), np.ones((3, 2)))}, {})
      >>> files.rank("q"), files.scale("q"), float(files.delta("q", (3, 4))[0, 0])
      (2, 2.0, 4.0)
    """

    config: Mapping[str, Any]
    modules: Mapping[str, Module]
    saved: Mapping[str, np.ndarray] = field(default_factory=dict)
    where: str = "the adapter"

    def rank(self, module: str, experts: int = 1) -> int:
        """The rank of a module: that of its arrays, which is per weight where a parameter stacks several."""
        return self.modules[module].a.shape[0] // experts

    def alpha(self, module: str, parameter: str | None = None) -> float:
        """Alpha of a module: the first `alpha_pattern` key that matches, else `lora_alpha`, else PEFT's 8.

        Args:
          module: its name.
          parameter: full name of the adapted parameter, for kind `parameter`: PEFT looks that up in its patterns.
        """
        return peft_config.alpha_of(self.config, parameter or module)

    def scale(self, module: str, parameter: str | None = None, experts: int = 1) -> float:
        """`alpha / rank` of a module, or `alpha / sqrt(rank)` under `use_rslora`; arguments as above."""
        return peft_config.scale_of(self.config, parameter or module, self.rank(module, experts))

    def delta(
        self, module: str, shape: tuple[int, ...], *, parameter: str | None = None, transposed: bool | None = None
    ) -> np.ndarray:
        """What the adapter adds to a weight, scale included, in PyTorch's layout.

        Args:
          module: name of the module.
          shape: shape of the tensor to add to: it tells a stack of experts, groups, and how the weight lies.
          parameter: full name of the adapted parameter, for kind `parameter`.
          transposed: whether the weight is stored `(in, out)`, or `(experts, in, out)`. By default it is read off
            the shape, and off `fan_in_fan_out` for a square one.

        Returns:
          Float32 array of the given shape.

        Raises:
          CheckpointError: the factors do not fit the shape, a square stack of experts needs `transposed`, or the
            change is not one of the weight alone (DoRA, convolutions in groups).

        Example:
          >>> module = Module("embedding", np.ones((2, 9)), np.ones((4, 2)))
          >>> PeftFiles({"lora_alpha": 2}, {"wte": module}).delta("wte", (9, 4)).shape
          (9, 4)
        """
        found = self.modules[module]
        if found.magnitude is not None:
            raise CheckpointError(
                f"{self.where}: {module} uses DoRA, which rescales the weight itself, so it has no delta to add. "
                "Merge it in PEFT (merge_and_unload)."
            )
        stacked = found.kind == "parameter" and len(shape) == 3
        scale = self.scale(module, parameter, shape[0] if stacked else 1)
        return delta(f"{self.where}: {parameter or module}", found, scale, shape, self._transposed(found, transposed))

    def _transposed(self, module: Module, given: bool | None) -> bool | None:
        if given is not None or module.kind == "parameter":
            return given
        return bool(peft_config.setting(self.config, "fan_in_fan_out")) if module.kind == "linear" else None

    def owners(self, shapes: Mapping[str, tuple[int, ...]], *, ordered: bool = False) -> dict[str, str]:
        """Which entry of `modules` belongs to which parameter, for modules of kind `parameter`.

        The files say only how deep the entries of one module are nested; the parameters that PyTorch declares first
        are nested deepest.

        Args:
          shapes: shapes of the base's tensors by full name; those that `target_parameters` does not name are ignored.
          ordered: whether `shapes` is in the order in which the modules declare their parameters. If not, parameters
            of one module are told apart by their shapes.

        Returns:
          Name in `modules` by full name of the parameter.

        Raises:
          CheckpointError: an entry has no parameter, or shapes cannot tell them apart.
        """
        return owners(self.where, self.modules, self.config.get("target_parameters") or (), shapes, ordered)


def read_peft(path: str | PathLike[str], subfolder: str | None = None) -> PeftFiles:
    """Read a PEFT adapter from a directory, or from a `.safetensors` file with or without a config beside it.

    Arrays keep their dtype. Keys are taken with or without the prefix `base_model.model.`, with `_orig_mod.` and
    `_fsdp_wrapped_module.` anywhere, and with the name of an adapter in them, as in the state of a live model.

    Args:
      path: the directory that `save_pretrained` wrote, or a file.
      subfolder: name of an adapter in a subdirectory; PEFT puts every adapter not called `default` into one.

    Returns:
      The files' contents; see `PeftFiles`.

    Raises:
      CheckpointError: there is no adapter, it is damaged, it has keys that mean nothing, or its config says that
        the arrays mean something that cannot be represented.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> modules = {"q": Module("linear", np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))}
      >>> write_peft(folder, PeftFiles({"r": 2, "lora_alpha": 4, "target_modules": ["q"]}, modules))
      >>> read_peft(folder).modules["q"].a.shape
      (2, 4)
    """
    weights, config_path = locate(Path(path).expanduser(), subfolder)
    config = read_config(config_path)
    if config is not None:
        peft_config.check(str(config_path), config)
    return _assemble(str(weights), config, read_arrays(weights))


def write_peft(path: str | PathLike[str], files: PeftFiles, *, overwrite: bool = False) -> None:
    """Write a PEFT adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

    Both are written beside `path` and renamed at the end, so that a write cut short leaves nothing under that name.

    Args:
      path: the directory to create.
      files: what to write. Nothing of it is changed.
      overwrite: replace the two files of an adapter that is there already; other files beside them stay.

    Raises:
      CheckpointError: `path` exists (and, with `overwrite`, holds something other than an adapter), or there is
        nothing to write.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> modules = {"q": Module("linear", np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))}
      >>> write_peft(folder, PeftFiles({"r": 2, "target_modules": {"q"}}, modules))
      >>> sorted(os.listdir(folder))
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    where = Path(path).expanduser().absolute()
    if not files.modules and not files.saved:
        raise CheckpointError(f"Nothing to write to {where}: the adapter is empty")
    if where.exists() or where.is_symlink():
        _check_replaceable(where, overwrite)
    arrays = _tensors(files)
    text = (
        json.dumps(_plain({"peft_type": "LORA", **files.config, "inference_mode": True}), indent=2, sort_keys=True)
        + "\n"
    )
    try:
        _write(where, arrays, text)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be written: {error}") from None


def _write(where: Path, arrays: dict[str, np.ndarray], text: str) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where.parent, prefix=f".{where.name}-") as folder:
        beside = Path(folder) / "adapter"
        beside.mkdir()
        save_file(arrays, beside / WEIGHTS, metadata={"format": "pt"})
        (beside / CONFIG).write_text(text)
        if where.exists():
            for name in (WEIGHTS, CONFIG):
                os.replace(beside / name, where / name)
        else:
            os.replace(beside, where)


def _tensors(files: PeftFiles) -> dict[str, np.ndarray]:
    """Arrays by key. Contiguous: safetensors 0.8.0 writes wrong values for strided ones without a word."""
    keyed = {
        unparse(name, part, embedding=module.kind == "embedding"): array
        for name, module in files.modules.items()
        for part, array in module.arrays().items()
    }
    for name, array in files.saved.items():
        owner, _, leaf = name.rpartition(".")
        keyed[f"{PREFIX}{owner}.base_layer.{leaf}" if owner in files.modules else f"{PREFIX}{name}"] = array
    return {key: np.ascontiguousarray(array) for key, array in sorted(keyed.items())}


def _plain(value: Any) -> Any:
    """The value with sets as sorted lists, as JSON needs."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _check_replaceable(where: Path, overwrite: bool) -> None:
    if not overwrite:
        raise CheckpointError(f"{where} exists already. Choose another path, or pass overwrite=True to replace it.")
    if not (where / CONFIG).is_file() and not (where / WEIGHTS).is_file():
        raise CheckpointError(f"{where} exists and is no PEFT adapter, so it is left alone. Choose another path.")
    for name in (WEIGHTS, CONFIG):
        if (where / name).is_dir():
            raise CheckpointError(f"{where / name} is a directory where a file belongs, so {where} is left alone.")


def _assemble(where: str, config: dict[str, Any] | None, arrays: Mapping[str, np.ndarray]) -> PeftFiles:
    parts: dict[str, dict[str, np.ndarray]] = {}
    embeddings: set[str] = set()
    whole: dict[str, np.ndarray] = {}
    unknown: list[str] = []
    for raw, array in arrays.items():
        # With bias="all" PEFT writes the biases of saved modules again, under the name of its wrapper.
        plain = arrays.get(raw.replace(".modules_to_save.", "."))
        if ".modules_to_save." in raw and plain is not None and np.array_equal(plain, array):
            continue
        key = parse(where, raw)
        if key.part is None:
            _put(where, whole, key.name, array, raw)
        elif key.part == "unknown":
            unknown.append(raw)
        elif key.part != "unused":
            _put(where, parts.setdefault(key.name, {}), key.part, array, raw)
            embeddings |= {key.name} if key.embedding else set()
    if config is None:
        ranks = {name: found["a"].shape[0] for name, found in parts.items() if "a" in found and found["a"].ndim}
        config = peft_config.inferred(ranks, sorted({name.rpartition(".")[0] for name in whole}))
    unknown += [name for name in whole if not _belongs(name, config, parts)]
    _refuse_unknown(where, unknown)
    modules = {name: _module(where, name, found, name in embeddings, config) for name, found in sorted(parts.items())}
    if not modules and not whole:
        raise CheckpointError(f"{where} holds no tensors at all")
    return PeftFiles(_completed(config, modules), modules, dict(sorted(whole.items())), where)


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
    if owner in modules or saves(config.get("modules_to_save"), name):
        return True
    if leaf == "bias" and peft_config.setting(config, "bias") != "none":
        return True
    return leaf in ("weight", "bias") and owner.rpartition(".")[2] in EMBEDDINGS


def _refuse_unknown(where: str, keys: list[str]) -> None:
    if keys:
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        raise CheckpointError(
            f"{where}: {len(keys)} tensors are neither factors nor anything its config asks for "
            f"(modules_to_save, bias, trainable_token_indices): {', '.join(sorted(keys)[:_SHOWN])}{more}. "
            "They would be lost; remove them, or complete the config."
        )


def _module(
    where: str, name: str, found: Mapping[str, np.ndarray], embedding: bool, config: Mapping[str, Any]
) -> Module:
    missing = [part for part in ("a", "b") if part not in found]
    if missing:
        key = unparse(name, missing[0], embedding=embedding)
        raise CheckpointError(f"{where}: {key} is missing, although the module's other tensors are there")
    kind = _kind(name, found["a"], embedding, config)
    module = Module(kind, **found)
    _check_rank(where, name, module, peft_config.rank_of(config, name) if kind != "parameter" else None)
    return module


def _kind(name: str, a: np.ndarray, embedding: bool, config: Mapping[str, Any]) -> ModuleKind:
    if embedding:
        return "embedding"
    if name.endswith(".base_layer") or (
        config.get("target_parameters") and not targets(config.get("target_modules"), name)
    ):
        return "parameter"
    return "conv" if a.ndim > 2 else "linear"


def _check_rank(where: str, name: str, module: Module, wanted: int | None) -> None:
    a, b = module.a.shape, module.b.shape
    key = f"{unparse(name, 'a', embedding=module.kind == 'embedding')} of shape {a}"
    flat = module.kind != "conv"
    if len(a) != len(b) or len(a) < 2 or (flat and (len(a) > 2 or a[0] != b[1])) or a[0] % max(b[1], 1):
        raise CheckpointError(f"{where}: {key} does not fit lora_B of shape {b}: they must share the rank")
    if a[0] > _MAX_RANK and module.kind != "parameter":
        raise CheckpointError(f"{where}: {key} has rank {a[0]}, more than the {_MAX_RANK} that is believable")
    if wanted is not None and wanted != a[0]:
        raise CheckpointError(
            f"{where}: {key} has rank {a[0]}, but {CONFIG} says {wanted} (r and rank_pattern). One of the two files "
            "belongs to another adapter."
        )


def _completed(config: Mapping[str, Any], modules: Mapping[str, Module]) -> dict[str, Any]:
    """The config with the fields it lacks, from the arrays."""
    ranks = {name: len(module.a) for name, module in modules.items() if module.kind != "parameter"}
    guess = peft_config.inferred(ranks, [])
    lacking = {"r", "rank_pattern"} if config.get("r") is None and ranks else set()
    if not config.get("target_modules") and not config.get("target_parameters") and ranks:
        lacking.add("target_modules")
    return {**config, **{name: guess[name] for name in lacking}}
