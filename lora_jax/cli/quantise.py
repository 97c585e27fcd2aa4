"""The verb `quantise`: a Hugging Face directory in 4 bits, as bitsandbytes stores it."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from lora_jax.cli.parse import Verb
from lora_jax.models.load import load
from lora_jax.models.save import save
from lora_jax.paths import named_leaves
from lora_jax.quantised.leaf import is_quantised
from lora_jax.report.terminal import Terminal
from lora_jax.train.options import OptionError


@dataclass(frozen=True, kw_only=True)
class Quantise(Verb):
    """Write a model in 4 bits, as bitsandbytes stores it.

    Kernels of layers become nf4, one by one as they are read, so that the model is never there in full. Tables, heads,
    norms and routers keep their dtype. lora-jax, transformers and PEFT load the directory as it is.
    """

    paths: tyro.conf.Positional[tuple[str, Path]]
    """The model, as --model of finetune, and the directory to create."""
    json: bool = False
    """Print the sizes as JSON."""

    def prepare(self, saved: "Quantise | None") -> "QuantiseJob":
        """Check that there is nothing at the place.

        Raises:
          OptionError: there is something.
        """
        if self.paths[1].exists():
            raise OptionError(f"{self.paths[1]} exists already: choose another directory")
        return QuantiseJob(*self.paths, Terminal(self.json))


class QuantiseJob:
    """A model that is read in codes and written."""

    resume = None

    def __init__(self, model: str, out: Path, terminal: Terminal):
        self._model, self._out, self._terminal = model, out, terminal

    def run(self) -> None:
        """Do it.

        Raises:
          LoraError: the model cannot be read, or not be written.
        """
        model = load(self._model, quantise="nf4")
        leaves = named_leaves(model.params)[0].values()
        small = [leaf for leaf in leaves if is_quantised(leaf)]
        if not small:
            raise OptionError(f"{self._model} has no kernels of 4,096 numbers or more: there is nothing to quantise")
        save(self._out, model, codes=True)
        before = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        after = sum(leaf.nbytes for leaf in leaves)
        numbers = sum(leaf.size for leaf in small)
        self._terminal.say(f"{self._out}: {numbers:,} numbers in nf4, {before:,} bytes of parameters are {after:,}")
        self._terminal.result({"out": str(self._out), "quantised": numbers, "bytes_before": before, "bytes": after})
