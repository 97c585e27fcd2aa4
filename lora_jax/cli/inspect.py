"""The verb `inspect`: a table of what an adapter on disk holds."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from lora_jax.io.contents import inspect
from lora_jax.train.report import make_console


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what an adapter holds, in PEFT's format or lora_jax's own: lora-jax inspect PATH.

    Sites, rank, alpha, norms, dtype and bytes. The base is not needed. |ΔW| is the Frobenius norm of the update, scale
    included; of a tensor stored whole it is the tensor's own.
    """

    path: tyro.conf.Positional[Path]
    """Directory of the adapter, or its .safetensors file."""

    def saved(self) -> "Inspect | None":
        """Nothing is resumed."""
        return None

    def prepare(self, saved: "Inspect | None") -> "InspectJob":
        """There is nothing to check before reading."""
        return InspectJob(self.path)


class InspectJob:
    """A look into an adapter."""

    resume = None

    def __init__(self, path: Path):
        self._path = path

    def run(self) -> None:
        """Read and print."""
        make_console().print(inspect(self._path))
