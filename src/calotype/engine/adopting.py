"""Adopting: a QEMU that somebody started by hand becomes a VM of the store.

The process is asked of the kernel and of /proc, the disks of QEMU itself: what the command line
names is where they came from, what QEMU writes to now is where their newest content is. Nothing is
changed in QEMU or in its files, and nothing is journalled: the record is written last, and the VM
is there or it is not.

A QEMU that its user started anew is bound to the same VM again: its command line must be the one
that is known, and it must write to the images that hold the newest content.
"""

import os
import secrets
import shlex
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from calotype.engine import defining, launch
from calotype.engine.recover import recover
from calotype.errors import CalotypeError, ConflictError
from calotype.formats import argv as command_line
from calotype.formats.argv import CommandLine
from calotype.model import names
from calotype.model.vm import Adopted, DiskRecord, Image, Limit, Process, Topology, VmRecord
from calotype.plan.adopt import Stranger, limits, refusal
from calotype.plan.take import plan_take
from calotype.plan.take_plan import Blocker, TakeRequest
from calotype.qemu import live_merge, observe, process, strangers
from calotype.qemu.cancelling import shielded
from calotype.qemu.live_merge import Node
from calotype.qemu.monitor import Monitor, connect
from calotype.store.store import Store


class Adoption(NamedTuple):
    """What was adopted, and what can be done with it."""

    record: VmRecord
    qemu: Process
    is_new: bool
    """Whether there was no VM of that name."""
    limits: tuple[Limit, ...]
    blockers: tuple[Blocker, ...]
    """What is in the way of a snapshot now."""


class _Seen(NamedTuple):
    """A QEMU as it was found, before anything is written down."""

    stranger: Stranger
    command: CommandLine
    adopted: Adopted
    disks: tuple[DiskRecord, ...]
    topology: Topology

    @property
    def process(self) -> Process:
        return Process(self.stranger.pid, self.stranger.start_ticks, self.adopted.qmp)


async def adopt(store: Store, name: str, qmp: Path) -> Adoption:
    """Take a QEMU that runs into the store, or bind one that was started anew to its VM.

    Args:
        store: Where it is to be kept.
        name: What to call it.
        qmp: The QMP socket that it made, an absolute path.

    Raises:
        RequestError: That is no QMP socket of a QEMU, or cannot be a name.
        CommandLineError: Its command line holds a disk that cannot be stood for.
        ConflictError: It belongs to a manager, or is in a store already; its monitor, its images or
            the name are in use.
        HostError: It may not be looked at, or its paths mean other files.
        QemuError: It does not answer.
    """
    names.check_name(name)
    stranger = strangers.look(await strangers.reach(qmp), launch.MARK)
    _refuse_known(store, stranger)
    if (reason := refusal(stranger, str(qmp), os.geteuid())) is not None:
        raise reason
    await strangers.require_monitor(qmp)
    async with connect(qmp, cwd=stranger.cwd, pid=stranger.pid) as monitor:
        seen = await _see(monitor, stranger, qmp)
    record, is_new = await _keep(store, name, seen)
    return await _adoption(store, record, seen, is_new=is_new)


def _refuse_known(store: Store, stranger: Stranger) -> None:
    """Refuse a process that some VM of the store has already."""
    for record in store.sound_records()[0]:
        qemu = launch.is_running(store, record)
        if qemu is not None and qemu.pid == stranger.pid:
            raise ConflictError(
                f"process {stranger.pid} is the VM {record.name!r} already",
                f"`calotype show {shlex.quote(record.name)}`",
                vm=record.name,
            )


# --- seeing --------------------------------------------------------------------------------------


async def _see(monitor: Monitor, stranger: Stranger, qmp: Path) -> _Seen:
    """Ask QEMU what it is made of."""
    ran = CommandLine.parse(stranger.argv)
    command, dropped = command_line.without_its_start(ran)
    command = _with_program(command, stranger)
    disks = tuple(_disks(ran, stranger, (await live_merge.look(monitor)).chains))
    obstacles = command_line.obstacles(command)
    relative = await observe.relative_names(monitor)
    return _Seen(
        stranger,
        command,
        Adopted(
            argv=stranger.argv,
            qmp=str(qmp),
            uid=stranger.uid,
            dropped=dropped,
            limits=tuple(limits(stranger, obstacles, relative, os.geteuid())),
        ),
        await observe.name_disks(monitor, disks),
        await _as_started(monitor, ran),
    )


def _with_program(command: CommandLine, stranger: Stranger) -> CommandLine:
    """The command line with the program that runs, where its name means another one to us."""
    meant = shutil.which(command.program)
    if "/" in command.program:
        meant = str(Path(stranger.cwd) / command.program)
    is_there = Path(stranger.program).exists()
    if is_there and (meant is None or os.path.realpath(meant) != stranger.program):
        return CommandLine(stranger.program, command.arguments)
    return command


def _disks(
    command: CommandLine, stranger: Stranger, chains: tuple[tuple[Node, ...], ...]
) -> Iterator[DiskRecord]:
    """Each writable disk of the command line, on the image that QEMU writes to now."""
    opened = strangers.open_files(stranger.pid)
    for disk in command_line.disks(command, stranger.cwd):
        if disk.read_only:
            continue
        path = os.path.realpath(disk.path)
        chain = next((each for each in chains if path in {node.path for node in each}), ())
        if not chain:
            raise ConflictError(
                f"QEMU has no writable disk on {path}, which its command line names",
                "start QEMU anew, with the images that it is on now on its command line",
                path=path,
            )
        for node in chain:
            process.require_open(node.path, opened)
        at_top, origin = chain[0], next(node for node in chain if node.path == path)
        yield DiskRecord(disk.index, disk.name, _image(origin), _image(at_top))


def _image(node: Node) -> Image:
    """The image of a node.

    Raises:
        ConflictError: It is of another format, or a filter.
    """
    if node.driver == "qcow2" or node.driver in ("raw", "file", "host_device"):
        return Image(node.path, "qcow2" if node.driver == "qcow2" else "raw")
    raise ConflictError(
        f"QEMU has {node.path} below a {node.driver!r} node",
        "Calotype freezes raw and qcow2 images: take that node out of the disk's chain",
        path=node.path,
    )


async def _as_started(monitor: Monitor, command: CommandLine) -> Topology:
    """The machine as the command line built it: what was changed since is in a snapshot's way."""
    now = await observe.observe_topology(monitor)
    plugged = await observe.plugged_in(monitor)
    present = {device.partition("=")[0] for device in now.devices}
    taken_out = [
        f"{name}={driver}"
        for name, driver in command_line.named_devices(command).items()
        if name not in present
    ]
    built = [device for device in now.devices if device not in plugged]
    in_use = await observe.active_paths(monitor)
    media = tuple(_media_at_first(command, monitor.cwd, now.media, in_use))
    return replace(now, devices=(*built, *taken_out), media=media)


def _media_at_first(
    command: CommandLine, cwd: str, now: tuple[str, ...], in_use: set[str]
) -> Iterator[str]:
    """The media that the command line put into drives, be they in there still or not."""
    named = {
        os.path.realpath(disk.path): disk.name
        for disk in command_line.disks(command, cwd)
        if disk.read_only
    }
    for medium in now:
        file = medium.partition("=")[2]
        if file in named or not file.startswith("/"):  # what is no file is named in many ways
            yield medium
    for path in sorted(named.keys() - in_use):
        yield f"{named[path] or 'its drive'}={path}"


# --- keeping -------------------------------------------------------------------------------------


async def _keep(store: Store, name: str, seen: _Seen) -> tuple[VmRecord, bool]:
    """Write it down: as a new VM, or as the new process of one that is known."""
    with store.naming():
        known = store.index.vm_named(name)
        if known is None:
            return _keep_new(store, name, seen), True
        record = _known_again(store, store.record(known), seen)
    with store.locked(record, "adopt"):
        store.save_process(record.id, seen.process)
        store.save(record)
        await shielded(recover(store, record))
    return store.record(record.id), False


def _keep_new(store: Store, name: str, seen: _Seen) -> VmRecord:
    _refuse_known(store, seen.stranger)
    taken = defining.in_use(store, "")
    for disk in seen.disks:
        for path in (disk.origin.path, disk.active.path):
            defining.refuse_in_use(path, taken)
    record = VmRecord(
        id=secrets.token_hex(names.ID_LENGTH // 2),
        name=name,
        argv=tuple(seen.command.argv()),
        cwd=seen.stranger.cwd,
        disks=seen.disks,
        created=datetime.now(UTC).isoformat(),
        topology=seen.topology,
        adopted=seen.adopted,
    )
    store.make_vm_folder(record.id)
    store.save_process(record.id, seen.process)
    store.save(record)
    return record


def _known_again(store: Store, record: VmRecord, seen: _Seen) -> VmRecord:
    """The record of a VM that runs in another process now.

    Raises:
        ConflictError: It runs, or is another VM than the one that was found.
    """
    if launch.is_running(store, record) is not None:
        raise ConflictError(f"the name {record.name!r} is taken", "choose another", vm=record.name)
    argv = record.adopted.argv if record.adopted else record.argv
    if (argv, record.cwd) != (seen.stranger.argv, seen.stranger.cwd):
        raise ConflictError(
            f"the name {record.name!r} is taken by a VM with another command line",
            f"choose another; or, if it is that VM, end that QEMU and let `calotype start"
            f" {shlex.quote(record.name)}` put the newest images on its command line",
            vm=record.name,
        )
    newest = {disk.origin.path: disk.active for disk in record.disks}
    for disk in seen.disks:
        if (expected := newest.get(disk.origin.path, disk.active)) != disk.active:
            raise ConflictError(
                f"process {seen.stranger.pid} writes to {disk.active.path}, the newest content of"
                f" that disk is in {expected.path}",
                f"end that process, and `calotype start {shlex.quote(record.name)}`",
                path=disk.active.path,
            )
    return replace(record, disks=seen.disks, topology=seen.topology, adopted=seen.adopted)


# --- what can be done with it --------------------------------------------------------------------


async def _adoption(store: Store, record: VmRecord, seen: _Seen, *, is_new: bool) -> Adoption:
    blockers = await _blockers(store, record, seen.process)
    return Adoption(record, seen.process, is_new, launch.limits(store, record), blockers)


async def _blockers(store: Store, record: VmRecord, qemu: Process) -> tuple[Blocker, ...]:
    """What is in the way of a snapshot now; a look that fails is one thing that is."""
    snapshot = secrets.token_hex(names.ID_LENGTH // 2)
    try:
        async with launch.looking(store, record) as monitor:
            facts = await observe.observe(monitor, record, qemu, store.root)
    except CalotypeError as error:
        return (Blocker(error.problem, error.remedy),)
    return plan_take(facts, record, TakeRequest(), snapshot).blockers
