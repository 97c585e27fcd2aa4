"""The verb `merge`: PEFT adapters into a Hugging Face checkpoint, tensor by tensor."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from lora_jax.cli.parse import Verb
from lora_jax.errors import listed
from lora_jax.io.hf.merge import Merged, merge_checkpoint
from lora_jax.models.locate import locate
from lora_jax.report.report import plain_value
from lora_jax.report.tables import scaled
from lora_jax.report.terminal import Progress, Terminal
from lora_jax.train.options import OptionError

_MEGABYTE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Merge(Verb):
    """Merge PEFT adapters into a Hugging Face checkpoint.

    Tensors are read, changed in float32, rounded once and written a few rows at a time: no model is loaded, and memory
    holds the adapters and some megabytes. OUT appears only when it is complete.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """The base (a directory, or USER/NAME of the Hugging Face Hub), PEFT adapters, and the directory to create."""
    weights: tuple[float, ...] | None = None
    """A factor for the update of every adapter, in order, given after the paths; 1 for each by default."""
    alpha: float | None = None
    """The lora_alpha of adapters whose scale nothing tells: no config, no metadata, no alpha tensors."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How sums become the base's dtype; stochastic keeps small updates on average."""
    seed: int = 0
    """For stochastic rounding."""
    untie: bool = False
    """Write two tables where an adapter changes one use of a tied one, and say so in the config."""
    again: bool = False
    """Merge an adapter even if the base holds it already."""

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
        self._options = options

    def run(self) -> None:
        """Merge, with progress, and say what was written."""
        options = self._options
        base, *adapters, out = options.paths
        base = locate(base).path
        began = time.monotonic()
        with ExitStack() as stack:
            merged = merge_checkpoint(
                base, adapters, out, weights=options.weights, alpha=options.alpha, rounding=options.rounding,
                seed=options.seed, untie=options.untie, again=options.again, progress=_bar(stack),
            )  # fmt: skip
        _tell(Terminal(options.json), merged, time.monotonic() - began)


def _bar(stack: ExitStack) -> Callable[[int, int], None]:
    """Progress in megabytes, from the moment the total is known until the stack is closed."""
    shown: list[Progress] = []

    def tell(done: int, total: int) -> None:
        if not shown:
            progress = Progress("merging", -(-total // _MEGABYTE), unit="megabyte")
            shown.append(stack.enter_context(progress.shown()))
        shown[0].update(-(-done // _MEGABYTE), f"{done / total:.0%}")

    return tell


def _tell(terminal: Terminal, merged: Merged, seconds: float) -> None:
    terminal.say(
        f"{merged.path}: {len(merged.changed)} of {merged.tensors} tensors changed, "
        f"{scaled(merged.nbytes, 'B')}, {seconds:.1f} s"
    )
    if merged.added:
        terminal.say(f"Added, as the base has no such tensor: {', '.join(merged.added)}")
    if merged.left_out:
        names = listed([str(path) for path in merged.left_out])
        terminal.say(f"Left out, as they hold the unmerged weights or other state: {names}")
    terminal.result({**plain_value(merged), "seconds": seconds})
