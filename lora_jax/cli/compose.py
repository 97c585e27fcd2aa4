"""The verb `compose`: several adapters on disk made into one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from lora_jax.adapter.base import agreed
from lora_jax.cli.parse import Verb
from lora_jax.compose import compose_report
from lora_jax.compose.compose import ComposeReport
from lora_jax.compose.methods import METHODS, checked, weighed
from lora_jax.errors import ParameterError
from lora_jax.io.compose import base_values, compose_files
from lora_jax.io.hf.folder import open_checkpoint
from lora_jax.io.hf.plan import on_base
from lora_jax.io.inspect import Format, detect
from lora_jax.io.own import orbax
from lora_jax.io.peft import write_peft
from lora_jax.io.peft.read import read_several
from lora_jax.io.peft.uniform import uniform
from lora_jax.report.terminal import Terminal
from lora_jax.train.options import OptionError, require


@dataclass(frozen=True, kw_only=True)
class Compose(Verb):
    """Make one adapter out of several.

    All of them in PEFT's format or all in lora_jax's own, and so is the result. Factors need no base; what is trained
    in full (whole modules, rows, DoRA's magnitudes in PEFT's files) needs --base, or weights that add up to 1.

    Methods: cat is the exact sum, and ranks add up. svd and linear are the nearest factors to the sum, slerp those of
    two adapters along a circle. rank_one keeps the strongest rank-one terms, block the strongest adapters. ties,
    dare_linear, dare_ties and magnitude_prune go entry by entry, over the factors as in PEFT, or with _svd over the
    updates. knots is ties in a shared basis, peft_linear PEFT's linear with its cross terms.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """The adapters."""
    out: Path
    """The directory to create."""
    weights: tuple[float, ...] | None = None
    """A factor for the effect of each, given after the paths; negative ones subtract. 1 by default, 0.5 for slerp."""
    method: str = "cat"
    """What to do, as above."""
    rank: int | None = None
    """Of the result; by default the largest given, and half of the sum for rank_one and block."""
    density: float | None = None
    """Share of entries that ties, dare, magnitude_prune and knots keep."""
    majority_sign: Literal["total", "frequency"] | None = None
    """How ties, dare_ties and knots elect signs: that of the sum (total, the default), or that of most."""
    seed: int = 0
    """For dare."""
    uniform: bool = False
    """PEFT only: one rank and one alpha for all modules, for servers that know no patterns."""
    alpha: float | None = None
    """The lora_alpha of adapters whose scale nothing tells: no config, no metadata, no alpha tensors."""
    base: Path | None = None
    """A Hugging Face checkpoint of the base, for PEFT adapters with parts trained in full; only those are read."""

    def prepare(self, saved: "Compose | None") -> "ComposeJob":
        """Read the adapters and compose them, as only that tells whether they go together. Nothing is written.

        Raises:
          LoraError: an adapter cannot be read, or they cannot be composed as asked for.
        """
        settings = self._settings()
        weighed(len(self.paths), self.weights, METHODS.find(self.method))
        if self.out.exists():
            raise OptionError(f"{self.out} exists already: choose another directory for --out")
        found: dict[Path, Format] = {path: detect(path) for path in self.paths}
        if len(set(found.values())) > 1:
            given = ", ".join(f"{path} ({name})" for path, name in found.items())
            raise OptionError(f"Adapters of different formats: {given}. Bring them to one with lora-jax convert")
        try:
            if found[self.paths[0]] == "peft":
                report, write = _peft(self, settings)
                return ComposeJob(self, report, write)
            if self.uniform:
                raise OptionError("--uniform is for PEFT's format; lora-jax export makes that of an adapter of our own")
            if self.alpha is not None:
                raise OptionError("--alpha is for PEFT's format and others: an adapter of our own has its scales")
            if self.base is not None:
                raise OptionError("--base goes with PEFT's format; in Python, lora_jax.compose(..., params=) takes any")
            return ComposeJob(self, *_orbax(self.paths, self.out, self.weights, settings))
        except ParameterError as error:
            hint = "" if self.base else " Here --base takes one, for PEFT adapters."
            raise OptionError(f"{error}{hint}") from error

    def _settings(self) -> dict[str, Any]:
        require("seed", self.seed, least=0)
        key = jax.random.key(self.seed) if METHODS.find(self.method).random else None
        checked(self.method, self.rank, self.density, self.majority_sign, key)
        settings = {"method": self.method, "rank": self.rank, "density": self.density, "key": key}
        return settings | {"majority_sign": self.majority_sign}


class ComposeJob:
    """A composition that is to be written."""

    resume = None

    def __init__(self, options: Compose, report: ComposeReport, write: Callable[[], None]):
        self._options, self._report, self._write = options, report, write

    def run(self) -> None:
        """Write it, and show what was lost."""
        self._write()
        terminal, worst, out = Terminal(self._options.json), self._report.worst, self._options.out
        terminal.show(self._report.summary())
        lost = "" if worst is None else f", energy lost at most {worst.lost:.2%} ({worst.path})"
        terminal.say(f"{out}: {len(self._report.rows)} parameters{lost}")
        terminal.result({"out": out, **self._report.as_dict()})


_Composition = tuple[ComposeReport, Callable[[], None]]
"""What is made, and how it is written."""


def _peft(options: Compose, settings: dict[str, Any]) -> _Composition:
    given = read_several(options.paths, options.alpha)
    base = None if options.base is None else open_checkpoint(options.base)
    given = given if base is None else [on_base(files, base) for files in given]
    known = None if base is None else base_values(base, given)
    files, report = compose_files(given, options.weights, known, **settings)
    files = uniform(files) if options.uniform else files
    return report, lambda: write_peft(options.out, files)


def _orbax(paths: Sequence[Path], out: Path, weights: Any, settings: dict[str, Any]) -> _Composition:
    bases = {path: base for path in paths if (base := orbax.load_base(path)) is not None}
    base = next(iter(bases.values()), None)
    if other := [path for path, each in bases.items() if each != base]:
        raise OptionError(f"{other[0]} was saved for another base than {next(iter(bases))}")
    values = agreed({str(path): orbax.load_samples(path)[1] for path in paths})
    report = compose_report([orbax.load(path) for path in paths], weights, **settings)
    return report, lambda: orbax.save_recorded(out, report.adapter, base, values)
