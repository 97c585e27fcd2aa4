"""What is wrong with data: a file as a whole, or one of its lines."""

from lora_jax.errors import LoraError


class DataError(LoraError, ValueError):
    """Data that cannot be trained on; the message names the file, mostly the line, and what to do.

    Example:
      >>> from lora_jax.data import read
      >>> try:
      ...     read("/nowhere.jsonl")
      ... except DataError as error:
      ...     print(str(error)[:48])
      /nowhere.jsonl is nothing, or a link to nothing.
    """


class BadLine(Exception):
    """What is wrong with one line, which is counted and named, and only fatal if nothing may be wrong.

    Args:
      reason: in a few words, the same for all lines with this fault.
      detail: what was found in this line.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
