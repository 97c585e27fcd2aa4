"""What every verb has: `--json`, and two steps, of which only the second writes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, Self


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
