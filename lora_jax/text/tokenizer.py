"""`Tokenizer`: text to tokens and back, with the special tokens and the chat templates that belong to a model."""

import json
import shutil
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from lora_jax.text.errors import TemplateError, TokenizerError
from lora_jax.text.template import Messages, Template, Tools


class Tokenizer:
    """The tokenizer of a model: `read_tokenizer` reads it from a directory; here it is made of its parts.

    Args:
      backend: a `tokenizers.Tokenizer`; its padding and truncation are switched off, as batches are padded here.
      special: special tokens by their names in Hugging Face's files: `bos_token`, `eos_token`, `pad_token`, ...
      template: the chat template, or several by name: `default`, and `tool_use` where there are tools.
      eos_ids: further tokens at which generation stops, beside `eos_token`.
      files: where it was read from, to be copied by `save`.

    Attributes:
      backend: the same.
      special: the same.
      templates: chat templates by name, as Jinja source; empty if there are none.
      bos_id: the token that begins a text, or None.
      eos_id: the token that ends one, or None.
      pad_id: the token for padding, or None.
      eos_ids: all tokens at which generation stops, `eos_id` first.
      files: names of its files in a model's directory, relative to it.
      vocab_size: one more than the largest token.
      adds_bos: whether `encode(text, special=True)` puts `bos_id` first.

    Raises:
      TokenizerError: `bos_token` or `eos_token` is not in the vocabulary.

    Example:
      >>> from tokenizers import Tokenizer as Backend, models, pre_tokenizers
      >>> backend = Backend(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="<s>"))
      >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
      >>> tokenizer = Tokenizer(backend, {"eos_token": "<s>"})
      >>> tokenizer.encode("b a b"), tokenizer.decode([2, 1]), tokenizer.eos_ids
      ([2, 1, 2], 'b a', (0,))
    """

    def __init__(
        self,
        backend: Any,
        special: Mapping[str, str] | None = None,
        *,
        template: str | Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
        files: Mapping[str, Path] | None = None,
    ):
        backend.no_padding()
        backend.no_truncation()
        self.backend, self.special = backend, dict(special or {})
        self.templates = {"default": template} if isinstance(template, str) else dict(template or {})
        self.bos_id, self.eos_id = self._named("bos_token"), self._named("eos_token")
        self.pad_id = backend.token_to_id(self.special.get("pad_token", ""))
        first = [] if self.eos_id is None else [self.eos_id]
        self.eos_ids = tuple(dict.fromkeys([*first, *eos_ids]))
        self._files = dict(files or {})

    def __repr__(self) -> str:
        chat = f", chat templates: {', '.join(self.templates)}" if self.templates else ", no chat template"
        return f"Tokenizer({self.vocab_size:,} tokens{chat})"

    def _named(self, name: str) -> int | None:
        token = self.special.get(name)
        if token is None:
            return None
        found = self.backend.token_to_id(token)
        if found is None:
            raise TokenizerError(
                f"{name} is {token!r}, which is not in the vocabulary of {self.backend.get_vocab_size():,} tokens. "
                "Give the tokenizer.json and the tokenizer_config.json of one model"
            )
        return found

    @property
    def files(self) -> tuple[str, ...]:
        """Names of its files in a model's directory."""
        return tuple(self._files)

    @property
    def template(self) -> str | None:
        """The chat template for conversations without tools, or None."""
        return self.templates.get("default")

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token."""
        return max(self.backend.get_vocab().values(), default=-1) + 1

    @cached_property
    def adds_bos(self) -> bool:
        """Whether `encode(text, special=True)` puts `bos_id` first."""
        return self.bos_id is not None and self.encode("a", special=True)[:1] == [self.bos_id]

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Tokens of a text.

        Special tokens that are written out in it are read as such, as templates write them.

        Args:
          text: any text.
          special: add what the model's files say begins and ends a text. A rendered template has it already.
        """
        return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of tokens.

        Args:
          ids: tokens; of those that are not in the vocabulary nothing is shown.
          skip_special: leave out special tokens.
        """
        return self.backend.decode([int(each) for each in ids], skip_special_tokens=skip_special)

    def chat_template(self, tools: bool = False) -> Template:
        """The compiled template for conversations with or without tools.

        Raises:
          TemplateError: there is none.
        """
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            named = f"only templates named {', '.join(self.templates)}" if self.templates else "no chat template"
            raise TemplateError(
                f"the tokenizer has {named}: neither chat_template.jinja nor chat_template in tokenizer_config.json. "
                "Use a model that is tuned to chat, or put a chat_template.jinja into its directory"
            )
        if name not in self._compiled:
            self._compiled[name] = Template(self.templates[name], self.special)
        return self._compiled[name]

    @cached_property
    def _compiled(self) -> dict[str, Template]:
        return {}

    def render(
        self,
        messages: Messages,
        tools: Tools | None = None,
        generation_prompt: bool = False,
        *,
        now: datetime | None = None,
    ) -> str:
        """A conversation as the text that the model reads; encode it with `special=False`.

        Args:
          messages: each with `role`, and mostly `content`.
          tools: JSON schemas of functions that the model may call.
          generation_prompt: end with what begins an answer.
          now: what templates that write a date take it to be; by default the present.

        Raises:
          TemplateError: there is no template, or it refuses the conversation.
        """
        return self.chat_template(bool(tools)).render(messages, tools, generation_prompt=generation_prompt, now=now)

    def save(self, directory: str | PathLike[str]) -> tuple[str, ...]:
        """Copy its files into a model's directory, or write them if it was made of parts.

        Returns:
          The names of the files.
        """
        out = Path(directory)
        if self._files:
            for name, path in self._files.items():
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, out / name)
            return self.files
        out.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special}
        if self.templates:
            named = [{"name": name, "template": source} for name, source in self.templates.items()]
            config["chat_template"] = self.template if len(named) == 1 and self.template else named
        texts = {"tokenizer.json": self.backend.to_str(), "tokenizer_config.json": json.dumps(config, indent=2)}
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
        return tuple(texts)
