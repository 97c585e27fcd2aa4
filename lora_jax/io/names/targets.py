"""Targets: what a map of names says about one parameter and one PyTorch module."""

from dataclasses import dataclass

from lora_jax.io.names.fused import Span


@dataclass(frozen=True)
class Part:
    """The outputs that a parameter and a module have in common.

    Attributes:
      start, stop: range along the output axis `axis` of the parameter.
      span: the same outputs, counted among the module's.
      axis: counted among output axes.
      rotary: features per head to reorder from neighbours to halves, or 0.
      gain: the parameter is PyTorch's weight times this.
    """

    start: int
    stop: int
    span: Span
    axis: int = 0
    rotary: int = 0
    gain: float = 1.0


@dataclass(frozen=True)
class Target:
    """One PyTorch module, or stacked parameter, and the part of it that a JAX parameter has.

    Attributes:
      name: of the module; of the parameter itself if `parameter`.
      part: the outputs in common.
      index: position along the stacked axes that the name counts.
      parameter: whether this is a stack of experts, which PEFT adapts as one parameter.
    """

    name: str
    part: Part
    index: tuple[int, ...] = ()
    parameter: bool = False
