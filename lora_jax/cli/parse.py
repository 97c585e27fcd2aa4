"""From arguments to a job, or one line on what is wrong with them; and what every verb has."""

import io
import os
import re
import shutil
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any, Protocol, Self, get_type_hints

import tyro

from lora_jax.cli.words import meant, meant_verb
from lora_jax.errors import LoraError


class Job(Protocol):
    """Work whose arguments have been checked."""

    @property
    def resume(self) -> str | None:
        """The arguments that continue the job after it was stopped; None if a stopped job leaves nothing."""
        ...

    def run(self) -> None:
        """Do the work."""
        ...


@dataclass(frozen=True, kw_only=True)
class Verb(ABC):
    """A dataclass whose fields are the options of a verb."""

    json: bool = False
    """Print one JSON object instead of tables and lines."""

    def saved(self) -> Self | None:
        """The options of the run to resume: they stand where an option is left out. None where nothing is resumed."""
        return None

    @abstractmethod
    def prepare(self, saved: Any) -> Job:
        """Check everything that can be checked before anything is written.

        Args:
          saved: what `saved` returned.

        Raises:
          LoraError: something cannot be used.
        """


VERBS = {
    "finetune": ("finetune", "Adapt a language model to your data with LoRA."),
    "generate": ("generate --model DIR --prompt TEXT", "Continue prompts with a model, alone or with adapters."),
    "chat": ("chat --model DIR", "Talk with a model, alone or with an adapter."),
    "evaluate": ("evaluate --model DIR --data FILE", "Loss and accuracy of base, adapted and merged on a file."),
    "merge": ("merge BASE ADAPTER [ADAPTER ...] OUT", "Merge PEFT adapters into a Hugging Face checkpoint."),
    "quantise": ("quantise MODEL OUT", "Write a model in 4 bits, as bitsandbytes stores it."),
    "compose": ("compose ADAPTER [ADAPTER ...] --out OUT", "Make one adapter out of several."),
    "convert": ("convert ADAPTER OUT", "Convert an adapter to the other format, lora_jax's own or PEFT's."),
    "export": ("export ADAPTER OUT --for SERVER", "Write an adapter for vllm, sglang, llama.cpp, mlx or peft."),
    "extract": ("extract BASE TUNED OUT", "Make an adapter of a checkpoint that was fine-tuned in full."),
    "inspect": ("inspect ADAPTER", "Show what an adapter holds, in PEFT's format or lora_jax's own."),
    "bench": ("bench", "Time what LoRA costs: the base, the adapter, both, merged, and many adapters at once."),
}
"""How each verb is called, and what it does. Its module, which holds its options, is imported when it is called."""

_HELP = """\
LoRA for any JAX function.

{verbs}

  lora-jax VERB --help  what a verb does, and its options
  lora-jax --version    the version of lora_jax

Every verb takes --json: one JSON object on standard output instead of tables and lines. Progress and errors go to \
standard error. NO_COLOR and TERM=dumb are respected, and tables are not wrapped in a pipe.

{codes}"""

_CODES = (
    "Exit codes: 0 done; 1 something failed; 2 what you gave cannot be used; 130 stopped by Ctrl-C, 143 by "
    "SIGTERM, 141 by a closed pipe."
)

_TYPES = {
    r"\{?\[+([A-Z]+) \[\1 \.\.\.\]+\}?": r"\1 ...",
    r"\{None\}\|([A-Z]+(?: \.\.\.)?)": r"\1",
}
"""How tyro writes what an option takes, and how it is written here."""

_WIDTH = 100


class UsageError(LoraError, ValueError):
    """Arguments that mean nothing."""


def prepare(args: Sequence[str]) -> Job | None:
    """Turn arguments into a job; None if they ask for help or the version, which is printed.

    Raises:
      UsageError: they cannot be parsed.
      LoraError: what they ask for cannot be done.
    """
    if not args:
        raise UsageError(f"name a verb: {', '.join(VERBS)}. More with lora-jax --help")
    name, *rest = args
    if name in ("-h", "--help"):
        print(_help())
        return None
    if name == "--version":
        print(f"lora-jax {version('lora_jax')}")
        return None
    if name.startswith("-"):
        raise UsageError(f"{name} goes after a verb: lora-jax VERB {name}")
    if name not in VERBS:
        raise UsageError(f"there is no verb {name}: {meant_verb(name, VERBS)}")
    kind: type[Verb] = getattr(import_module(f"lora_jax.cli.{name}"), name.title())
    if "-h" in rest or "--help" in rest:
        print(_verb_help(name, kind))
        return None
    _check_known(name, rest, _options(kind))
    verb: Verb = _parse(kind, name, rest)
    saved = verb.saved()
    if saved is None:
        return verb.prepare(None)
    resumed: Verb = _parse(kind, name, rest, default=saved)
    return resumed.prepare(saved)


def _help() -> str:
    verbs = "\n".join(f"  {name:<10}{what}" for name, (_, what) in VERBS.items())
    text = _HELP.format(verbs=verbs, codes=_CODES)
    return "\n".join(_filled(["usage: lora-jax VERB [OPTIONS]", "", *text.splitlines()]))


def _options(kind: Any) -> set[str]:
    """Names of a verb's options as they are typed; those of its groups too."""
    names, hints = set(), get_type_hints(kind, include_extras=True)
    for each in fields(kind):
        if is_dataclass(hints[each.name]):
            names |= _options(hints[each.name])
        else:
            marks = getattr(hints[each.name], "__metadata__", ())
            called = [mark.name for mark in marks if getattr(mark, "name", None)] if marks else [each.name]
            names |= {name.replace("_", "-") for name in called}
    return names


def _check_known(verb: str, args: Sequence[str], options: set[str]) -> None:
    for given in args:
        name = given.partition("=")[0].lstrip("-").replace("_", "-")
        dashed = re.match(r"--?[A-Za-z]", given)
        if dashed and (not given.startswith("--") or name.removeprefix("no-") not in options):
            raise UsageError(f"{verb} has no option {given}: {meant(given, options, VERBS[verb][0])}")


def _parse(kind: type[Verb], name: str, args: Sequence[str], **options: Any) -> Any:
    complaint = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(complaint):
            return _tyro(kind, name, args, **options)
    except SystemExit:
        raise UsageError(_gist(complaint.getvalue(), name)) from None


def _tyro(kind: type[Verb], name: str, args: Sequence[str], **options: Any) -> Any:
    parse: Callable[..., Any] = tyro.cli
    return parse(kind, prog=f"lora-jax {name}", args=args, config=(tyro.conf.OmitArgPrefixes,), **options)


def _verb_help(name: str, kind: type[Verb]) -> str:
    """tyro's help as it is in a pipe, without its usage, its rules and what need not be said."""
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit), _narrow():
        _tyro(kind, name, ["--help"])
    lines = [re.sub(r"^ (\S.*)", r"\1:", line.rstrip()) for line in _shortened(shown.getvalue()).splitlines()[1:]]
    kept = [line for line in lines if not line or line.strip(" -:")]
    return "\n".join(_filled([f"usage: lora-jax {VERBS[name][0]} [OPTIONS]", *kept, "", _CODES]))


@contextmanager
def _narrow() -> Iterator[None]:
    """A terminal on which tyro puts options below each other; beside each other they are wider than it."""
    former = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(min(shutil.get_terminal_size().columns, _WIDTH))
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if former is not None:
            os.environ["COLUMNS"] = former


def _filled(lines: Sequence[str]) -> Iterator[str]:
    """Lines as wide as the terminal at most; tyro wraps its options, and no paragraphs."""
    width = min(shutil.get_terminal_size().columns, _WIDTH)
    for line in lines:
        yield from textwrap.wrap(line, width) if line[:1].strip() else [line]


def _gist(text: str, name: str) -> str:
    """The message among what tyro writes when it writes to no terminal: title, message, hints, with rules between."""
    lines = [line.strip() for line in text.splitlines()]
    rules = [index for index, line in enumerate(lines) if line and not line.strip("-")]
    said = " ".join(lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines).partition(" Got errors:")[0]
    return f"{_shortened(said).rstrip('.')}. Usage: lora-jax {VERBS[name][0]} [OPTIONS]"


def _shortened(text: str) -> str:
    """What tyro writes, without what need not be said."""
    text = re.sub(r"\s*\(default:\s+(None|False)?\s*\)|None,|\s*\(required\)", "", text)
    for verbose, short in _TYPES.items():
        text = re.sub(verbose, lambda found, short=short: found.expand(short).ljust(len(found[0])), text)
    return text
