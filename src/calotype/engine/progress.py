"""How an operation says how far it is; the command line draws it, a program may ignore it."""

from typing import Protocol


class Progress(Protocol):
    """Told of each phase, and of the bytes done within one."""

    def __call__(self, phase: str, done_bytes: int, expected_bytes: int) -> None:
        """Take note; must not block and must not raise."""


def silent(phase: str, done_bytes: int, expected_bytes: int) -> None:
    """Take no note."""
