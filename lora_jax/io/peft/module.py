"""One module of a PEFT file: its factors, and what they add to a PyTorch weight, in the weight's own layout."""

from dataclasses import dataclass, fields, replace
from math import prod
from typing import Literal

import numpy as np

from lora_jax.errors import CheckpointError
from lora_jax.io.peft.keys import Form

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
      values: `(rank,)`, what every term is multiplied by: AdaLoRA's `lora_E`, or VeRA's `vera_lambda_d`. AdaLoRA's A of
        a convolution is flat, `(rank, in · kernel)`, and so is its B, `(out, rank)`.
      outputs: `(out,)`, what every output is multiplied by: `vera_lambda_b`. A and B are then `vera_A` and `vera_B`,
        which all modules of a file share; a weight has the first columns of A and the first rows of B.

    Example:
      >>> Module("linear", np.ones((2, 4)), np.ones((3, 2))).b.shape
      (3, 2)
    """

    kind: ModuleKind
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None
    b_bias: np.ndarray | None = None
    values: np.ndarray | None = None
    outputs: np.ndarray | None = None

    @property
    def form(self) -> Form:
        """How the keys of its arrays are spelled."""
        if self.outputs is not None:
            return "vera"
        return "adalora" if self.values is not None else "embedding" if self.kind == "embedding" else "lora"

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that are there, by the name of their field."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "kind"}
        return {name: value for name, value in named.items() if value is not None}

    def cut(self, inputs: int) -> "Module":
        """The module with the part of shared projections that a weight of so many inputs has."""
        if self.outputs is None:
            return self
        return replace(self, a=self.a[:, :inputs], b=self.b[: len(self.outputs)])

    def features(self, size: int) -> tuple[int, int]:
        """Outputs and inputs of a linear layer whose weight has `size` elements."""
        if self.outputs is None:
            return len(self.b), self.a.shape[1]
        return len(self.outputs), size // len(self.outputs)

    def plain(self, size: int) -> "Module":
        """Factors alone that do the same to a weight of `size` elements, in float32.

        >>> ones = np.ones(2)
        >>> vera = Module("linear", np.ones((2, 9)), np.ones((8, 2)), values=ones, outputs=np.arange(3.0))
        >>> vera.plain(12).a.shape, vera.plain(12).b[:, 0].tolist()
        ((2, 4), [0.0, 1.0, 2.0])
        """
        own = self.cut(self.features(size)[1])
        a, b = own.a.astype(np.float32), own.b.astype(np.float32)
        if self.values is not None:
            b = b * self.values.astype(np.float32)
        if self.outputs is not None:
            b = b * self.outputs.astype(np.float32)[:, None]
        return replace(self, a=a, b=b, values=None, outputs=None)


def delta(where: str, module: Module, scale: float, shape: tuple[int, ...], transposed: bool | None) -> np.ndarray:
    """`scale · B·A` in float32; see `PeftFiles.delta`."""
    left, right, _ = matrices(where, module, shape, transposed)
    return (left * np.float32(scale) @ right).reshape(shape)


def matrices(
    where: str, module: Module, shape: tuple[int, ...], transposed: bool | None
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The factors in the layout of the weight they change.

    Args:
      where: file and module, for error messages.
      module: the factors.
      shape: shape of the weight.
      transposed: whether the weight's outputs are its last axis; None to read it off the shape.

    Returns:
      Float32 matrices `[stack, rows, rank]` and `[stack, rank, columns]`, and whether the outputs are the columns. The
      weight has the rows of its first axis, and all other axes are columns; a stack of experts is one matrix each.

    Raises:
      CheckpointError: the factors do not fit, or the shape leaves open how the weight lies.
    """
    module = module.plain(prod(shape))
    a, b = module.a, module.b
    stack = shape[:1] if module.kind == "parameter" and len(shape) == 3 else ()
    last = False
    if stack:
        left, right, last = _experts(where, module, shape, transposed)
    elif module.kind == "conv":
        _check_groups(where, module, shape)
        left, right = b.reshape(1, len(b), -1), a.reshape(1, len(a), -1)
    elif module.kind == "embedding" or _lies_transposed((len(b), a.shape[1]), shape, transposed):
        left, right, last = a.T[None], b.T[None], True
    else:
        left, right = b[None], a[None]
    columns = shape[len(stack) + 1 :]
    if (*stack, left.shape[1]) != shape[: len(stack) + 1] or right.shape[-1] != prod(columns):
        raise _misfit(where, module, shape)
    return np.ascontiguousarray(left), np.ascontiguousarray(right), last


def _lies_transposed(out_in: tuple[int, int], shape: tuple[int, ...], given: bool | None) -> bool:
    """Whether a weight has its outputs last: as told where it is square, otherwise as its shape says."""
    if len(shape) > 2:
        return False
    if out_in[0] == out_in[1]:
        return bool(given)
    return shape == (out_in[1], out_in[0])


def _check_groups(where: str, module: Module, shape: tuple[int, ...]) -> None:
    a, b = module.a, module.b
    if b.shape[1] != a.shape[0] or (len(shape) > 1 and shape[1] != a.shape[1]):
        raise crossing(where)


def crossing(where: str) -> CheckpointError:
    """The error for a convolution in groups whose A reads channels of other groups."""
    return CheckpointError(
        f"{where} is a convolution in groups: PEFT's A reads every input channel, the weight only those of its "
        "group, so the adapter is no change to the weight. PEFT refuses to merge it too."
    )


def _experts(
    where: str, module: Module, shape: tuple[int, ...], transposed: bool | None
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Rows of A are grouped by expert, columns of B by rank."""
    stack = shape[0]
    if not stack or len(module.a) % stack:
        raise _misfit(where, module, shape)
    a = module.a.reshape(stack, -1, module.a.shape[-1])
    b = module.b.reshape(len(module.b), -1, stack).transpose(2, 0, 1)
    out_first, in_first = (b.shape[1], a.shape[2]), (a.shape[2], b.shape[1])
    if transposed is None and out_first == in_first == shape[1:]:
        raise CheckpointError(
            f"{where} has square weights, shape {shape}, so the shape does not tell whether they are stored "
            "(experts, out, in) or (experts, in, out): pass transposed=False or True."
        )
    flip = transposed if transposed is not None else shape[1:] == in_first and shape[1:] != out_first
    return (a.swapaxes(1, 2), b.swapaxes(1, 2), True) if flip else (b, a, False)


def _misfit(where: str, module: Module, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{where}: factors of shapes {module.a.shape} and {module.b.shape} ({module.kind}) do not fit a weight of "
        f"shape {tuple(shape)}. The adapter belongs to another base, or the base's vocabulary was resized."
    )
