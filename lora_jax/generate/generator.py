"""`Generator`: prompts in, texts out, a few tokens at a time, with one compiled program for all of them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.errors import ConfigError, ParameterError, nearest
from lora_jax.generate.decoding import Forward, State, padded, places, read, write
from lora_jax.generate.forward import programs
from lora_jax.generate.kept import WIDTH, Kept
from lora_jax.generate.sampling import Sampling
from lora_jax.generate.text import Answer, Text
from lora_jax.many.bank import AdapterBank
from lora_jax.models.cache import empty_cache
from lora_jax.models.decoder import body_of
from lora_jax.models.load import Model

_STEPS = 8
"""Tokens that are written before any is shown."""

_DEFAULT = Sampling()


class Generator:
    """A model that continues prompts; programs are compiled at their first use, and kept.

    Prompts of other lengths, other adapters of the same shapes, and other ways of sampling use the same program, as
    long as their number and the room for their tokens (a power of two) stay the same.

    Args:
      model: of `lora_jax.models.load`.
      adapters: one adapter for all prompts, or several by name: each prompt then names its own. None for the base.

    Attributes:
      model: the same.
      tokenizer: the model's.
      slots: of several adapters the slot of each in the bank; empty for one or none.

    Raises:
      ConfigError: the model continues no texts, or has no tokenizer.

    Example:
      >>> model = lora_jax.models.load("SmolLM2-135M")  # doctest: +SKIP
      >>> Generator(model)(["The capital of France is"], max_tokens=4)[0].text  # doctest: +SKIP
      ' Paris.\\n\\nThe'
    """

    def __init__(self, model: Model, adapters: Adapter | Mapping[str, Adapter] | None = None):
        if not model.continues:
            raise ConfigError(f"{model.directory} is {model.what}, which continues no texts: give another model")
        if model.tokenizer is None:
            raise ConfigError("The model has no tokenizer: put its tokenizer.json into the directory")
        self.model, self.tokenizer = model, model.tokenizer
        self._kept: Kept | None = None
        forms = programs(model)
        self.slots: dict[str, int] = {}
        if adapters is None:
            self._forward, self._weights = forms.plain, model.params
        elif isinstance(adapters, Adapter):
            self._forward, self._weights = forms.adapted, (model.params, adapters)
        else:
            self.slots = {name: slot for slot, name in enumerate(adapters, 1)}
            self._forward, self._weights = forms.routed, (model.params, AdapterBank.of(list(adapters.values())))

    def __call__(self, prompts: Sequence[str | Sequence[int]], **options: Any) -> list[Answer]:
        """The texts that continue prompts; options are those of `stream`."""
        continuation = self.stream(prompts, **options)
        for _ in continuation:
            pass
        return continuation.answers

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int = 256,
        sampling: Sampling = _DEFAULT,
        stops: Sequence[str] = (),
        seed: int = 0,
        adapters: Sequence[str | None] | None = None,
        keep: bool = False,
    ) -> "Continuation":
        """Continue prompts, and give the text as it comes.

        Args:
          prompts: texts, or their tokens, as of a chat template.
          max_tokens: how many tokens may follow each.
          sampling: how they are chosen; greedy by default.
          stops: strings that end a text, beside the tokenizer's `eos_ids`; they are not part of it.
          seed: for drawing tokens.
          adapters: for each prompt the name of its adapter, or None for the base.
          keep: whether the cache of a single prompt is kept, until the next such call: what that prompt and the text so
            far begin with is not read again, as in the turns of a conversation.

        Raises:
          ConfigError: there is no prompt, one is empty, or a number is out of range.
          ParameterError: there is no adapter of such a name.
        """
        rows = [self._encoded(prompt) for prompt in prompts]
        if not rows or not all(rows) or max_tokens < 1:
            empty = next((number for number, row in enumerate(rows, 1) if not row), None)
            said = (
                f"prompt {empty} is empty"
                if empty
                else "there is no prompt"
                if not rows
                else f"max_tokens={max_tokens}"
            )
            raise ConfigError(f"{said}: give prompts of at least one token, and room for at least one more")
        weights = self._routed(len(rows), adapters) if self.slots else self._weights
        texts = [Text(self.tokenizer.decode, self.tokenizer.eos_ids, stops) for _ in rows]
        ends = jnp.asarray(self.tokenizer.eos_ids or (-1,), jnp.int32)
        run = _Run(self._forward, weights, sampling.checked(), ends)
        kept, self._kept = self._kept, None
        if not keep or len(rows) > 1 or self.slots:
            return Continuation(run, lambda: self._read(run, rows, max_tokens, seed), texts, max_tokens)
        rest = None if kept is None else kept.rest(rows[0], max_tokens)
        begin = lambda: self._read(run, rows, max_tokens, seed, rest)  # noqa: E731
        return Continuation(run, begin, texts, max_tokens, partial(self._keep, rows[0]))

    def _keep(self, prompt: list[int], written: list[int], state: State) -> None:
        self._kept = Kept([*prompt, *written], state.cache)

    def _encoded(self, prompt: str | Sequence[int]) -> list[int]:
        return self.tokenizer.encode(prompt, special=True) if isinstance(prompt, str) else list(prompt)

    def _routed(self, count: int, adapters: Sequence[str | None] | None) -> Any:
        names = list(adapters or [None] * count)
        if len(names) != count:
            raise ParameterError(f"there are {count} prompts, and adapters for {len(names)}")
        if unknown := [name for name in names if name is not None and name not in self.slots]:
            raise ParameterError(
                f"there is no adapter {unknown[0]!r}; nearest: {nearest(unknown[0], self.slots)}. None is the base"
            )
        slots = [0 if name is None else self.slots[name] for name in names]
        return (*self._weights, jnp.asarray(slots, jnp.int32))

    def _read(
        self, run: "_Run", rows: Sequence[Sequence[int]], more: int, seed: int, rest: Kept | None = None
    ) -> State:
        """Read the prompts into a new cache, or the rest of one into the cache of what is before it."""
        config = self.model.config
        if rest is None:
            prompts = padded(rows)
            table = body_of(config, self.model.params)[config.modules.table]["weight"]
            cache = empty_cache(config, len(rows), places(prompts, more, config.positions), table.dtype)
        else:
            prompts, cache = padded([rest.tokens])._replace(width=WIDTH), rest.cache
        tokens = np.zeros((len(rows), cache.length), np.int32)
        tokens[:, cache.length - prompts.tokens.shape[1] :] = prompts.tokens
        return read(
            run.forward, run.weights, jnp.asarray(tokens), jnp.asarray(prompts.lengths), cache, jax.random.key(seed),
            width=prompts.width,
        )  # fmt: skip


class _Run(NamedTuple):
    """What stays the same while texts grow."""

    forward: Forward
    weights: Any
    sampling: Sampling
    ends: jax.Array


class Continuation:
    """Texts as they come: iterating over it gives a tuple of what is new in each, again and again until all have ended.

    Attributes:
      answers: the texts so far; after the last iteration they are whole.
      tokens: how many tokens were written.
      waited: seconds until the first of them, with the compilation of programs if they were new.
      rate: tokens per second after the first ones, or None if there were no more.

    Example:
      >>> for new in Generator(model).stream(["Once"], max_tokens=32):  # doctest: +SKIP
      ...     print(new[0], end="", flush=True)
       upon a time
    """

    def __init__(self, run: _Run, begin: Any, texts: Sequence[Text], max_tokens: int, keep: Any = None):
        self._run, self._begin, self._texts, self._left = run, begin, texts, max_tokens
        self._keep, self._written = keep, list[int]()
        self.tokens, self.waited = 0, 0.0
        self.rate: float | None = None

    @property
    def answers(self) -> list[Answer]:
        """The texts so far."""
        return [text.answer() for text in self._texts]

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        began = time.monotonic()
        state, first = self._begin(), 0
        while self._left > 0 and not all(text.ended for text in self._texts):
            steps = min(self._left, _STEPS)
            written, state = write(
                self._run.forward, self._run.weights, state, self._run.sampling, self._run.ends, jnp.int32(steps),
                steps=_STEPS,
            )  # fmt: skip
            rows = np.asarray(written)[:, :steps]
            self._left -= steps
            self._written += [token for token in rows[0].tolist() if token >= 0]
            self.tokens += int((rows >= 0).sum())
            now = time.monotonic()
            if not first:
                self.waited, first = now - began, self.tokens
            elif self.tokens > first:
                self.rate = (self.tokens - first) / (now - began - self.waited)
            yield tuple(text.push(row) for text, row in zip(self._texts, rows.tolist(), strict=True))
        if self._keep is not None:
            self._keep(self._written, state)
        yield tuple(text.close() for text in self._texts)
