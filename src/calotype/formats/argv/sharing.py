"""What two QEMUs with one command line cannot both have, and how it goes from one to the other.

A restore over a running VM prepares a second QEMU beside the first. Most of a command line is no
matter: guest memory, devices and images are each QEMU's own. But some options name something of the
host that only one can have: a listening socket, a port, a log. Left as they are, the second QEMU
ends (ports, pidfile), empties a log, or takes a socket's path over and removes it when it ends.

So each such option is an *endpoint*, with three things to know: how the second QEMU is started
instead, the acts that hand it over while the guest stands still, and those that hand it back.

====================  ==========================  =============================================
endpoint              the second is started with  handed over by
====================  ==========================  =============================================
unix socket           another path                renaming the sockets; the first keeps its own
TCP port of a serial  a port to nowhere           chardev-change in both (chardev/char.c)
hostfwd of a user net no forwarding               hostfwd_remove, hostfwd_add (net/slirp.c)
VNC on TCP            a unix socket               display-update in both (since QEMU 7.1)
pidfile               none                        writing the other pid into it
a log                 the same, appended to       nothing: who does not run says nothing
a new terminal        one of its own              nothing: its name is another one
====================  ==========================  =============================================

What is in no table here is not known to be harmless, and is *unshared*: such a VM must be stopped
first. The options are those of `arity`; a test holds the tables against it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from posixpath import join, normpath
from typing import Any

from calotype.formats.argv.line import Argument, CommandLine
from calotype.formats.argv.syntax import IMPLIED, settings
from calotype.formats.options import parse, unparse
from calotype.formats.secrets import redacted
from calotype.model.acts import NEXT, Act, Tell, WritePid, exchange

LONGEST_SOCKET_PATH = 107
"""Bytes that a unix socket's address holds."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Something of the host that goes from one QEMU to the other."""

    what: str
    """What it is, for a person: `TCP port 2222 (hostfwd)`."""
    how: str
    """What happens to it, for a person."""
    forth: tuple[Act, ...] = ()
    back: tuple[Act, ...] = ()


@dataclass(frozen=True, slots=True)
class Unshared:
    """An argument that keeps a second QEMU from being started beside the first."""

    argument: str
    reason: str


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a second QEMU is started beside the first."""

    command: CommandLine
    endpoints: tuple[Endpoint, ...]
    unshared: tuple[Unshared, ...]


@dataclass(slots=True)
class _Argument:
    """One argument while it is looked at, and what came out of it."""

    command: CommandLine
    place: int
    cwd: str
    aside: str
    now: Argument
    """What the second QEMU gets instead."""
    is_left_out: bool = False
    added: list[Argument] = field(default_factory=list)
    endpoints: list[Endpoint] = field(default_factory=list)
    unshared: list[str] = field(default_factory=list)

    @property
    def given(self) -> Argument:
        return self.command.arguments[self.place]

    def path(self, written: str) -> str:
        return normpath(join(self.cwd, written))

    def label(self) -> str:
        """What QEMU calls the chardev that a short form makes (system/vl.c)."""
        before = self.command.arguments[: self.place]
        count = sum(each.option == self.given.option for each in before)
        return f"{_LABELS[self.given.option]}{count}"


def sharing(command: CommandLine, cwd: str, aside: str) -> Sharing:
    """Say how a second QEMU with this command line is started beside the first.

    Args:
        command: The user's command line, which the first was started with.
        cwd: The folder that both run in, absolute.
        aside: A folder for sockets that nobody is to find.

    Raises:
        CommandLineError: An option is not in QEMU's grammar.
    """
    looked = [
        _look(_Argument(command, place, cwd, aside, given))
        for place, given in enumerate(command.arguments)
    ]
    changes = {each.place: each.now for each in looked}
    added = [argument for each in looked for argument in each.added]
    changed = command.having(changes, *added)
    left_out = {each.place for each in looked if each.is_left_out}
    kept = (each for place, each in enumerate(changed.arguments) if place not in left_out)
    return Sharing(
        CommandLine(changed.program, tuple(kept)),
        tuple(endpoint for each in looked for endpoint in each.endpoints),
        tuple(
            Unshared(" ".join(redacted(each.given.words())), reason)
            for each in looked
            for reason in each.unshared
        ),
    )


def _look(found: _Argument) -> _Argument:
    if found.given.option not in ALONE:
        READERS.get(found.given.option, _unknown)(found)
    return found


def _unknown(found: _Argument) -> None:
    found.unshared.append(UNSHARED.get(found.given.option, _NOT_KNOWN))


_NOT_KNOWN = "it is not known whether two QEMUs can have it"

UNSHARED: Mapping[str, str] = {
    "D": "the second QEMU would empty the log",
    "gdb": "its port serves one QEMU",
    "s": "its port serves one QEMU",
    "spice": "its port cannot be changed while QEMU runs",
    "tpmdev": "a TPM's state serves one QEMU",
    "qtest": "its socket serves one QEMU",
}
"""Options that keep a second QEMU from being started, and why; those in no table do too."""

ALONE: frozenset[str] = frozenset({
    # the machine, its memory and its devices
    "machine", "M", "cpu", "accel", "smp", "numa", "global", "boot", "m", "mem-path", "uuid",
    "mem-prealloc", "enable-kvm", "vga", "g", "acpitable", "smbios", "usb", "usbdevice", "no-hpet",
    "no-acpi", "no-fd-bootchk", "win2k-hack", "nodefaults", "watchdog-action", "icount", "rtc",
    "rotate", "portrait", "full-screen", "old-param", "prom-env", "semihosting",
    "semihosting-config",
    # firmware, kernels and other files that are only read
    "bios", "kernel", "append", "initrd", "dtb", "shim", "fw_cfg", "option-rom", "L", "seed",
    # disks: images are exchanged by the restore
    "drive", "blockdev", "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "sd", "mtdblock",
    "pflash",
    # how QEMU behaves
    "name", "k", "nographic", "S", "no-reboot", "no-shutdown", "only-migratable", "action",
    "compat", "overcommit", "sandbox", "run-with", "runas", "msg", "d", "dfilter", "echr", "mon",
    "no-user-config", "singlestep", "async-teardown", "perfmap", "jitdump", "enable-sync-profile",
})  # fmt: skip
"""Options that name nothing of the host that two QEMUs could not both have."""


# --- character devices ---------------------------------------------------------------------------

_LABELS = {
    "serial": "serial", "parallel": "parallel", "debugcon": "debugcon", "monitor": "compat_monitor",
    "qmp": "compat_monitor", "qmp-pretty": "compat_monitor",
}  # fmt: skip
_SHORT = {
    "unix": ("socket", "path"), "tcp": ("socket", ""), "telnet": ("socket", ""),
    "file": ("file", "path"), "pty": ("pty", "path"),
}  # fmt: skip
"""Prefix of a short form (chardev/char.c, qemu_chr_parse_compat) -> backend, key of the rest."""

_HARMLESS_BACKENDS = frozenset({"null", "none", "vc", "ringbuf", "memory", "msmouse", "wctablet",
                                "testdev", "stdio", "chardev", "mon:stdio", ""})  # fmt: skip
_SERIAL_DRIVERS = frozenset({"isa-serial", "pci-serial"})
"""Devices whose chardev can be changed while they run (hw/char/serial*.c)."""


def _short_form(found: _Argument) -> None:
    """A character device in the short form: `unix:PATH,server=on`."""
    text = found.given.text
    backend, _, rest = text.removeprefix("mon:").partition(":")
    if text.startswith("mon:") and backend in _SHORT:
        found.unshared.append("a port with a monitor in it cannot be changed while QEMU runs")
    elif backend in _SHORT:
        kind, key = _SHORT[backend]
        keys = dict(parse(rest, key or "address"))
        if not key:
            keys["host"], _, keys["port"] = keys.pop("address", "").rpartition(":")
            keys[backend] = "on"
        _backend(found, kind, keys, found.label())
    elif backend not in _HARMLESS_BACKENDS:
        found.unshared.append(f"a port on {text!r} serves one QEMU")


def _chardev(found: _Argument) -> None:
    keys = settings(found.given)
    _backend(found, keys.pop("backend", ""), keys, keys.get("id", ""))


def _backend(found: _Argument, kind: str, keys: dict[str, str], label: str) -> None:
    if keys.get("logfile"):
        found.endpoints.append(Endpoint(f"log {keys['logfile']}", _APPENDED))
        keys["logappend"] = "on"
        _rewrite(found, kind, keys, label)
    if (reader := _BACKENDS.get(kind)) is not None:
        reader(found, keys, label)
    elif kind not in _HARMLESS_BACKENDS:
        found.unshared.append(f"a character device of the kind {kind!r} serves one QEMU")


def _rewrite(found: _Argument, kind: str, keys: Mapping[str, str], label: str) -> None:
    """Start the second QEMU with the chardev *kind* instead, under the same label."""
    others = {key: value for key, value in keys.items() if key != "id"}
    chardev = Argument("chardev", f"{kind},{unparse({'id': label, **others}.items())}")
    if found.given.option == "chardev":
        found.now = chardev
    else:
        found.now = Argument(found.given.option, f"chardev:{label}")
        found.added = [chardev]


def _pty(found: _Argument, keys: dict[str, str], _: str) -> None:
    if keys.get("path"):
        found.unshared.append("the path of a terminal serves one QEMU")
    how = "a new one is made, of another name; the old one ends"
    found.endpoints.append(Endpoint("pseudo-terminal", how))


_APPENDED = "appended to"


def _log(found: _Argument, keys: dict[str, str], label: str) -> None:
    if keys.get("input-path"):
        found.unshared.append("a file that is read from serves one QEMU")
    found.endpoints.append(Endpoint(f"log {found.path(keys.get('path', ''))}", _APPENDED))
    _rewrite(found, "file", {**keys, "append": "on"}, label)


def _socket(found: _Argument, keys: dict[str, str], label: str) -> None:
    if keys.get("server", "off") not in {"on", "yes", "true", "y", "server"}:
        found.unshared.append("what it connects to would see two QEMUs")
    elif "path" in keys and keys.get("abstract", "off") == "off":
        _unix_socket(found, keys, label)
    elif "port" in keys and not keys.keys() & {"tls-creds", "to", "fd"}:
        _tcp_port(found, keys, label)
    else:
        found.unshared.append("such a socket cannot be handed over")


def _unix_socket(found: _Argument, keys: dict[str, str], label: str) -> None:
    path = found.path(keys["path"])
    if not _renamed(found, path):
        return
    _rewrite(found, "socket", {**keys, "path": path + NEXT}, label)


def _renamed(found: _Argument, path: str) -> bool:
    """Hand a unix socket over by renaming; whether its path leaves room for that."""
    if len((path + NEXT).encode()) > LONGEST_SOCKET_PATH:
        found.unshared.append(f"the path {path} is too long for a second socket beside it")
        return False
    forth, back = exchange(path)
    found.endpoints.append(Endpoint(f"unix socket {path}", "renamed into its place", forth, back))
    return True


def _tcp_port(found: _Argument, keys: dict[str, str], label: str) -> None:
    if keys.get("mux", "off") != "off" or not _serves_a_serial(found, label):
        found.unshared.append("only a serial port can be moved to another socket")
        return
    given = {"host": keys.get("host", "").strip("[]"), "port": keys["port"]}
    modes = {mode: True for mode in ("telnet", "tn3270", "websocket") if keys.get(mode) == "on"}
    data = {"addr": {"type": "inet", "data": given}, "server": True, "wait": False, **modes}
    here, nowhere = _changed(label, "socket", data), _changed(label, "null", {})
    forth = (Tell("old", *nowhere), Tell("new", *here))
    what = f"TCP port {keys['port']} (of {label})"
    found.endpoints.append(Endpoint(what, _MOVED, forth, (Tell("old", *here),)))
    _rewrite(found, "null", {}, label)


_MOVED = "closed by the one, opened by the other; who is connected must connect again"


def _changed(label: str, kind: str, data: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "chardev-change", {"id": label, "backend": {"type": kind, "data": data}}


def _serves_a_serial(found: _Argument, label: str) -> bool:
    if found.given.option == "serial":
        return True
    devices = [settings(each) for each in found.command.arguments if each.option == "device"]
    drivers = {each.get("driver", "") for each in devices if each.get("chardev") == label}
    is_serial = f"chardev:{label}" in found.command.values("serial")
    return is_serial or (bool(drivers) and drivers <= _SERIAL_DRIVERS)


_BACKENDS: Mapping[str, Callable[[_Argument, dict[str, str], str], None]] = {
    "socket": _socket,
    "file": _log,
    "pty": _pty,
}


# --- networks, displays, and the rest ------------------------------------------------------------


def _netdev(found: _Argument) -> None:
    given = found.given
    pairs = _pairs(given)
    kind = next((value for key, value in pairs if key == "type"), "")
    if kind not in _HARMLESS_NETS and kind != "user":
        found.unshared.append(f"a network of the kind {kind!r} serves one QEMU")
    if any(key.startswith("hostfwd.") for key, _ in pairs):
        found.unshared.append("forwarded ports are handed over only where they are not JSON")
    rules = [value for key, value in pairs if key == "hostfwd"]
    if not rules:
        return
    name = f"{settings(given).get('id', '')} " if given.option == "netdev" else ""
    if not name and _user_nets(found.command) > 1:
        found.unshared.append("a port is forwarded to one of several networks without an id")
    found.endpoints += [_forwarding(name, rule) for rule in rules]
    kept = [(key, value) for key, value in pairs if key != "hostfwd"]
    found.now = Argument(given.option, unparse(kept))


_HARMLESS_NETS = frozenset({"none", "nic", "hubport"})


def _pairs(argument: Argument) -> list[tuple[str, str]]:
    if argument.text.startswith("{"):
        return list(settings(argument).items())
    return list(parse(argument.text, IMPLIED[argument.option]))


def _user_nets(command: CommandLine) -> int:
    nets = [each for each in command.arguments if each.option in {"netdev", "nic", "net"}]
    return sum(settings(each).get("type") == "user" for each in nets)


def _forwarding(name: str, rule: str) -> Endpoint:
    """A rule is `[tcp|udp]:[address]:port-[address]:port` (net/slirp.c, slirp_hostfwd)."""
    host = rule.partition("-")[0]
    port = host.rpartition(":")[2]
    opened = {"command-line": f"hostfwd_add {name}{rule}"}
    closed = {"command-line": f"hostfwd_remove {name}{host}"}
    hmp = "human-monitor-command"
    return Endpoint(
        f"port {port} ({rule} forwarded)",
        _MOVED,
        (Tell("old", hmp, closed), Tell("new", hmp, opened)),
        (Tell("old", hmp, opened),),
    )


def _vnc(found: _Argument) -> None:
    address, *others = parse(found.given.text, "vnc")
    keys = dict(others)
    if address[1] == "none":
        return
    host, colon, display = address[1].rpartition(":")
    if (
        address[0] != "vnc"
        or keys.keys() & {"websocket", "to", "id", "reverse", "password"}
        or not colon
    ):
        found.unshared.append("only VNC on one display, host:N or unix:PATH, can be handed over")
        return
    if host == "unix":
        path = found.path(display)
        if _renamed(found, path):
            found.now = _at(f"unix:{path}{NEXT}", others)
        return
    port = str(5900 + int(display)) if display.isdigit() else ""
    server = {"type": "inet", "host": host.strip("[]"), "port": port}
    here = ("display-update", {"type": "vnc", "addresses": [server]})
    nowhere = ("display-update", {"type": "vnc", "addresses": []})
    forth = (Tell("old", *nowhere), Tell("new", *here))
    found.endpoints.append(Endpoint(f"TCP port {port} (VNC)", _MOVED, forth, (Tell("old", *here),)))
    found.now = _at(f"unix:{found.aside}/vnc{NEXT}", others)


def _at(address: str, others: list[tuple[str, str]]) -> Argument:
    text = unparse([("vnc", address), *others])
    return Argument("vnc", text.removeprefix("vnc="))


def _display(found: _Argument) -> None:
    kind = settings(found.given).get("type", "")
    if kind not in _HARMLESS_DISPLAYS:
        found.unshared.append(f"a display of the kind {kind!r} serves one QEMU")


_HARMLESS_DISPLAYS = frozenset({"none", "gtk", "sdl", "cocoa", "egl-headless"})


def _pidfile(found: _Argument) -> None:
    path = found.path(found.given.text)
    how = "the other pid is written into it"
    acts = ((WritePid("new", path),), (WritePid("old", path),))
    found.endpoints.append(Endpoint(f"pidfile {path}", how, *acts))
    found.is_left_out = True


def _device(found: _Argument) -> None:
    driver = settings(found.given).get("driver", "")
    if driver.startswith(_UNSHARED_DEVICES):
        found.unshared.append("what is behind the device serves one QEMU")


_UNSHARED_DEVICES = ("vhost-", "vfio-", "ivshmem-", "usb-host", "usb-redir", "u2f-passthru",
                     "scsi-block", "scsi-generic", "ccid-card-emulated", "igd-")  # fmt: skip


def _object(found: _Argument) -> None:
    keys = settings(found.given)
    kind = keys.get("qom-type", "")
    if kind == "memory-backend-file" and keys.get("share", "off") in {"off", "no", "false", "n"}:
        return
    if kind.startswith(("memory-backend-file", "memory-backend-shm")):
        found.unshared.append("two QEMUs would write to one memory")
    elif not kind.startswith(_HARMLESS_OBJECTS):
        found.unshared.append(f"an object of the kind {kind!r} serves one QEMU")


_HARMLESS_OBJECTS = ("memory-backend-ram", "memory-backend-memfd", "iothread", "secret",
                     "rng-random", "rng-builtin", "throttle-group", "tls-creds-", "authz-",
                     "tls-cipher-suites", "cryptodev-backend-builtin", "thread-context",
                     "main-loop", "can-bus")  # fmt: skip


def _fsdev(found: _Argument) -> None:
    kind = settings(found.given).get("fsdriver", "") or found.given.text.partition(",")[0]
    if kind not in {"local", "synth"}:
        found.unshared.append(f"a file system of the kind {kind!r} serves one QEMU")


def _audio(found: _Argument) -> None:
    kind = settings(found.given).get("driver", "") or found.given.text.partition(",")[0]
    if kind not in _HARMLESS_AUDIO:
        found.unshared.append(f"sound of the kind {kind!r} serves one QEMU")


_HARMLESS_AUDIO = frozenset({"none", "alsa", "coreaudio", "dsound", "jack", "oss", "pa", "pipewire",
                             "sdl", "sndio"})  # fmt: skip


def _trace(found: _Argument) -> None:
    if settings(found.given).get("file"):
        found.unshared.append("the second QEMU would empty the trace")


READERS: Mapping[str, Callable[[_Argument], None]] = {
    **dict.fromkeys(_LABELS, _short_form),
    "chardev": _chardev,
    **dict.fromkeys(("netdev", "nic", "net"), _netdev),
    "vnc": _vnc,
    "display": _display,
    "pidfile": _pidfile,
    "device": _device,
    "object": _object,
    **dict.fromkeys(("fsdev", "virtfs"), _fsdev),
    **dict.fromkeys(("audiodev", "audio"), _audio),
    "trace": _trace,
}
"""Option -> who looks at it."""


def acts(endpoints: tuple[Endpoint, ...]) -> tuple[tuple[Act, ...], tuple[Act, ...]]:
    """All that hands the endpoints over, in order, and all that hands them back, newest first."""
    forth = (act for endpoint in endpoints for act in endpoint.forth)
    back = (act for endpoint in reversed(endpoints) for act in endpoint.back)
    return tuple(forth), tuple(back)
