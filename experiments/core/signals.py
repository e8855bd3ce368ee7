"""Requests to stop: SIGINT (Ctrl-C) and SIGTERM, as exceptions that the command line turns into exit codes."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to stop. The message says what was saved and how to continue.

    Attributes:
        signal_number: the signal, such as `signal.SIGTERM`.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal_number


def raise_on_sigterm() -> None:
    """Make SIGTERM raise `Interrupted`, so that `finally` blocks run and worker processes are stopped first.

    Only the main thread may call it.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted("Terminated.", number)

    signal.signal(signal.SIGTERM, stop)
