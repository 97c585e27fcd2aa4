"""Stopping in order: Ctrl-C and SIGTERM wait until what is at stake is done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal stopped the work in order.

    Attributes:
      number: of the signal, SIGINT for Ctrl-C.
    """

    def __init__(self, message: str = "", number: int = signal.SIGINT):
        super().__init__(message)
        self.number = number


class Stop:
    """Whether a signal has come.

    Attributes:
      number: of the signal; None while there was none.
      message: what has become of the work, for the error that is raised at the end.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.message = ""


@contextmanager
def deferred() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a flag, and raise at the end if one has come.

    A second Ctrl-C acts at once, as a person who presses it twice means it; further SIGTERMs wait too. Only the main
    thread may set handlers; elsewhere nothing changes.

    Raises:
      Interrupted: a signal came, and all that was inside is done.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    usual: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        stop.number = stop.number or number
        signal.signal(signal.SIGINT, usual[signal.SIGINT] or signal.SIG_DFL)

    for number in usual:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if stop.number is not None:
        raise Interrupted(stop.message, stop.number)
