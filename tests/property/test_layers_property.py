"""No delete, in any order, cut off anywhere and begun again, changes what a snapshot holds.

`World` is the images of a VM reduced to what matters: each is a few clusters over another image,
some hold snapshots inside. Hypothesis lets a VM live (write, take, restore, delete), with an image
of a stranger on one of its own, and cuts a delete off between any two steps or within one. The
guest writes on meanwhile: into the image that QEMU has or, started anew, that the record names.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from msgspec.structs import replace

from builders import make_disk_record, make_layer, make_manifest, make_part, make_record
from calotype.model import names
from calotype.model.identity import Format
from calotype.model.snapshot import Manifest, StoragePart
from calotype.model.vm import DiskRecord, Image
from calotype.plan.delete import Catalogue, DeletePlan, DeleteRequest, plan_delete
from calotype.plan.layers import DiskLayers, Inside, Layer
from calotype.plan.steps import (
    DeleteInside,
    DropSnapshot,
    MergeDown,
    MergeUp,
    RecordMerged,
    RemoveImage,
    RemoveSnapshotFiles,
    Retarget,
    Step,
    TakePath,
)

CLUSTERS = 6
CLUSTER_BYTES = 65536
FORMATS: tuple[Format, ...] = ("qcow2", "raw")

Content = dict[int, int]
Move = tuple[str, int, int]
MOVES = ("write", "write", "write", "external", "internal", "restore", "discard", "delete")


class File:
    """An image: its clusters, what it stands on, and the snapshots inside."""

    def __init__(self, backing: str | None = None) -> None:
        self.backing = backing
        self.clusters: Content = {}
        self.inside: dict[tuple[str, str], Content] = {}
        self.count = 0


class Cut(Exception):  # noqa: N818 - a power cut, no error
    """The end of whoever carries out the steps."""


class World:
    """A VM of two disks, a qcow2 and a raw one, its files and its catalogue."""

    def __init__(self) -> None:
        origins = [Image(f"/vm/disk{index}.{kind}", kind) for index, kind in enumerate(FORMATS)]
        self.files = {origin.path: File() for origin in origins}
        self.record = make_record(
            [make_disk_record(index, origin=at, active=at) for index, at in enumerate(origins)]
        )
        self.manifests: dict[str, Manifest] = {}
        self.is_running = False
        self.tops = [origin.path for origin in origins]
        """The images that the guest writes to: QEMU's, while it runs."""
        self.strangers: set[str] = set()
        self.free_bytes = 1 << 40
        self.count = 0

    # --- what is read ----------------------------------------------------------------------------

    def read(self, path: str | None) -> Content:
        if path is None:
            return {}
        file = self.files[path]
        return {**self.read(file.backing), **file.clusters}

    def read_part(self, part: StoragePart) -> Content:
        assert part.image
        if part.kind == "external":
            return shown(self.read(part.image.path))
        file = self.files[part.image.path]
        inside = file.inside[part.internal_id, part.internal_name]
        return shown({**self.read(file.backing), **inside})

    def contents(self) -> dict[str, list[Content]]:
        """What each snapshot, each stranger and the guest reads."""
        kept = {
            manifest.id: [self.read_part(part) for part in manifest.storage if part.image]
            for manifest in self.manifests.values()
        }
        kept |= {path: [shown(self.read(path))] for path in self.strangers}
        return kept | {"": [shown(self.read(path)) for path in self.tops]}

    def recorded(self) -> list[Content]:
        """What the guest would read if it were started now."""
        return [shown(self.read(disk.active.path)) for disk in self.record.disks]

    def chain(self, path: str) -> list[str]:
        below = self.files[path].backing
        return [path, *self.chain(below)] if below else [path]

    # --- how a VM lives --------------------------------------------------------------------------

    def new_id(self) -> str:
        self.count += 1
        return f"{self.count:016x}"

    def write(self, disk: int, cluster: int) -> None:
        self.count += 1
        self.files[self.tops[disk % 2]].clusters[cluster % CLUSTERS] = self.count

    def take(self, snapshot: str, kinds: tuple[str, str]) -> None:
        """Take a snapshot; raw disks are always external."""
        parts, disks = [], []
        for disk, kind in zip(self.record.disks, kinds, strict=True):
            if kind == "internal" and disk.active.format == "qcow2":
                parts.append(self.part_inside(disk, snapshot))
                disks.append(disk)
            else:
                parts.append(self.part_of(disk, snapshot))
                overlay = Image(names.overlay_path(disk.origin.path, snapshot), "qcow2")
                self.files[overlay.path] = File(disk.active.path)
                disks.append(replace(disk, active=overlay))
        self.keep(snapshot, parts)
        self.go_on(disks, snapshot)

    def keep(self, snapshot: str, parts: list[StoragePart]) -> None:
        self.manifests[snapshot] = make_manifest(parts, id=snapshot, parent=self.record.parent)

    def go_on(self, disks: list[DiskRecord], parent: str) -> None:
        self.record = replace(self.record, disks=tuple(disks), parent=parent)
        self.tops = [disk.active.path for disk in disks]

    def part_of(self, disk: DiskRecord, snapshot: str) -> StoragePart:
        layers = tuple(make_layer(path) for path in self.chain(disk.active.path))
        image = {"origin": disk.origin, "image": disk.active, "layers": layers}
        return make_part(disk.index, "external", snapshot, **image)

    def part_inside(self, disk: DiskRecord, snapshot: str) -> StoragePart:
        file = self.files[disk.active.path]
        file.count += 1
        file.inside[str(file.count), names.internal_name(snapshot)] = dict(file.clusters)
        layers = tuple(make_layer(path) for path in self.chain(disk.active.path)[1:])
        image = {"origin": disk.origin, "image": disk.active, "layers": layers}
        return make_part(disk.index, "internal", snapshot, internal_id=str(file.count), **image)

    def restore(self, wanted: Manifest, *, discard: bool) -> None:
        """Go back; what is left behind is a snapshot, or thrown away."""
        left = self.new_id()
        parts, disks, gone = [], [], []
        for part, disk in zip(wanted.storage, self.record.disks, strict=True):
            assert part.image
            if part.kind == "internal" and part.image == disk.active:
                parts.append(self.part_inside(disk, left))
                file = self.files[disk.active.path]
                file.clusters = dict(file.inside[part.internal_id, part.internal_name])
                if discard:
                    del file.inside[parts[-1].internal_id, parts[-1].internal_name]
                disks.append(disk)
                continue
            parts.append(self.part_of(disk, left))
            gone.append(disk)
            now = Image(names.overlay_path(disk.origin.path, left), "qcow2")
            self.files[now.path] = File(part.image.path if part.kind == "external" else None)
            if part.kind == "internal":
                self.files[now.path].clusters = self.read_part(part)
            disks.append(replace(disk, active=now))
        if not discard:
            self.keep(left, parts)
        self.go_on(disks, wanted.id)
        named = {
            path
            for manifest in self.manifests.values()
            for part in manifest.storage
            for path in (part.image and part.image.path, *(layer.path for layer in part.layers))
        }
        for disk in gone if discard else []:
            on_it = any(file.backing == disk.active.path for file in self.files.values())
            if disk.active != disk.origin and disk.active.path not in named and not on_it:
                del self.files[disk.active.path]

    # --- what a delete sees ----------------------------------------------------------------------

    def catalogue(self) -> Catalogue:
        return Catalogue(
            record=self.record,
            manifests=tuple(self.manifests.values()),
            protected=frozenset(),
            disks=tuple(self.disk_layers(disk) for disk in self.record.disks),
            identities={},
            state_bytes={},
            is_running=self.is_running,
        )

    def disk_layers(self, disk: DiskRecord) -> DiskLayers:
        parts = [part for each in self.manifests.values() for part in each.storage]
        known = {layer.path for part in parts for layer in part.layers}
        known |= {part.image.path for part in parts if part.image}
        known |= {disk.origin.path, *self.chain(disk.active.path)}
        open_now = self.chain(self.tops[disk.index]) if self.is_running else []
        return DiskLayers(
            index=disk.index,
            disk=disk.name,
            origin=disk.origin,
            active=disk.active,
            layers={
                path: Layer(
                    image=image_of(path),
                    backing=image_of(file.backing) if file.backing else None,
                    virtual_size_bytes=CLUSTERS * CLUSTER_BYTES,
                    allocated_bytes=len(file.clusters) * CLUSTER_BYTES,
                    inside=tuple(Inside(*each) for each in file.inside),
                    is_ours=path == disk.origin.path or names.is_overlay_of(path, disk.origin.path),
                    is_known=path in known,
                    is_open=path in open_now,
                )
                for path, file in self.files.items()
                if path.startswith(disk.origin.path)
            },
            free_bytes=self.free_bytes,
        )

    # --- the steps, as `engine/delete_effects.py` does them --------------------------------------

    def run(self, step: Step, *, cut: bool = False) -> None:
        """Do a step; with *cut* only the half of what can be cut in half."""
        if isinstance(step, MergeDown):
            self.merge_down(step, cut=cut)
        elif isinstance(step, MergeUp):
            self.merge_up(step, cut=cut)
        else:
            self.run_small(step)
        if cut:
            raise Cut

    def run_small(self, step: Step) -> None:
        match step:
            case DropSnapshot(snapshot):
                self.manifests.pop(snapshot, None)
            case RemoveSnapshotFiles(snapshot):
                assert snapshot not in self.manifests
            case DeleteInside(image, internal_id, internal_name):
                inside = self.files[image.path].inside if image.path in self.files else {}
                inside.pop((internal_id, internal_name), None)
            case Retarget():
                self.retarget(step)
            case RecordMerged():
                self.record_merged(step)
            case RemoveImage(path):
                self.files.pop(path, None)
            case TakePath():
                self.take_path(step)

    def take_path(self, step: TakePath) -> None:
        assert not self.is_running
        if step.copy in self.files:
            self.files[step.origin] = self.files[step.copy]

    def merge_down(self, step: MergeDown, *, cut: bool) -> None:
        if step.top.path not in self.files:
            return
        top, base = self.files[step.top.path], self.files[step.base.path]
        is_switch = step.active == step.base.path
        at = self.record.disks[step.disk].active
        is_open = self.is_running and step.top.path in self.chain(self.tops[step.disk])
        is_done = (self.is_running and self.tops[step.disk] == step.base.path) or (
            not is_open and is_switch and at == step.base
        )
        if not is_done:
            assert top.backing == step.base.path
            for place, value in list(top.clusters.items())[:: 2 if cut else 1]:
                base.clusters[place] = value
            if cut:
                raise Cut
            if is_switch and is_open:
                self.tops[step.disk] = step.base.path
                self.set_active(step.disk, step.base)
        for child in step.children:
            if self.files[child.path].backing == step.top.path:
                self.files[child.path].backing = step.base.path
            assert self.files[child.path].backing == step.base.path

    def set_active(self, index: int, image: Image) -> None:
        disks = [
            replace(disk, active=image) if disk.index == index else disk
            for disk in self.record.disks
        ]
        self.record = replace(self.record, disks=tuple(disks))

    def merge_up(self, step: MergeUp, *, cut: bool) -> None:
        for child in step.children:
            file = self.files[child.path]
            onto = step.onto.path if step.onto else None
            assert not (self.is_running and child.path in self.chain(self.tops[0]))
            if file.backing != onto:
                below, wanted = self.read(onto), self.read(child.path)
                for place in range(CLUSTERS):
                    if below.get(place, 0) != wanted.get(place, 0):
                        file.clusters[place] = wanted.get(place, 0)
                if cut:
                    raise Cut
                file.backing = onto

    def retarget(self, step: Retarget) -> None:
        manifest = self.manifests[step.snapshot]
        storage = []
        for part in manifest.storage:
            assert part.image
            image = step.images.get(part.image.path, part.image)
            below = self.chain(image.path)[1 if part.kind == "internal" else 0 :]
            layers = tuple(make_layer(path) for path in below)
            storage.append(replace(part, image=image, layers=layers))
        self.manifests[step.snapshot] = replace(
            manifest, storage=tuple(storage), parent=step.parent
        )

    def record_merged(self, step: RecordMerged) -> None:
        for disk in self.record.disks:
            if disk.active == step.active_before.get(disk.index):
                self.set_active(disk.index, step.active[disk.index])
        self.record = replace(self.record, parent=step.parent)
        if not self.is_running:
            self.tops = [disk.active.path for disk in self.record.disks]


def shown(content: Content) -> Content:
    """Content without the zeros that stand in it."""
    return {place: value for place, value in content.items() if value}


def image_of(path: str) -> Image:
    return Image(path, "raw" if path.endswith(".raw") else "qcow2")


# --- a life, and its deletes ---------------------------------------------------------------------


class Life(NamedTuple):
    """What a VM went through, and what is deleted in the end."""

    moves: list[Move]
    doomed: int
    """A bit for each snapshot."""
    children: bool
    is_running: bool
    is_tight: bool
    stranger: int


lives = st.builds(
    Life,
    moves=st.lists(
        st.tuples(st.sampled_from(MOVES), st.integers(0, 11), st.integers(0, 11)), max_size=24
    ),
    doomed=st.integers(0, (1 << 16) - 1),
    children=st.booleans(),
    is_running=st.booleans(),
    is_tight=st.booleans(),
    stranger=st.integers(0, 30),
)


def lived(life: Life) -> World:
    """The world after a life, up to its last delete."""
    world = World()
    for verb, one, two in life.moves:
        manifests = list(world.manifests.values())
        if verb == "write":
            world.write(one, two)
        elif verb in ("external", "internal"):
            world.take(world.new_id(), (verb, "external" if one % 2 else verb))
        elif verb in ("restore", "discard") and manifests:
            world.restore(manifests[one % len(manifests)], discard=verb == "discard")
        elif verb == "delete" and manifests:
            carry_out(world, planned(world, {manifests[one % len(manifests)].id}))
    world.is_running = life.is_running
    world.free_bytes = CLUSTER_BYTES * 64 if life.is_tight else 1 << 40
    paths = sorted(set(world.files) - set(world.tops))
    if life.stranger < len(paths):
        below = paths[life.stranger]
        origin = next(
            disk.origin for disk in world.record.disks if below.startswith(disk.origin.path)
        )
        path = names.overlay_path(origin.path, "f" * 16)
        world.files[path] = File(below)
        world.files[path].clusters[0] = -1
        world.strangers.add(path)
    return world


def planned(world: World, doomed: set[str], *, children: bool = False) -> DeletePlan:
    return plan_delete(world.catalogue(), DeleteRequest(frozenset(doomed), children))


def carry_out(world: World, plan: DeletePlan) -> None:
    if not plan.blockers:
        for step in plan.steps:
            world.run(step)


def chosen(world: World, life: Life) -> set[str]:
    return {each for place, each in enumerate(world.manifests) if life.doomed >> place & 1}


def promised(world: World, plan: DeletePlan) -> dict[str, list[Content]]:
    """What must be read the same before, during and after a delete."""
    return {who: what for who, what in world.contents().items() if who not in plan.snapshots}


def assert_kept(world: World, before: dict[str, list[Content]]) -> None:
    now = world.contents()
    assert {who: now[who] for who in before} == before
    assert world.recorded() == now[""]


@settings(max_examples=400, deadline=None)
@given(lives)
def test_what_stays_reads_the_same_after_every_step_and_nothing_unneeded_is_left(
    life: Life,
) -> None:
    world = lived(life)
    plan = planned(world, chosen(world, life), children=life.children)
    if plan.blockers:
        assert life.is_running or life.is_tight
        return
    before = promised(world, plan)
    for step in plan.steps:
        world.run(step)
        assert_kept(world, before)
        if world.is_running:
            world.write(0, 1)
            before[""] = world.contents()[""]
    assert not set(plan.snapshots) & set(world.manifests)
    assert_tidy(world, plan)


def assert_tidy(world: World, plan: DeletePlan) -> None:
    """Nothing of ours is there but what the plan says, and no parent that is gone is named."""
    assert {stay.path for stay in plan.stays} == set(world.files)
    known = {None, *world.manifests}
    assert {each.parent for each in world.manifests.values()} | {world.record.parent} <= known
    needed = {part.image.path for each in world.manifests.values() for part in each.storage
              if part.image}  # fmt: skip
    needed |= {disk.active.path for disk in world.record.disks}
    said = {stay.path for stay in plan.stays if stay.is_needed}
    assert said <= needed | world.strangers
    again = planned(world, set())
    assert not [step for step in again.steps if not isinstance(step, Retarget)]


@settings(max_examples=400, deadline=None)
@given(lives, st.integers(0, 100), st.booleans(), st.booleans(), st.booleans())
def test_a_delete_that_was_cut_off_is_finished_by_doing_its_steps_again(
    life: Life, place: int, within: bool, starts: bool, dies: bool
) -> None:
    world = lived(life)
    plan = planned(world, chosen(world, life), children=life.children)
    if plan.blockers or not plan.steps:
        return
    before = promised(world, plan)
    for step in list(cut_off(plan, place)):
        world.run(step)
    if within:
        with pytest.raises(Cut):
            world.run(plan.steps[place % len(plan.steps)], cut=True)
    assert_kept(world, before)
    go_through_a_crash(world, plan, starts=starts, dies=dies)
    before[""] = world.contents()[""]
    for step in plan.steps:
        world.run(step)
        assert_kept(world, before)
    assert not set(plan.snapshots) & set(world.manifests)


def cut_off(plan: DeletePlan, place: int) -> Iterator[Step]:
    yield from plan.steps[: place % len(plan.steps)]


def go_through_a_crash(world: World, plan: DeletePlan, *, starts: bool, dies: bool) -> None:
    """QEMU may die and be started again, from what the record names; then the guest writes on."""
    needs_off = any(isinstance(step, MergeUp | TakePath) for step in plan.steps)
    if dies:
        world.is_running = False
    if starts and not needs_off:
        world.is_running = True
    world.tops = world.tops if world.is_running and not dies else [
        disk.active.path for disk in world.record.disks
    ]  # fmt: skip
    world.write(0, 3)
    world.write(1, 3)


@settings(max_examples=200, deadline=None)
@given(lives, st.permutations(range(24)))
def test_when_all_is_deleted_the_users_paths_hold_the_newest_content_alone(
    life: Life, order: list[int]
) -> None:
    world = lived(life._replace(stranger=99, is_running=False, is_tight=False))
    newest = world.recorded()
    ids = list(world.manifests)
    for place in order:
        if place < len(ids):
            carry_out(world, planned(world, {ids[place]}))
    carry_out(world, planned(world, set(ids[24:])))
    assert not world.manifests
    assert [disk.active for disk in world.record.disks] == [
        disk.origin for disk in world.record.disks
    ]
    assert set(world.files) == {disk.origin.path for disk in world.record.disks}
    assert world.recorded() == newest


@settings(max_examples=100, deadline=None)
@given(lives)
def test_a_plan_is_the_same_for_the_same_world(life: Life) -> None:
    world = lived(life)
    twin = copy.deepcopy(world)
    wanted = chosen(world, life)
    assert planned(world, wanted) == planned(twin, wanted)


# --- twins: what is broken on purpose is caught --------------------------------------------------

CHAIN = Life([("external", 1, 0), ("write", 0, 1)], 1, False, False, False, 0)
"""One snapshot, and an image of a stranger on its image, beside the newest."""


def test_twin_a_stranger_who_is_not_counted_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    world = lived(CHAIN)
    before = world.contents()
    whole = World.disk_layers

    def blind(self: World, disk: DiskRecord) -> DiskLayers:
        layers = whole(self, disk)
        known = {path: layer for path, layer in layers.layers.items() if layer.is_known}
        return replace(layers, layers=known)

    monkeypatch.setattr(World, "disk_layers", blind)
    carry_out(world, planned(world, set(world.manifests)))
    assert {who: world.contents()[who] for who in world.strangers} != {
        who: before[who] for who in world.strangers
    }


def test_twin_an_image_that_is_removed_before_its_heir_is_named_is_caught() -> None:
    world = lived(CHAIN._replace(stranger=99))
    plan = planned(world, set(world.manifests))
    steps = sorted(plan.steps, key=lambda step: isinstance(step, RecordMerged))
    with pytest.raises(KeyError):
        carry_out_and_look(world, steps)


def carry_out_and_look(world: World, steps: list[Step]) -> None:
    for step in steps:
        world.run(step)
        world.recorded()


def test_twin_a_top_that_is_merged_again_after_the_guest_wrote_below_is_caught() -> None:
    world = lived(CHAIN._replace(stranger=99))
    plan = planned(world, set(world.manifests))
    (merge, *_) = [step for step in plan.steps if isinstance(step, MergeDown)]
    world.run(merge)
    world.set_active(merge.disk, merge.base)
    world.tops = [disk.active.path for disk in world.record.disks]
    world.write(merge.disk, 1)
    newest = world.recorded()
    world.run(merge)
    assert world.recorded() == newest
    world.set_active(merge.disk, merge.top)
    world.run(merge)
    world.set_active(merge.disk, merge.base)
    assert world.recorded() != newest
