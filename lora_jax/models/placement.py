"""Where parameters lie on a mesh: which axis of each is spread over which axis of the mesh."""

from collections.abc import Callable

from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax.models.config import DecoderConfig
from lora_jax.models.encoder_config import EncoderConfig
from lora_jax.models.tensors import DOWN, Leaf


def placement(config: DecoderConfig | EncoderConfig, mesh: Mesh) -> Callable[[Leaf], NamedSharding]:
    """The sharding of each parameter.

    Kernels that split heads or inner features lie with their outputs on `tensor` and their inputs on `fsdp`, those that
    join them the other way round; tables lie with their words on `tensor`. Other axes of the mesh hold copies, and so
    does an axis that does not divide a size. Vectors are copied.
    """
    # Products are partitioned by the compiler, so no axis may be one that programs spell out.
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return lambda leaf: NamedSharding(mesh, _spec(config, mesh, leaf))


def _spec(config: DecoderConfig | EncoderConfig, mesh: Mesh, leaf: Leaf) -> PartitionSpec:
    if len(leaf.shape) < 2 or leaf.path[-1].endswith("bias"):
        return PartitionSpec()
    joins, transposed = _layout(config, leaf)
    axes = ("fsdp", "tensor") if joins else ("tensor", "fsdp")
    spec: list[str | None] = [None] * len(leaf.whole)
    for place, axis in zip((-2, -1), axes[::-1] if transposed else axes, strict=True):
        if axis in mesh.axis_names and leaf.whole[place] % mesh.shape[axis] == 0:
            spec[place] = axis
    return PartitionSpec(*spec)


def _layout(config: DecoderConfig | EncoderConfig, leaf: Leaf) -> tuple[bool, bool]:
    """Whether a kernel joins what others split, and whether it is `(in, out)`."""
    if isinstance(config, EncoderConfig):
        return leaf.path[-3:-1] == ("output", "dense"), False
    names, own = config.modules, leaf.path[-1] == "weight"
    module = leaf.path[-2] if own else leaf.path[-1]
    table = module in (names.table, names.positions, names.head)
    stacks_transposed = config.experts is not None and config.experts.stored == "gpt-oss"
    return module in (names.out, names.down, DOWN), (config.transposed and not table) if own else stacks_transposed
