"""Endpoints of the host on a command line: how a second QEMU is started, what is handed over."""

import pytest

from calotype.formats.argv import CommandLine
from calotype.formats.argv.arity import FLAGS, VALUED
from calotype.formats.argv.refusals import REFUSED
from calotype.formats.argv.sharing import ALONE, READERS, UNSHARED, Sharing, acts, sharing
from calotype.model.acts import Act, Drop, Keep, Move, Tell, WritePid

Words = list[str]


def shared(*words: str) -> Sharing:
    return sharing(CommandLine.parse(("qemu", *words)), "/vm", "/store/vm")


def hmp(side: str, words: str) -> Tell:
    assert side in ("old", "new")
    return Tell(side, "human-monitor-command", {"command-line": words})  # type: ignore[arg-type]


def unix(path: str) -> tuple[list[Act], list[Act]]:
    return (
        [Keep(path, f"{path}.prev"), Move(f"{path}.next", path)],
        [Move(f"{path}.prev", path), Drop(f"{path}.next")],
    )


def vnc(*servers: str) -> dict[str, object]:
    return {
        "type": "vnc",
        "addresses": [{"type": "inet", "host": host, "port": "5901"} for host in servers],
    }


def tcp(label: str, host: str, **modes: bool) -> dict[str, object]:
    data = {"addr": {"type": "inet", "data": {"host": host, "port": "77"}}, "server": True}
    return {"id": label, "backend": {"type": "socket", "data": {**data, "wait": False, **modes}}}


def nowhere(label: str) -> dict[str, object]:
    return {"id": label, "backend": {"type": "null", "data": {}}}


ENDPOINTS: list[tuple[Words, Words, list[Act], list[Act]]] = [
    # the user's words, those of the second QEMU, forth, back
    (
        ["-netdev", "user,id=n,hostfwd=tcp::22-:22,ipv6=off,hostfwd=udp:127.0.0.1:5-:6"],
        ["-netdev", "type=user,id=n,ipv6=off"],
        [
            hmp("old", "hostfwd_remove n tcp::22"),
            hmp("new", "hostfwd_add n tcp::22-:22"),
            hmp("old", "hostfwd_remove n udp:127.0.0.1:5"),
            hmp("new", "hostfwd_add n udp:127.0.0.1:5-:6"),
        ],
        [
            hmp("old", "hostfwd_add n udp:127.0.0.1:5-:6"),
            hmp("old", "hostfwd_add n tcp::22-:22"),
        ],
    ),
    (
        ["-nic", "user,hostfwd=tcp::22-:22"],
        ["-nic", "type=user"],
        [hmp("old", "hostfwd_remove tcp::22"), hmp("new", "hostfwd_add tcp::22-:22")],
        [hmp("old", "hostfwd_add tcp::22-:22")],
    ),
    (
        ["-chardev", "socket,id=c,path=s,,x.sock,server=on,wait=off"],
        ["-chardev", "socket,id=c,path=/vm/s,,x.sock.next,server=on,wait=off"],
        *unix("/vm/s,x.sock"),
    ),
    (
        ["-serial", "unix:/run/s,server,nowait"],
        [
            *("-serial", "chardev:serial0"),
            *("-chardev", "socket,id=serial0,path=/run/s.next,server=on,wait=off"),
        ],
        *unix("/run/s"),
    ),
    (["-vnc", "unix:/run/v"], ["-vnc", "unix:/run/v.next"], *unix("/run/v")),
    (
        ["-vnc", ":1,share=ignore"],
        ["-vnc", "unix:/store/vm/vnc.next,share=ignore"],
        [
            Tell("old", "display-update", vnc()),
            Tell("new", "display-update", vnc("")),
        ],
        [Tell("old", "display-update", vnc(""))],
    ),
    (
        ["-vnc", "[::1]:1"],
        ["-vnc", "unix:/store/vm/vnc.next"],
        [
            Tell("old", "display-update", vnc()),
            Tell("new", "display-update", vnc("::1")),
        ],
        [Tell("old", "display-update", vnc("::1"))],
    ),
    (
        ["-serial", "none", "-serial", "telnet:localhost:77,server=on,wait=off"],
        ["-serial", "none", "-serial", "chardev:serial1", "-chardev", "null,id=serial1"],
        [
            Tell("old", "chardev-change", nowhere("serial1")),
            Tell("new", "chardev-change", tcp("serial1", "localhost", telnet=True)),
        ],
        [Tell("old", "chardev-change", tcp("serial1", "localhost", telnet=True))],
    ),
    (
        ["-chardev", "socket,id=c,host=::,port=77,server=on", "-device", "isa-serial,chardev=c"],
        ["-chardev", "null,id=c", "-device", "isa-serial,chardev=c"],
        [
            Tell("old", "chardev-change", nowhere("c")),
            Tell("new", "chardev-change", tcp("c", "::")),
        ],
        [Tell("old", "chardev-change", tcp("c", "::"))],
    ),
    (["-pidfile", "p"], [], [WritePid("new", "/vm/p")], [WritePid("old", "/vm/p")]),
    (
        ["-serial", "file:log"],
        ["-serial", "chardev:serial0", "-chardev", "file,id=serial0,path=log,append=on"],
        [],
        [],
    ),
    (
        ["-chardev", "ringbuf,id=r,size=8,logfile=l"],
        ["-chardev", "ringbuf,id=r,size=8,logfile=l,logappend=on"],
        [],
        [],
    ),
    (["-serial", "pty"], ["-serial", "pty"], [], []),
]


@pytest.mark.parametrize(("words", "second", "forth", "back"), ENDPOINTS)
def test_an_endpoint_is_handed_over(
    words: Words, second: Words, forth: list[Act], back: list[Act]
) -> None:
    found = shared(*words)
    assert found.unshared == ()
    assert found.command.argv() == ["qemu", *second]
    assert acts(found.endpoints) == (tuple(forth), tuple(back))
    assert found.endpoints
    assert all(each.what and each.how for each in found.endpoints)


HARMLESS = [
    ["-m", "1G", "-smp", "4", "-drive", "file=x,if=virtio", "-nographic", "-serial", "stdio"],
    ["-netdev", "user,id=n", "-nic", "none", "-net", "nic,model=e1000"],
    ["-object", "memory-backend-file,id=m,size=1G,mem-path=/x", "-object", "iothread,id=t"],
    ["-vnc", "none", "-display", "gtk", "-parallel", "none", "-monitor", "vc", "-trace", "x"],
    ["-audiodev", "pa,id=a", "-virtfs", "local,path=/x,mount_tag=t,security_model=none"],
    ["-chardev", "null,id=n", "-monitor", "null", "-serial", "mon:stdio"],
]


@pytest.mark.parametrize("words", HARMLESS)
def test_what_two_can_have_is_left_as_it_is(words: Words) -> None:
    found = shared(*words)
    assert (found.endpoints, found.unshared) == ((), ())
    assert found.command == CommandLine.parse(("qemu", *words))


REFUSALS = [
    ["-netdev", "tap,id=n,ifname=tap0"],
    ["-netdev", '{"type":"user","id":"n","hostfwd":[{"str":"tcp::22-:22"}]}'],
    ["-nic", "user,hostfwd=tcp::22-:22", "-netdev", "user,id=n"],
    ["-serial", "tcp:localhost:77"],
    ["-serial", "mon:tcp::77,server"],
    ["-serial", "udp:localhost:77"],
    ["-serial", "/dev/ttyS0"],
    ["-monitor", "tcp:localhost:77,server"],
    ["-chardev", "socket,id=c,host=::,port=77,server=on", "-device", "virtserialport,chardev=c"],
    ["-chardev", "socket,id=c,path=/x,server=on,abstract=on"],
    ["-chardev", "socket,id=c,path=/x"],
    ["-chardev", f"socket,id=c,path=/{'x' * 104},server=on"],
    ["-chardev", "pipe,id=c,path=/x"],
    ["-chardev", "pty,id=c,path=/x"],
    ["-vnc", ":1,websocket=on"],
    ["-vnc", ":1,to=9"],
    ["-vnc", ":1,password=on"],
    ["-display", "dbus"],
    ["-spice", "port=5900"],
    ["-gdb", "tcp::1234"],
    ["-s"],
    ["-D", "log"],
    ["-trace", "file=x"],
    ["-device", "vhost-vsock-pci,guest-cid=3"],
    ["-object", "memory-backend-file,id=m,size=1G,mem-path=/x,share=on"],
    ["-object", "rng-egd,id=r,chardev=c"],
    ["-audiodev", "wav,id=a"],
    ["-fsdev", "proxy,id=f,socket=/x"],
    ["-plugin", "x.so"],
]


@pytest.mark.parametrize("words", REFUSALS)
def test_what_one_alone_can_have_is_named(words: Words) -> None:
    found = shared(*words)
    assert [each.argument for each in found.unshared] == [" ".join(words[:2])]
    assert found.unshared[0].reason


@pytest.mark.parametrize(
    "words",
    [
        ["-spice", "port=5900,password=hunter2"],
        ["-iscsi", "user=me,password=hunter2"],
        ["-netdev", "l2tpv3,id=n,src=::1,dst=::2,udp=on,txcookie=hunter2,txsession=1"],
    ],
)
def test_what_is_named_holds_no_secret(words: Words) -> None:
    told = " ".join(f"{each.argument} {each.reason}" for each in shared(*words).unshared)
    assert "REDACTED" in told
    assert "hunter2" not in told


def test_each_option_is_in_one_table_or_is_refused() -> None:
    tables = [ALONE, frozenset(READERS), frozenset(UNSHARED)]
    for option in sorted(VALUED | FLAGS):
        assert sum(option in table for table in tables) <= 1, option
    known = frozenset().union(*tables)
    assert known <= VALUED | FLAGS
    assert (VALUED | FLAGS) - known - frozenset(REFUSED) == UNKNOWN


UNKNOWN = frozenset({"iscsi", "plugin", "qtest-log", "xen-attach", "xen-domid",
                     "xen-domid-restrict"})  # fmt: skip
"""Options that nobody has looked at: they keep a second QEMU from being started."""
