"""Which images a command line may name: whoever stands on one has it, a forgotten VM too."""

from pathlib import Path

import pytest

from builders import make_disk_record, make_manifest, make_part, make_record
from calotype.engine.defining import define_new
from calotype.errors import ConflictError
from calotype.model.vm import Image, ImageFacts, VmRecord
from calotype.store import images
from calotype.store.store import Store


class Forgotten:
    """A VM that was forgotten: its first image, the newest one, and one snapshot."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "store")
        self.origin, self.newest = folder / "disk.raw", folder / "disk.newest.raw"
        self.origin.write_bytes(bytes(512))
        self.newest.write_bytes(bytes(512))
        origin, newest = Image(str(self.origin), "raw"), Image(str(self.newest), "raw")
        record = make_record([make_disk_record(origin=origin, active=newest)])
        facts = ImageFacts(origin.path, "raw", images.identify(self.origin, "raw"))
        part = make_part(origin=origin, image=origin, layers=(facts,))
        self.store.make_vm_folder(record.id)
        self.store.save(record)
        manifest = make_manifest([part])
        self.store.make_snapshot_folder(record.id, manifest.id)
        self.store.commit(manifest)
        self.manifest = self.store.forget(record) / f"snapshots/{manifest.id}/manifest.json"

    def define(self, image: Path) -> VmRecord | None:
        argv = ("qemu-system-x86_64", "-drive", f"file={image},format=raw")
        return define_new(self.store, "other", argv, "/")


@pytest.fixture
def forgotten(tmp_path: Path) -> Forgotten:
    return Forgotten(tmp_path)


def test_what_a_forgotten_vm_stands_on_is_refused_with_what_to_name_instead(
    forgotten: Forgotten,
) -> None:
    with pytest.raises(ConflictError, match="it was of the forgotten VM 'web'") as caught:
        forgotten.define(forgotten.origin)
    assert f"put {forgotten.newest} on the command line" in caught.value.remedy
    assert forgotten.define(forgotten.newest)


def test_it_is_free_once_the_newest_image_is_gone(forgotten: Forgotten) -> None:
    forgotten.newest.unlink()
    assert forgotten.define(forgotten.origin)


def test_another_file_at_its_path_is_free(forgotten: Forgotten) -> None:
    other = forgotten.origin.with_name("other")
    other.write_bytes(bytes(512))
    other.replace(forgotten.origin)
    assert forgotten.define(forgotten.origin)


@pytest.mark.parametrize("is_damaged", [True, False])
def test_it_is_refused_where_nobody_knows_which_file_it_was(
    forgotten: Forgotten, is_damaged: bool
) -> None:
    if is_damaged:
        forgotten.manifest.write_text("{")
    else:
        forgotten.manifest.unlink()
    with pytest.raises(ConflictError):
        forgotten.define(forgotten.origin)
