"""What a restore is asked for, what there is before it, and what it is planned to do: values."""

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from calotype.model.acts import Act
from calotype.model.identity import Identity
from calotype.model.vm import AgentFacts, Image, MigrationFacts, RunState
from calotype.plan.steps import Step
from calotype.plan.take_plan import Blocker

Definition = tuple[tuple[str, str], ...]


class RestoreRequest(Struct, frozen=True):
    """What the user asked for."""

    run_state: Literal["saved", "running", "paused"] = "saved"
    discard_current: bool = False
    accept_touched: bool = False
    """Go on although a file's mode, owner or name was changed, if nothing else of it was."""
    keep_current: bool = False
    """Keep the machine state that is left behind, too; of a VM that runs."""
    sync_time: bool = False
    """Have the agent in the guest set its clock, which stood still since the snapshot."""


class Found(Struct, frozen=True):
    """What is there now, read before the plan is made."""

    definition: Definition
    identities: Mapping[str, Identity]
    """By path; a path that is missing here is missing on disk."""
    internal: Mapping[tuple[str, str], str]
    """Digest of each internal snapshot, by image path and name."""
    state: Identity | None
    """The machine state's file."""
    modes: Mapping[str, int]
    """The permission bits of the active images, by path."""
    kept_paths: frozenset[str]
    """Images that some snapshot of this VM stands on."""
    agent: AgentFacts = AgentFacts("", "the guest agent was not looked for", "try again")
    """Where the agent will be reached; it cannot be asked yet."""


class Running(Struct, frozen=True):
    """What is found of the QEMU that runs the VM, whose place another is to take."""

    was_running: bool
    """Whether its guest runs."""
    endpoints: tuple[tuple[str, str], ...]
    """What only one of the two can have, and how it is handed over, in words."""
    forth: tuple[Act, ...]
    back: tuple[Act, ...]
    unshared: tuple[tuple[str, str], ...]
    """Arguments of its command line that keep a second QEMU from being started, and why."""
    jobs: tuple[str, ...]
    """Block jobs that would end with it."""
    can_let_go: bool
    """Whether it can give up an image that the other takes over (blockdev-set-active)."""
    migration: MigrationFacts
    adopted_at: str = ""
    """The QMP socket of one that its user started; "" of one that we did."""


class Mismatch(Struct, frozen=True):
    """One difference, as a word that a program can use and a line for a person."""

    kind: Literal["missing", "extra", "swapped", "replaced", "resized", "written", "touched",
                  "header", "snapshots", "definition"]  # fmt: skip
    subject: str
    text: str


class RestorePlan(Struct, frozen=True):
    """All that a restore will do."""

    snapshot: str
    left_behind: str
    keeps_left_behind: bool
    run_state: RunState
    active: dict[int, Image]
    mismatches: tuple[Mismatch, ...]
    steps: tuple[Step, ...]
    blockers: tuple[Blocker, ...] = ()
    endpoints: tuple[tuple[str, str], ...] = ()
    """What is handed over from the QEMU that runs, and how; none where none runs."""
    notes: tuple[str, ...] = ()
    """What else there is to know."""
