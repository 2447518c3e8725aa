"""The witness: a guest that notices when its RAM and its disks are not of one instant.

`witness.c` is the instrument, and opens with its theory; `build` makes a kernel and an initramfs
to boot it with; `reading` turns what it says on its console into facts and a verdict.
"""

from calotype.testing.witness.build import Witness, witness
from calotype.testing.witness.reading import (
    Boot,
    Check,
    Fact,
    Failure,
    Inconsistency,
    Ready,
    Reply,
    Tick,
    Verdict,
    read,
    verdict,
)

__all__ = [
    "Boot",
    "Check",
    "Fact",
    "Failure",
    "Inconsistency",
    "Ready",
    "Reply",
    "Tick",
    "Verdict",
    "Witness",
    "read",
    "verdict",
    "witness",
]
