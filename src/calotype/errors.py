"""What can go wrong, by whose fault it is; the tree is the documentation.

    CalotypeError
    ├── RequestError         2   the words of the command are wrong
    │   └── CommandLineError     QEMU's command line holds something we cannot stand for
    ├── NotFoundError        3   no such VM or snapshot, or more than one
    ├── BlockedError         4   the plan names what is in the way; nothing was changed
    ├── MismatchError        5   what is there is not what the snapshot was taken of
    ├── ConflictError        6   taken, busy or in the wrong run state
    ├── QemuError            7   QEMU refused, failed or died; its own text is kept
    ├── PauseLimitError      8   the pause grew too long: given up, the guest runs on
    ├── HostError            9   a tool, a permission or space is missing on the host
    ├── StoreError          10   a file of the store is not what it claims to be
    ├── UnwellError         11   a check-up found faults
    └── InterruptError     130   stopped by the user; says what was undone

An error is one line that says what is wrong, and one that says what to do about it. What a program
would like to know travels as data. The numbers are the command's exit codes: one for each family.
"""

from typing import Any, ClassVar


class CalotypeError(Exception):
    """The root of all errors that Calotype raises on purpose.

    Args:
        problem: One line that says what is wrong.
        remedy: One line that says what to do.
        **data: What a program would like to know, JSON-able.
    """

    exit_code: ClassVar[int] = 1
    family: ClassVar[str] = "error"

    def __init__(self, problem: str, remedy: str = "", **data: Any) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy
        self.data = data

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}" if self.remedy else self.problem


class RequestError(CalotypeError):
    """The words of the command are wrong."""

    exit_code = 2
    family = "request"


class CommandLineError(RequestError):
    """QEMU's command line holds something that Calotype cannot stand for."""


class NotFoundError(CalotypeError):
    """No such VM or snapshot, or more than one of that name."""

    exit_code = 3
    family = "not-found"


class BlockedError(CalotypeError):
    """The plan names what is in the way; nothing was changed."""

    exit_code = 4
    family = "blocked"


class MismatchError(CalotypeError):
    """What is there is not what the snapshot was taken of; nothing was changed."""

    exit_code = 5
    family = "mismatch"


class ConflictError(CalotypeError):
    """Taken, busy, or not in a run state that allows it."""

    exit_code = 6
    family = "conflict"


class QemuError(CalotypeError):
    """QEMU refused, failed or died; its own text is kept in the problem."""

    exit_code = 7
    family = "qemu"


class PauseLimitError(CalotypeError):
    """The pause would have grown too long: given up, the guest runs on."""

    exit_code = 8
    family = "pause-limit"


class HostError(CalotypeError):
    """A tool, a permission or space is missing on the host."""

    exit_code = 9
    family = "host"


class StoreError(CalotypeError):
    """A file of the store is not what it claims to be."""

    exit_code = 10
    family = "store"


class UnwellError(CalotypeError):
    """A check-up found faults; each was told with what to do about it."""

    exit_code = 11
    family = "unwell"


class InterruptError(CalotypeError):
    """Stopped by the user; says whether what was begun was undone."""

    exit_code = 130
    family = "interrupt"


FAMILIES: tuple[type[CalotypeError], ...] = (
    RequestError,
    NotFoundError,
    BlockedError,
    MismatchError,
    ConflictError,
    QemuError,
    PauseLimitError,
    HostError,
    StoreError,
    UnwellError,
    InterruptError,
)
"""The families, in the order of their exit codes; the page on exit codes is checked against it."""
