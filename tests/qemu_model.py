"""A QEMU reduced to what matters to the instant: who may do what, in which order, and what is seen.

It has a guest that advances whenever it runs, a main loop that serves one command after another, a
migration thread, and one wire on which replies and events travel in the order in which they were
sent. It knows when RAM and disks were really taken. Who moves next is the test's business.

From QEMU's source (migration/migration.c, system/cpus.c):

* The main loop and the migration thread exclude each other where QEMU's lock is held: a background
  save stops the VM, saves the devices and protects RAM in one go. It is `active` before that.
* QEMU's own resume is a bottom half of the main loop. Pages may be counted, and one command may be
  served, before it runs.
* STOP is sent before a drain, the reply to `stop` after it. Between the two the thread may move.
* The reply to `migrate` may be sent when QEMU has resumed the VM already.
* A cancelled save goes on until its thread notices, stopping and resuming the VM on its way.
* `query-migrate` tells of the last save, if there was one, until the next begins.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from calotype.plan.window import Event, Failure, Input, Reply

ALL_PAGES = 6
LAG = 10
BUSY = ("setup", "active", "cancelling")


class Refused(Exception):  # noqa: N818 - as QEMU's answer
    """QEMU answers a command with an error."""


class QemuModel:
    """A QEMU and its guest, moved one small step at a time."""

    def __init__(self, *, is_background: bool, gives_back: bool, running: bool) -> None:
        self.is_background = is_background
        self.gives_back = gives_back
        """Whether it gives a VM back in the run state that it found (9.0 and newer)."""
        self.running = running
        self.ran_before = running
        self.rounds = 0
        """How far the guest has come."""
        self.now_us = 0
        self.ram: int | None = None
        self.disks: int | None = None
        self.taken_us: list[int] = []
        self.status = "none"
        self.pages = 0
        self.commands: deque[str] = deque()
        self.wire: deque[Input] = deque()
        self.stopped_by_command = False
        self.continued_by_command = False
        self.refuse = False
        """Whether the next command is refused."""
        self.reply_lags = False
        """Whether the main loop does something else before it sends the next reply."""
        self.overtake = False
        """Whether the next bottom half is overtaken by a command."""
        self.save_fails = False
        """Whether the save fails at its next step."""
        self._inactive = False
        self._thread: Iterator[None] = iter(())
        self._bottom_halves: list[Callable[[], None]] = []
        self._reply: Input | None = None
        self._lag = 0

    # --- who moves -------------------------------------------------------------------------------

    def move(self, actor: str, steps: int = 1) -> None:
        """Let time pass, and the main loop or the migration thread make some steps."""
        for _ in range(steps):
            self.now_us += 1
            self.rounds += self.running
            if actor == "main":
                self._serve()
            elif actor == "thread":
                next(self._thread, None)

    def _serve(self) -> None:
        if self._reply is not None and self._lag:
            self._lag -= 1
            self._run_bottom_halves()
        elif self._reply is not None:
            self.wire.append(self._reply)
            self._reply = None
        elif self._bottom_halves and not (self.overtake and self.commands):
            self._run_bottom_halves()
        elif self.commands:
            self.overtake = self.overtake and not self._bottom_halves
            self._lag, self.reply_lags = LAG * self.reply_lags, False
            command = self.commands.popleft()
            try:
                self._reply = Reply(command, self._execute(command))
            except Refused as refused:
                self._reply = Failure(command, str(refused))

    def _run_bottom_halves(self) -> None:
        for bottom_half in self._bottom_halves:
            bottom_half()
        self._bottom_halves.clear()

    # --- the guest -------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop the vCPUs, as a command, a stranger or QEMU itself does."""
        if self.running:
            self.running = False
            self._tell("STOP")

    def resume(self) -> None:
        """Let the vCPUs run; a guest that runs comes on."""
        if not self.running:
            self._tell("RESUME")
            self.running = True
            self.rounds += 1
        self._inactive = False

    def _tell(self, event: str) -> None:
        self.now_us += 1
        self.wire.append(Event(event, self.now_us))

    # --- commands --------------------------------------------------------------------------------

    def _execute(self, command: str) -> Any:
        if self.refuse:
            self.refuse = False
            raise Refused(f"{command} is refused")
        return {
            "stop": self._stop,
            "cont": self._cont,
            "migrate": self._migrate,
            "migrate_cancel": self.cancel,
            "transaction": self._transact,
            "query-migrate": self._query_migrate,
            "query-status": self._query_status,
        }[command]()

    def _stop(self) -> None:
        self.stopped_by_command = self.stopped_by_command or self.running
        self.pause()

    def _cont(self) -> None:
        self.continued_by_command = self.continued_by_command or not self.running
        self.resume()

    def _migrate(self) -> None:
        if self.status in BUSY:
            raise Refused("There's a migration process in progress")
        self.status, self.pages = "setup", 0
        self._thread = self._save_in_background() if self.is_background else self._save()

    def _transact(self) -> None:
        if self._inactive:
            raise Refused("node is inactive")
        self.disks = self.rounds
        self.taken_us.append(self.now_us)

    def _query_migrate(self) -> dict[str, Any]:
        if self.status in ("none", "setup"):
            return {} if self.status == "none" else {"status": "setup"}
        zero_pages = (self.pages + 1) // 2
        ram = {"normal": self.pages - zero_pages, "duplicate": zero_pages}
        return {"status": self.status, "ram": ram}

    def _query_status(self) -> dict[str, Any]:
        return {"running": self.running, "status": "running" if self.running else "paused"}

    # --- saves -----------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Ask the thread to end; it may make some steps yet."""
        self._turn("setup", "cancelling")
        self._turn("active", "cancelling")

    def _turn(self, before: str, after: str) -> None:
        if self.status == before:
            self.status = after

    def _take_ram(self) -> None:
        self.ram = self.rounds
        self.taken_us.append(self.now_us)

    def _fails(self) -> bool:
        if self.save_fails:
            self._turn("active", "failed")
            self._bottom_halves.append(self._clean_up)
        return self.save_fails

    def _clean_up(self) -> None:
        self._turn("cancelling", "cancelled")

    def _save_in_background(self) -> Iterator[None]:
        yield
        self._turn("setup", "active")
        yield
        found_running = self.running
        self.pause()
        if self._fails():
            return  # and the VM stays stopped
        self._take_ram()
        if found_running or not self.gives_back:
            self._bottom_halves.append(self.resume)
        yield
        while self.status == "active" and self.pages < ALL_PAGES:
            self.pages += 1
            yield
            if self._fails():
                return
        self._turn("active", "completed")
        self._bottom_halves.append(self._clean_up)

    def _save(self) -> Iterator[None]:
        """An ordinary migration: pages are counted from the start, RAM is taken at the end."""
        yield
        self._turn("setup", "active")
        while self.status == "active" and self.pages < ALL_PAGES:
            yield
            if self._fails():
                return
            self.pages += 1
        if self.status == "active":
            self.pause()
            self._take_ram()
            self._inactive = True
            self.status = "completed"
        self._bottom_halves.append(self._clean_up)
