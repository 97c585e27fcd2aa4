"""From arguments to a job, or one line on what is wrong with them."""

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from typing import Any, Protocol, Self

import tyro

from lora_jax.cli.bench import Bench
from lora_jax.cli.compose import Compose
from lora_jax.cli.convert import Convert
from lora_jax.cli.finetune import Finetune
from lora_jax.cli.inspect import Inspect
from lora_jax.cli.merge import Merge
from lora_jax.errors import LoraError

_PROGRAM = "lora-jax"
_DESCRIPTION = "LoRA for any JAX function."


class UsageError(LoraError, ValueError):
    """Arguments that mean nothing."""


class Job(Protocol):
    """Work whose arguments have been checked."""

    @property
    def resume(self) -> str | None:
        """The arguments that continue the job after it was stopped; None if a stopped job leaves nothing."""
        ...

    def run(self) -> None:
        """Do the work."""
        ...


class Verb(Protocol):
    """A dataclass whose fields are the options of a verb."""

    def saved(self) -> Self | None:
        """The options of the run to resume: they stand where an option is left out."""
        ...

    def prepare(self, saved: Self | None) -> Job:
        """Check everything that can be checked before anything is written."""
        ...


VERBS: dict[str, type[Verb]] = {
    "finetune": Finetune,
    "merge": Merge,
    "compose": Compose,
    "convert": Convert,
    "inspect": Inspect,
    "bench": Bench,
}


def prepare(args: Sequence[str]) -> Job:
    """Turn arguments into a job.

    Raises:
      UsageError: they cannot be parsed.
      LoraError: what they ask for cannot be done.
    """
    verb: Verb = _parse(tyro.extras.subcommand_cli_from_dict, VERBS, prog=_PROGRAM, description=_DESCRIPTION, args=args)
    saved = verb.saved()
    if saved is None:
        return verb.prepare(None)
    resumed = _parse(tyro.cli, type(saved), default=saved, prog=f"{_PROGRAM} {args[0]}", args=args[1:])
    return resumed.prepare(saved)


def _parse(parser: Callable[..., Any], *args: Any, **options: Any) -> Any:
    parse = partial(parser, *args, **options, config=(tyro.conf.OmitArgPrefixes,))
    complaint = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(complaint):
            return parse()
    except SystemExit as stop:
        if not stop.code:
            parse()  # the help, in the colours of the terminal this time
        raise UsageError(_gist(complaint.getvalue())) from None


def _gist(text: str) -> str:
    """The message among what tyro writes when it writes to no terminal: title, message, hints, with rules between."""
    lines = [line.strip() for line in text.splitlines()]
    rules = [index for index, line in enumerate(lines) if line and not line.strip("-")]
    if len(rules) < 2:
        return text
    message, hints = lines[rules[0] + 1 : rules[1]], lines[rules[1] :]
    message += [f"({line})" for line in hints if line.startswith("Available")]
    if any(line.startswith("Perhaps") for line in hints):
        similar = [line.split()[0] for line in hints if line.startswith("--") and line.strip("-")]
        message.append(f"(perhaps {' or '.join(similar)})")
    return " ".join(message)
