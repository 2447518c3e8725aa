"""What the effects of an operation act on: one VM, its QEMU, and the store that keeps both.

An operation that is carried out knows more (a take has its plan, a restore its manifest) and is a
subclass. What undoes a step must do with what is here: it also runs after the process that had
begun the step is dead, and all that is left of it is its journal.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import datetime
from typing import NamedTuple

from calotype.engine import launch
from calotype.engine.progress import Progress, silent
from calotype.errors import CalotypeError
from calotype.model.vm import Process, VmRecord
from calotype.plan.steps import Step
from calotype.qemu.freezing import Freeze
from calotype.qemu.monitor import Monitor
from calotype.store.store import Store


class World:
    """One VM, while one operation changes it.

    Args:
        store: Where it is kept.
        record: The VM's record from before the operation.
        began_with: The QEMU that ran the VM when the operation began.
        progress: Told how far it is.
        monitor: A connection that is open for the whole of it, if one is.
    """

    def __init__(
        self,
        store: Store,
        record: VmRecord,
        began_with: Process | None = None,
        progress: Progress = silent,
        monitor: Monitor | None = None,
    ) -> None:
        self.store = store
        self.record = record
        self.began_with = began_with
        self.progress = progress
        self.began = asyncio.get_running_loop().time()
        self.phases_ms: dict[str, float] = {}
        self.is_settled = False
        """Whether the run state is known to be what it was: then a pause need not be ended."""
        self.freeze: Freeze | None = None
        """The guest's file systems while we hold them frozen."""
        self.is_thawed = False
        """Whether they are known not to be frozen any more."""
        self.let_run_at: datetime | None = None
        """When a guest was let run."""
        self.warnings: list[str] = []
        """What did not work and is no failure."""
        self._monitor = monitor
        self._silence: CalotypeError | None = None

    @property
    def qemu(self) -> Process | None:
        """The QEMU that runs the VM now."""
        return launch.is_running(self.store, self.record)

    @contextlib.asynccontextmanager
    async def controlling(self) -> AsyncIterator[Monitor]:
        """A connection to act through: the one that is open, else a new one.

        A QEMU that did not answer once is not waited for again by what follows.
        """
        if self._monitor is not None and not self._monitor.is_handed_over:
            yield self._monitor
            return
        if self._silence is not None:
            raise self._silence
        async with contextlib.AsyncExitStack() as stack:
            try:
                monitor = await stack.enter_async_context(
                    launch.controlling(self.store, self.record)
                )
            except CalotypeError as error:
                self._silence = error
                raise
            yield monitor


class Effect(NamedTuple):
    """What a kind of step does, and what undoes it.

    *apply* is called once, and again when an operation that was cut off is finished. *revert* must
    be right for a step that has not happened, has half happened, or is done; QEMU and the files
    say which. A step without it needs no undoing.
    """

    apply: Callable[..., Awaitable[None]]
    revert: Callable[..., Awaitable[None]] | None = None


Effects = Mapping[type[Step], Effect]
