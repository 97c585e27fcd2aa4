"""The verb `export`: an adapter as the files that a server reads, with every number as it is meant."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from lora_jax.cli.parse import Verb
from lora_jax.io.inspect import detect
from lora_jax.io.own import orbax
from lora_jax.io.peft.base import base_of
from lora_jax.io.peft.config import LORA, peft_type_of
from lora_jax.io.peft.files import PeftFiles
from lora_jax.io.peft.mlx import write_mlx
from lora_jax.io.peft.portability import Portability, row
from lora_jax.io.peft.read import read_peft
from lora_jax.io.peft.save import peft_files
from lora_jax.io.peft.servers import SERVERS, Server
from lora_jax.io.peft.uniform import can_be_uniform, uniform
from lora_jax.io.peft.write import write_peft
from lora_jax.report.terminal import Terminal
from lora_jax.train.options import OptionError


@dataclass(frozen=True, kw_only=True)
class Export(Verb):
    """Write an adapter for vllm, sglang, llama.cpp, mlx or peft.

    From PEFT's format or lora_jax's own. Servers take lora_alpha / rank for every scale, whatever the config says, so
    there are one rank, one alpha and no patterns: ranks are padded with zeros, and scales go into B. For mlx the files
    are mlx-lm's, for all others PEFT's; llama.cpp's own convert_lora_to_gguf.py makes GGUF of those. What a server
    cannot read at all is refused, with the reason.
    """

    paths: tyro.conf.Positional[tuple[Path, Path]]
    """The adapter, and the directory to create."""
    server: Annotated[Server, tyro.conf.arg(name="for")]
    """Who is to read it."""
    alpha: float | None = None
    """The lora_alpha of a file whose scale nothing tells: no config, no metadata, no alpha tensors."""
    names: str | None = None
    """Of an adapter in lora_jax's own format: the map of names, such as hf_flax; see lora-jax convert."""
    base_model: str | None = None
    """The base's repository or directory, for the config."""
    task_type: str | None = None
    """The task, such as CAUSAL_LM, for the config."""

    def prepare(self, saved: "Export | None") -> "ExportJob":
        """Read the adapter, and check that the server can read what would be written.

        Raises:
          LoraError: there is no adapter, or the server has no place for what it holds.
        """
        source, out = self.paths
        own = detect(source) == "orbax"
        if self.alpha is not None and own:
            raise OptionError(f"{source} has scales of its own: leave --alpha out")
        if self.names is not None and not own:
            raise OptionError(f"{source} is a PEFT adapter, which has PyTorch's names: leave --names out")
        if out.exists():
            raise OptionError(f"{out} exists already: choose another directory")
        files = self._files(own)
        found = row(files, self.server, form=False)
        if found.verdict != "reads":
            raise OptionError(f"{self.server} {found.verdict} {source}. {'; '.join(found.reasons)}")
        return ExportJob(self, files)

    def _files(self, own: bool) -> PeftFiles:
        if own:
            base = base_of(*orbax.load_samples(self.paths[0]))
            notes: Any = {"base_model": self.base_model, "task_type": self.task_type, "base": base}
            return peft_files(orbax.load(self.paths[0]), self.names, uniform=True, **notes)
        files = read_peft(self.paths[0], alpha=self.alpha)
        files.check_scales()
        fields = {"base_model_name_or_path": self.base_model, "task_type": self.task_type}
        given = {field: value for field, value in fields.items() if value is not None}
        files = replace(files, config={**files.config, **given})
        # PEFT itself reads also what has no one rank, and its other types.
        plain = can_be_uniform(files) and peft_type_of(files.config) is LORA
        return uniform(files) if self.server != "peft" or plain else files


class ExportJob:
    """An export."""

    resume = None

    def __init__(self, options: Export, files: PeftFiles):
        self._options, self._files = options, files

    def run(self) -> None:
        """Write it, and show who reads what was written."""
        out, server = self._options.paths[1], self._options.server
        if server == "mlx":
            write_mlx(out, self._files)
        else:
            write_peft(out, self._files)
        readers = ("mlx",) if server == "mlx" else SERVERS
        found = Portability(tuple(row(self._files, each, form=server != "mlx") for each in readers))
        terminal = Terminal(self._options.json)
        terminal.show(found)
        terminal.say(f"{out}: {len(self._files.modules)} modules for {server}")
        terminal.result({"out": out, "for": server, **found.as_dict()})
