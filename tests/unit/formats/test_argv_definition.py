import pytest

from calotype.formats.argv import CommandLine, Endpoints, definition, supervised

CWD = "/vm"


def defined(text: str) -> tuple[tuple[str, str], ...]:
    return definition(CommandLine.parse(["qemu", *text.split()]), CWD)


EQUAL = [
    ("-m 512", "-m size=512M"),
    ("-m 512", "-m 0.5G"),
    ("-m 512", "-machine memory.size=512M"),
    ("", "-m 128"),
    ("-M q35", "-machine type=q35"),
    ("-M q35,smm=off", "-machine smm=off,type=q35,accel=kvm:tcg"),
    ("-M q35 -M smm=off", "-M q35,smm=off"),
    ("-M q35", "-M q35 -enable-kvm"),
    ("-M q35,memory-backend=m -m 1G -object memory-backend-ram,id=m,size=1G",
     "-M q35,memory-backend=m -object memory-backend-memfd,size=1024M,id=m,share=on"),
    ("-smp 2", "-smp cpus=2"),
    ("-smp 4,cores=2", "-machine smp.cores=2,smp.cpus=4"),
    ("-usb", "-machine usb=on"),
    ("-no-acpi", "-machine acpi=off"),
    ("-cpu max", "-cpu host -cpu max"),
    ("-cpu max,+avx,-sse,ht", "-cpu max,ht=on,sse=off,avx=on"),
    ("-cpu max,+avx", "-cpu max,+avx,avx=off"),
    ("-device virtio-blk-pci,id=d,drive=x", "-device drive=x,driver=virtio-blk-pci,id=d"),
    ("-device usb-tablet,id=t,pcap", "-device {'driver':'usb-tablet','pcap':true,'id':'t'}"),
    ("-device e1000,bootindex=1", "-device {'driver':'e1000','bootindex':1}"),
    ("-global kvm-pit.lost_tick_policy=discard",
     "-global driver=kvm-pit,property=lost_tick_policy,value=discard"),
    ("-hda a", "-drive file=b,index=0,format=qcow2,cache=none"),
    ("-hda a", "a"),
    ("-cdrom a", "-drive media=cdrom,index=2"),
    ("-drive file=a,if=none,id=d,readonly", "-drive file=a,if=none,id=d,read-only=on"),
    ("-pflash a", "-drive if=pflash,file=b,format=raw"),
    ("-netdev user,id=n,hostfwd=tcp::22-:22", "-netdev id=n,type=user"),
    ("-netdev user,id=n", "-netdev {'type':'user','id':'n'}"),
    ("-nic user,model=e1000,hostfwd=tcp::22-:22", "-nic user,model=e1000"),
    ("-serial stdio", "-serial file:x"),
    ("", "-serial mon:stdio"),
    ("-display none", "-vnc :1 -qmp unix:x -monitor none -pidfile p -name n"),
    ("-bios ./fw/../a.fd/b", "-bios /vm/a.fd/b"),
    ("-kernel k -append x -initrd i -boot d", ""),
    ("-object iothread,id=i", ""),
    ("-vga std -vga cirrus", "-vga cirrus"),
    ("-blockdev null-co,node-name=x", ""),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_what_means_the_same_to_the_guest_is_defined_alike(one: str, other: str) -> None:
    assert defined(one) == defined(other)


DIFFERENT = [
    ("-m 512", "-m 513"),
    ("-m 512", "-m 512,slots=2,maxmem=1G"),
    ("-M q35", "-M pc"),
    ("-smp 2", "-smp 4"),
    ("-cpu max", "-cpu max,-avx"),
    ("-device e1000", "-device e1000e"),
    ("-device e1000 -device usb-tablet", "-device usb-tablet -device e1000"),
    ("-device e1000", "-device e1000 -device e1000"),
    ("-hda a", "-hdb a"),
    ("-hda a", "-cdrom a"),
    ("-hda a", "-drive file=a,index=0,readonly=on"),
    ("-nodefaults", ""),
    ("-nographic", ""),
    ("-serial none", ""),
    ("-serial stdio -serial null", "-serial stdio"),
    ("-nic none", "-nic user"),
    ("-netdev user,id=n", "-netdev tap,id=n"),
    ("-bios a", "-bios b"),
    ("-vga std", "-vga none"),
    ("-global a.b=1", "-global a.b=2"),
    ("-numa node,nodeid=0", ""),
    ("-uuid 1", "-uuid 2"),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_the_guest_can_tell_apart_is_defined_differently(one: str, other: str) -> None:
    assert defined(one) != defined(other)


def test_a_definition_is_in_canonical_order() -> None:
    text = (
        "-vga std -device usb-tablet,id=t -cpu max -M accel=tcg,type=q35 -hda a -nodefaults -m 1G"
    )
    assert defined(text) == (
        ("machine.memory.size", str(1 << 30)),
        ("machine.type", "q35"),
        ("cpu", "max"),
        ("device", "driver=usb-tablet,id=t"),
        ("drive", "index=0"),
        ("vga", "std"),
        ("nodefaults", "on"),
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-nographic",
        "-nodefaults -nographic",
        "-serial mon:stdio -serial null",
        "-serial file:x",
        "-serial none",
        "-monitor stdio -M q35",
        "-chardev stdio,id=c -device isa-serial,chardev=c",
        "-chardev stdio,id=c -serial chardev:c",
    ],
)
def test_supervision_is_invisible_to_the_guest(text: str) -> None:
    command = CommandLine.parse(["qemu", *text.split()])
    watched = supervised(command, Endpoints(3, 4, 6, 7, 5, "/log"))
    assert definition(watched, CWD) == definition(command, CWD)
