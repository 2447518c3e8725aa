import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype.errors import CommandLineError
from calotype.formats.argv import CommandLine, DiskArgument, definition, disks, with_images
from calotype.model.vm import Image

CWD = "/vm"


def line(*words: str) -> CommandLine:
    return CommandLine.parse(["qemu-system-x86_64", *words])


def disk(
    path: str, fmt: str = "", *, name: str = "", ro: bool = False, interface: str = ""
) -> DiskArgument:
    return DiskArgument(0, name, path, fmt, ro, interface)


def drive(value: str) -> tuple[str, ...]:
    return ("-drive", value)


def node(value: str) -> tuple[str, ...]:
    return ("-blockdev", value)


SPLIT = (
    "-blockdev", "driver=file,node-name=f0,filename=a.qcow2,aio=threads",
    "-blockdev", "driver=qcow2,node-name=d0,file=f0,discard=unmap",
)  # fmt: skip
ONE_DISK: dict[str, tuple[tuple[str, ...], DiskArgument]] = {
    "positional": (("a.raw",), disk("/vm/a.raw")),
    "hda": (("-hda", "sub/../a.raw"), disk("/vm/a.raw")),
    "hda is literal": (("-hda", "a,,b=c.raw"), disk("/vm/a,,b=c.raw")),
    "hdd": (("-hdd", "/x/a.raw"), disk("/x/a.raw")),
    "cdrom": (("-cdrom", "a.iso"), disk("/vm/a.iso", ro=True)),
    "fda": (("-fda", "a.img"), disk("/vm/a.img", interface="floppy")),
    "fdb": (("-fdb", "a.img"), disk("/vm/a.img", interface="floppy")),
    "sd": (("-sd", "a.img"), disk("/vm/a.img", interface="sd")),
    "mtdblock": (("-mtdblock", "a.img"), disk("/vm/a.img", interface="mtd")),
    "pflash": (("-pflash", "vars.fd"), disk("/vm/vars.fd", interface="pflash")),
    "device node": (("-hda", "/dev/disk/by-id/a:b"), disk("/dev/disk/by-id/a:b")),
    "colon after a slash": (("-hda", "./nbd:x"), disk("/vm/nbd:x")),
    "drive": (
        ("-drive", "file=a,,b c.qcow2,if=virtio"),
        disk("/vm/a,b c.qcow2", interface="virtio"),
    ),
    "drive with format": (
        ("-drive", "file=a.raw,format=raw,if=none,id=d0"),
        disk("/vm/a.raw", "raw", name="d0", interface="none"),
    ),
    "drive with driver": (
        ("-drive", "driver=qcow2,file=a.qcow2,l2-cache-size=1M"),
        disk("/vm/a.qcow2", "qcow2"),
    ),
    "drive with a node name": (
        ("-drive", "file=a.raw,id=x,node-name=n0"),
        disk("/vm/a.raw", name="n0"),
    ),
    "drive with a dotted file": (
        ("-drive", "file.driver=file,file.filename=nbd:a,format=raw,file.locking=off"),
        disk("/vm/nbd:a", "raw"),
    ),
    "drive with many options": (
        drive(
            "file=a.raw,index=1,cache=none,aio=native,discard=unmap,detect-zeroes=on,"
            "werror=stop,rerror=stop,cache.direct=on,snapshot=off,copy-on-read=off"
        ),
        disk("/vm/a.raw"),
    ),
    "drive, read-only": (("-drive", "file=a.raw,readonly=on"), disk("/vm/a.raw", ro=True)),
    "drive, read-only flag": (("-drive", "file=a.raw,readonly"), disk("/vm/a.raw", ro=True)),
    "drive, not read-only": (("-drive", "file=a.raw,read-only=off"), disk("/vm/a.raw")),
    "drive, cdrom": (("-drive", "file=a.iso,media=cdrom"), disk("/vm/a.iso", ro=True)),
    "drive, last file counts": (("-drive", "file=b,file=a"), disk("/vm/a")),
    "read-only takes any key": (
        ("-drive", "file=a.raw,readonly=on,offset=512,iops=5"),
        disk("/vm/a.raw", ro=True),
    ),
    "inline": (
        ("-blockdev", "qcow2,node-name=d0,file.driver=file,file.filename=a.qcow2"),
        disk("/vm/a.qcow2", "qcow2", name="d0", interface="none"),
    ),
    "inline, JSON": (
        node(
            '{"driver": "raw", "node-name": "d0", "read-only": true,'
            ' "file": {"driver": "file", "filename": "a:b"}}'
        ),
        disk("/vm/a:b", "raw", name="d0", ro=True, interface="none"),
    ),
    "inline on a block device": (
        ("-blockdev", "raw,node-name=d0,file.driver=host_device,file.filename=/dev/sdb"),
        disk("/dev/sdb", "raw", name="d0", interface="none"),
    ),
    "split": (SPLIT, disk("/vm/a.qcow2", "qcow2", name="d0", interface="none")),
    "split, other order": (
        (*SPLIT[2:], *SPLIT[:2]),
        disk("/vm/a.qcow2", "qcow2", name="d0", interface="none"),
    ),
    "bare": (
        ("-blockdev", "driver=file,node-name=d0,filename=a.raw,aio=native"),
        disk("/vm/a.raw", "raw", name="d0", interface="none"),
    ),
    "limits": (
        ("-drive", "file=a.raw,iops_rd=1,bps_max=2,throttling.iops-total-max-length=3,group=g"),
        disk("/vm/a.raw"),
    ),
    "JSON in a file name": (
        ("-hda", 'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "a,b"}}'),
        disk("/vm/a,b", "qcow2"),
    ),
    "below a filter": (
        (
            "-blockdev", "throttle,node-name=t,throttle-group=g,file=c",
            "-blockdev", "copy-on-read,node-name=c,file=d0",
            "-blockdev", "qcow2,node-name=d0,file.driver=file,file.filename=a.qcow2",
        ),
        disk("/vm/a.qcow2", "qcow2", name="d0", interface="none"),
    ),
    "bare below a filter": (
        (
            "-blockdev", "file,node-name=d0,filename=a.raw",
            "-blockdev", "throttle,node-name=t,throttle-group=g,file=d0",
        ),
        disk("/vm/a.raw", "raw", name="d0", interface="none"),
    ),
    "read-only chain": (
        (
            "-blockdev", "file,node-name=f,filename=base",
            "-blockdev", "file,node-name=g,filename=a",
            "-blockdev", "raw,node-name=b,file=f,read-only=on",
            "-blockdev", "qcow2,node-name=d,read-only=on,backing=b,file=g",
        ),
        disk("/vm/a", "qcow2", name="d", ro=True, interface="none"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("words", "found"), ONE_DISK.values(), ids=ONE_DISK)
def test_a_disk_is_found(words: tuple[str, ...], found: DiskArgument) -> None:
    assert disks(line(*words), CWD) == (found,)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("-m", "512"),
        ("-cdrom", ""),
        ("-drive", "if=ide,media=cdrom"),
        ("-drive", "file=,if=ide,media=cdrom"),
        ("-drive", "if=none,id=d0,format=raw"),
        ("-drive", "driver=null-co,size=1G"),
        ("-blockdev", "null-co,node-name=d0"),
        ("-blockdev", "raw,node-name=d0,file.driver=null-aio"),
        ("-blockdev", "null-co,node-name=n", "-blockdev", "raw,node-name=d0,file=n"),
        ("-kernel", "a.raw"),
    ],
)
def test_what_holds_no_image_is_no_disk(words: tuple[str, ...]) -> None:
    assert disks(line(*words), CWD) == ()


def test_disks_are_counted_in_the_order_of_the_line() -> None:
    command = line("-hdb", "b", "-m", "64", "-cdrom", "c", *SPLIT[2:], "a", *SPLIT[:2])
    assert [(each.index, each.path) for each in disks(command, CWD)] == [
        (0, "/vm/b"),
        (1, "/vm/c"),
        (2, "/vm/a.qcow2"),
        (3, "/vm/a"),
    ]


INLINE = "qcow2,node-name=d0,file.driver=file,file.filename=a"
REFUSED = [
    (("-hda", "nbd:localhost:10809"), "'nbd:' as a protocol"),
    (("-hda", "json:{}"), "names no file"),
    (("-hda", "json:{"), "JSON"),
    (("-hda", 'json:{"driver": "qcow2", "file": "f0"}'), "the node 'f0' is below it"),
    (("-hda", 'json:{"driver": "file", "filename": "a"}'), "names no file"),
    (("-hda", 'json:{"driver": "nbd", "file": {"filename": "a"}}'), "driver 'nbd'"),
    (("-hda", "fat:rw:dir"), "'fat:' as a protocol"),
    (("-hda", "file:a"), "'file:' as a protocol"),
    (("a:b",), "'a:' as a protocol"),
    (drive("file=nbd://h/x"), "'nbd:' as a protocol"),
    (drive("file=null-co://"), "'null-co:' as a protocol"),
    (drive("file=/dev/fdset/2"), "passed file"),
    (drive("file.filename=/dev/fdset/2"), "passed file"),
    (node("file,node-name=d,filename=/dev/fdset/2"), "passed file"),
    (drive("file=a,format=vmdk"), "driver 'vmdk'"),
    (drive("file=a,driver=luks"), "driver 'luks'"),
    (drive("driver=file,filename=a,file=b"), "driver 'file'"),
    (drive("driver=quorum,children.0=x"), "driver 'quorum'"),
    (drive("driver=nvme,device=0000:01:00.0,namespace=1"), "driver 'nvme'"),
    (drive("file.driver=nbd,file.host=h,file.port=1"), "driver 'nbd'"),
    (drive("file.driver=blkdebug,file.image.filename=a"), "driver 'blkdebug'"),
    (drive("file=a,snapshot=on"), "snapshot: the disk's writes"),
    (drive("file=a,snapshot=on,readonly=on"), "snapshot: the disk's writes"),
    (drive("file=a,copy-on-read=on"), "copy-on-read"),
    (drive("file=a,throttling.bps-all=1"), "does not know throttling.bps-all"),
    (node(f"{INLINE},throttling.iops-total=1"), "does not know throttling.iops-total"),
    (drive("file=a,backing.file.filename=b"), "read from the image"),
    (drive("file=a,backing=b"), "read from the image"),
    (drive("file=a,encrypt.key-secret=s"), "encrypted"),
    (drive("file=a,format=raw,offset=512"), "part of a file"),
    (drive("file=a,data-file.filename=b"), "two files"),
    (drive("file=a,stats-intervals.0=1"), "does not know stats-intervals.0"),
    (drive("file=a,file.cookie=1"), "does not know file.cookie"),
    (node("throttle,node-name=t,throttle-group=g,file=d0"), "no -blockdev of its own"),
    (node("copy-on-read,node-name=t,file.driver=raw"), "no -blockdev of its own"),
    ((*node(INLINE), *node("copy-on-read,node-name=t,file=d0,bottom=b")), "does not know bottom"),
    ((*node(INLINE), *node("copy-on-read,file=d0"), *node("copy-on-read,file=d0")),
     "more than one node stands on 'd0'"),
    (node("preallocate,node-name=t,file=d0"), "driver 'preallocate'"),
    (node("nbd,node-name=d,server.type=inet"), "driver 'nbd'"),
    (node("raw,node-name=d,file.driver=nbd"), "driver 'nbd'"),
    (node("raw,node-name=d,file.driver=qcow2,file.file.filename=a"), "driver 'qcow2'"),
    (node("raw,node-name=d"), "driver ''"),
    (node("file,node-name=d"), "filename is missing"),
    (node("raw,node-name=d,file=nothing"), "no -blockdev is named 'nothing'"),
    (node(f"{INLINE},backing.driver=null-co"), "read from the image"),
    (node('{"driver": "qcow2", "file": {"driver": "file", "filename": "a"}, "backing": null}'),
     "read from the image"),
    (node(f"{INLINE},encrypt.format=luks"), "encrypted"),
    (node(f"{INLINE},unheard=of"), "does not know unheard"),
    (node("raw,node-name=d,size=1,file.driver=file,file.filename=a"), "part of a file"),
    (node("raw,readonly"), "has no '='"),
    ((*node("file,node-name=f,filename=a,unheard=of"), *node("raw,node-name=d,file=f")),
     "does not know unheard"),
    ((*node("null-co,node-name=f"), *node("raw,node-name=d,file=f"), *node("raw,file=f")),
     "more than one node stands on 'f'"),
    ((*node("raw,node-name=d,file=e"), *node(f"{INLINE.replace('d0', 'e')},read-only=on")),
     "driver 'qcow2'"),
    ((*node(INLINE), *node("qcow2,node-name=t,read-only=on,backing=d0,file.driver=file,"
                           "file.filename=b")), "another node stands on it"),
    (("-snapshot",), "gone when QEMU ends"),
    (("-readconfig", "f"), "does not show"),
    (("-set", "drive.d0.file=b"), "behind their backs"),
    (("-hda", "a", "-hdb", "./a"), "more than once"),
    (("-hda", "a", "-drive", "file=/vm/a,readonly=on"), "more than once"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "problem"), REFUSED)
def test_what_cannot_be_frozen_is_refused(words: tuple[str, ...], problem: str) -> None:
    with pytest.raises(CommandLineError, match=problem) as caught:
        disks(line(*words), CWD)
    assert caught.value.remedy


def test_a_read_only_image_may_be_named_twice() -> None:
    command = line("-cdrom", "a", "-drive", "file=a,readonly=on")
    assert [each.path for each in disks(command, CWD)] == ["/vm/a", "/vm/a"]


@pytest.mark.parametrize(("words", "found"), ONE_DISK.values(), ids=ONE_DISK)
@pytest.mark.parametrize("image", [Image("/o,v/x:y.qcow2", "qcow2"), Image("/o.raw", "raw")])
def test_the_disk_stays_what_it_was_with_another_image(
    words: tuple[str, ...], found: DiskArgument, image: Image
) -> None:
    command = with_images(line(*words), {0: image})
    expected = DiskArgument(
        0, found.name, image.path, image.format, found.read_only, found.interface
    )
    assert disks(command, CWD) == (expected,)
    assert definition(command, CWD) == definition(line(*words), CWD)


@pytest.mark.parametrize(("words", "found"), ONE_DISK.values(), ids=ONE_DISK)
def test_its_own_image_is_exchanged_for_the_same_disk(
    words: tuple[str, ...], found: DiskArgument
) -> None:
    image = Image(found.path, "qcow2" if found.format == "qcow2" else "raw")
    once = with_images(line(*words), {0: image})
    assert disks(once, CWD)[0].path == found.path
    assert with_images(once, {0: image}) == once


QCOW2 = Image("/o.qcow2", "qcow2")
EXCHANGED = [
    (("a.raw",), ("-drive", "file=/o.qcow2,index=0,media=disk,driver=qcow2")),
    (("-cdrom", "a"), ("-drive", "file=/o.qcow2,index=2,media=cdrom,driver=qcow2")),
    (("-fdb", "a"), ("-drive", "file=/o.qcow2,if=floppy,index=1,driver=qcow2")),
    (("-pflash", "a"), ("-drive", "file=/o.qcow2,if=pflash,driver=qcow2")),
    (drive("file=a,format=raw,if=virtio"), drive("file=/o.qcow2,format=qcow2,if=virtio")),
    (
        drive("file=a,driver=raw,readonly=on,size=1M"),
        drive("file=/o.qcow2,driver=qcow2,readonly=on"),
    ),
    (
        drive("file.driver=host_device,file.filename=/dev/sdb,format=raw"),
        drive("file.driver=file,file.filename=/o.qcow2,format=qcow2"),
    ),
    (
        node("file,node-name=d0,filename=a,aio=native,cache.direct=on,discard=unmap"),
        node(
            "driver=qcow2,file.driver=file,node-name=d0,file.filename=/o.qcow2,file.aio=native,"
            "cache.direct=on,discard=unmap"
        ),
    ),
    (
        node('{"driver": "file", "node-name": "d0", "filename": "a", "read-only": false}'),
        node(
            '{"driver": "qcow2", "file": {"driver": "file", "filename": "/o.qcow2"}, '
            '"node-name": "d0", "read-only": false}'
        ),
    ),
    (
        node('{"driver": "raw", "node-name": "d0", "cache": {"direct": true}, "file": "f0"}')
        + node('{"driver": "host_device", "node-name": "f0", "filename": "/dev/sdb"}'),
        node('{"driver": "qcow2", "node-name": "d0", "cache": {"direct": true}, "file": "f0"}')
        + node('{"driver": "file", "node-name": "f0", "filename": "/o.qcow2"}'),
    ),
]


@pytest.mark.parametrize(("before", "after"), EXCHANGED)
def test_an_image_is_exchanged_in_place(before: tuple[str, ...], after: tuple[str, ...]) -> None:
    assert with_images(line(*before, "-S"), {0: QCOW2}).argv()[1:] == [*after, "-S"]


def test_keys_of_qcow2_are_dropped_for_a_raw_image() -> None:
    command = line(*drive("file=a,format=qcow2,l2-cache-size=1M,overlap-check.template=all"))
    exchanged = with_images(command, {0: Image("/o", "raw")})
    assert exchanged.argv()[1:] == ["-drive", "file=/o,format=raw"]


def test_a_bare_file_stays_bare_with_a_raw_image() -> None:
    command = line(*node("host_device,node-name=d0,filename=/dev/sdb"))
    exchanged = with_images(command, {0: Image("/o", "raw")})
    assert exchanged.argv()[1:] == ["-blockdev", "driver=file,node-name=d0,filename=/o"]
    same = with_images(command, {0: Image("/dev/sdb", "raw")})
    assert disks(same, CWD) == disks(command, CWD)
    assert "host_device" in same.argv()[-1]


def test_a_disk_that_is_not_there_is_refused() -> None:
    with pytest.raises(CommandLineError, match="no disk 1"):
        with_images(line("a"), {1: QCOW2})


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_any_path_can_be_put_in_any_form(name: str) -> None:
    path = f"/x/{name.replace('/', '_')}"
    for words, _ in ONE_DISK.values():
        command = with_images(line(*words), {0: Image(path, "qcow2")})
        read = disks(CommandLine.parse(command.argv()), CWD)
        assert read[0].path == path or name in {".", ".."}
