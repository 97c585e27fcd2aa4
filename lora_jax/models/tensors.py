"""The tensors that a decoder has: name, shape, and place in its parameters, where layers and experts are stacked."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from lora_jax.models.config import DecoderConfig, Experts

Shape = tuple[int, ...]
SCORE = "score"
"""What transformers calls the head of a decoder for classes."""
GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""What experts that are one tensor are called."""


class Leaf(NamedTuple):
    """One parameter: a tensor of the checkpoint, or a stack of several.

    Attributes:
      path: its keys in the parameters.
      template: the tensor's name, with `{}` for every number that the stack counts.
      stack: sizes of the leading axes; empty for a tensor by itself.
      shape: of each tensor.
    """

    path: tuple[str, ...]
    template: str
    stack: Shape
    shape: Shape

    @property
    def whole(self) -> Shape:
        """Shape of the parameter."""
        return (*self.stack, *self.shape)

    def members(self) -> Iterator[tuple[Shape, str]]:
        """Index in the stack and name of each tensor."""
        for index in product(*map(range, self.stack)):
            yield index, self.template.format(*index)


def decoder_leaves(config: DecoderConfig, *, unrolled: bool = False) -> list[Leaf]:
    """Every parameter of a decoder.

    Args:
      config: the decoder.
      unrolled: whether layers and experts are parameters of their own; stacked otherwise. Layers always are where only
        some have experts.
    """
    names, found = config.modules, []
    outside = {f"{names.root}.{name}": shape for name, shape in _outside(config).items()}
    if config.labels:
        outside[f"{SCORE}.weight"] = (config.labels, config.width)
    elif not config.tied:
        outside[f"{names.head}.weight"] = (config.vocab, config.width)
    found = [Leaf(tuple(name.split(".")), name, (), shape) for name, shape in outside.items()]
    layers = f"{names.root}.{names.layers}"
    if config.mixed:
        for index, has_experts in enumerate(config.experts.layers if config.experts else ()):
            for name, (stack, shape) in _layer(config, has_experts).items():
                found += stacked(f"{layers}.{index}.{name}", stack, shape, unrolled)
        return found
    for name, (stack, shape) in _layer(config, config.experts is not None).items():
        found += stacked(f"{layers}.{{}}.{name}", (config.layers, *stack), shape, unrolled)
    return found


def stacked(template: str, stack: Shape, shape: Shape, unrolled: bool) -> list[Leaf]:
    """Tensors whose names differ by numbers, as one parameter or, `unrolled`, as one each."""
    leaf = Leaf(tuple(part for part in template.split(".") if part != "{}"), template, stack, shape)
    if not unrolled:
        return [leaf]
    return [Leaf(tuple(name.split(".")), name, (), shape) for _, name in leaf.members()]


def _outside(config: DecoderConfig) -> dict[str, Shape]:
    names = config.modules
    found = {f"{names.table}.weight": (config.vocab, config.width)}
    if names.positions:
        found[f"{names.positions}.weight"] = (config.positions, config.width)
    return found | _norm(config, names.last_norm, config.width)


def _layer(config: DecoderConfig, has_experts: bool) -> dict[str, tuple[Shape, Shape]]:
    """Tensors of one layer: sizes of the stack of experts, and shape."""
    names, found = config.modules, {}
    for name in names.norms:
        found |= _norm(config, name, config.width)
    attention = {f"{names.attention}.{name}": shape for name, shape in _attention(config).items()}
    dense = {name: ((), shape) for name, shape in (found | attention).items()}
    mlp = _experts(config, config.experts) if config.experts and has_experts else _mlp(config)
    return dense | {f"{names.mlp}.{name}": each for name, each in mlp.items()}


def _norm(config: DecoderConfig, name: str, size: int) -> dict[str, Shape]:
    return {f"{name}.{part}": (size,) for part in (("weight", "bias") if config.norm == "layer" else ("weight",))}


def _linear(config: DecoderConfig, name: str, out: int, into: int, kind: str) -> dict[str, Shape]:
    found: dict[str, Shape] = {f"{name}.weight": (into, out) if config.transposed else (out, into)}
    return found | ({f"{name}.bias": (out,)} if kind in config.biases else {})


def _attention(config: DecoderConfig) -> dict[str, Shape]:
    names, dim = config.modules, config.head_dim
    queries, keys = config.heads * dim, config.kv_heads * dim
    sizes = (queries, keys, keys) if len(names.qkv) == 3 else (queries + 2 * keys,)
    found: dict[str, Shape] = {}
    for name, size in zip(names.qkv, sizes, strict=True):
        found |= _linear(config, name, size, config.width, "qkv")
    found |= _linear(config, names.out, config.width, queries, "out")
    if config.qk_norm:
        found |= _norm(config, "q_norm", dim) | _norm(config, "k_norm", dim)
    return found | ({"sinks": (config.heads,)} if config.sinks else {})


def _mlp(config: DecoderConfig) -> dict[str, tuple[Shape, Shape]]:
    names, found = config.modules, {}
    for name in names.up:
        size = config.hidden * (2 if config.gated and len(names.up) == 1 else 1)
        found |= _linear(config, name, size, config.width, "mlp")
    found |= _linear(config, names.down, config.width, config.hidden, "mlp")
    return {name: ((), shape) for name, shape in found.items()}


def _experts(config: DecoderConfig, experts: Experts) -> dict[str, tuple[Shape, Shape]]:
    names, width, hidden = config.modules, config.width, experts.hidden
    router: dict[str, tuple[Shape, Shape]] = {f"{names.router}.weight": ((), (experts.count, width))}
    if experts.stored == "gpt-oss":
        return router | {
            f"{names.router}.bias": ((), (experts.count,)),
            f"experts.{GATE_UP}": ((), (experts.count, width, 2 * hidden)),
            f"experts.{GATE_UP}_bias": ((), (experts.count, 2 * hidden)),
            f"experts.{DOWN}": ((), (experts.count, hidden, width)),
            f"experts.{DOWN}_bias": ((), (experts.count, width)),
        }
    if experts.stored == "all":
        return router | {
            f"experts.{GATE_UP}": ((), (experts.count, 2 * hidden, width)),
            f"experts.{DOWN}": ((), (experts.count, width, hidden)),
        }
    one = ((experts.count,), (hidden, width))
    ups = {f"experts.{{}}.{name}.weight": one for name in names.up}
    return router | ups | {f"experts.{{}}.{names.down}.weight": ((experts.count,), (width, hidden))}
