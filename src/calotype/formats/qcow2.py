"""The metadata of a qcow2 image: its header, its active L1 table, its snapshot table.

    header ─┬─> active L1 table ──> L2 tables ──> clusters of guest data
            └─> snapshot table: an entry each ──> its own L1 table ──> L2 tables (shared)

Source: QEMU's docs/interop/qcow2.rst; the limits are those of QEMU's block/qcow2.h and
block/qcow2-snapshot.c. All numbers are big-endian. Offsets, lengths and sizes are in bytes.

The rules of this file:

* Nothing is opened here. A parser is a generator: it yields a `Need`, is sent the bytes at that
  place, and returns a value. Fewer bytes than needed mean that the file ends there: QEMU would
  read zeros, we refuse. `drive` pumps.
* An image is a stranger's word. Every size, count and offset is checked before it is used, no
  `Need` is longer than `MAX_NEED_BYTES`, and a table is digested as it passes by, never kept. What
  stays in memory is at most the text of a snapshot table (64 MiB, QEMU's limit).
* What QEMU would refuse to open is a `StoreError`, with the offset and the reason in its data.
* The digest of an L1 table leaves out bit 63 of its entries (COPIED). That bit follows the
  reference counts: QEMU clears it when a snapshot is taken, and going back to a snapshot rewrites
  it in that snapshot's own table. It says nothing about the content of the disk.
* The digest of a snapshot is of what its entry says, not of the entry's bytes: QEMU writes the
  whole table anew for each snapshot, and a newer QEMU then adds fields to the entries of an older.
* L2 tables and guest data are not read: the digests notice a mapping that has changed, and miss a
  cluster that was overwritten in place.
"""

import struct
from collections.abc import Callable, Generator, Iterator
from enum import IntFlag
from typing import TypeVar

import msgspec
from blake3 import blake3
from msgspec.structs import replace

from calotype.errors import StoreError

MAGIC = b"QFI\xfb"
MAX_NEED_BYTES = 1 << 20
"""The longest stretch that a parser asks for at once."""

MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE_BYTES = 64 << 20
MAX_SNAPSHOT_EXTRA_BYTES = 1024
MAX_BACKING_NAME_BYTES = 1023
MAX_ALL_SNAPSHOT_L1_BYTES = 1 << 30
"""Our own limit: the L1 tables of all snapshots together, since entries may point anywhere."""

_MAX_OFFSET = (1 << 63) - 1
_CLUSTER_BITS = range(9, 22)
_MIN_CLUSTER_BITS_OF_EXTENDED_L2 = 14
_MAX_REFCOUNT_ORDER = 6
_L1_ENTRY_BYTES = 8

_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")
_EXTENDED = struct.Struct(">QQQII")
_COMPRESSION_TYPE_OFFSET = _FIXED.size + _EXTENDED.size
_MIN_HEADER_BYTES = {2: _FIXED.size, 3: _FIXED.size + _EXTENDED.size}
"""Version -> how long its header is at least."""

_EXTENSION = struct.Struct(">II")
_EXTENSION_END = 0
_EXTENSION_TEXTS = {0xE2792ACA: ("backing_format", 15), 0x44415441: ("data_file", 4095)}
"""Type of a header extension that is a text -> the field of `Header`, and its longest length."""

_ENTRY = struct.Struct(">QIHHIIQII")
_ENTRY_EXTRA = struct.Struct(">QQ")
_ENTRY_DIGESTED = struct.Struct(">QIHHIIQQQ")

_WITHOUT_COPIED = bytes(byte & 0x7F for byte in range(256))
_ENCRYPTIONS = ("none", "aes", "luks")
_COMPRESSIONS = ("zlib", "zstd")

Value = TypeVar("Value")


class Need(msgspec.Struct, frozen=True):
    """A parser's question: the bytes at *offset*, *length* of them or all that the file has."""

    offset: int
    length: int


class Feature(IntFlag):
    """Incompatible features: who does not know one must not open the image."""

    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION = 8
    EXTENDED_L2 = 16


class Header(msgspec.Struct, frozen=True):
    """The header, in the order of the bytes; the defaults are what version 2 stands for.

    Source: docs/interop/qcow2.rst, "Header" and "Header extensions". The last four fields are read
    from elsewhere in the first cluster. *digest* is the BLAKE3 of the header, its extensions and
    the backing file's name, as they are on disk: it moves with anything that QEMU notes there
    (also: snapshots taken, an L1 table that grew, the dirty bit).
    """

    version: int
    backing_offset: int
    backing_length: int
    cluster_bits: int
    virtual_size_bytes: int
    encryption_method: int
    l1_entries: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int
    snapshots_offset: int
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = _FIXED.size
    compression_type: int = 0
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    digest: str = ""

    @property
    def features(self) -> Feature:
        """The incompatible features; all are known ones."""
        return Feature(self.incompatible_features)

    @property
    def cluster_bytes(self) -> int:
        """The size of a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_reach_bytes(self) -> int:
        """How much of the guest's disk one L2 table (a cluster of entries) maps."""
        entry_bits = 4 if Feature.EXTENDED_L2 in self.features else 3
        return 1 << (2 * self.cluster_bits - entry_bits)

    @property
    def encryption(self) -> str:
        """How guest data is encrypted: `none`, `aes` or `luks`."""
        return _ENCRYPTIONS[self.encryption_method]

    @property
    def compression(self) -> str:
        """How compressed clusters are compressed: `zlib` or `zstd`."""
        return _COMPRESSIONS[self.compression_type]


class SnapshotEntry(msgspec.Struct, frozen=True):
    """One internal snapshot; source: docs/interop/qcow2.rst, "Snapshots".

    Bytes of *id* and *name* that are not UTF-8 are kept as lone surrogates (`surrogateescape`).
    *vm_state_bytes* is 0 if there is no machine state. *digest* is the BLAKE3 of the entry's
    meaning and of its L1 table: the same for as long as the snapshot exists.
    """

    id: str
    name: str
    date_ns: int
    vm_clock_ns: int
    vm_state_bytes: int
    disk_size_bytes: int
    l1_offset: int
    l1_entries: int
    digest: str


class Metadata(msgspec.Struct, frozen=True):
    """What an image says about itself.

    *l2_tables* counts the entries of the active L1 table that are in use; *allocated_limit_bytes*
    is an upper bound of the guest data allocated: what those tables can map, at most the whole
    disk. Digests are BLAKE3, in hex.
    """

    header: Header
    snapshots: tuple[SnapshotEntry, ...]
    l1_digest: str
    snapshots_digest: str
    l2_tables: int
    allocated_limit_bytes: int


_Claim = tuple[int, str, Callable[[Header], bool]]

_FIRST_CLAIMS: tuple[_Claim, ...] = (
    (4, "a version other than 2 and 3", lambda h: h.version in _MIN_HEADER_BYTES),
    (20, "clusters not of 512 bytes to 2 MiB", lambda h: h.cluster_bits in _CLUSTER_BITS),
)
"""What must be true before the rest of the header can be found: (field's offset, fault, claim)."""

_CLAIMS: tuple[_Claim, ...] = (
    (
        100,
        "a header too short for its version or too long for a cluster",
        lambda h: _MIN_HEADER_BYTES[h.version] <= h.header_length <= h.cluster_bytes,
    ),
    (72, "unknown incompatible features", lambda h: h.incompatible_features <= sum(Feature)),
    (
        104,
        "a compression type that is unknown or not among its features",
        lambda h: h.compression_type == int(Feature.COMPRESSION in h.features),
    ),
    (
        20,
        "clusters too small for extended L2 entries",
        lambda h: (
            Feature.EXTENDED_L2 not in h.features
            or h.cluster_bits >= _MIN_CLUSTER_BITS_OF_EXTENDED_L2
        ),
    ),
    (32, "an unknown encryption", lambda h: h.encryption_method < len(_ENCRYPTIONS)),
    (96, "reference counts wider than 64 bits", lambda h: h.refcount_order <= _MAX_REFCOUNT_ORDER),
    (8, "a backing name outside the first cluster", lambda h: h.backing_offset <= h.cluster_bytes),
    (
        16,
        "a backing name that is too long",
        lambda h: (
            not h.backing_offset
            or h.backing_length <= min(MAX_BACKING_NAME_BYTES, h.cluster_bytes - h.backing_offset)
        ),
    ),
    (
        56,
        "no reference count table, or one too large",
        lambda h: 0 < h.refcount_table_clusters << h.cluster_bits <= MAX_REFCOUNT_TABLE_BYTES,
    ),
    (48, "a misplaced reference count table", lambda h: _is_aligned(h, h.refcount_table_offset)),
    (36, "an active L1 table that is too large", lambda h: _is_l1_size(h.l1_entries)),
    (
        36,
        "an active L1 table too small for its virtual size",
        lambda h: h.l1_entries * h.l2_reach_bytes >= h.virtual_size_bytes,
    ),
    (40, "a misplaced active L1 table", lambda h: _is_aligned(h, h.l1_offset)),
    (60, "too many snapshots", lambda h: h.snapshot_count <= MAX_SNAPSHOTS),
    (64, "a misplaced snapshot table", lambda h: _is_aligned(h, h.snapshots_offset)),
)
"""What must be true of the header's numbers: (field's offset, fault, claim)."""


def read_metadata() -> Generator[Need, bytes, Metadata]:
    """Parse header, active L1 table and snapshots.

    Raises:
        StoreError: The image is truncated, corrupt or lies; `offset` and `reason` are in its data.
    """
    header = yield from read_header()
    l1_digest = blake3()
    l2_tables = yield from _read_l1(
        header.l1_offset, header.l1_entries, l1_digest, "the active L1 table"
    )
    snapshots = yield from _read_snapshots(header)
    return Metadata(
        header=header,
        snapshots=snapshots,
        l1_digest=l1_digest.hexdigest(),
        snapshots_digest=blake3("".join(entry.digest for entry in snapshots).encode()).hexdigest(),
        l2_tables=l2_tables,
        allocated_limit_bytes=min(l2_tables * header.l2_reach_bytes, header.virtual_size_bytes),
    )


def read_header() -> Generator[Need, bytes, Header]:
    """Parse the header with its extensions and the backing file's name.

    Raises:
        StoreError: As `read_metadata`.
    """
    header = yield from _read_numbers()
    digest = blake3()
    yield from _absorb(0, header.header_length, digest, "the header")
    texts = yield from _read_extensions(header, digest)
    name = b""
    if header.backing_offset:
        need = Need(header.backing_offset, header.backing_length)
        name = yield from _take(need, "the backing file's name")
    digest.update(name)
    return replace(header, backing_file=_text(name) or None, digest=digest.hexdigest(), **texts)


def drive(parser: Generator[Need, bytes, Value], pread: Callable[[int, int], bytes]) -> Value:
    """Run *parser* to its end and return its value.

    Args:
        parser: A parser that was not started.
        pread: Gives the bytes at (offset, length); fewer only where the file ends.

    Raises:
        StoreError: From the parser. What *pread* raises passes through.
    """
    try:
        need = next(parser)
        while True:
            need = parser.send(pread(need.offset, need.length))
    except StopIteration as done:
        value: Value = done.value
        return value


def _read_numbers() -> Generator[Need, bytes, Header]:
    """Parse the header's numbers and check them against each other."""
    fixed = yield from _take(Need(0, _FIXED.size), "the header")
    magic, *numbers = _FIXED.unpack(fixed)
    if magic != MAGIC:
        raise _broken(0, "it does not start as a qcow2 image does")
    header = Header(*numbers)
    _check(header, _FIRST_CLAIMS)
    if _MIN_HEADER_BYTES[header.version] > _FIXED.size:
        extended = yield from _take(Need(_FIXED.size, _EXTENDED.size), "the header")
        header = Header(*numbers, *_EXTENDED.unpack(extended))
    if header.header_length > _COMPRESSION_TYPE_OFFSET:
        compression = yield from _take(Need(_COMPRESSION_TYPE_OFFSET, 1), "the header")
        header = replace(header, compression_type=compression[0])
    _check(header, _CLAIMS)
    return header


def _read_extensions(header: Header, digest: blake3) -> Generator[Need, bytes, dict[str, str]]:
    """Digest all header extensions and return those that are texts, by field of `Header`."""
    texts = {}
    what = "a header extension"
    offset, end = header.header_length, header.backing_offset or header.cluster_bytes
    while offset < end:
        head = yield from _take(Need(offset, _EXTENSION.size), what)
        kind, length = _EXTENSION.unpack(head)
        start = offset + _EXTENSION.size
        if start + length > end:
            raise _broken(offset, "a header extension is longer than the room for it")
        digest.update(head)
        if kind == _EXTENSION_END:
            break
        yield from _absorb(start, length, digest, what)
        if kind in _EXTENSION_TEXTS:
            field, limit = _EXTENSION_TEXTS[kind]
            texts[field] = yield from _read_text(Need(start, length), limit, what)
        offset = start + _round_up(length)
    return texts


def _read_text(need: Need, limit: int, what: str) -> Generator[Need, bytes, str]:
    if need.length > limit:
        raise _broken(need.offset, f"{what} is longer than {limit} bytes")
    return _text((yield from _take(need, what)))


def _read_snapshots(header: Header) -> Generator[Need, bytes, tuple[SnapshotEntry, ...]]:
    """Parse the snapshot table; the space it takes is known only as it is read."""
    entries = []
    offset = header.snapshots_offset
    l1_bytes = 0
    for _ in range(header.snapshot_count):
        entry, end = yield from _read_entry(header, offset)
        entries.append(entry)
        l1_bytes += entry.l1_entries * _L1_ENTRY_BYTES
        if end - header.snapshots_offset > MAX_SNAPSHOT_TABLE_BYTES:
            raise _broken(offset, "its snapshot table is too large")
        if l1_bytes > MAX_ALL_SNAPSHOT_L1_BYTES:
            raise _broken(offset, "its snapshots' L1 tables are too large together")
        offset = _round_up(end)
    return tuple(entries)


def _read_entry(header: Header, offset: int) -> Generator[Need, bytes, tuple[SnapshotEntry, int]]:
    """Parse the entry at *offset* and digest its L1 table; also return where the entry ends."""
    what = "the snapshot table"
    fixed = yield from _take(Need(offset, _ENTRY.size), what)
    *said, state_bytes, extra_length = _ENTRY.unpack(fixed)
    l1_offset, l1_entries, id_length, name_length, seconds, nanoseconds, vm_clock_ns = said
    _check_entry(header, offset, l1_offset, l1_entries, extra_length)
    need = Need(offset + _ENTRY.size, extra_length + id_length + name_length)
    tail = yield from _take(need, what)
    extra, texts = tail[:extra_length], tail[extra_length:]
    sizes = _entry_sizes(extra, state_bytes, header.virtual_size_bytes)
    digest = blake3(_ENTRY_DIGESTED.pack(*said, *sizes) + texts)
    yield from _read_l1(l1_offset, l1_entries, digest, "a snapshot's L1 table")
    entry = SnapshotEntry(
        id=_text(texts[:id_length]),
        name=_text(texts[id_length:]),
        date_ns=seconds * 1_000_000_000 + nanoseconds,
        vm_clock_ns=vm_clock_ns,
        vm_state_bytes=sizes[0],
        disk_size_bytes=sizes[1],
        l1_offset=l1_offset,
        l1_entries=l1_entries,
        digest=digest.hexdigest(),
    )
    return entry, need.offset + need.length


def _check_entry(
    header: Header, offset: int, l1_offset: int, l1_entries: int, extra_length: int
) -> None:
    if not _is_aligned(header, l1_offset):
        raise _broken(offset, "a snapshot's L1 table does not start at a cluster")
    if not _is_l1_size(l1_entries):
        raise _broken(offset + 8, "a snapshot's L1 table is too large")
    if extra_length > MAX_SNAPSHOT_EXTRA_BYTES:
        raise _broken(offset + 36, "a snapshot's extra data is too long")


def _entry_sizes(extra: bytes, state_bytes: int, disk_bytes: int) -> tuple[int, int]:
    """The sizes of machine state and disk: from the extra data as far as that goes."""
    known = extra[: min(len(extra) // 8 * 8, _ENTRY_EXTRA.size)]
    assumed = _ENTRY_EXTRA.pack(state_bytes, disk_bytes)
    state_bytes, disk_bytes = _ENTRY_EXTRA.unpack(known + assumed[len(known) :])
    return state_bytes, disk_bytes


def _read_l1(offset: int, entries: int, digest: blake3, what: str) -> Generator[Need, bytes, int]:
    """Digest an L1 table without its COPIED bits; return how many of its entries are in use."""
    used = 0
    for need in _needs(offset, entries * _L1_ENTRY_BYTES):
        table = bytearray((yield from _take(need, what)))
        used += len(table) // _L1_ENTRY_BYTES - memoryview(table).cast("Q").tolist().count(0)
        table[::_L1_ENTRY_BYTES] = table[::_L1_ENTRY_BYTES].translate(_WITHOUT_COPIED)
        digest.update(table)
    return used


def _absorb(offset: int, length: int, digest: blake3, what: str) -> Generator[Need, bytes, None]:
    """Digest a stretch of the file, however long."""
    for need in _needs(offset, length):
        digest.update((yield from _take(need, what)))


def _needs(offset: int, length: int) -> Iterator[Need]:
    """Cut a stretch of the file into pieces that may be asked for."""
    end = offset + length
    for start in range(offset, end, MAX_NEED_BYTES):
        yield Need(start, min(MAX_NEED_BYTES, end - start))


def _take(need: Need, what: str) -> Generator[Need, bytes, bytes]:
    """Get exactly the bytes needed.

    Raises:
        StoreError: The file ends before, or no file can be that long.
    """
    if need.length == 0:
        return b""
    if need.offset + need.length > _MAX_OFFSET:
        raise _broken(need.offset, f"{what} lies where no file can reach")
    data = yield need
    if len(data) < need.length:
        raise _broken(need.offset + len(data), f"the file ends before {what} does")
    return data


def _check(header: Header, claims: tuple[_Claim, ...]) -> None:
    for offset, fault, is_true in claims:
        if not is_true(header):
            raise _broken(offset, f"it has {fault}")


def _is_aligned(header: Header, offset: int) -> bool:
    return offset % header.cluster_bytes == 0


def _is_l1_size(entries: int) -> bool:
    return entries * _L1_ENTRY_BYTES <= MAX_L1_BYTES


def _round_up(offset: int) -> int:
    """The next multiple of 8, to which extensions and snapshot entries are padded."""
    return (offset + 7) & ~7


def _text(data: bytes) -> str:
    """A text as QEMU's C strings read it: up to the first NUL."""
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _broken(offset: int, reason: str) -> StoreError:
    return StoreError(
        f"not a sound qcow2 image: {reason} (at byte {offset})",
        "look at it with 'qemu-img check'; restore it from a copy if it is damaged",
        offset=offset,
        reason=reason,
    )
