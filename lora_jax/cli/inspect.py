"""The verb `inspect`: a table of what an adapter on disk holds, and pictures of what it does."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro

from lora_jax.analysis import overlap, spectra
from lora_jax.analysis.overlap import Overlap
from lora_jax.analysis.rows import left_out_lines
from lora_jax.analysis.spectra import Spectra
from lora_jax.cli.parse import Verb
from lora_jax.io.inspect import inspect, read_factors
from lora_jax.io.peft.portability import portability
from lora_jax.report.terminal import Terminal
from lora_jax.train.options import OptionError


@dataclass(frozen=True, kw_only=True)
class Inspect(Verb):
    """Show what an adapter holds, in PEFT's format or lora_jax's own.

    Sites, rank, alpha, norms, dtype and bytes; of a PEFT adapter also who reads it. The base is not needed. |ΔW| is the
    Frobenius norm of the update, scale included; of a tensor stored whole it is the tensor's own. Another table has the
    rank in use and |ΔW| where a picture of them is asked for, or what two adapters share.
    """

    path: tyro.conf.Positional[Path]
    """Directory of the adapter, or its .safetensors file."""
    plot: Path | None = None
    """A PNG to write: singular values, effective rank and |ΔW| of every layer; with --against what both share."""
    against: Path | None = None
    """Another adapter of the same model, in the same format: how much of their directions and signs they share."""

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
        self._options, self._terminal = options, Terminal(options.json)

    def run(self) -> None:
        """Read, then print, and draw what was asked for."""
        options, terminal = self._options, self._terminal
        contents = inspect(options.path)
        found, title, left_out = self._analysed()
        terminal.show(contents)
        result = contents.as_dict()
        if contents.format == "peft":
            readers = portability(options.path)
            terminal.show(readers)
            result["portability"] = readers.as_dict()["rows"]
        if found is not None:
            terminal.show(found.summary())
            name = type(found).__name__.lower()
            result[name] = found.as_dict() | ({"left_out": left_out} if left_out else {})
        for line in left_out_lines(left_out):
            terminal.say(line)
        if found is not None and options.plot is not None:
            found.plot(options.plot, title)
            terminal.say(f"Written: {options.plot}")
        terminal.result(result)

    def _analysed(self) -> tuple[Overlap | Spectra | None, str, Mapping[str, str]]:
        """What was asked for beside the contents, the title of its picture, and what it has no rows for."""
        path, against = self._options.path, self._options.against
        if against is not None:
            (one, notes), (other, others) = read_factors(path), read_factors(against)
            found = overlap(one, other)
            missing = {name: why for name, why in (others | notes).items() if name not in one}
            return found, f"{_name(path)} (first) and {_name(against)} (second)", {**found.left_out, **missing}
        if self._options.plot is None:
            return None, "", {}
        adapter, notes = read_factors(path)
        return spectra(adapter).noted(notes), f"Updates of {_name(path)}", {}


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
