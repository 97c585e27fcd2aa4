"""The verb `finetune`: its options, and everything that is checked before anything is written."""

import shlex
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_jax.cli.parse import Verb
from lora_jax.models import TransformerConfig
from lora_jax.models.sizes import SIZES, Size
from lora_jax.report.terminal import Terminal
from lora_jax.train.data import Corpus, python_source, python_topics, read_text, split
from lora_jax.train.folder import Folder
from lora_jax.train.job import FinetuneJob, Plan
from lora_jax.train.options import AdapterOptions, OptionError, TrainingOptions, flag, require
from lora_jax.train.pretrain import Recipe
from lora_jax.train.saved import converted_fields


@dataclass(frozen=True, kw_only=True)
class Finetune(Verb):
    """Adapt a small language model to a text with LoRA.

    The model reads bytes. It is pre-trained on the source of Python's standard library (once, then it is cached),
    frozen and adapted. Without options this takes about two minutes on two cores, and no network.
    """

    data: Path | None = None
    """UTF-8 text file to adapt to; None is the topics of Python's help(), in English."""
    out: Path = Path("lora-out")
    """Folder for the adapter, the metrics, the loss curve and the resolved config."""
    resume: bool = False
    """Continue the run in --out, with its options."""
    overwrite: bool = False
    """Replace the run in --out; only what a run wrote is removed."""
    model: Size = "small"
    """Size of the base model."""
    pretrain_steps: int = 300
    """Pre-training steps."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def saved(self) -> "Finetune | None":
        """The options of the run in `out`, if it is to be resumed."""
        folder = Folder(self.out)
        folder.check(resume=self.resume, overwrite=self.overwrite)
        if not self.resume:
            return None
        try:
            return replace(self, **converted_fields(folder.read_config()["options"], Finetune))
        except TypeError as error:
            raise OptionError(
                f"{folder.config} holds options that this version of lora_jax does not know: {error}"
            ) from error

    def prepare(self, saved: "Finetune | None") -> FinetuneJob:
        """Check the options and read the texts; nothing is written.

        Raises:
          LoraError: an option or a text cannot be used.
        """
        if saved is not None and (changed := _changed(replace(self, data=_absolute(self.data)), saved)):
            raise OptionError(f"a run is resumed with its own options: leave out {', '.join(map(flag, changed))}")
        self.training.check()
        training = self.training if self.training.lr is not None else replace(self.training, lr=_RATE)
        require("pretrain_steps", self.pretrain_steps, above=0)
        folder, config, seq_len = Folder(self.out), self.adapter.config, self.training.length
        shape = replace(SIZES[self.model], remat=self.remat)
        target = split(*self._text(), seq_len)
        if saved is not None and folder.read_config()["text"]["sha256"] != target.sha256:
            raise OptionError(f"{target.name} has changed since the run began: start again with --overwrite")
        return FinetuneJob(
            Plan(
                shape=shape,
                recipe=Recipe(steps=self.pretrain_steps, seq_len=seq_len),
                config=config,
                training=training,
                source=split("Python source", python_source(), seq_len),
                target=target,
                record=self._record(shape, target),
            ),
            folder,
            resumed=saved is not None,
            overwrite=self.overwrite,
            resume=f"finetune --out {shlex.quote(str(self.out))} --resume",
            terminal=Terminal(self.json),
        )

    def _text(self) -> tuple[str, bytes]:
        if self.data is None:
            return "English of Python's help()", python_topics()
        return str(self.data), read_text(self.data)

    def _record(self, shape: TransformerConfig, text: Corpus) -> dict[str, Any]:
        """What `config.json` holds: every option resolved, and what the result depends on beside them."""
        options = {name: value for name, value in asdict(self).items() if name not in _OF_A_CALL}
        options["data"] = self.data and str(_absolute(self.data))
        return {
            "options": options,
            "model": asdict(shape),
            "lora": asdict(self.adapter.config),
            "text": {"name": text.name, "bytes": text.train.size + text.held_out.size, "sha256": text.sha256},
            "versions": {name: version(name) for name in ("jax", "flax", "optax")},
        }


_RATE = 3e-3
"""Of the small base model, if none is given."""
_OF_A_CALL = ("out", "resume", "overwrite", "json")
"""Options that do not say what a run is."""


def _absolute(path: Path | None) -> Path | None:
    return path and path.absolute()


def _changed(one: Any, other: Any) -> list[str]:
    """Names of the options that differ."""
    names = []
    for option in fields(one):
        if option.name in _OF_A_CALL:
            continue
        value, former = getattr(one, option.name), getattr(other, option.name)
        if value != former:
            names += _changed(value, former) if is_dataclass(value) else [option.name]
    return names
