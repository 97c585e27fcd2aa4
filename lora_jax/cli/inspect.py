"""The verb `inspect`: a table of what an adapter on disk holds, and pictures of what it does."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from lora_jax.analysis import overlap, spectra
from lora_jax.analysis.rows import left_out_line
from lora_jax.io.inspect import inspect, read_factors
from lora_jax.train.options import OptionError
from lora_jax.train.report import make_console


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what an adapter holds, in PEFT's format or lora_jax's own: lora-jax inspect PATH.

    Sites, rank, alpha, norms, dtype and bytes. The base is not needed. |ΔW| is the Frobenius norm of the update, scale
    included; of a tensor stored whole it is the tensor's own. A second table has the rank in use and |ΔW| where a
    picture of them is asked for, or what two adapters share.
    """

    path: tyro.conf.Positional[Path]
    """Directory of the adapter, or its .safetensors file."""
    plot: Path | None = None
    """A PNG to write: singular values, effective rank and |ΔW| of every layer; with --against what both share."""
    against: Path | None = None
    """Another adapter of the same model, in the same format: how much of their directions and signs they share."""

    def saved(self) -> "Inspect | None":
        """Nothing is resumed."""
        return None

    def prepare(self, saved: "Inspect | None") -> "InspectJob":
        """Check where the picture goes.

        Raises:
          OptionError: it cannot go there.
        """
        if self.plot is not None:
            _check_picture(self.plot)
        return InspectJob(self)


class InspectJob:
    """A look into an adapter."""

    resume = None

    def __init__(self, options: Inspect):
        self._options, self._console = options, make_console()

    def run(self) -> None:
        """Read and print, and draw what was asked for."""
        options, console = self._options, self._console
        console.print(inspect(options.path))
        if options.against is not None:
            self._compare(options.against)
        elif options.plot is not None:
            adapter, notes = read_factors(options.path)
            found = spectra(adapter).noted(notes)
            console.print(found.summary())
            found.plot(options.plot, f"Updates of {_name(options.path)}")
        if options.plot is not None:
            console.print(f"Written: {options.plot}", markup=False)

    def _compare(self, against: Path) -> None:
        options, console = self._options, self._console
        (one, notes), (other, others) = read_factors(options.path), read_factors(against)
        found = overlap(one, other)
        console.print(found.summary())
        left_out = dict(found.left_out) | {name: why for name, why in (others | notes).items() if name not in one}
        if left_out:
            console.print(left_out_line(left_out), markup=False)
        if options.plot is not None:
            found.plot(options.plot, f"{_name(options.path)} (first) and {_name(against)} (second)")


def _check_picture(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise OptionError(f"--plot writes a PNG, and {path} is called something else")
    if path.exists():
        raise OptionError(f"{path} exists already: choose another file for --plot")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"{path.parent} is no directory: make it first, or choose another file for --plot")


def _name(path: Path) -> str:
    """The end of a path that tells adapters apart, as `run-1/adapter`."""
    return "/".join(path.absolute().parts[-2:])
