"""The verb `extract`: the PEFT adapter nearest to a fine-tuned Hugging Face checkpoint."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import tyro

from lora_jax.cli.parse import Verb
from lora_jax.compose.extract import Truncation
from lora_jax.io.hf.extract import extract_checkpoint
from lora_jax.report.terminal import Progress, Terminal
from lora_jax.train.options import OptionError

_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Extract(Verb):
    """Make an adapter of a checkpoint that was fine-tuned in full.

    The difference of every matrix is cut after its strongest singular values, which no other update of that rank comes
    closer to. Tensors are read one by one: no model is loaded. A table says what is lost.
    """

    paths: tyro.conf.Positional[tuple[Path, Path, Path]]
    """The checkpoints before and after fine-tuning, and the directory to create, in PEFT's format."""
    rank: int | None = None
    """The most terms of one matrix; 16 if neither --energy nor --error is given."""
    energy: float | None = None
    """The share of the squared norm of every difference to keep, with as few terms as that takes."""
    error: float | None = None
    """The largest norm of what is left out, over the norm of the difference."""
    targets: tuple[str, ...] | None = None
    """Modules to give factors to, as in PEFT's target_modules; by default all but look-up tables and heads."""
    train: tuple[str, ...] = ()
    """Modules to take over in full, as in PEFT's modules_to_save: embed_tokens, norm, lm_head."""
    bias: bool = False
    """Take over the biases in full."""
    fan_in_fan_out: bool = False
    """The matrices are [in, out], as in GPT-2's Conv1D."""

    def prepare(self, saved: "Extract | None") -> "ExtractJob":
        """Check the arguments.

        Raises:
          LoraError: OUT exists, or a number is out of range.
        """
        if self.paths[2].exists():
            raise OptionError(f"{self.paths[2]} exists already: choose another directory")
        few = self.rank is None and self.energy is None and self.error is None
        return ExtractJob(self, Truncation(rank=_RANK if few else self.rank, energy=self.energy, error=self.error))


class ExtractJob:
    """An extraction."""

    resume = None

    def __init__(self, options: Extract, cut: Truncation):
        self._options, self._cut = options, cut

    def run(self) -> None:
        """Extract, with progress, and show what is lost."""
        options, cut = self._options, self._cut
        with ExitStack() as stack:
            report = extract_checkpoint(
                *options.paths, rank=cut.rank, energy=cut.energy, error=cut.error, targets=options.targets,
                train=options.train, bias=options.bias, fan_in_fan_out=options.fan_in_fan_out, progress=_bar(stack),
            )  # fmt: skip
        terminal = Terminal(options.json)
        terminal.show(report)
        terminal.result(report.as_dict())


def _bar(stack: ExitStack) -> Callable[[int, int], None]:
    """Progress in tensors, from the moment their number is known until the stack is closed."""
    shown: list[Progress] = []

    def tell(done: int, total: int) -> None:
        if not shown:
            shown.append(stack.enter_context(Progress("extracting", total, unit="tensor").shown()))
        shown[0].update(done, f"{done / total:.0%}")

    return tell
