"""What is there before a restore: read for the preflight, which compares it; nothing is changed.

Only identities and tables are read, no contents. What cannot be read as what it was recorded as is
found all the same: that it is another thing now is for the preflight to say.
"""

from collections.abc import Callable
from pathlib import Path

from calotype.engine import launch
from calotype.engine.agents import where
from calotype.errors import CalotypeError
from calotype.formats import argv as command_line
from calotype.formats.argv import CommandLine, Endpoint
from calotype.model.acts import exchange
from calotype.model.identity import Format, Identity
from calotype.model.snapshot import Manifest
from calotype.model.vm import VmRecord
from calotype.plan.restore_plan import Definition, Found, Running
from calotype.qemu import observe
from calotype.qemu.monitor import Monitor
from calotype.store import images
from calotype.store.store import Store

Sighting = Callable[[Path, Format], Identity | None]
"""Who a file is; None where it is missing."""


def find(
    store: Store,
    record: VmRecord,
    manifest: Manifest,
    definition: Definition,
    kept_paths: frozenset[str] | None = None,
    sighting: Sighting | None = None,
) -> Found:
    """Look at all that a restore of *manifest* stands on.

    Args:
        store: Where it is kept.
        record: The VM as it is defined now.
        manifest: The snapshot.
        definition: What the guest can see of the VM's command line now.
        kept_paths: Every image that a snapshot of this VM stands on, if that is known.
        sighting: Who looks; whoever looks at many snapshots need not look at an image twice.
    """
    look = sighting or identify
    layers = [layer for part in manifest.storage for layer in part.layers]
    layers += [disk.image for disk in manifest.read_only if disk.image is not None]
    sightings = {layer.path: look(Path(layer.path), layer.format) for layer in layers}
    state = manifest.machine_state
    state_path = store.snapshot_folder(record.id, manifest.id) / (state.file if state else "")
    active = [disk.active.path for disk in record.disks]
    return Found(
        definition=definition,
        identities={path: sight for path, sight in sightings.items() if sight is not None},
        internal=_internal(manifest),
        state=look(state_path, "raw") if state else None,
        modes={path: images.mode(Path(path)) for path in active if Path(path).exists()},
        kept_paths=frozenset(_kept_paths(store, record)) if kept_paths is None else kept_paths,
        agent=where(record),
    )


async def find_running(store: Store, record: VmRecord, monitor: Monitor) -> Running:
    """Look at the QEMU that runs a VM, and at what it has of the host.

    Raises:
        QemuError: It does not answer.
    """
    folder = str(store.folder(record.id))
    shared = command_line.sharing(CommandLine.parse(record.argv), record.cwd, folder)
    ours = [
        Endpoint("Calotype's own socket", "renamed", *exchange(f"{folder}/{name}"))
        for name in launch.SOCKETS
    ]
    forth, back = command_line.acts((*ours, *shared.endpoints))
    commands = {each["name"] for each in await monitor.execute("query-commands")}
    jobs = await monitor.execute("query-block-jobs")
    qemu = launch.is_running(store, record)
    return Running(
        was_running=(await monitor.execute("query-status"))["running"],
        endpoints=tuple((each.what, each.how) for each in shared.endpoints),
        forth=forth,
        back=back,
        unshared=tuple((each.argument, each.reason) for each in shared.unshared),
        jobs=tuple(job["device"] for job in jobs),
        can_let_go="blockdev-set-active" in commands,
        migration=await observe.observe_migration(monitor),
        adopted_at=qemu.monitor if qemu is not None else "",
    )


def identify(path: Path, format_: Format) -> Identity | None:
    """Who a file is; one that is no sound qcow2 any more is told as the raw file that it is."""
    if not path.exists():
        return None
    try:
        return images.identify(path, format_)
    except CalotypeError:
        return images.identify(path, "raw")


def _internal(manifest: Manifest) -> dict[tuple[str, str], str]:
    """The digest of each internal snapshot in the images that hold parts."""
    holders = {
        part.image.path
        for part in manifest.storage
        if part.kind == "internal" and part.image is not None
    }
    found = {}
    for holder in map(Path, sorted(holders)):
        sight = identify(holder, "qcow2")
        if sight is not None and sight.format == "qcow2":
            for entry in images.read_metadata(holder).snapshots:
                found[str(holder), entry.name] = entry.digest
    return found


def _kept_paths(store: Store, record: VmRecord) -> set[str]:
    """Every image that a snapshot of this VM stands on."""
    kept = set()
    manifests, damage = store.sound_manifests(record.id)
    if damage:  # nobody knows what a damaged one stands on: all that the VM is on is kept
        kept |= {disk.active.path for disk in record.disks}
    for manifest in manifests:
        for part in manifest.storage:
            kept |= {layer.path for layer in part.layers}
            kept |= {part.image.path} if part.image is not None else set()
    return kept
