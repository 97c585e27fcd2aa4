"""The verb `merge`: PEFT adapters into a Hugging Face checkpoint, tensor by tensor."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from lora_jax.errors import listed
from lora_jax.io.hf.merge import Merged, merge_checkpoint
from lora_jax.train.log import Reporter
from lora_jax.train.options import OptionError
from lora_jax.train.report import make_console

_MEGABYTE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Merge PEFT adapters into a Hugging Face checkpoint: lora-jax merge BASE ADAPTER [ADAPTER ...] OUT.

    Tensors are read, changed in float32, rounded once and written a few rows at a time: no model is loaded, and memory
    holds the adapters and some megabytes. OUT appears only when it is complete.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """The base's directory, one or more PEFT adapters, and the directory to create."""
    weights: tuple[float, ...] | None = None
    """A factor for the update of every adapter, in order, given after the paths; 1 for each by default."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How sums become the base's dtype; stochastic keeps small updates on average."""
    seed: int = 0
    """For stochastic rounding."""
    untie: bool = False
    """Write two tables where an adapter changes one use of a tied one, and say so in the config."""

    def saved(self) -> "Merge | None":
        """Nothing is resumed."""
        return None

    def prepare(self, saved: "Merge | None") -> "MergeJob":
        """Check the arguments.

        Raises:
          OptionError: there are too few paths.
        """
        if len(self.paths) < 3:
            raise OptionError(f"merge takes BASE ADAPTER [ADAPTER ...] OUT, and got {len(self.paths)} paths")
        return MergeJob(self)


class MergeJob:
    """A merge."""

    resume = None

    def __init__(self, options: Merge):
        self._options, self._console = options, make_console()

    def run(self) -> None:
        """Merge, with progress, and say what was written."""
        options, console = self._options, self._console
        base, *adapters, out = options.paths
        began = time.monotonic()
        with ExitStack() as stack:
            merged = merge_checkpoint(
                base, adapters, out, weights=options.weights, rounding=options.rounding, seed=options.seed,
                untie=options.untie, progress=_bar(console, stack),
            )  # fmt: skip
        _tell(console, merged, time.monotonic() - began)


def _bar(console: Console, stack: ExitStack) -> Callable[[int, int], None]:
    """Progress in megabytes, from the moment the total is known until the stack is closed."""
    shown: list[Reporter] = []

    def tell(done: int, total: int) -> None:
        if not shown:
            reporter = Reporter(console, "merging", -(-total // _MEGABYTE), unit="megabyte")
            shown.append(stack.enter_context(reporter.shown()))
        shown[0].update(-(-done // _MEGABYTE), f"{done / total:.0%}")

    return tell


def _tell(console: Console, merged: Merged, seconds: float) -> None:
    console.print(
        f"{merged.path}: {len(merged.changed)} of {merged.tensors} tensors changed, "
        f"{merged.nbytes / 1e9:.3g} GB, {seconds:.1f} s",
        markup=False,
    )
    if merged.added:
        console.print(f"Added, as the base has no such tensor: {', '.join(merged.added)}", markup=False)
    if merged.left_out:
        names = listed([str(path) for path in merged.left_out])
        console.print(f"Left out, as they hold the unmerged weights or other state: {names}", markup=False)
