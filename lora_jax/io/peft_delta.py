"""The factors of one PEFT module, and what they add to a PyTorch weight, in the weight's own layout."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_jax.errors import CheckpointError
from lora_jax.io.peft_match import targets

ModuleKind = Literal["linear", "conv", "embedding", "parameter"]


@dataclass(frozen=True)
class Module:
    """What an adapter file holds for one module.

    Attributes:
      kind: `linear` (HF `Conv1D` included), `conv`, `embedding`, or `parameter`: a weight adapted by itself through
        `target_parameters`, such as a stack of experts.
      a: PEFT's `lora_A.weight` or `lora_embedding_A`, in the dtype of the file. Linear `(rank, in)`, conv
        `(rank, in, *kernel)`, embedding `(rank, vocabulary)`, parameter `(experts · rank, in)`, expert-major.
      b: `lora_B.weight` or `lora_embedding_B`. Linear `(out, rank)`, conv `(out, rank / groups, 1, ...)`, embedding
        `(features, rank)`, parameter `(out, rank · experts)`, rank-major.
      magnitude: `lora_magnitude_vector` of DoRA.
      b_bias: `lora_B.bias`, of `lora_bias=True`.

    Example:
      >>> Module("linear", np.ones((2, 4)), np.ones((3, 2))).b.shape
      (3, 2)
    """

    kind: ModuleKind
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None
    b_bias: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that are there, by the name of their field."""
        named = {"a": self.a, "b": self.b, "magnitude": self.magnitude, "b_bias": self.b_bias}
        return {name: value for name, value in named.items() if value is not None}


def delta(where: str, module: Module, scale: float, shape: tuple[int, ...], transposed: bool | None) -> np.ndarray:
    """`scale · B·A` in float32; see `PeftFiles.delta`."""
    a, b = (array.astype(np.float32) for array in (module.a, module.b))
    b *= np.float32(scale)
    if module.kind == "embedding":
        return _fitting(where, module, shape, np.ascontiguousarray((b @ a).T))
    if module.kind == "conv":
        return _conv(where, module, a, b, shape)
    if module.kind == "parameter" and len(shape) == 3:
        return _experts(where, module, a, b, shape, transposed)
    square = b @ a
    flip = transposed if square.shape[0] == square.shape[1] else square.shape != shape
    return _fitting(where, module, shape, np.ascontiguousarray(square.T) if flip else square)


def _conv(where: str, module: Module, a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if b.shape[1] != a.shape[0] or (len(shape) > 1 and shape[1] != a.shape[1]):
        raise CheckpointError(
            f"{where} is a convolution in groups: PEFT's A reads every input channel, the weight only those of its "
            "group, so the adapter is no change to the weight. PEFT refuses to merge it too."
        )
    return _fitting(where, module, shape, np.tensordot(b.reshape(b.shape[:2]), a, 1))


def _experts(
    where: str, module: Module, a: np.ndarray, b: np.ndarray, shape: tuple[int, ...], transposed: bool | None
) -> np.ndarray:
    """Rows of A are grouped by expert, columns of B by rank."""
    if a.shape[0] % shape[0]:
        raise _misfit(where, module, shape)
    a, b = a.reshape(shape[0], -1, a.shape[-1]), b.reshape(b.shape[0], -1, shape[0])
    out_first, in_first = (b.shape[0], a.shape[-1]), (a.shape[-1], b.shape[0])
    if transposed is None and out_first == in_first == shape[1:]:
        raise CheckpointError(
            f"{where} has square weights, shape {shape}, so the shape does not tell whether they are stored "
            "(experts, out, in) or (experts, in, out): pass transposed=False or True."
        )
    flip = transposed if transposed is not None else shape[1:] == in_first and shape[1:] != out_first
    return _fitting(where, module, shape, np.einsum("ore,eri->eio" if flip else "ore,eri->eoi", b, a, optimize=True))


def _fitting(where: str, module: Module, shape: tuple[int, ...], value: np.ndarray) -> np.ndarray:
    if value.shape != tuple(shape):
        raise _misfit(where, module, shape)
    return value


def _misfit(where: str, module: Module, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{where}: factors of shapes {module.a.shape} and {module.b.shape} ({module.kind}) do not fit a weight of "
        f"shape {tuple(shape)}. The adapter belongs to another base."
    )


def owners(
    where: str,
    modules: Mapping[str, Module],
    wanted: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    ordered: bool,
) -> dict[str, str]:
    """Names in `modules` by parameter; see `PeftFiles.owners`."""
    groups: dict[str, list[str]] = {}
    for name, module in modules.items():
        if module.kind == "parameter":
            groups.setdefault(name.replace(".base_layer", ""), []).append(name)
    found: dict[str, str] = {}
    for owner, levels in groups.items():
        # Innermost first: that is the order in which the parameters are declared.
        levels.sort(key=len, reverse=True)
        names = [name for name in shapes if name.rpartition(".")[0] == owner and targets(list(wanted), name)]
        if len(names) != len(levels):
            raise CheckpointError(
                f"{where}: {owner} has {len(levels)} adapted parameters, but target_parameters={sorted(wanted)} names "
                f"{len(names)} of the base's there: {', '.join(names) or 'none'}"
            )
        chosen = levels if ordered else _by_shape(where, {level: modules[level] for level in levels}, names, shapes)
        found |= dict(zip(names, chosen, strict=True))
    return found


def _by_shape(
    where: str, levels: Mapping[str, Module], names: list[str], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The level of each name, where shapes leave one possibility."""
    fits = {name: [level for level, module in levels.items() if _fits(module, shapes[name])] for name in names}
    chosen = [options[0] for options in fits.values() if len(options) == 1]
    if len(set(chosen)) != len(names):
        raise CheckpointError(
            f"{where}: the shapes of {' and '.join(names)} do not tell which factors belong to which. Give the "
            "parameters in the order in which the module declares them, with ordered=True."
        )
    return chosen


def _fits(module: Module, shape: tuple[int, ...]) -> bool:
    sizes = (module.a.shape[1], module.b.shape[0])
    stack = shape[0] if len(shape) == 3 else 1
    return sorted(sizes) == sorted(shape[-2:]) and module.a.shape[0] % stack == 0
