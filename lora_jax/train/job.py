"""The job behind `lora-jax finetune`: start an adapter, train it, evaluate, save, check, and merge."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from lora_jax import models
from lora_jax.errors import CheckpointError
from lora_jax.io.hf.merge import merge_checkpoint
from lora_jax.io.load import load_for
from lora_jax.jsonfile import read_object
from lora_jax.processes import written_by_the_first
from lora_jax.publish import discard, publish_file
from lora_jax.quantised.leaf import has_quantised
from lora_jax.report.tables import Table
from lora_jax.report.terminal import Progress, Terminal
from lora_jax.train import builtin, start
from lora_jax.train.best import Best
from lora_jax.train.card import card
from lora_jax.train.finetune import Trainer
from lora_jax.train.folder import Folder
from lora_jax.train.loop import TrainingError
from lora_jax.train.material import Material
from lora_jax.train.metrics import plot_loss, read_metrics
from lora_jax.train.options import TrainingOptions
from lora_jax.train.pretrain import Recipe, pretrain
from lora_jax.train.stop import deferred
from lora_jax.train.tasks import Task
from lora_jax.train.texts import python_source

_TOLERANCE, _ROUNDED = 1e-4, 5e-2
"""By how much losses may differ of an adapter that was saved, and of one merged into a base of 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done.

    Attributes:
      model: the base.
      task: what is trained.
      material: the data, encoded.
      config: of the adapter.
      training: how it is trained.
      init_batches: how many batches an initialiser sees that starts from data.
      source: an adapter on disk to start from, or None.
      mesh: of the devices, or None.
      merge: whether to write the merged model too.
      tensorboard: whether to write TensorBoard's files.
      record: all this as JSON, for people and for resuming.
      unmade: how the built-in model is pre-trained, if that has to be done first; `model` is it before.
      load: reads a model.
    """

    model: Any
    task: Task
    material: Material
    config: lora.LoraConfig
    training: TrainingOptions
    init_batches: int
    source: Path | None
    mesh: Any
    merge: bool
    tensorboard: bool
    record: dict[str, Any]
    unmade: Recipe | None
    load: Callable[..., Any]


class FinetuneJob:
    """Fine-tuning, with everything checked and nothing written until `run` is called.

    Args:
      plan: what to do.
      folder: where to.
      resumed: whether `folder` holds the beginning of this run.
      overwrite: whether it may hold another run, which is replaced.
      resume: the arguments that continue it.
      terminal: where it tells what happens.

    Raises:
      MatchError: the adapter's config selects nothing.
      LoraError: something else that is asked for cannot be done.
    """

    def __init__(self, plan: Plan, folder: Folder, *, resumed: bool, overwrite: bool, resume: str, terminal: Terminal):
        self.resume = resume
        self._plan, self._folder, self._resumed, self._overwrite = plan, folder, resumed, overwrite
        self._terminal = terminal
        self._result: dict[str, Any] = {"out": folder.path}
        model = plan.model
        tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
        self._sites = lora.find_sites(model.apply, model.params, tokens)
        self._init_key, self._step_key = jax.random.split(jax.random.key(plan.training.seed))
        self._check()

    def _check(self) -> None:
        """Refuse here what selects nothing, an optimizer that there is not, and an adapter that does not fit."""
        plan = self._plan
        if plan.source is not None:
            adapter: Any = self._read(plan.source)
        else:
            # What starts from data selects the same as what does not.
            config = replace(plan.config, init="default") if start.needed(plan.config) else plan.config
            draw = partial(lora.init, config=config, sites=self._sites)
            adapter = jax.eval_shape(lambda key, params: draw(key, params=params), self._init_key, plan.model.params)
        jax.eval_shape(plan.training.how.transformation(adapter).init, adapter)

    def run(self) -> None:
        """Do it all, and say what happens.

        Raises:
          FolderError: another run is going on in the folder, or has changed it since it was checked.
          Interrupted: Ctrl-C was pressed or SIGTERM came; the state is on disk.
          TrainingError: a loss is not finite, or the saved adapter is not the trained one.
        """
        began = time.monotonic()
        with self._folder.claimed(resume=self._resumed, overwrite=self._overwrite):
            if self._resumed and self._folder.finished:
                self._folder.finish()
                self._terminal.say(f"The run in {self._folder.path} is finished: nothing is left to do.")
            else:
                self._run()
                self._result["seconds"] = time.monotonic() - began
                self._terminal.say(f"Done in {self._result['seconds']:.0f} s.")
        self._terminal.result(self._result)

    def _run(self) -> None:
        if not self._resumed:
            with deferred():
                self._once(lambda: self._folder.start(self._plan.record))
        if self._plan.unmade is not None:
            self._plan = replace(self._plan, model=self._pretrained(self._plan.unmade))
        self._plan.material.tell(self._terminal)
        trainer = self._trainer()
        adapter, best, found = trainer.train(self._start())
        losses = self._compare()
        with deferred():
            self._save(adapter, best, found, losses)
            self._verify(trainer, adapter)
            if self._plan.merge:
                self._merge(trainer, adapter)
            self._once(self._folder.finish)
        self._next()

    def _pretrained(self, recipe: Recipe) -> Any:
        """The built-in model, made now and kept for the next run."""
        text, say = python_source(), self._terminal.say
        self._terminal.title(
            f"The built-in model is pre-trained on the source of Python's library: {len(text):,} bytes"
        )
        states, blank = self._folder.state / "pretrain", builtin.blank()
        params = pretrain(blank, text, recipe, states, partial(Progress, "pre-training", recipe.steps), say)
        try:
            path = builtin.keep(recipe, params)
        except CheckpointError as error:
            say(f"Not kept for the next run: {error}")
            return replace(self._plan.model, params=params)
        say(f"Kept for the next run in {path}")
        return self._plan.load(path)

    def _trainer(self) -> Trainer:
        plan, folder = self._plan, self._folder
        return Trainer(
            task=plan.task,
            base=plan.model.params,
            batches=plan.material.batches,
            named=plan.material.named,
            held_out=plan.material.held_out,
            options=plan.training,
            key=self._step_key,
            mesh=plan.mesh,
            states=folder.states,
            metrics=folder.metrics,
            board=folder.board if plan.tensorboard else None,
            report=partial(Progress, "fine-tuning", plan.training.steps),
            say=self._terminal.say,
        )

    def _read(self, source: Path) -> lora.Adapter:
        """The adapter on disk that training goes on from."""
        return load_for(source, self._plan.model.params, lambda: self._sites, self._plan.model.directory)

    def _start(self) -> lora.Adapter:
        """The adapter before the first step."""
        plan = self._plan
        if plan.source is not None:
            adapter, how = self._read(plan.source), f"from {plan.source}"
        else:
            adapter, how = self._fresh(), f"{plan.config.method} of rank {plan.config.rank}"
        start.check_exportable(adapter, self._sites, plan.model.params)
        self._terminal.title(f"Adapter: {how}; the base stays frozen")
        summary = lora.summary(adapter, plan.model.params)
        self._terminal.show(summary)
        self._result["adapter"] = summary.as_dict()
        self._terminal.title(f"Fine-tuning on {plan.material.name}")
        return adapter

    def _fresh(self) -> lora.Adapter:
        plan, captured = self._plan, None
        if what := start.needed(plan.config):
            batches = map(plan.material.batches, range(plan.init_batches))
            captured = start.captured_from(plan.task.plain, plan.config, plan.model.params, batches, what)
        return start.fresh(self._init_key, plan.config, plan.model.params, self._sites, captured)

    def _compare(self) -> dict[str, dict[str, float]]:
        """What the metrics say of base and adapter on held-out data; nothing where none are held out."""
        records = read_metrics(self._folder.metrics)
        found = {"base": (records[0], "base_eval_"), "adapted": (records[-1], "eval_")}
        if any(f"{prefix}loss" not in record for record, prefix in found.values()):
            return {}
        scores = {
            name: {what: record[f"{prefix}{what}"] for what in ("loss", "accuracy")}
            for name, (record, prefix) in found.items()
        }
        self._terminal.title("On held-out data")
        rows = [(name, f"{each['loss']:.4f}", f"{each['accuracy']:.1%}") for name, each in scores.items()]
        self._terminal.show(Table(("model", "loss", "right"), rows))
        self._result["losses"] = scores
        return scores

    def _save(self, adapter: lora.Adapter, best: Any, found: Best, losses: dict[str, dict[str, float]]) -> None:
        plan, folder = self._plan, self._folder
        kept = {folder.adapter: adapter, **({} if best is None else {folder.best: best})}
        means = {f"{name} on held-out data": each["loss"] for name, each in losses.items()}
        for where, each in kept.items():
            self._write(where, each, card(plan.record, means))
        title = f"LoRA of rank {plan.config.rank} on {plan.material.name}"
        self._once(lambda: plot_loss(folder.metrics, folder.image, title))
        self._terminal.title(f"Files in {folder.path}")
        written = {
            folder.adapter: "the adapter, in PEFT's format",
            folder.metrics: "losses",
            folder.image: "their curve",
        }
        if best is not None:
            written[folder.best] = f"the adapter of step {found.step}, the best on held-out data"
        for path, what in {**written, folder.config: "every option, resolved"}.items():
            self._terminal.say(f"{path}: {what}")

    def _write(self, where: Path, adapter: lora.Adapter, text: str) -> None:
        name = self._plan.record["model"]["name"]
        lora.peft.save(where, adapter, sites=self._sites, params=self._plan.model.params, base_model=name,
                       task_type=self._plan.material.peft_task, overwrite=True)  # fmt: skip
        self._once(lambda: publish_file(where / "README.md", text.encode()))

    def _verify(self, trainer: Trainer, adapter: lora.Adapter) -> None:
        """Load the adapter again, and compare its loss on some of the held-out data with the trained one's."""
        loaded = lora.peft.load(self._folder.adapter, self._plan.model.params, self._sites)
        if trainer.held_out:
            usual = trainer.evaluate(adapter, 1)["loss"]
            self._agree(trainer.evaluate(loaded, 1)["loss"], usual, "loaded from disk", _TOLERANCE)

    def _merge(self, trainer: Trainer, adapter: lora.Adapter) -> None:
        """Write the merged model, and compare its loss with the adapted one's."""
        folder = self._folder
        self._once(lambda: discard(folder.merged))
        self._write_merged()
        self._terminal.say(f"{folder.merged}: the merged model")
        if trainer.held_out:
            merged = self._plan.load(folder.merged, quantise=None)
            narrow = min(leaf.dtype.itemsize for leaf in jax.tree.leaves(merged.params)) < 4
            loss = replace(trainer, base=merged.params).evaluate(None, 1)["loss"]
            usual = trainer.evaluate(adapter, 1)["loss"]
            if has_quantised(self._plan.model.params) and self._rewritable:
                self._result["merged_loss"] = loss
                self._terminal.say(
                    f"Merged into the base as it was before: loss {loss:.4f}; beside its codes {usual:.4f}"
                )
            else:
                self._agree(loss, usual, "merged into the base", _ROUNDED if narrow else _TOLERANCE)

    @property
    def _rewritable(self) -> bool:
        """Whether the model is all that its directory holds."""
        model = self._plan.model
        return model.directory.is_dir() and read_object(model.directory / "config.json") == model.source

    def _write_merged(self) -> None:
        folder, model = self._folder, self._plan.model
        if self._rewritable:
            self._once(lambda: merge_checkpoint(model.directory, folder.adapter, folder.merged))
            return
        # Of a GGUF file, of codes, and with another head, there is no checkpoint to rewrite.
        adapter = lora.peft.load(folder.adapter, model.params, self._sites)
        models.save(folder.merged, model, lora.merge(lora.dequantise(model.params), adapter))

    def _agree(self, loss: float, usual: float, what: str, tolerance: float) -> None:
        difference = abs(loss - usual)
        if not difference <= tolerance * max(1.0, usual):
            raise TrainingError(f"the adapter {what} has a loss of {loss:.6f}, not {usual:.6f}")
        self._terminal.say(f"Adapter {what}: the loss differs by {difference:.1e}")
        self._result.setdefault("differences", {})[what] = difference

    def _once(self, write: Any) -> None:
        """Write in one process, and let the others wait for it."""
        written_by_the_first(self._folder.path, write)

    def _next(self) -> None:
        """What to do with it now."""
        given, found = self._plan.record["options"]["model"], self._plan.record["model"]["name"]
        base, adapter = given or found, self._folder.adapter
        self._terminal.title("Next")
        verb, more = ("generate", "--prompt TEXT") if self._plan.model.continues else ("evaluate", "--data FILE")
        self._terminal.say(f"lora-jax {verb} --model {base} --adapter {adapter} {more}")
        if not self._plan.merge and self._rewritable:
            self._terminal.say(f"lora-jax merge {base} {adapter} {self._folder.merged}")
        self._terminal.say(f"lora-jax export {adapter} {self._folder.path / 'served'} --for vllm")
