"""From arguments to a job, or one line on what is wrong with them."""

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Annotated, Any, Protocol, Self

import tyro

from lora_jax.cli.finetune import Finetune
from lora_jax.errors import LoraError

_STYLE = tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes
_DESCRIPTION = "LoRA for any JAX function."


class UsageError(LoraError, ValueError):
    """Arguments that mean nothing."""


class Job(Protocol):
    """Work whose arguments have been checked."""

    @property
    def resume(self) -> str:
        """The arguments that continue the job after it was stopped."""
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


VERBS: dict[str, type[Verb]] = {"finetune": Finetune}


def prepare(args: Sequence[str]) -> Job:
    """Turn arguments into a job.

    Raises:
      UsageError: they cannot be parsed.
      LoraError: what they ask for cannot be done.
    """
    verb = _parse(args, VERBS)
    saved = verb.saved()
    if saved is None:
        return verb.prepare(None)
    resumed = _parse(args, {args[0]: Annotated[type(saved), tyro.conf.subcommand(default=saved)]})
    return resumed.prepare(saved)


def _parse(args: Sequence[str], verbs: dict[str, Any]) -> Verb:
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(
                verbs, prog="lora-jax", description=_DESCRIPTION, args=args, config=_STYLE
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_gist(complaint.getvalue())) from None


def _gist(box: str) -> str:
    """The message in the frame that tyro draws: what stands above the first rule, and tyro's suggestion."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    rules = [index for index, line in enumerate(lines) if line and not line.strip("─")]
    message_lines = lines[: rules[0] if rules else None]
    similar = [line.split()[0] for line in lines[len(message_lines) :] if line.startswith("--")]
    hint = f"; perhaps you meant {' or '.join(similar)}" if similar else ""
    return " ".join(message_lines) + hint or box
