"""The command `lora-jax`.

```
cli/parse.py      arguments -> a job, or one line on what is wrong with them
cli/finetune.py   the verb `finetune`; every verb is a file with a dataclass of options
cli/merge.py      `merge`: PEFT adapters into a Hugging Face checkpoint
cli/compose.py    `compose`: several adapters into one
cli/convert.py    `convert`: adapters between Orbax and PEFT
cli/inspect.py    `inspect`: what an adapter holds
cli/bench.py      `bench`: what LoRA's modes cost beside the base
cli/stop.py       SIGTERM as an exception
```

Whatever happens ends in one line and an exit code: 0 done, 1 failed, 2 nothing done because of what was asked for,
130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lora_jax.cli.stop import Terminated, terminable
from lora_jax.errors import LoraError


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      args: the arguments, by default those of the process.

    Returns:
      The exit code.
    """
    if missing := [name for name in ("tyro", "matplotlib") if find_spec(name) is None]:
        return _fail(f'the command line needs {" and ".join(missing)}: pip install "lora_jax[cli]"', 2)
    # Not before: it imports what has just been looked for.
    from lora_jax.cli.parse import prepare

    try:
        job = prepare(sys.argv[1:] if args is None else args)
    except LoraError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("stopped before anything was written", 130)
    try:
        with terminable():
            job.run()
    except KeyboardInterrupt as stop:
        hint = f"to continue: {_program()} {job.resume}" if job.resume else "nothing was left behind"
        return _fail(f"{str(stop) or 'stopped'}; {hint}", 143 if isinstance(stop, Terminated) else 130)
    except (LoraError, OSError) as error:
        return _fail(error, 1)
    return 0


def _fail(reason: object, code: int) -> int:
    print(f"lora-jax: {' '.join(str(reason).split())}", file=sys.stderr)
    return code


def _program() -> str:
    return "python -m lora_jax" if Path(sys.argv[0]).name == "__main__.py" else "lora-jax"
