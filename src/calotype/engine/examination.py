"""Look at all that a check-up judges: host, store, VMs; nothing is changed, nobody waited for.

No lock is taken, and none is tried. So somebody may be changing a VM meanwhile: a VM whose lock is
held, or of whose operations one began or ended during the look, is marked as changing, and what
does not fit together in it is no fault. What a QEMU does not answer within moments is a trouble.
"""

import asyncio
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from calotype.engine import finding, launch, looseness, operations
from calotype.errors import CalotypeError, StoreError
from calotype.formats import argv as command_line
from calotype.formats.argv import CommandLine
from calotype.formats.secrets import redacted
from calotype.model.snapshot import Manifest
from calotype.model.vm import DiskRecord, VmRecord
from calotype.plan.restore import plan_restore
from calotype.plan.restore_plan import Definition, Mismatch, RestoreRequest
from calotype.plan.sights import (
    ChainSight,
    HostSight,
    LooseFile,
    Opener,
    Sight,
    SnapshotSight,
    Space,
    Trouble,
    VmSight,
)
from calotype.plan.take_plan import TakePlan, TakeRequest
from calotype.qemu import host, process
from calotype.store import images, openers, space
from calotype.store import journal as journals
from calotype.store.store import Store

PATIENCE_S = 5.0
"""How long a QEMU may take to say all that a plan needs."""
_GREETING_S = 1.0

_ANY_ID = "0" * 16
_BOOT_FILES = ("kernel", "initrd", "dtb")
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, not written to


async def examine(root: Path) -> Sight:
    """Look at everything.

    Raises:
        HostError: The store may not be read by this user.
    """
    before = looseness.read(Store.looking(root))
    stamps = {record.id: _stamp(Store.looking(root), record) for record in before.records}
    beside = looseness.list_beside(looseness.origins(before))
    store = Store.looking(root)
    catalogue = looseness.read(store)
    loose = looseness.loose_files(store, catalogue, beside)
    active = {disk.active.path for record in catalogue.records for disk in record.disks}
    manifests = [each for kept in catalogue.manifests.values() for each in kept]
    frozen = {path for manifest in manifests for path in _held(manifest)} - active
    opened, unseen = openers.openers(frozen | active | {file.path for file in loose})
    looks = [
        _Look(store, record, catalogue, opened, stamps.get(record.id))
        for record in catalogue.records
    ]
    return Sight(
        host=await _host(catalogue.records, unseen),
        store=space.look(root) if root.is_dir() else None,
        store_path=str(root),
        damage=catalogue.damage,
        index_fault=store.index_fault(),
        loose=tuple(file for file in loose if not _is_used(file, opened)),
        frozen_openers=tuple(who for who in opened if who.path not in active),
        longest_chain=images.MAX_CHAIN_LENGTH,
        vms=tuple([await look.vm() for look in looks]),
    )


def _is_used(file: LooseFile, opened: Sequence[Opener]) -> bool:
    """Whether it is gone by now, or a temporary file that is being written."""
    is_written = file.kind == "temporary" and any(each.path == file.path for each in opened)
    return is_written or not Path(file.path).exists()


def _held(manifest: Manifest) -> Iterator[str]:
    """The images that a snapshot stands on."""
    for part in manifest.storage:
        yield from (layer.path for layer in part.layers)
        yield from [part.image.path] if part.image else []


# --- the host ------------------------------------------------------------------------------------


async def _host(records: Sequence[VmRecord], unseen: int) -> HostSight:
    programs = [
        host.usual_program(),
        *(host.program_of(each.argv[0], each.cwd) for each in records),
    ]
    qemus = await asyncio.gather(*map(host.ask, filter(None, dict.fromkeys(programs))))
    is_shared = images.is_on_tmpfs(_SHARED_MEMORY)
    return HostSight(
        kernel=host.kernel(),
        has_kvm=host.has_kvm(),
        may_track_writes=host.may_track_writes(),
        missing_tools=host.missing_tools(),
        qemus=tuple(qemus),
        shared_memory_free_bytes=images.free_bytes(_SHARED_MEMORY) if is_shared else None,
        unseen_processes=unseen,
    )


# --- VMs -----------------------------------------------------------------------------------------

_Stamp = tuple[tuple[str, ...], tuple[str, ...]]


def _stamp(store: Store, record: VmRecord) -> _Stamp:
    """Which operations are under way, and which have ended."""
    paths = (store.unfinished(record.id), store.history(record.id))
    under_way, ended = (tuple(path.name for path in each) for each in paths)
    return under_way, ended


class _Look(NamedTuple):
    """A look at one VM."""

    store: Store
    record: VmRecord
    catalogue: looseness.Catalogue
    opened: Sequence[Opener]
    stamp: _Stamp | None
    """As it was when the look began."""

    async def vm(self) -> VmSight:
        """Look at it."""
        record = self.record
        command = CommandLine.parse(record.argv)
        pid, plan, trouble = await self._running()
        active = {disk.active.path for disk in record.disks}
        folders = dict.fromkeys(Path(disk.origin.path).parent for disk in record.disks)
        snapshots = tuple(self._snapshots(command))
        cut_off = tuple(self._cut_off())
        return VmSight(
            record=record,
            pid=pid,
            is_changing=self._is_changing(),
            cut_off=cut_off,
            snapshots=snapshots,
            frozen=frozenset(
                path for each in self.catalogue.manifests[record.id] for path in _held(each)
            ),
            chains=tuple(map(_chain, record.disks)),
            openers=tuple(who for who in self.opened if who.path in active),
            has_program=bool(host.program_of(record.argv[0], record.cwd)),
            has_folder=Path(record.cwd).is_dir(),
            absent=tuple(_absent(command, record.cwd)),
            spaces=tuple(
                Space(str(each), images.free_bytes(each)) for each in folders if each.is_dir()
            ),
            has_secrets=redacted(record.argv) != record.argv,
            plan=plan,
            trouble=trouble,
        )

    async def _running(self) -> tuple[int | None, TakePlan | None, Trouble | None]:
        """The pid of its QEMU, if one runs; what a take would do, or why that cannot be said."""
        try:
            qemu = launch.is_running(self.store, self.record)
        except StoreError:
            qemu = None  # it is told among the damaged files
        if qemu is None:
            return None, None, None
        told = await self._ask()
        if not process.is_alive(qemu):
            return None, None, None  # it has just ended
        return (qemu.pid, None, told) if isinstance(told, Trouble) else (qemu.pid, told, None)

    async def _ask(self) -> TakePlan | Trouble:
        """What a take would do now."""
        store, name = self.store, self.record.name
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await operations.plan_only(
                    store, name, TakeRequest(), patience_s=_GREETING_S
                )
        except CalotypeError as error:
            return Trouble(error.problem, error.remedy)
        except TimeoutError:
            silence = f"its QEMU did not say all in {PATIENCE_S:g} s"
            return Trouble(silence, "ask again; `calotype ps` says whether it is busy")

    def _is_changing(self) -> bool:
        """Whether somebody is at it, or was during the look."""
        return self.store.is_held(self.record.id) or self.stamp != _stamp(self.store, self.record)

    def _cut_off(self) -> Iterator[str]:
        for path in self.store.unfinished(self.record.id):
            try:
                began = journals.read(path)[0]
            except StoreError:
                continue  # it is told among the damaged files
            assert isinstance(began, journals.Began)
            yield f"the {began.operation} of {began.at[:19].replace('T', ' ')}"

    def _snapshots(self, command: CommandLine) -> Iterator[SnapshotSight]:
        sighting = functools.cache(finding.identify)
        definition = command_line.definition(command, self.record.cwd)
        active = {disk.active.path for disk in self.record.disks}
        for manifest in self.catalogue.manifests[self.record.id]:
            parts = [part for part in manifest.storage if part.kind == "external" and part.image]
            frozen = {part.image.path for part in parts if part.image} - active
            yield SnapshotSight(
                id=manifest.id,
                mismatches=self._mismatches(manifest, definition, sighting),
                writable=tuple(path for path in sorted(frozen) if _is_writable(path)),
            )

    def _mismatches(
        self, manifest: Manifest, definition: Definition, sighting: finding.Sighting
    ) -> tuple[Mismatch, ...]:
        found = finding.find(self.store, self.record, manifest, definition, frozenset(), sighting)
        request = RestoreRequest(discard_current=True)
        return plan_restore(manifest, self.record, found, request, _ANY_ID).mismatches


def _is_writable(path: str) -> bool:
    return images.protection(Path(path)) == "writable"


def _chain(disk: DiskRecord) -> ChainSight:
    try:
        chain = images.backing_chain(Path(disk.active.path), disk.active.format)
    except CalotypeError as error:
        return ChainSight(disk.name, disk.active, 0, Trouble(error.problem, error.remedy))
    return ChainSight(disk.name, disk.active, len(chain))


def _absent(command: CommandLine, cwd: str) -> Iterator[str]:
    """Files that a command line names, besides its writable disks, and that are not there."""
    paths = [disk.path for disk in command_line.disks(command, cwd) if disk.read_only]
    paths += [str(Path(cwd, value)) for value in command.values(*_BOOT_FILES)]
    yield from (path for path in dict.fromkeys(paths) if not Path(path).exists())
