"""`calotype serve`: QMP for any number of clients, in front of a VM or of any QEMU's monitor."""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path

import click

from calotype.cli import completing
from calotype.cli.output import Settings, common, run_async, say_meanwhile
from calotype.cli.place import working_directory
from calotype.errors import ConflictError, HostError, RequestError

_TCP = "tcp:"
_QUEUE = 64


@click.command("serve")
@click.argument("name", required=False, shell_complete=completing.vm_names)
@click.option(
    "--upstream",
    metavar="SOCKET",
    help="A QMP monitor of any QEMU, in place of a VM NAME: its own commands alone are served.",
)
@click.option(
    "--qmp",
    required=True,
    metavar="SOCKET",
    help="Where to listen: the path of a unix socket, or tcp:HOST:PORT on loopback.",
)
@common
def command(settings: Settings, name: str | None, upstream: str | None, qmp: str) -> None:
    """Serve QMP to any number of clients, in front of the VM NAME, until its QEMU ends.

    QEMU's commands and events are passed on, and Calotype's are served beside: see docs/qmp.md.
    """
    if (name is None) == (upstream is None):
        raise RequestError("which QEMU?", "give either NAME, or --upstream with a monitor's socket")
    with _listening(qmp) as (listener, where):
        run_async(_serve(settings, name, upstream, listener, where))


async def _serve(
    settings: Settings,
    name: str | None,
    upstream: str | None,
    listener: socket.socket,
    where: str,
) -> None:
    from calotype.service.serving import Vm, serving  # noqa: PLC0415
    from calotype.service.work import Work  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    vm = None if name is None else Vm(Store(settings.store_path, make=False), name)
    path = _absolute(upstream) if vm is None else vm.upstream
    with Work() as work:
        async with serving(path, vm, listener, work) as running:
            say_meanwhile(settings, {"listening": where}, [f"listening on {where}"])
            with contextlib.suppress(asyncio.CancelledError):  # how one ends a service
                await running


def _absolute(path: str | None) -> Path:
    assert path is not None
    return Path(path) if Path(path).is_absolute() else working_directory() / path


@contextlib.contextmanager
def _listening(qmp: str) -> Iterator[tuple[socket.socket, str]]:
    """A socket that listens, and where."""
    if qmp.startswith(_TCP):
        with _listening_tcp(qmp) as listener:
            host, port = listener.getsockname()[:2]
            yield listener, f"{_TCP}{host}:{port}"
        return
    if not qmp:
        raise RequestError("--qmp names no socket", "give a path, or tcp:127.0.0.1:PORT")
    path = _absolute(qmp)
    _refuse_taken(path)
    from calotype.qemu.monitor import listen_socket  # noqa: PLC0415

    listener = listen_socket(path)
    listener.listen(_QUEUE)
    made = path.stat()
    try:
        with listener:
            yield listener, str(path)
    finally:
        with contextlib.suppress(OSError):
            if (now := path.stat()).st_ino == made.st_ino and now.st_dev == made.st_dev:
                path.unlink()


def _listening_tcp(qmp: str) -> socket.socket:
    host, _, port = qmp.removeprefix(_TCP).rpartition(":")
    host = host.strip("[]")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        number = int(port)
    except ValueError as error:
        raise RequestError(f"--qmp {qmp!r} is no address", "write tcp:127.0.0.1:PORT") from error
    if not address.is_loopback:
        raise RequestError(
            f"--qmp {qmp!r} is not on loopback: whoever reaches a monitor owns the host's user",
            "listen on tcp:127.0.0.1:PORT, and forward it through ssh",
        )
    try:
        return socket.create_server(
            (str(address), number),
            family=socket.AF_INET6 if ":" in str(address) else socket.AF_INET,
        )
    except (OSError, OverflowError) as error:
        raise HostError(f"cannot listen on {qmp}: {error}", "choose another port") from error


def _refuse_taken(path: Path) -> None:
    """Refuse a path at which something is, but for a socket that nobody listens on any more."""
    from calotype.qemu.monitor import open_socket  # noqa: PLC0415

    if not path.exists() and not path.is_symlink():
        return
    if not path.is_socket():
        raise HostError(f"{path} is there, and is no socket", "name another path for --qmp")
    try:
        open_socket(path).close()
    except ConnectionRefusedError:
        return
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}", "name another path for --qmp") from error
    raise ConflictError(f"somebody listens on {path} already", "name another path for --qmp")
