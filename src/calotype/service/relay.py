"""The relay: any number of clients in front of one QEMU; who said what, whose turn, whose answer.

No I/O happens here, but that a descriptor which nobody takes is closed: lines come in by `heard`
and `qemu_said`, and go out through what a client or QEMU is reached by (`Line`).

**Turns.** QEMU answers a client's commands one after the other, so each client has one command
under way, and the rest waits in its queue. That is fair besides: who sends ten thousand commands at
once has one of them in QEMU, like everybody else. Who has more than a few waiting is not read from
(monitor/qmp.c, QMP_REQ_QUEUE_LEN_MAX); what is out-of-band does not wait.

**Ids.** QEMU is told ids of ours; the client hears its own again. An answer is not decoded on its
way, unless we have something to add (`Merge`).

**Descriptors.** Those that come belong to the next command of their client that takes one. QEMU's
socket keeps those that came last until a command takes them, whichever that is. So one command
that takes descriptors is under way at a time, and one that failed without having taken its own is
followed by two of ours that take and close it: the next client must not get it.

**Without QEMU** (it is being replaced, or gone) commands wait; those that were under way are
refused, because nobody knows whether they were carried out.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from calotype.qmp.client import Client, Event, Greeting, Refused, Returned, Unreadable
from calotype.qmp.decoder import Limits
from calotype.qmp.server import OUT_OF_BAND, Answer, Command, Server

MOST_WAITING = 8
"""How many commands of a client wait before it is not read from any more, as in QEMU."""
LIMITS = Limits(document_bytes=1 << 20)
"""What one command may be; QEMU would read a longer one for seconds, and hear nobody else."""
TAKES_DESCRIPTOR = frozenset({"getfd", "add-fd"})
_STALE = "calotype-stale"
WENT_AWAY = "QEMU went away before it answered; whether it carried the command out is not known"

Merge = Callable[[Any], Any]
"""What a value that QEMU returned becomes before the client hears it."""


class Line(Protocol):
    """How a client, or QEMU, is reached."""

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send bytes, with descriptors beside the first."""

    def hold(self) -> None:
        """Let nothing more come for now."""

    def go_on(self) -> None:
        """Let it come again."""

    def end(self) -> None:
        """Hang up once all is sent."""


class Peer:
    """A client: its session, what waits, and the descriptors that came last."""

    def __init__(self, line: Line, session: Server) -> None:
        self.line = line
        self.session = session
        self.waiting: deque[_Waiting] = deque()
        self.is_busy = False
        """A command of its own is under way."""
        self.is_held = False
        self.is_here = True
        self.urgent = 0
        """How many of its out-of-band commands are under way."""
        self.is_finished = False
        """It will send no more, and is hung up on when all is answered."""
        self.descriptors: list[int] = []

    @property
    def is_answered(self) -> bool:
        """Whether nothing is left to be answered."""
        return not self.waiting and not self.is_busy and not self.urgent

    def take_descriptors(self) -> list[int]:
        """Give up what came last."""
        taken, self.descriptors = self.descriptors, []
        return taken


class _Waiting(NamedTuple):
    """A request that is to be carried out, and the descriptors that it came with."""

    request: Command | Answer
    descriptors: tuple[int, ...] = ()


_NO_ANSWER = Refused(None, b"{}")

Told = Callable[[Returned | Refused], object]


class _Sent(NamedTuple):
    """A command that QEMU has, of a client or of ours."""

    peer: Peer | None
    command: Command
    has_descriptor: bool = False
    told: Told | None = None


class Relay:
    """All clients of one QEMU.

    Args:
        greeting: What QEMU said first, as a client is to hear it.
        own: Told of each command; whether it is ours. Then `answer` is called later, once.
        merges: What is added to an answer of QEMU's, by command.
    """

    def __init__(
        self,
        greeting: Mapping[str, Any],
        own: Callable[[Peer, Command], bool],
        merges: Mapping[str, Merge],
    ) -> None:
        self._greeting = greeting
        self._own = own
        self._merges = merges
        self.peers: list[Peer] = []
        self._qemu: Line | None = None
        self._upstream = Client()
        self._sent: dict[int | None, _Sent] = {}
        self._passing: deque[tuple[Peer, Command, tuple[int, ...]]] = deque()
        self._is_passing = False
        self.said_shutdown = False
        """QEMU has told that it ends."""

    # --- clients -------------------------------------------------------------------------------

    def join(self, line: Line) -> Peer:
        """A client has connected; it is to be greeted."""
        peer = Peer(line, Server(self._greeting, LIMITS))
        self.peers.append(peer)
        return peer

    def greet(self, peer: Peer) -> None:
        """Say to a client who we are; it may be gone by then."""
        peer.line.send(peer.session.greeting())

    def leave(self, peer: Peer) -> None:
        """A client is gone; what it had under way is carried out, and nobody hears of it."""
        if peer.is_here:
            peer.is_here = False
            self.peers.remove(peer)
            for each in peer.waiting:
                _close(each.descriptors)
            peer.waiting.clear()
            _close(peer.take_descriptors())

    def heard(self, peer: Peer, data: bytes, descriptors: list[int]) -> None:
        """A client has written *data*, with *descriptors*."""
        if descriptors:
            _close(peer.take_descriptors())
            peer.descriptors = descriptors
        for request in peer.session.receive(data):
            takes = isinstance(request, Command) and request.name in TAKES_DESCRIPTOR
            waiting = _Waiting(request, tuple(peer.take_descriptors()) if takes else ())
            if request.is_out_of_band:
                self._carry_out(peer, waiting)
            else:
                peer.waiting.append(waiting)
        self._next(peer)

    def finish(self, peer: Peer) -> None:
        """A client will send no more: what it has sent is answered."""
        peer.is_finished = True
        self._next(peer)

    def answer(self, peer: Peer, command: Command, line: bytes) -> None:
        """A command is done: its client hears *line*, and has its next turn."""
        if peer.is_here:
            peer.line.send(line)
        if command.is_out_of_band:
            peer.urgent -= 1
        else:
            peer.is_busy = False
        self._next(peer)

    def tell(self, event: str, data: Mapping[str, Any], at_us: int) -> None:
        """Tell all clients of an event of ours."""
        for peer in list(self.peers):
            peer.line.send(peer.session.event(event, data, at_us))

    def _next(self, peer: Peer) -> None:
        while peer.waiting and not peer.is_busy and peer.is_here:
            if self._qemu is None and isinstance(peer.waiting[0].request, Command):
                break
            self._carry_out(peer, peer.waiting.popleft())
        is_full = len(peer.waiting) > MOST_WAITING
        if is_full and not peer.is_held:
            peer.line.hold()
        elif peer.is_held and not is_full:
            peer.line.go_on()
        peer.is_held = is_full
        if peer.is_finished and peer.is_here and peer.is_answered:
            peer.line.end()

    def _carry_out(self, peer: Peer, waiting: _Waiting) -> None:
        request = waiting.request
        if isinstance(request, Answer):
            peer.line.send(request.line)
            return
        if request.is_out_of_band:
            peer.urgent += 1
        else:
            peer.is_busy = True
        if self._own(peer, request):
            return
        if self._qemu is None:  # out-of-band, and nobody to ask
            refused = peer.session.refuse(request, "GenericError", WENT_AWAY)
            _close(waiting.descriptors)
            self.answer(peer, request, refused)
        elif request.name in TAKES_DESCRIPTOR:
            self._passing.append((peer, request, waiting.descriptors))
            self._pass_next()
        else:
            self._forward(peer, request)

    # --- QEMU ----------------------------------------------------------------------------------

    def qemu_here(self, line: Line, session: Client) -> None:
        """QEMU is reached, and has left the negotiation; what waits is carried out."""
        self._qemu, self._upstream = line, session
        self.said_shutdown = False
        for peer in list(self.peers):
            self._next(peer)

    def qemu_said(self, data: bytes) -> None:
        """QEMU has written *data*."""
        for message in self._upstream.receive(data):
            match message:
                case Returned() | Refused():
                    self._returned(message)
                case Event():
                    self.said_shutdown = self.said_shutdown or message.name == "SHUTDOWN"
                    for peer in list(self.peers):
                        peer.line.send(peer.session.event_raw(message.raw))
                case Greeting() | Unreadable():
                    pass

    def qemu_gone(self) -> None:
        """QEMU is not reached any more; what it had is refused, the rest waits."""
        self._qemu = None
        lost, self._sent = list(self._sent.values()), {}
        waiting, self._passing, self._is_passing = list(self._passing), deque(), False
        for sent in lost:
            if sent.told is not None:
                sent.told(_NO_ANSWER)
            if sent.peer is not None:
                self._refuse(sent.peer, sent.command)
        for peer, command, descriptors in waiting:
            _close(descriptors)
            self._refuse(peer, command)

    def hang_up(self) -> None:
        """There will be no QEMU any more: all clients are told, and hung up on."""
        for peer in list(self.peers):
            while peer.waiting:
                request, descriptors = peer.waiting.popleft()
                _close(descriptors)
                if isinstance(request, Answer):
                    peer.line.send(request.line)
                else:
                    peer.line.send(peer.session.refuse(request, "GenericError", WENT_AWAY))
            peer.line.end()

    def _refuse(self, peer: Peer, command: Command) -> None:
        self.answer(peer, command, peer.session.refuse(command, "GenericError", WENT_AWAY))

    def ask(self, name: str, told: Told) -> None:
        """Ask QEMU something of ours; *told* hears the answer, or that there is none."""
        if self._qemu is None:
            told(_NO_ANSWER)
            return
        command = Command(name, {}, None, has_id=False, is_out_of_band=False)
        self._forward(None, command, told=told)

    def _forward(
        self,
        peer: Peer | None,
        command: Command,
        descriptors: Sequence[int] = (),
        told: Told | None = None,
    ) -> None:
        assert self._qemu is not None
        number, line = self._upstream.send(
            command.name, command.arguments, is_out_of_band=command.is_out_of_band
        )
        self._sent[number] = _Sent(peer, command, bool(descriptors), told)
        self._qemu.send(line, descriptors)

    def _pass_next(self) -> None:
        """Send the next command that takes a descriptor, once QEMU is done with the one before."""
        if self._is_passing or not self._passing or self._qemu is None:
            return
        self._is_passing = True
        peer, command, descriptors = self._passing.popleft()
        self._forward(peer, command, descriptors)
        _close(descriptors)

    def _returned(self, message: Returned | Refused) -> None:
        sent = self._sent.pop(message.id, None)
        if sent is None:
            return
        if sent.command.name in TAKES_DESCRIPTOR and sent.peer is not None:
            self._is_passing = False
            if isinstance(message, Refused) and sent.has_descriptor:
                self._drop_stale()
            self._pass_next()
        if sent.told is not None:
            sent.told(message)
        if sent.peer is not None:
            self.answer(sent.peer, sent.command, self._told(sent.peer, sent.command, message))

    def _drop_stale(self) -> None:
        """Take from QEMU's socket the descriptor that a refused command has left there."""
        for name in ("getfd", "closefd"):
            arguments = {"fdname": _STALE}
            self._forward(None, Command(name, arguments, None, has_id=False, is_out_of_band=False))

    def _told(self, peer: Peer, command: Command, message: Returned | Refused) -> bytes:
        if isinstance(message, Refused):
            return peer.session.refuse_raw(command, message.raw)
        merge = self._merges.get(command.name)
        if merge is None:
            return peer.session.answer_raw(command, message.raw)
        return peer.session.answer_raw(command, msgspec.json.encode(merge(message.value())))


def negotiation(session: Client, greeting: Mapping[str, Any]) -> bytes:
    """What QEMU is told first: out-of-band is enabled where it has it."""
    offered = greeting["QMP"]["capabilities"]
    wanted = {"enable": [OUT_OF_BAND]} if OUT_OF_BAND in offered else {}
    return session.send("qmp_capabilities", wanted)[1]


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
