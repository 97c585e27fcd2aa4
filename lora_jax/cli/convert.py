"""The verb `convert`: an adapter of lora_jax's own format as a PEFT directory, and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from lora_jax.cli.parse import Verb
from lora_jax.errors import MatchError
from lora_jax.generate.adapters import model_sites
from lora_jax.io import peft
from lora_jax.io.inspect import detect, inspect
from lora_jax.io.names.known import find_names
from lora_jax.io.own import orbax
from lora_jax.io.peft.base import base_of
from lora_jax.io.peft.load import load_like
from lora_jax.io.peft.save import peft_files
from lora_jax.models.load import Model, load
from lora_jax.report.terminal import Terminal
from lora_jax.train.options import OptionError


@dataclass(frozen=True, kw_only=True)
class Convert(Verb):
    """Convert an adapter to the other format, lora_jax's own or PEFT's.

    From lora_jax's own (Orbax) to PEFT, and from PEFT to lora_jax's own. PyTorch's names and layouts do not tell those
    of a JAX model, so the way back needs --like: any adapter of the same model, such as one saved right after
    lora_jax.init, with every parameter that the PEFT adapter changes; of a DoRA adapter one with DoRA, as the file does
    not tell the norms of the base. Or it needs --base, where lora_jax.models reads the model.

    What the adapter records of its base's values goes along, and --base has them recorded.
    """

    paths: tyro.conf.Positional[tuple[Path, Path]]
    """The adapter, and the directory to create."""
    names: str | None = None
    """Known map of names, such as hf_flax or tunix; by default layers_0/attn/query is layers.0.attn.query."""
    like: Path | None = None
    """From PEFT: an adapter of the same JAX model, in lora_jax's format."""
    base: str | None = None
    """The adapter's base, whose values are compared and recorded: what lora_jax.models.load reads."""
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
        elif (self.like is None) == (self.base is None):
            raise OptionError(
                f"{self.paths[0]} is a PEFT adapter: give --like ADAPTER, an adapter of the same JAX model saved by "
                "lora_jax.save, so that its parameters and their axes are known, or --base MODEL, and not both"
            )
        elif self.like is not None and detect(self.like) != "orbax":
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
        model = None if options.base is None else load(options.base)
        if detect(source) == "orbax":
            _to_peft(options, source, out, model)
        elif model is not None:
            adapter = peft.load(source, model.params, model_sites(model), options.names, alpha=options.alpha)
            orbax.save(out, adapter, params=model.params)
        else:
            assert options.like is not None, "prepare has checked it"
            recorded, like = orbax.load_base(options.like), orbax.load(options.like)
            known = [update.site for update in like.values()]
            shapes = recorded or {site.path: jax.ShapeDtypeStruct(site.shape, site.dtype) for site in known}
            adapter, values = load_like(source, like, shapes, options.names, alpha=options.alpha)
            orbax.save_recorded(out, adapter, recorded, values)


def _to_peft(options: Convert, source: Path, out: Path, model: Model | None) -> None:
    notes: Any = {"base_model": options.base_model, "task_type": options.task_type, "uniform": options.uniform}
    if model is not None:
        notes |= {"params": model.params, "sites": model_sites(model)}
    adapter, base = orbax.load(source, notes.get("params")), base_of(*orbax.load_samples(source))
    peft.write_peft(out, peft_files(adapter, options.names, base=base, **notes))
