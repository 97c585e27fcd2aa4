"""Text as models read it: tokenizers of Hugging Face directories, chat templates, and which tokens are answers.

`read_tokenizer` reads a directory, `Tokenizer` is what it returns, and `encode_chat` encodes a conversation. The extra
`[text]` brings what they need.
"""

from typing import TYPE_CHECKING

from lora_jax import lazy as _lazy

if TYPE_CHECKING:  # What type checkers and editors see; a test holds it equal to the names below.
    from lora_jax.text.byte_tokenizer import byte_tokenizer as byte_tokenizer
    from lora_jax.text.chat import Chat as Chat
    from lora_jax.text.chat import encode_chat as encode_chat
    from lora_jax.text.chat import mark_chat as mark_chat
    from lora_jax.text.errors import MessagesError as MessagesError
    from lora_jax.text.errors import TemplateError as TemplateError
    from lora_jax.text.errors import TokenizerError as TokenizerError
    from lora_jax.text.files import read_tokenizer as read_tokenizer
    from lora_jax.text.tokenizer import Tokenizer as Tokenizer

_lazy.face(
    __name__,
    {
        "lora_jax.text.byte_tokenizer": "byte_tokenizer",
        "lora_jax.text.chat": "Chat encode_chat mark_chat",
        "lora_jax.text.errors": "MessagesError TemplateError TokenizerError",
        "lora_jax.text.files": "read_tokenizer",
        "lora_jax.text.tokenizer": "Tokenizer",
    },
)
