"""The verb `convert`: an adapter of lora_jax's own format as a PEFT directory, and back."""

from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from lora_jax.cli.parse import Verb
from lora_jax.errors import MatchError
from lora_jax.io import peft
from lora_jax.io.inspect import detect, inspect
from lora_jax.io.names.known import find_names
from lora_jax.io.own import orbax
from lora_jax.io.peft.load import load_like
from lora_jax.report.terminal import Terminal
from lora_jax.train.options import OptionError


@dataclass(frozen=True, kw_only=True)
class Convert(Verb):
    """Convert an adapter to the other format, lora_jax's own or PEFT's.

    From lora_jax's own (Orbax) to PEFT, and from PEFT to lora_jax's own. PyTorch's names and layouts do not tell those
    of a JAX model, so the way back needs --like: any adapter of the same model, such as one saved right after
    lora_jax.init, with every parameter that the PEFT adapter changes; of a DoRA adapter one with DoRA, as the file does
    not tell the norms of the base.
    """

    paths: tyro.conf.Positional[tuple[Path, Path]]
    """The adapter, and the directory to create."""
    names: str | None = None
    """Known map of names, such as hf_flax or tunix; by default layers_0/attn/query is layers.0.attn.query."""
    like: Path | None = None
    """From PEFT: an adapter of the same JAX model, in lora_jax's format."""
    alpha: float | None = None
    """From PEFT: the lora_alpha of a file whose scale nothing tells: no config, no metadata, no alpha tensors."""
    base_model: str | None = None
    """To PEFT: the base's repository or directory, for the config."""
    task_type: str | None = None
    """To PEFT: the task, such as CAUSAL_LM, for the config."""

    uniform: bool = False
    """To PEFT: one rank and one alpha for all modules, for servers that know no patterns."""

    def prepare(self, saved: "Convert | None") -> "ConvertJob":
        """Check that source and options go together.

        Raises:
          LoraError: they do not, or there is no adapter.
        """
        if detect(self.paths[0]) == "orbax":
            if self.like is not None or self.alpha is not None:
                raise OptionError(f"{self.paths[0]} is no PEFT adapter: --like and --alpha are for the other direction")
        elif self.like is None:
            raise OptionError(
                f"{self.paths[0]} is a PEFT adapter: give --like ADAPTER, an adapter of the same JAX model saved by "
                "lora_jax.save, so that its parameters and their axes are known"
            )
        elif detect(self.like) != "orbax":
            raise OptionError(f"--like {self.like} must be an adapter that lora_jax.save wrote, not one of PEFT's")
        elif self.base_model or self.task_type or self.uniform:
            raise OptionError("--base-model, --task-type and --uniform are for PEFT's config: leave them out")
        find_names(self.names)
        if self.paths[1].exists():
            raise OptionError(f"{self.paths[1]} exists already: choose another directory")
        return ConvertJob(self)


class ConvertJob:
    """A conversion."""

    resume = None

    def __init__(self, options: Convert):
        self._options = options

    def run(self) -> None:
        """Convert, and show the result.

        Raises:
          OptionError: the map of names does not fit the adapter.
        """
        try:
            self._convert()
        except MatchError as error:
            known = f"Known maps for --names: {', '.join(sorted(peft.KNOWN))}; lora_jax.peft.save takes any other."
            raise OptionError(f"{error} {known}") from error
        terminal, found = Terminal(self._options.json), inspect(self._options.paths[1])
        terminal.show(found)
        terminal.result(found.as_dict())

    def _convert(self) -> None:
        options, (source, out) = self._options, self._options.paths
        if options.like is None:
            adapter = orbax.load(source)
            notes = {"base_model": options.base_model, "task_type": options.task_type, "uniform": options.uniform}
            peft.save(out, adapter, options.names, **notes)
        else:
            recorded, like = orbax.load_base(options.like), orbax.load(options.like)
            known = [update.site for update in like.values()]
            shapes = recorded or {site.path: jax.ShapeDtypeStruct(site.shape, site.dtype) for site in known}
            orbax.save(out, load_like(source, like, shapes, options.names, alpha=options.alpha), params=recorded)
