"""`calotype console`: the guest's serial console, on this terminal.

A console serves one at a time, so the one who has it holds a lock; QEMU itself would let a second
one wait for ever without a word.
"""

import contextlib
import fcntl
import functools
import os
import select
import shlex
import socket
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from calotype.cli.output import Settings, common, say, vm_name

ESCAPE = b"\x1d"
"""Ctrl-], as telnet and virsh have it."""


@click.command("console")
@vm_name
@common
def command(settings: Settings, name: str) -> None:
    """Connect to the console of the VM NAME; Ctrl-] ends it.

    Without a terminal, standard input is sent, and what the guest says until input ends is printed;
    with --json it is printed as one object, in the end.
    """
    from calotype.engine import launch  # noqa: PLC0415
    from calotype.errors import ConflictError  # noqa: PLC0415
    from calotype.qemu.monitor import open_socket  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    record = store.find(name)
    qemu = launch.is_running(store, record)
    if qemu is None:
        raise ConflictError(
            f"the VM {name!r} does not run", f"`calotype start {shlex.quote(name)}`"
        )
    socket_path = launch.console_socket(store, record, qemu)
    if socket_path is None:
        raise ConflictError(
            f"{name!r} has no console of ours",
            "its command line sends the serial port elsewhere, or has none",
        )
    alone = _alone(store.folder(record.id) / "console.lock", name, socket_path)
    with alone, open_socket(socket_path) as guest, _raw_terminal():
        if settings.as_json:
            said: list[bytes] = []
            _talk(guest, sys.stdin.fileno(), said.append)
        else:
            _talk(guest, sys.stdin.fileno(), functools.partial(os.write, sys.stdout.fileno()))
    if settings.as_json:
        say(settings, {"vm": name, "text": b"".join(said).decode(errors="replace")}, [])


@contextlib.contextmanager
def _alone(path: Path, name: str, console: Path) -> Iterator[None]:
    from calotype.errors import ConflictError  # noqa: PLC0415
    from calotype.qemu.peers import clients  # noqa: PLC0415

    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError(
                f"the console of {name!r} is in use",
                f"`calotype logs -f {shlex.quote(name)}` may be enough",
            ) from error
        if others := clients(console):
            raise ConflictError(
                f"the console of {name!r} is in use by process {others[0]}", "end that one first"
            )
        yield


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Pass every key to the guest, if there is a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    click.echo("connected; Ctrl-] ends it", err=True)
    try:
        tty.setraw(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        click.echo("", err=True)


def _talk(guest: socket.socket, keyboard: int, screen: Callable[[bytes], object]) -> None:
    """Carry bytes both ways until either side ends."""
    is_terminal = os.isatty(keyboard)
    while True:
        ready, _, _ = select.select([guest.fileno(), keyboard], [], [])
        if guest.fileno() in ready:
            said = guest.recv(1 << 16)
            if not said:
                return
            screen(said)
        if keyboard in ready:
            typed = os.read(keyboard, 1 << 12)
            if not typed or (is_terminal and ESCAPE in typed):
                guest.sendall(typed.partition(ESCAPE)[0])
                return
            guest.sendall(typed)
