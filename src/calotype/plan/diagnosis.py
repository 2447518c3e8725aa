"""The diagnosis: a table of checks, each a name, a severity, and what it finds wrong in a `Sight`.

A *fault* is something that is broken, or that breaks a snapshot when it goes on: the command fails
with it. A *warning* is something that costs time, room or safety, and that somebody may want so.
Each finding names the thing and what to do; a sight in which nothing is wrong gives none.

What a VM shows while somebody changes it is not judged: it is in the midst of being made right.
"""

import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

from msgspec import Struct

from calotype.errors import UnwellError
from calotype.plan.sights import ChainSight, LooseFile, Opener, Sight, VmSight

MIB = 1 << 20
LEAST_BYTES = 64 * MIB
"""A snapshot is refused with less room than this beside an image; see `blockers.py`."""

CHAIN_SHARE = 2
"""A chain is too long from half of the longest that is followed on: 100 images.

Measured with QEMU 10.0, a disk on an empty chain: up to 50 images nothing can be felt. With 100
QEMU takes 30 ms to say what it stands on, which it is asked several times for each snapshot, and
120 ms with 200; each image takes a descriptor (of 1,024 that a process usually may have, for all
disks) and 0.15 MiB. And only as many again are left before snapshots are refused.
"""

Severity = Literal["fault", "warning"]


class Finding(Struct, frozen=True):
    """Something that is not well."""

    check: str
    severity: Severity
    about: str
    problem: str
    remedy: str


class Note(NamedTuple):
    """What a check finds."""

    about: str
    problem: str
    remedy: str


class Check(NamedTuple):
    """One row of the table."""

    name: str
    severity: Severity
    look: Callable[[Sight], Iterator[Note]]


def diagnose(sight: Sight) -> tuple[Finding, ...]:
    """All that is not well, faults first."""
    found = [
        Finding(check.name, check.severity, *note) for check in CHECKS for note in check.look(sight)
    ]
    return tuple(dict.fromkeys(sorted(found, key=lambda each: each.severity != "fault")))


def as_error(findings: tuple[Finding, ...]) -> UnwellError | None:
    """What the command fails with, if there are faults."""
    faults = sum(finding.severity == "fault" for finding in findings)
    if not faults:
        return None
    return UnwellError(
        f"not all is well: {counted(findings)}", "each finding says what to do", faults=faults
    )


def counted(findings: tuple[Finding, ...]) -> str:
    """How many of each severity there are, in words."""
    severities = [finding.severity for finding in findings]
    counts = {severity: severities.count(severity) for severity in ("fault", "warning")}
    words = (f"{count} {each}{'s' * (count > 1)}" for each, count in counts.items() if count)
    return ", ".join(words) or "nothing was found"


ABILITIES: Mapping[str, str] = {
    "background-snapshot": "saves a guest that runs",
    "mapped-ram": "gives it back in its run state",
    "multifd": "saves a stopped guest fast",
    "x-ignore-shared": "leaves out shared memory",
    "blockdev-set-active": "hands its images over",
    "xen-save-devices-state": "saves devices alone",
}
"""What a capability or a command of QEMU's is good for."""

# --- the host ------------------------------------------------------------------------------------

_PACKAGES: Mapping[str, str] = {"qemu-img": "qemu-utils", "setpriv": "util-linux"}


def _tools(sight: Sight) -> Iterator[Note]:
    for tool in sight.host.missing_tools:
        yield Note("host", f"{tool} is not installed", f"install Debian's {_PACKAGES[tool]}")


def _no_qemu(sight: Sight) -> Iterator[Note]:
    if not sight.host.qemus:
        yield Note("host", "no QEMU is installed", "install Debian's qemu-system-x86")


def _mute_qemu(sight: Sight) -> Iterator[Note]:
    for qemu in sight.host.qemus:
        if qemu.version is None:
            problem = f"{qemu.program} does not say what it can do: {qemu.fault}"
            yield Note("host", problem, "run it by hand with --version; is it QEMU, and whole?")


def _old_qemu(sight: Sight) -> Iterator[Note]:
    for qemu in sight.host.qemus:
        if qemu.version is not None and "background-snapshot" not in qemu.abilities:
            version = ".".join(map(str, qemu.version))
            yield Note(
                "host",
                f"{qemu.program} ({version}) cannot save a running guest",
                "use QEMU 6 or newer, or accept long pauses (`take --method paused`)",
            )


def _no_kvm(sight: Sight) -> Iterator[Note]:
    if not sight.host.has_kvm:
        yield Note(
            "host",
            "/dev/kvm cannot be used: guests are emulated, which is slow",
            "load kvm_intel or kvm_amd, and add the user to the group kvm",
        )


def _no_write_tracking(sight: Sight) -> Iterator[Note]:
    if not sight.host.may_track_writes:
        yield Note(
            "host",
            "a QEMU of this user may not protect its memory (userfaultfd): no live snapshots",
            "run it as root, give access to /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1",
        )


# --- the store -----------------------------------------------------------------------------------


def _damage(sight: Sight) -> Iterator[Note]:
    for trouble in sight.damage:
        yield Note("store", trouble.problem, trouble.remedy)


def _index(sight: Sight) -> Iterator[Note]:
    if sight.index_fault:
        yield Note("store", sight.index_fault, "`calotype doctor --rebuild` makes it anew")


def _store_full(sight: Sight) -> Iterator[Note]:
    if sight.store and sight.store.free_bytes < LEAST_BYTES:
        free = sight.store.free_bytes // MIB
        yield Note("store", f"only {free} MiB are free in {sight.store.path}", "free some space")


def _store_small(sight: Sight) -> Iterator[Note]:
    if not sight.store or sight.store.free_bytes < LEAST_BYTES:
        return
    for vm in sight.vms:
        topology = vm.record.topology
        if vm.pid is None and topology and topology.memory_bytes > sight.store.free_bytes:
            yield Note(
                _of(vm),
                f"its machine state may take {topology.memory_bytes // MIB} MiB,"
                f" {sight.store.free_bytes // MIB} MiB are free in {sight.store.path}",
                "free some space, or use another --store",
            )


def _store_in_memory(sight: Sight) -> Iterator[Note]:
    if sight.store and sight.store.is_in_memory:
        problem = f"{sight.store.path} is on tmpfs: all snapshots are gone with the next boot"
        yield Note("store", problem, "name a --store on a disk")


LOOSE: Mapping[str, tuple[str, str]] = {
    "overlay": (
        "no record, snapshot or journal names this overlay",
        "if no other --store has it (`qemu-img info` says what it stands on), remove it",
    ),
    "temporary": ("it was being written by a command that was killed", "remove it"),
    "snapshot": (
        "the files of a snapshot that does not exist: it has no manifest",
        "`calotype recover {vm}` removes them",
    ),
    "state": ("no manifest names this file", "look what it is, and remove it"),
    "vm": ("the folder of a VM without a record", "put its record.json back, or remove it"),
}
"""Kind of a loose file -> what is said of it, and what to do."""


def _orphans(sight: Sight) -> Iterator[Note]:
    busy = {vm.record.name for vm in sight.vms if vm.is_changing}
    for file in sight.loose:
        if file.vm not in busy:
            yield _loose_note(sight, file)


def _loose_note(sight: Sight, file: LooseFile) -> Note:
    what, remedy = LOOSE[file.kind]
    users = [each for each in sight.frozen_openers if each.path == file.path]
    if users:
        remedy = f"do not remove it before that process has ended; then: {remedy}"
    held = f"; {_named(users[0])} has it open" if users else ""
    size = f" ({file.size_bytes // MIB} MiB)" if file.size_bytes >= MIB else ""
    remedy = remedy.format(vm=shlex.quote(file.vm))
    return Note("store", f"{file.path}{size}: {what}{held}", remedy)


def _frozen_open(sight: Sight) -> Iterator[Note]:
    passed_over = {file.path for file in sight.loose}
    passed_over |= {path for vm in sight.vms if vm.is_changing for path in vm.frozen}
    for opener in sight.frozen_openers:
        if opener.may_write and opener.path not in passed_over:
            yield Note(
                "store",
                f"{opener.path} is frozen, and {_named(opener)} has it open for writing",
                f"end that process (kill {opener.pid}): what it writes spoils every snapshot that"
                " stands on the image",
            )


def _named(opener: Opener) -> str:
    return f"process {opener.pid} ({opener.command})"


# --- VMs -----------------------------------------------------------------------------------------

_VmLook = Callable[[VmSight], Iterator[Note]]


def _steady(look: _VmLook) -> Callable[[Sight], Iterator[Note]]:
    """Look at each VM that nobody is changing."""

    def look_at_all(sight: Sight) -> Iterator[Note]:
        for vm in sight.vms:
            if not vm.is_changing:
                yield from look(vm)

    return look_at_all


def _of(vm: VmSight) -> str:
    return f"vm {vm.record.name!r}"


def _cut_off(vm: VmSight) -> Iterator[Note]:
    for words in vm.cut_off:
        remedy = f"`calotype recover {shlex.quote(vm.record.name)}` finishes or undoes it"
        yield Note(_of(vm), f"{words} was cut off", remedy)


def _chain_broken(vm: VmSight) -> Iterator[Note]:
    for chain in vm.chains:
        if chain.trouble:
            yield Note(_disk(vm, chain), chain.trouble.problem, chain.trouble.remedy)


def _long_chains(sight: Sight) -> Iterator[Note]:
    for vm in sight.vms:
        for chain in vm.chains:
            if chain.length * CHAIN_SHARE >= sight.longest_chain and not chain.trouble:
                name = vm.record.name
                yield Note(
                    _disk(vm, chain),
                    f"{chain.image.path} stands on {chain.length - 1} images;"
                    f" {sight.longest_chain} are the most",
                    "delete snapshots that nobody needs:"
                    f" `calotype delete {shlex.quote(name)} --id ID` merges their images",
                )


def _disk(vm: VmSight, chain: ChainSight) -> str:
    return f"{_of(vm)}, disk {chain.disk!r}"


def _cannot_start(vm: VmSight) -> Iterator[Note]:
    if not vm.has_folder:
        yield Note(_of(vm), f"its folder {vm.record.cwd} is missing", "make it again")
    if not vm.has_program:
        program = vm.record.argv[0]
        yield Note(_of(vm), f"its program {program} is not there", "install it, or run another")
    for path in vm.absent:
        problem = f"its command line names {path}, which is missing"
        yield Note(_of(vm), problem, "put it back, or `calotype run` it without")


def _in_use(vm: VmSight) -> Iterator[Note]:
    for opener in vm.openers:
        if opener.may_write and opener.pid != vm.pid:
            problem = (
                f"{opener.path} is open for writing in {_named(opener)}, which is not its QEMU"
            )
            yield Note(_of(vm), problem, _end(vm, opener))


def _end(vm: VmSight, opener: Opener) -> str:
    """What to do about a process that has an image of a VM: its user may have started it again."""
    words = f"end that process (kill {opener.pid}) before it starts"
    if vm.record.adopted is None or vm.pid is not None:
        return words
    adopt = shlex.join(("calotype", "adopt", vm.record.name, "--qmp", vm.record.adopted.qmp))
    return f"if that is its QEMU, started again by hand, `{adopt}` binds it; else {words}"


def _little_space(vm: VmSight) -> Iterator[Note]:
    for space in vm.spaces:
        if vm.pid is None and space.free_bytes < LEAST_BYTES:
            free = space.free_bytes // MIB
            yield Note(_of(vm), f"only {free} MiB are free in {space.path}", "free some space")


def _no_snapshot(vm: VmSight) -> Iterator[Note]:
    for blocker in vm.plan.blockers if vm.plan else ():
        problem = f"no snapshot can be taken: {blocker.problem}"
        yield Note(_of(vm), problem, blocker.remedy)


def _worse_snapshot(vm: VmSight) -> Iterator[Note]:
    remedy = f"`calotype take {shlex.quote(vm.record.name)} --plan` says what else there is"
    for warning in vm.plan.warnings if vm.plan else ():
        yield Note(_of(vm), warning, remedy)


def _mute_vm(vm: VmSight) -> Iterator[Note]:
    if vm.trouble:
        yield Note(_of(vm), f"it could not be looked at: {vm.trouble.problem}", vm.trouble.remedy)


def _secrets(vm: VmSight) -> Iterator[Note]:
    if vm.has_secrets:
        yield Note(
            _of(vm),
            "a secret stands in its command line, which everybody on this host can read",
            "give it in a file (-object secret,id=ID,file=PATH), and name it by that id",
        )


# --- snapshots -----------------------------------------------------------------------------------

_LOST = "put it back from a copy; else `calotype delete {vm} --id {id}` lets the snapshot go"
_CHANGED = "what it held then is there no more, unless in a copy of the file: put that back"
_TOUCHED = "if that was you, and you wrote nothing to it, restore with --accept-touched"
_REDEFINED = "`calotype run` the VM with the command line that `calotype show {vm} --id {id}` tells"

_MISMATCHES: Mapping[str, tuple[str, str]] = {
    "missing": ("missing", _LOST),
    "replaced": ("changed", _CHANGED),
    "resized": ("changed", _CHANGED),
    "written": ("changed", _CHANGED),
    "header": ("changed", _CHANGED),
    "snapshots": ("changed", _CHANGED),
    "swapped": ("changed", "put each image where it was"),
    "touched": ("touched", _TOUCHED),
    "definition": ("redefined", _REDEFINED),
    "extra": ("redefined", _REDEFINED),
}  # fmt: skip
"""Kind of a mismatch -> the check that it is of, and what to do."""


def _mismatched(name: str) -> _VmLook:
    """The snapshots that could not be restored; each reason is told once."""

    def look(vm: VmSight) -> Iterator[Note]:
        reasons: dict[tuple[str, str], list[str]] = {}
        for snapshot in vm.snapshots:
            for mismatch in snapshot.mismatches:
                check, remedy = _MISMATCHES[mismatch.kind]
                if check == name:
                    reasons.setdefault((mismatch.text, remedy), []).append(snapshot.id)
        for (text, remedy), ids in reasons.items():
            more = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
            told = remedy.format(vm=shlex.quote(vm.record.name), id=ids[0])
            yield Note(f"{_of(vm)}, snapshot {ids[0]}{more}", f"cannot be restored: {text}", told)

    return look


def _unfrozen(vm: VmSight) -> Iterator[Note]:
    for path in dict.fromkeys(path for each in vm.snapshots for path in each.writable):
        quoted = shlex.quote(path)
        yield Note(
            _of(vm),
            f"{path} can be written to, which would spoil the snapshots that stand on it",
            f"`chmod a-w {quoted}` and `chattr +i {quoted}`; restore with --accept-touched then",
        )


CHECKS: tuple[Check, ...] = (
    Check("tool-missing", "fault", _tools),
    Check("qemu-missing", "fault", _no_qemu),
    Check("qemu-mute", "warning", _mute_qemu),
    Check("qemu-old", "warning", _old_qemu),
    Check("kvm", "warning", _no_kvm),
    Check("write-tracking", "warning", _no_write_tracking),
    Check("damaged", "fault", _damage),
    Check("index", "warning", _index),
    Check("store-full", "fault", _store_full),
    Check("store-small", "warning", _store_small),
    Check("store-in-memory", "warning", _store_in_memory),
    Check("orphan", "warning", _orphans),
    Check("frozen-open", "fault", _frozen_open),
    Check("cut-off", "fault", _steady(_cut_off)),
    Check("chain-broken", "fault", _steady(_chain_broken)),
    Check("chain-long", "warning", _long_chains),
    Check("cannot-start", "fault", _steady(_cannot_start)),
    Check("in-use", "fault", _steady(_in_use)),
    Check("space", "fault", _steady(_little_space)),
    Check("blocked", "fault", _steady(_no_snapshot)),
    Check("plan-warning", "warning", _steady(_worse_snapshot)),
    Check("vm-mute", "warning", _steady(_mute_vm)),
    Check("secret", "warning", _steady(_secrets)),
    Check("missing", "fault", _steady(_mismatched("missing"))),
    Check("changed", "fault", _steady(_mismatched("changed"))),
    Check("touched", "warning", _steady(_mismatched("touched"))),
    Check("redefined", "warning", _steady(_mismatched("redefined"))),
    Check("unfrozen", "fault", _steady(_unfrozen)),
)
"""Every check; the names are for programs, and stay."""
