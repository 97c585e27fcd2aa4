"""TensorBoard: the numbers of `metrics.jsonl` as event files too, through the extra `[tensorboard]`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """Writes events into a folder; what a run that was killed wrote after `step` is hidden.

    Raises:
      ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, step: int = 0):
        self._writer = check().SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a record."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


def check() -> Any:
    """The package that writes events.

    Raises:
      ImportError: it is not installed.
    """
    try:
        import tensorboardX
    except ImportError as error:
        raise ImportError('--tensorboard needs tensorboardX: pip install "lora_jax[tensorboard]"') from error
    return tensorboardX
