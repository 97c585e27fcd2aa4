"""Text as models read it: tokenizers of Hugging Face directories, chat templates, and which tokens are answers.

`read_tokenizer` reads a directory, `Tokenizer` is what it returns, and `encode_chat` encodes a conversation. The extra
`[text]` brings what they need.
"""

from lora_jax import lazy as _lazy

_lazy.face(
    __name__,
    {
        "lora_jax.text.chat": "Chat encode_chat mark_chat",
        "lora_jax.text.errors": "MessagesError TemplateError TokenizerError",
        "lora_jax.text.files": "read_tokenizer",
        "lora_jax.text.tokenizer": "Tokenizer",
    },
)
