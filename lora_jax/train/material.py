"""The data of a run: read, encoded, and as batches; what a person should know of them is told before the first step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from lora_jax.data import Batches, Dataset, Examples, Options, encode, read
from lora_jax.data import show as show_example
from lora_jax.data.example import texts_of
from lora_jax.data.records import Records
from lora_jax.errors import LoraError, listed
from lora_jax.paths import named_leaves
from lora_jax.report.terminal import Progress, Terminal
from lora_jax.train import classes
from lora_jax.train.options import DataOptions, TrainingOptions
from lora_jax.train.tasks import Name

_KINDS: dict[Name, tuple[str, ...]] = {
    "sft": ("text", "completion", "messages"), "classify": ("label",), "dpo": ("preference",),
}  # fmt: skip
_MANY = 10_000
"""Records from which on it is shown how many are encoded."""
_PEFT = {"sft": "CAUSAL_LM", "classify": "SEQ_CLS", "dpo": "CAUSAL_LM"}


class TaskError(LoraError, ValueError):
    """Data of one kind, and a task that needs another."""


def read_for(path: Path, options: DataOptions, task: Name, seed: int) -> Dataset:
    """Read the data.

    Raises:
      DataError: it cannot be read.
      TaskError: it is not what the task needs.
    """
    found = read(
        path, kind=options.kind, keys=options.renamed, strict=options.strict, held_out=options.held_out, seed=seed
    )
    if found.train.kind not in _KINDS[task]:
        fitting = next(name for name, kinds in _KINDS.items() if found.train.kind in kinds)
        raise TaskError(
            f"{path} holds {found.train.kind!r}, and --task {task} needs {listed(_KINDS[task], ' or ')}: did you mean "
            f"--task {fitting}?"
        )
    return found


@dataclass(frozen=True)
class Material:
    """Batches to train on and others to evaluate on.

    Attributes:
      name: what the data are, for people.
      data: as they were read.
      train: the examples to train on.
      valid: those to evaluate on, or None.
      tokenizer: that they were encoded with.
      options: how it is trained.
      task: what is trained.
    """

    name: str
    data: Dataset
    train: Examples
    valid: Examples | None
    tokenizer: Any
    options: TrainingOptions
    task: Name

    @property
    def sha256(self) -> Mapping[str, str]:
        """Of each file that was read."""
        return self.data.sha256

    @property
    def peft_task(self) -> str:
        """What PEFT calls the task."""
        return _PEFT[self.task]

    @cached_property
    def _batches(self) -> Batches:
        options = self.options
        return Batches(self.train, batch=options.batch * options.accumulate, length=options.length, seed=options.seed)

    def batches(self, step: int) -> Any:
        """The rows of a step, those of all its parts."""
        return self._batches[step]

    @cached_property
    def _held_out(self) -> Batches | None:
        if self.valid is None:
            return None
        return Batches(self.valid, batch=self.options.batch, length=self.options.length, seed=None)

    @cached_property
    def held_out(self) -> tuple[Any, ...]:
        """The batches to evaluate on."""
        found = self._held_out
        return () if found is None else tuple(found[i] for i in range(min(len(found), self.options.eval_batches)))

    @cached_property
    def room(self) -> int | None:
        """How many tokens are trained on in a part of a step, at most; the head is applied to no more positions."""
        if self.task == "classify":
            return None
        both = [each for each in (self._batches, self._held_out) if each is not None]
        return max(1, *(int(each.trained[: self.options.batch].sum()) for each in both))

    def named(self, step: int) -> str:
        """Which lines of the file the examples of a step are from."""
        lines = [str(line) for line in self._batches.lines(step)]
        return f"the examples of lines {listed(lines, count=20)} of {self.data.train.file}"

    def tell(self, terminal: Terminal) -> None:
        """Show what was read, what became of it, and the first example with what is trained on marked."""
        terminal.title(f"Data: {self.name}")
        read = {id(each.counts): each.counts for each in (self.data.train, self.data.valid) if each is not None}
        for counts in (*read.values(), self.train.counts):
            terminal.show(counts)
        rows, held_out = self._batches, 0 if self.valid is None else len(self.valid)
        size = self.options.batch * self.options.accumulate
        terminal.say(
            f"An epoch is {rows.steps_per_epoch:,} batches of {size:,} rows, of whose places {rows.fill:.1%} hold "
            f"tokens; {held_out:,} examples are held out"
        )
        if self.train.labels:
            terminal.say(
                f"The {len(self.train.labels)} classes, by their numbers: {listed(self.train.labels, count=20)}"
            )
        if not terminal.as_json and self.task != "classify":
            show_example(texts_of(self.train[0])[0], self.tokenizer)


def encoded(data: Dataset, name: str, model: Any, options: DataOptions, task: Name, how: TrainingOptions) -> Material:
    """Make tokens of the data.

    Raises:
      DataError: nothing is left to train on.
      TemplateError: conversations, and the model has no chat template.
      TaskError: the model has no tokenizer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise TaskError(f"{model.directory} has no tokenizer: copy tokenizer.json of the same model there")
    settings = Options(
        length=how.length, train_on=options.train_on, turns=options.turns, chat=options.in_template,
        strict=options.strict, now=options.now,
    )  # fmt: skip
    labels = classes.numbered(model, data.train) if task == "classify" else None
    train = encode_shown(data.train, tokenizer, settings, labels)
    _check_vocabulary(train, model)
    if task == "classify" and len(train.labels) < 2:
        raise TaskError(
            f"every example of {data.train.file} has the label {' '.join(train.labels)!r}: there is nothing to tell "
            "apart. Give examples of two classes or more"
        )
    valid = None if data.valid is None else encode_shown(data.valid, tokenizer, settings, train.labels or None)
    return Material(name, data, train, valid, tokenizer, how, task)


def encode_shown(records: Records, tokenizer: Any, settings: Options, labels: Sequence[str] | None) -> Examples:
    """What `lora_jax.data.encode` gives; how far it is shows where there are many records."""
    if len(records) < _MANY or jax.process_index() > 0:
        return encode(records, tokenizer, settings, labels=labels)
    with Progress("encoding", len(records), unit="example").shown() as shown:
        tell = lambda done: shown.update(done, f"{done / len(records):.0%}")  # noqa: E731
        return encode(records, tokenizer, settings, labels=labels, progress=tell)


def _check_vocabulary(examples: Examples, model: Any) -> None:
    """Refuse tokens that the model does not have: a look-up would give it others in silence."""
    most = max(int(each.tokens.max(initial=0)) for item in examples for each in texts_of(item))
    table = named_leaves(model.params)[0].values()
    size = int(model.source.get("vocab_size") or max(leaf.shape[0] for leaf in table))
    if most >= size:
        raise TaskError(
            f"the tokenizer in {model.directory} gives token {most}, and the model has {size}: it is another model's"
        )
