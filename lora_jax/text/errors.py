"""What goes wrong with tokenizers and chat templates, and the packages they need."""

from importlib import import_module
from types import ModuleType

from lora_jax.errors import LoraError


class TokenizerError(LoraError, ValueError):
    """A directory's tokenizer that is damaged, incomplete, or of a kind that is not read.

    Example:
      >>> import pathlib, tempfile
      >>> from lora_jax.text import read_tokenizer
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (folder / "tokenizer.json").write_text("{}")
      >>> try:
      ...     read_tokenizer(folder)
      ... except TokenizerError as error:
      ...     print("is no tokenizer" in str(error))
      True
    """


class TemplateError(TokenizerError):
    """A chat template that cannot be used, or that does not tell which of its text are answers.

    Example:
      >>> from lora_jax.text import byte_tokenizer
      >>> try:
      ...     byte_tokenizer().render([{"role": "user", "content": "Hi"}])
      ... except TemplateError as error:
      ...     print(str(error)[:35])
      the tokenizer has no chat template:
    """


class MessagesError(TemplateError):
    """A conversation that the template refuses, while it may take others.

    Example:
      >>> from lora_jax.text import byte_tokenizer
      >>> try:
      ...     byte_tokenizer("{{ raise_exception('no') }}").render([{"role": "user", "content": "Hi"}])
      ... except MessagesError as error:
      ...     print(error)
      the chat template refuses the conversation: no
    """


def extra(package: str) -> ModuleType:
    """Import a package of the extra `[text]`.

    Raises:
      ImportError: it is not installed; the message has the line that installs it.

    Example:
      >>> extra("jinja2").__name__
      'jinja2'
    """
    try:
        return import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ImportError(f'Tokenizers and chat templates need {name}: pip install "lora_jax[text]"') from error
