"""What a run says on the terminal."""

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lora_jax.train.evaluate import Loss

_PLAIN_WIDTH = 120


def make_console() -> Console:
    """A console on standard output, wide enough for tables when that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)


def losses_table(losses: Mapping[str, tuple[Loss, Loss]]) -> Table:
    """Held-out losses of base and adapted model, by text."""
    table = Table("held-out text", "base\nnats/byte", "adapted\nnats/byte", "base\nbits/byte", "adapted\nbits/byte")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (base, adapted) in losses.items():
        table.add_row(name, f"{base.nats:.4f}", f"{adapted.nats:.4f}", f"{base.bits:.4f}", f"{adapted.bits:.4f}")
    return table


def sample_panel(title: str, prompt: bytes, continuation: bytes) -> Panel:
    """A prompt, underlined, and what a model made of it."""
    # Decoded as one text, so that a character cut in two at the seam stays whole.
    text = Text((prompt + continuation).decode(errors="replace"))
    text.stylize("bold underline", 0, len(prompt.decode(errors="replace")))
    return Panel(text, title=title, title_align="left")
