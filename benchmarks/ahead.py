"""Programs compiled for a TPU that is not there: XLA's own compiler for it runs on any machine that has libtpu."""

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

CHIPS = {"v5e": "v5litepod-4", "v6e": "v6e-4"}


class Cost(NamedTuple):
    """What a compiled program takes, by the compiler's own counts.

    Attributes:
      flops: floating-point operations.
      nbytes: that all its operations read and write.
      temporary: bytes allocated beside arguments and results.
    """

    flops: float
    nbytes: float
    temporary: int

    def over(self, floor: "Cost") -> "Cost":
        """Its parts as multiples of another's."""
        return Cost(*(mine / max(its, 1) for mine, its in zip(self, floor, strict=True)))


def missing() -> str:
    """Why nothing can be compiled here; empty if it can."""
    return "" if find_spec("libtpu") else "libtpu is missing: pip install --group bench-tpu (Python 3.12 or later)"


@cache
def topology(grid: str, name: str = "v5e") -> Any:
    """Chips of a kind in a grid, as `2x4`."""
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.update({**quiet, "TPU_ACCELERATOR_TYPE": CHIPS[name]})
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{grid}")


@cache
def chip(name: str = "v5e") -> SingleDeviceSharding:
    """One chip of a kind, as a place for arguments."""
    return SingleDeviceSharding(topology("2x2", name).devices[0])


def compiled(fn: Callable[..., Any], *args: Any) -> Any:
    """A function compiled for the chip and for arguments of these shapes and dtypes."""
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chip())  # noqa: E731
    with jax.default_device(*chip().device_set):  # by which lora_jax knows for what it plans
        traced = jax.jit(fn).trace(*jax.tree.map(place, args))
    return traced.lower(lowering_platforms=("tpu",)).compile()


def cost(fn: Callable[..., Any], *args: Any) -> Cost:
    """What a function takes, compiled for the chip and for arguments of these shapes and dtypes."""
    program = compiled(fn, *args)
    counts, memory = program.cost_analysis(), program.memory_analysis()
    return Cost(counts["flops"], counts["bytes accessed"], memory.temp_size_in_bytes)
