"""The verb `bench`: what LoRA's modes cost beside the base."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_jax.bench import Case, Dense, Settings, measure
from lora_jax.bench.cases import MODELS, Dtype, Size
from lora_jax.bench.timing import check, steps
from lora_jax.cli.parse import Verb
from lora_jax.report.terminal import Progress, Terminal
from lora_jax.train.folder import check_writable
from lora_jax.train.options import OptionError

_DEFAULT = Dense(1024, 1024)


@dataclass(frozen=True, kw_only=True)
class Bench(Verb):
    """Time what LoRA costs: the base, the adapter, both, merged, and many adapters at once.

    That is Wx, B(Ax), Wx + B(Ax), (W + BA)x, and the same routed to an adapter for each example. For one or more
    weights, given by their shapes, or a small transformer with random weights. Results are compared before anything
    is timed. Times are medians of interleaved rounds; operations and bytes are XLA's. Without options it is one
    weight of 1024x1024, which takes about half a minute on two cores.
    """

    shapes: tuple[str, ...] = ()
    """Weights, inputs x outputs, such as `1024x1024 1024x4096`."""
    model: Size | None = None
    """A transformer of lora_jax.models, all linear layers of its blocks adapted."""
    ranks: tuple[int, ...] = Settings.ranks
    """Ranks of the adapters."""
    tokens: tuple[int, ...] = Settings.tokens
    """Numbers of tokens in a batch."""
    adapters: tuple[int, ...] = Settings.adapters
    """Numbers of adapters in the bank of the routed mode; a batch uses as many as it has examples."""
    length: int = Settings.length
    """Tokens of one example, which all meet the same adapter; with 1 every token meets its own."""
    dtype: Dtype = Settings.dtype
    """Of weights, factors and activations."""
    rounds: int = Settings.rounds
    """How often everything is timed; at least 11 for numbers that mean something."""
    seed: int = Settings.seed
    """Of weights, inputs, the choice of adapters, and the order of timing."""
    out: Path | None = None
    """Directory to create, for bench.json, bench.md and bench.png."""

    def prepare(self, saved: "Bench | None") -> "BenchJob":
        """Check the options.

        Raises:
          LoraError: one cannot be used.
        """
        if self.out is not None:
            if self.out.exists() or self.out.is_symlink():
                raise OptionError(f"{self.out} exists already: choose another directory for --out")
            check_writable(self.out)
        settings = Settings(
            ranks=self.ranks, tokens=self.tokens, adapters=self.adapters, length=self.length, dtype=self.dtype,
            rounds=self.rounds, seed=self.seed,
        )  # fmt: skip
        cases: list[Case] = [Dense.parsed(text) for text in self.shapes]
        cases += [] if self.model is None else [MODELS[self.model]]
        check(cases or [_DEFAULT], settings)
        return BenchJob(cases or [_DEFAULT], settings, self.out, Terminal(self.json))


class BenchJob:
    """A benchmark whose options have been checked."""

    resume = None

    def __init__(self, cases: Sequence[Case], settings: Settings, out: Path | None, terminal: Terminal):
        self._cases, self._settings, self._out, self._terminal = cases, settings, out, terminal

    def run(self) -> None:
        """Measure, with progress; print the tables, and write the files if a directory was asked for."""
        with Progress("bench", steps(self._cases, self._settings)).shown() as progress:
            found = measure(self._cases, self._settings, progress=progress.update)
        if self._out is not None:
            found.save(self._out)  # First, as a reader of the tables may close the pipe.
        self._terminal.show(found)
        self._terminal.result(found.as_dict())
        if self._out is not None:
            self._terminal.say(f"{self._out}: bench.json, bench.md, bench.png")
