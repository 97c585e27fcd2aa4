"""The command `lora-jax`: exit codes, signals, and errors in one line.

```
cli/parse.py      arguments -> a job, or one line on what is wrong with them; what every verb has
cli/words.py      options of PEFT and mlx-lm, and what they are called here
cli/finetune.py   the verb `finetune`; every verb is a file with a dataclass of options
cli/generate.py   `generate`: texts of a model, alone or with adapters
cli/chat.py       `chat`: a conversation
cli/evaluate.py   `evaluate`: loss and accuracy of base, adapted and merged
cli/merge.py      `merge`: PEFT adapters into a Hugging Face checkpoint
cli/compose.py    `compose`: several adapters into one
cli/convert.py    `convert`: adapters between Orbax and PEFT
cli/export.py     `export`: an adapter for a server
cli/extract.py    `extract`: an adapter of a fine-tuned checkpoint
cli/inspect.py    `inspect`: what an adapter holds
cli/bench.py      `bench`: what LoRA's modes cost beside the base
```

An error that is a `ValueError` is about what was given, one that is none about what happened then; likewise an
`OSError` is about the input where it is about a path.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from lora_jax.errors import LoraError, StorageError
from lora_jax.report.tables import escaped
from lora_jax.train.stop import Interrupted

DONE, FAILED, REFUSED = 0, 1, 2
_ABOUT_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      args: the arguments, by default those of the process.

    Returns:
      The exit code: 0 done, 1 something failed, 2 what was given cannot be used, 128 and the number of the signal where
      one stopped it (130 Ctrl-C, 143 SIGTERM, 141 a pipe that was closed).
    """
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # A terminal that is not UTF-8 shows what it can.
    try:
        with _terminable():
            return _run(sys.argv[1:] if args is None else list(args))
    except BrokenPipeError:
        # What is still buffered has no reader either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(args: Sequence[str]) -> int:
    if missing := [name for name in ("tyro", "matplotlib") if find_spec(name) is None]:
        return _fail(f'the command line needs {" and ".join(missing)}: pip install "lora_jax[cli]"', REFUSED)
    # Not before: it imports what has just been looked for.
    from lora_jax.cli.parse import prepare

    hint = "nothing was left behind"
    try:
        if (job := prepare(args)) is not None:
            hint = f"to continue: {_program()} {job.resume}" if job.resume else hint
            job.run()
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        return _fail(f"{str(stop) or 'stopped'}; {hint}", 128 + number)
    except BrokenPipeError:
        raise
    except (LoraError, OSError, MemoryError, ImportError) as error:
        refused = isinstance(error, (ValueError, *_ABOUT_PATHS)) and not isinstance(error, StorageError)
        return _fail(_said(error), REFUSED if refused else FAILED)
    return DONE


def _said(error: BaseException) -> str:
    """What an error says; Python's own about a file, with the file first as in ours."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


def _fail(reason: str, code: int) -> int:
    print(f"lora-jax: {escaped(' '.join(reason.split()))}", file=sys.stderr)
    return code


def _program() -> str:
    return "python -m lora_jax" if Path(sys.argv[0]).name == "__main__.py" else "lora-jax"


@contextmanager
def _terminable() -> Iterator[None]:
    """Raise `Interrupted` where SIGTERM comes; the former handler is put back at the end.

    So a verb ends as with Ctrl-C, and cleans up what it began.

    Only the main thread may set handlers; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former or signal.SIG_DFL)


def _stop(number: int, frame: FrameType | None) -> None:
    # A second one must not cut the cleaning up short.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted(number=number)
