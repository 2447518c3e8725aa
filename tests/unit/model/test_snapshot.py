"""What a snapshot is worth follows from its parts."""

import msgspec

from builders import make_manifest, make_state
from calotype.model.snapshot import Manifest, Quiesced

FROZEN = Quiesced(2, 400.0, "10.0.0")


def test_a_snapshot_is_worth_what_its_parts_are() -> None:
    assert make_manifest(machine_state=make_state()).consistency == "machine"
    assert make_manifest(machine_state=None, quiesced=FROZEN).consistency == "filesystem"
    assert make_manifest(machine_state=None).consistency == "crash"


def test_a_manifest_from_before_there_was_quiescing_is_read() -> None:
    members = msgspec.to_builtins(make_manifest(machine_state=None))
    del members["quiesced"]
    assert msgspec.convert(members, Manifest).consistency == "crash"
