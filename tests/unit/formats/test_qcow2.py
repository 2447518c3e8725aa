"""The qcow2 reader against hand-made images: what it says, and that no lie leads it astray."""

import struct
from collections.abc import Callable
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from calotype.errors import StoreError
from calotype.formats import qcow2
from calotype.formats.qcow2 import Feature, Metadata, Need

CLUSTER = 512
L1_OFFSET = 2 * CLUSTER
SNAPSHOTS_OFFSET = 4 * CLUSTER
SNAPSHOT_L1_OFFSET = 3 * CLUSTER
L2_REACH = CLUSTER * CLUSTER // 8
COPIED = 1 << 63

FIELDS = {
    "magic": (">4s", 0, qcow2.MAGIC),
    "version": (">I", 4, 3),
    "backing_offset": (">Q", 8, 0),
    "backing_length": (">I", 16, 0),
    "cluster_bits": (">I", 20, 9),
    "size": (">Q", 24, 3 * L2_REACH),
    "encryption": (">I", 32, 0),
    "l1_entries": (">I", 36, 4),
    "l1_offset": (">Q", 40, L1_OFFSET),
    "refcount_offset": (">Q", 48, CLUSTER),
    "refcount_clusters": (">I", 56, 1),
    "snapshot_count": (">I", 60, 0),
    "snapshots_offset": (">Q", 64, 0),
    "incompatible": (">Q", 72, 0),
    "compatible": (">Q", 80, 0),
    "autoclear": (">Q", 88, 0),
    "refcount_order": (">I", 96, 4),
    "header_length": (">I", 100, 112),
    "compression": (">B", 104, 0),
}


def header(**changes: Any) -> bytearray:
    """The first cluster of an image, empty but for its header."""
    data = bytearray(CLUSTER)
    for field, (code, offset, value) in FIELDS.items():
        struct.pack_into(code, data, offset, changes.pop(field, value))
    assert not changes
    return data


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def table(*entries: int) -> bytes:
    return struct.pack(f">{len(entries)}Q", *entries).ljust(CLUSTER, b"\0")


def snapshot(
    *,
    id: bytes = b"1",  # noqa: A002
    name: bytes = b"before",
    extra: bytes = struct.pack(">QQQ", 7 << 32, 4096, 5),
    l1_entries: int = 4,
    l1_offset: int = SNAPSHOT_L1_OFFSET,
    claimed_extra: int | None = None,
) -> bytes:
    length = len(extra) if claimed_extra is None else claimed_extra
    times = (1_700_000_000, 123, 9_000_000_001)
    sizes = (77, length)
    fixed = struct.pack(">QIHHIIQII", l1_offset, l1_entries, len(id), len(name), *times, *sizes)
    entry = fixed + extra + id + name
    return entry + bytes(-len(entry) % 8)


def image(*snapshots: bytes, **changes: Any) -> bytes:
    """A small image whose active L1 table has two entries in use."""
    if snapshots:
        changes = {
            "snapshot_count": len(snapshots),
            "snapshots_offset": SNAPSHOTS_OFFSET,
            **changes,
        }
    active = table(0x10000 | COPIED, 0, 0x20000, 0)
    return bytes(header(**changes)) + bytes(CLUSTER) + active + active + b"".join(snapshots)


def parse(data: bytes) -> Metadata:
    def pread(offset: int, length: int) -> bytes:
        assert 0 < length <= qcow2.MAX_NEED_BYTES
        assert offset + length < 1 << 63
        return data[offset : offset + length]

    return qcow2.drive(qcow2.read_metadata(), pread)


def fault(data: bytes) -> tuple[int, str]:
    with pytest.raises(StoreError) as caught:
        parse(data)
    return caught.value.data["offset"], caught.value.data["reason"]


def test_a_parser_asks_and_is_told() -> None:
    parser = qcow2.read_header()
    assert next(parser) == Need(0, 72)
    assert parser.send(bytes(image()[:72])) == Need(72, 32)


def test_numbers_of_a_version_3_header() -> None:
    found = parse(image(compatible=1, autoclear=2, incompatible=Feature.DIRTY | Feature.CORRUPT))
    assert found.header.version == 3
    assert found.header.cluster_bytes == 512
    assert found.header.virtual_size_bytes == 3 * L2_REACH
    assert found.header.features == Feature.DIRTY | Feature.CORRUPT
    assert (found.header.compatible_features, found.header.autoclear_features) == (1, 2)
    assert (found.header.encryption, found.header.compression) == ("none", "zlib")
    assert (found.header.backing_file, found.header.backing_format) == (None, None)
    assert found.header.header_length == 112


def test_version_2_ends_after_72_bytes() -> None:
    found = parse(image(version=2, incompatible=0, refcount_order=0, header_length=0))
    assert found.header.version == 2
    assert found.header.header_length == 72
    assert found.header.refcount_order == 4


def test_used_l1_entries_bound_what_is_allocated() -> None:
    found = parse(image())
    assert found.l2_tables == 2
    assert found.allocated_limit_bytes == 2 * L2_REACH
    assert parse(image(size=L2_REACH)).allocated_limit_bytes == L2_REACH


def test_extended_l2_entries_halve_the_reach() -> None:
    first = header(cluster_bits=14, incompatible=Feature.EXTENDED_L2, l1_offset=0, l1_entries=1)
    for field in ("refcount_offset", "size"):
        code, offset, _ = FIELDS[field]
        struct.pack_into(code, first, offset, 0)
    assert parse(bytes(first)).header.l2_reach_bytes == (1 << 28) // 16


def test_zstd_and_encryption_are_named() -> None:
    found = parse(image(incompatible=Feature.COMPRESSION, compression=1, encryption=2))
    assert (found.header.compression, found.header.encryption) == ("zstd", "luks")


def with_extensions(
    *extensions: bytes, backing: bytes = b"", entries: tuple[bytes, ...] = ()
) -> bytes:
    """A small image with header extensions, a backing file's name and snapshot entries."""
    area = b"".join(extensions)
    offset = 112 + len(area)
    place = {"backing_offset": offset, "backing_length": len(backing)} if backing else {}
    data = bytearray(image(*entries, **place))
    data[112 : offset + len(backing)] = area + backing
    return bytes(data)


FORMAT = extension(0xE2792ACA, b"qcow2")
DATA_FILE = extension(0x44415441, b"disk.raw")
UNKNOWN = extension(0x12345678, b"whatever")
END = extension(0, b"")


def test_texts_of_the_extensions_and_the_backing_file() -> None:
    found = parse(with_extensions(UNKNOWN, FORMAT, DATA_FILE, END, backing=b"base \xff.img")).header
    assert found.backing_file == "base \udcff.img"
    assert found.backing_format == "qcow2"
    assert found.data_file == "disk.raw"


def test_the_header_digest_is_of_the_bytes_on_disk() -> None:
    data = with_extensions(UNKNOWN, DATA_FILE, END, backing=b"base")
    assert parse(data).header.digest == blake3(data[: data.index(b"base") + 4]).hexdigest()


def test_extensions_may_end_where_the_name_begins() -> None:
    assert parse(with_extensions(FORMAT, backing=b"base")).header.backing_format == "qcow2"


def test_what_stands_behind_the_end_is_not_an_extension() -> None:
    assert parse(with_extensions(END, FORMAT)).header.backing_format is None


def test_an_empty_backing_name_is_none() -> None:
    assert parse(image(backing_offset=112)).header.backing_file is None


def test_the_header_digest_sees_unknown_extensions_and_the_name() -> None:
    images = (
        with_extensions(END, backing=b"base"),
        with_extensions(END, backing=b"bass"),
        with_extensions(UNKNOWN, END, backing=b"base"),
    )
    assert len({parse(data).header.digest for data in images}) == len(images)


def test_an_entry_of_the_snapshot_table() -> None:
    (found,) = parse(image(snapshot(id=b"17", name="vor dem Größerwerden ".encode()))).snapshots
    assert (found.id, found.name) == ("17", "vor dem Größerwerden ")
    assert found.date_ns == 1_700_000_000_000_000_123
    assert found.vm_clock_ns == 9_000_000_001
    assert found.vm_state_bytes == 7 << 32
    assert found.disk_size_bytes == 4096
    assert (found.l1_offset, found.l1_entries) == (SNAPSHOT_L1_OFFSET, 4)


@pytest.mark.parametrize(
    ("extra", "state", "disk"),
    [
        (b"", 77, 3 * L2_REACH),
        (struct.pack(">Q", 5), 5, 3 * L2_REACH),
        (struct.pack(">QI", 5, 6), 5, 3 * L2_REACH),
        (struct.pack(">QQ", 5, 6), 5, 6),
        (struct.pack(">QQQQ", 5, 6, 7, 8), 5, 6),
    ],
)
def test_sizes_come_from_the_extra_data_as_far_as_it_goes(
    extra: bytes, state: int, disk: int
) -> None:
    (found,) = parse(image(snapshot(extra=extra))).snapshots
    assert (found.vm_state_bytes, found.disk_size_bytes) == (state, disk)
    assert found.name == "before"


def test_a_name_that_is_not_utf_8_survives() -> None:
    (found,) = parse(image(snapshot(name=b"a\xffb"))).snapshots
    assert found.name.encode("utf-8", "surrogateescape") == b"a\xffb"


def test_entries_follow_one_another_at_multiples_of_8() -> None:
    names = [b"", b"a", b"ab" * 40, b"abc"]
    table = (snapshot(id=b"%d" % index, name=name) for index, name in enumerate(names))
    assert [entry.name.encode() for entry in parse(image(*table)).snapshots] == names


def test_the_copied_bit_is_not_in_the_digests() -> None:
    bare = bytearray(image(snapshot()))
    for offset in (L1_OFFSET, SNAPSHOT_L1_OFFSET):
        assert bare[offset] == 0x80
        bare[offset] = 0
    one, two = parse(image(snapshot())), parse(bytes(bare))
    assert one.l1_digest == two.l1_digest
    assert one.snapshots == two.snapshots


def test_added_extra_data_leaves_the_digest_of_an_entry() -> None:
    sizes = struct.pack(">QQ", 5, 6)
    old, new = image(snapshot(extra=sizes)), image(snapshot(extra=sizes + bytes(8)))
    assert parse(old).snapshots_digest == parse(new).snapshots_digest


@pytest.mark.parametrize(
    "change",
    [
        {"id": b"2"},
        {"name": b"after"},
        {"extra": struct.pack(">QQ", 1, 2)},
        {"l1_entries": 3},
        {"l1_offset": 0},
    ],
)
def test_each_part_of_an_entry_is_in_its_digest(change: dict[str, Any]) -> None:
    (one,), (two,) = parse(image(snapshot())).snapshots, parse(image(snapshot(**change))).snapshots
    assert one.digest != two.digest


def test_the_content_of_a_snapshots_l1_table_is_in_its_digest() -> None:
    data = bytearray(image(snapshot()))
    data[SNAPSHOT_L1_OFFSET + 12] = 1
    one, two = parse(image(snapshot())), parse(bytes(data))
    assert one.snapshots_digest != two.snapshots_digest
    assert one.l1_digest == two.l1_digest


@pytest.mark.parametrize(
    ("offset", "changes"),
    [
        (0, {"magic": b"QFI\xfa"}),
        (4, {"version": 1}),
        (4, {"version": 4}),
        (20, {"cluster_bits": 8}),
        (20, {"cluster_bits": 22}),
        (20, {"cluster_bits": 0xFFFFFFFF}),
        (20, {"incompatible": Feature.EXTENDED_L2}),
        (100, {"header_length": 103}),
        (100, {"header_length": 513}),
        (100, {"header_length": 0xFFFFFFFF}),
        (72, {"incompatible": 32}),
        (72, {"incompatible": 1 << 63}),
        (104, {"compression": 1}),
        (104, {"incompatible": Feature.COMPRESSION}),
        (104, {"incompatible": Feature.COMPRESSION, "compression": 2}),
        (104, {"incompatible": Feature.COMPRESSION, "compression": 1, "header_length": 104}),
        (32, {"encryption": 3}),
        (96, {"refcount_order": 7}),
        (8, {"backing_offset": 513}),
        (8, {"backing_offset": (1 << 64) - 1}),
        (16, {"backing_offset": 112, "backing_length": 401}),
        (16, {"backing_offset": 112, "backing_length": 0xFFFFFFFF}),
        (16, {"backing_offset": 112, "backing_length": 1024, "cluster_bits": 12}),
        (56, {"refcount_clusters": 0}),
        (56, {"refcount_clusters": (8 << 20) // CLUSTER + 1}),
        (56, {"refcount_clusters": 0xFFFFFFFF}),
        (48, {"refcount_offset": 513}),
        (36, {"l1_entries": (4 << 20) + 1}),
        (36, {"l1_entries": 0xFFFFFFFF}),
        (36, {"l1_entries": 2}),
        (36, {"size": (1 << 64) - 1}),
        (40, {"l1_offset": 8}),
        (60, {"snapshot_count": 65537}),
        (60, {"snapshot_count": 0xFFFFFFFF}),
        (64, {"snapshots_offset": 8}),
        (1 << 62, {"l1_offset": 1 << 62}),
        ((1 << 64) - CLUSTER, {"l1_offset": (1 << 64) - CLUSTER}),
        ((1 << 64) - CLUSTER, {"snapshots_offset": (1 << 64) - CLUSTER, "snapshot_count": 1}),
    ],
)
def test_a_lie_in_the_header_is_told_with_its_place(offset: int, changes: dict[str, Any]) -> None:
    assert fault(image(**changes))[0] == offset


@pytest.mark.parametrize(
    ("field_offset", "change"),
    [
        (36, {"claimed_extra": 1025}),
        (36, {"claimed_extra": 0xFFFFFFFF}),
        (8, {"l1_entries": (4 << 20) + 1}),
        (8, {"l1_entries": 0xFFFFFFFF}),
        (0, {"l1_offset": 8}),
    ],
)
def test_a_lie_in_a_snapshot_is_told_with_its_place(
    field_offset: int, change: dict[str, Any]
) -> None:
    assert fault(image(snapshot(**change)))[0] == SNAPSHOTS_OFFSET + field_offset


@pytest.mark.parametrize(
    "lie",
    [
        struct.pack(">II", 0x12345678, 0xFFFFFFFF),
        struct.pack(">II", 0x12345678, CLUSTER - 112 - 7),
        struct.pack(">II", 0, CLUSTER),
        extension(0xE2792ACA, b"x" * 16),
    ],
)
def test_a_lie_in_an_extension_is_told_with_its_place(lie: bytes) -> None:
    assert fault(with_extensions(lie))[0] in (112, 120)


def test_an_extension_does_not_reach_into_the_backing_name() -> None:
    assert fault(with_extensions(struct.pack(">II", 0x12345678, 1), backing=b"base"))[0] == 112


def test_a_file_cut_anywhere_is_refused() -> None:
    entries = snapshot(), snapshot(id=b"2", name=b"1234567")
    whole = with_extensions(FORMAT, END, backing=b"base", entries=entries)
    assert len(parse(whole).snapshots) == 2
    for length in range(len(whole)):
        offset, reason = fault(whole[:length])
        assert offset >= length
        assert reason.startswith("the file ends before")


def test_the_last_entry_needs_no_padding() -> None:
    assert parse(image(snapshot(name=b"a")).rstrip(b"\0")).snapshots[0].name == "a"


def endless(data: bytes) -> Callable[[int, int], bytes]:
    """A file without an end: zeros follow what is written."""

    def pread(offset: int, length: int) -> bytes:
        assert 0 < length <= qcow2.MAX_NEED_BYTES
        return data[offset : offset + length].ljust(length, b"\0")

    return pread


def test_the_largest_image_is_read_in_bounded_pieces() -> None:
    data = image(l1_entries=4 << 20, snapshot_count=65536, snapshots_offset=1 << 40)
    found = qcow2.drive(qcow2.read_metadata(), endless(data))
    assert found.l2_tables == 4
    assert len(found.snapshots) == 65536


def test_a_snapshot_table_may_not_grow_beyond_its_limit() -> None:
    entry = snapshot(id=b"i" * 65535, name=b"n" * 65535, l1_entries=0, l1_offset=0)

    def pread(offset: int, length: int) -> bytes:
        if offset < SNAPSHOTS_OFFSET:
            return image(snapshot_count=65536, snapshots_offset=SNAPSHOTS_OFFSET)[offset:][:length]
        start = (offset - SNAPSHOTS_OFFSET) % len(entry)
        return entry[start : start + length]

    with pytest.raises(StoreError, match="snapshot table is too large"):
        qcow2.drive(qcow2.read_metadata(), pread)


def test_the_l1_tables_of_the_snapshots_have_a_limit_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qcow2, "MAX_ALL_SNAPSHOT_L1_BYTES", 64)
    parse(image(snapshot(), snapshot()))
    assert "together" in fault(image(snapshot(), snapshot(), snapshot()))[1]


def test_an_error_says_what_and_where_and_what_to_do() -> None:
    with pytest.raises(StoreError) as caught:
        parse(b"#!/bin/sh")
    assert caught.value.data == {"offset": 9, "reason": "the file ends before the header does"}
    assert "at byte 9" in caught.value.problem
    assert "qemu-img" in caught.value.remedy


def test_what_the_pump_raises_passes_through() -> None:
    def broken(offset: int, length: int) -> bytes:
        raise OSError(offset, length)

    with pytest.raises(OSError, match="72"):
        qcow2.drive(qcow2.read_metadata(), broken)


def accept_or_refuse(data: bytes) -> None:
    try:
        parse(data)
    except StoreError as error:
        assert set(error.data) == {"offset", "reason"}  # noqa: PT017


@given(st.binary(max_size=4096))
def test_noise_is_refused_in_order(noise: bytes) -> None:
    accept_or_refuse(noise)


@given(st.binary(max_size=1024))
def test_noise_behind_a_magic_is_refused_in_order(noise: bytes) -> None:
    accept_or_refuse(struct.pack(">4sI", qcow2.MAGIC, 3) + noise)


SOUND = image(snapshot(), snapshot(id=b"2", name=b"after"))
WORDS = st.sampled_from((0, 1, 0x7F, 0x80, 0xFF))


@given(
    st.dictionaries(st.integers(0, len(SOUND) - 1), WORDS | st.integers(0, 255), max_size=12),
    st.integers(0, len(SOUND)),
)
def test_mutations_of_a_sound_image(changes: dict[int, int], cut: int) -> None:
    data = bytearray(SOUND)
    for offset, byte in changes.items():
        data[offset] = byte
    accept_or_refuse(bytes(data[: len(SOUND) if cut % 2 else cut]))


@given(st.sampled_from(sorted(FIELDS)), st.binary(min_size=8, max_size=8), st.integers(0, 3))
def test_lies_in_one_field(field: str, value: bytes, index: int) -> None:
    code, offset, _ = FIELDS[field]
    size = struct.calcsize(code)
    data = bytearray(SOUND)
    lie = (bytes(8), b"\xff" * 8, b"\x7f" + b"\xff" * 7, value)[index]
    data[offset : offset + size] = lie[:size]
    accept_or_refuse(bytes(data))
