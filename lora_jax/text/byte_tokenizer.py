"""`byte_tokenizer`: every byte is a token, for small models, tests and examples."""

from collections.abc import Mapping

from lora_jax.text.errors import extra
from lora_jax.text.tokenizer import Tokenizer

_END = "<|endoftext|>"


def byte_tokenizer(template: str | Mapping[str, str] | None = None) -> Tokenizer:
    """Make a tokenizer of 256 bytes, and a token that ends a text.

    Args:
      template: the chat template, or several by name.

    Raises:
      ImportError: tokenizers is not installed.

    Example:
      >>> tokenizer = byte_tokenizer()
      >>> tokenizer.vocab_size, tokenizer.eos_id, len(tokenizer.encode("für"))
      (257, 256, 4)
      >>> tokenizer.decode(tokenizer.encode("für"))
      'für'
    """
    tokenizers = extra("tokenizers")
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = {letter: number for number, letter in enumerate(sorted(level.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer, backend.decoder = level, tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([_END])
    return Tokenizer(backend, {"eos_token": _END}, template=template)
