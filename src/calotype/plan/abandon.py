"""Plan to abandon an instant: undo what happened in the pause, the guest running on.

The undo of everything else is a step's own; this one is long, and has a plan, because what has to
be done depends on what is there: whether QEMU is the one that the pause was of, another that was
started since, or none; whether the guest writes to an overlay by now. The same plan is made when a
take fails and when `recover` finds one that was cut off, so it must be right for a pause that did
not begin, was in its midst, or ended long ago.

The guest comes first: it is let run, and its file systems are thawed, before anything else. Then
the disks, each on its own: what was written to an overlay is merged back into what it stands on
(from one that is empty, nothing). An overlay that is not merged back is never let go of: the record
names it, and it stays the newest image.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from msgspec import Struct

from calotype.plan.steps import (
    DeleteMade,
    EndPause,
    MergeBack,
    MergeBackOffline,
    PassInstant,
    SnapshotInside,
    Step,
    SwitchToOverlay,
    TakeBack,
    ThawFileSystems,
    Verbatim,
)

Qemu = Literal["same", "other", "gone"]
"""Whether the QEMU that the pause was of still runs; "other" was started since."""


class OverlaySight(Struct, frozen=True):
    """What an overlay is found to be."""

    is_newest: bool
    """The record names it. One that it does not name was merged already, or never used."""


def plan_abandon(
    instant: PassInstant, qemu: Qemu, overlays: Mapping[str, OverlaySight], *, settled: bool
) -> tuple[Step, ...]:
    """Plan to undo what a paused window did.

    Args:
        instant: The window.
        qemu: Who runs the VM now.
        overlays: What is found of each overlay, by path; those that are missing are not there.
        settled: The window is known to have ended: whether the guest runs is its user's business.
    """
    return tuple(_steps(instant, qemu, overlays, instant.was_running and not settled))


def _steps(
    instant: PassInstant, qemu: Qemu, overlays: Mapping[str, OverlaySight], let_run: bool
) -> Iterator[Step]:
    if qemu == "same":
        yield EndPause(let_run, unprotect=instant.method == "live-storage-first")
        if instant.agent:
            yield ThawFileSystems(instant.agent)
    for action in reversed(instant.actions):
        match action:
            case SnapshotInside():
                yield DeleteMade(action.image, action.name)
            case Verbatim(take_back=(command, arguments)) if qemu == "same":
                yield TakeBack(command, arguments)
            case SwitchToOverlay() if (sight := overlays.get(action.overlay)) is not None:
                if qemu != "gone":
                    yield MergeBack(action.overlay, action.base, action.base_mode, action.merge_job)
                elif sight.is_newest:
                    yield MergeBackOffline(action.overlay, action.base, action.base_mode)
