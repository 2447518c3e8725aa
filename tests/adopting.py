"""What the tests of adopting share: a QEMU that is started by hand, outside of Calotype.

It has two monitors. `qmp.sock` is the one that it is adopted by, and the only one that Calotype
ever uses; through `watch.sock` the tests see what is going on while the other is held.
"""

import asyncio
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calotype.qemu import process
from calotype.qemu.monitor import connect, open_socket
from calotype.testing.machine import wait
from calotype.testing.witness_vm import WitnessVm
from crashing import Subject

CALOTYPE = Path(sys.executable).parent / "calotype"


def server(name: str) -> str:
    """A socket that QEMU makes and does not wait at."""
    return f"unix:{name},server=on,wait=off"


class ByHand(Subject):
    """A machine whose QEMU its user starts; `hand` is that process."""

    hand: "subprocess.Popen[bytes]"

    def start_by_hand(
        self, *more: str, argv: Sequence[str] = (), descriptors: Sequence[int] = ()
    ) -> None:
        """Start QEMU, with *more* words, and wait until its monitors are there."""
        command = [*(argv or self.argv()), *self.monitors(), *more]
        if hasattr(self, "hand"):
            self.hand.poll()  # one that Calotype has ended is nobody's child any more
        for path in self.folder.glob("*.sock"):
            path.unlink()
        with (self.folder / "said.log").open("ab") as said:
            self.hand = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, "PWD": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=descriptors,
            )
        wait(self._is_up, "QEMU's monitors")

    def _is_up(self) -> bool:
        """Whether QEMU answers: the socket is there before the machine is."""
        assert self.hand.poll() in (None, 0), (self.folder / "said.log").read_text()
        try:
            with open_socket(self.folder / "watch.sock") as monitor:
                monitor.settimeout(30.0)
                return bool(monitor.recv(4096))
        except OSError:
            return False

    def monitors(self) -> list[str]:
        """The words for the two monitors; the one to watch is made last."""
        return ["-qmp", server("qmp.sock"), "-qmp", server("watch.sock")]

    def run(self) -> None:
        """Start it by hand, and adopt it."""
        self.start_by_hand()
        self.adopt()

    def adopt(self, socket: str = "qmp.sock") -> dict[str, Any]:
        """Adopt it; what is told of that."""
        return self.calotype("adopt", self.name, "--qmp", socket)

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Send one QMP command past the monitor that Calotype has; ours, once Calotype runs it."""
        if not self.is_by_hand:
            return super().qmp(command, **arguments)

        async def send() -> Any:
            async with connect(self.folder / "watch.sock") as monitor:
                return await monitor.execute(command, **arguments)

        return asyncio.run(send())

    @property
    def is_by_hand(self) -> bool:
        """Whether the QEMU that was started by hand runs."""
        return hasattr(self, "hand") and self.hand.poll() is None

    def end_by_hand(self) -> None:
        """End it as its user would, with Ctrl-C."""
        self.hand.send_signal(signal.SIGINT)
        self.hand.wait(60)

    def clean_up(self) -> None:
        """End the QEMU that was started by hand, by its pid, and whatever Calotype started."""
        if hasattr(self, "hand"):
            self.hand.kill()
            self.hand.wait()
        pidfile = self.folder / "daemon.pid"
        if pidfile.exists() and process.start_ticks(pid := int(pidfile.read_text())):
            os.kill(pid, signal.SIGKILL)
        super().clean_up()

    def shell(self, line: str, expected: int = 0) -> str:
        """Give one line to the installed command, as a user would; what it said."""
        done = subprocess.run(
            [CALOTYPE, *shlex.split(line)],
            cwd=self.folder,
            env={**os.environ, "CALOTYPE_STORE": str(self.store)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == expected, done.stdout + done.stderr
        return done.stdout if expected == 0 else done.stderr


class WitnessByHand(ByHand, WitnessVm):
    """A witness that its user starts; before it is restored it speaks to `said.log`."""

    def rounds_by_hand(self, count: int) -> None:
        """Wait until it told of *count* rounds more, of those that it tells of."""
        said = self.folder / "said.log"
        before = said.read_bytes().count(b"TICK n=")
        wait(lambda: said.read_bytes().count(b"TICK n=") >= before + count, "rounds")
