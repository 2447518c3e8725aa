"""QEMU's own client library talks to a session as it talks to QEMU."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient
from test_qmp_server import GREETING

from calotype.qmp.server import Answer, Command, Server


def carried_out(server: Server, command: Command) -> bytes:
    """What a service with two commands says; `tell` sends an event first."""
    match command.name:
        case "echo":
            return server.answer(command, command.arguments)
        case "tell":
            return server.event("TOLD", {"by": "tell"}, 1_000_001) + server.answer(command, {})
    desc = f"The command {command.name} has not been found"
    return server.refuse(command, "CommandNotFound", desc)


async def serve(connection: socket.socket) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    server = Server(GREETING)
    writer.write(server.greeting())
    with contextlib.closing(writer):
        while data := await reader.read(7):
            for request in server.receive(data):
                match request:
                    case Answer(line):
                        writer.write(line)
                    case Command():
                        writer.write(carried_out(server, request))


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[QMPClient]:
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(serve(ours))
    client = QMPClient("oracle")
    await client.connect(theirs)
    try:
        yield client
    finally:
        await client.disconnect()
        await serving


async def test_it_negotiates_commands_and_hears_events() -> None:
    arguments: dict[str, Any] = {"a": [1, 2.5, None, "é😀\x00\n"], "b": {"c": True}}
    async with connected() as client:
        assert client.greeting is not None
        assert client.greeting._raw == GREETING
        assert await client.execute("echo", arguments) == arguments
        with pytest.raises(ExecuteError, match="The command stop has not been found") as refused:
            await client.execute("stop")
        assert refused.value.error_class == "CommandNotFound"
        listener = EventListener("TOLD")
        with client.listen(listener):
            assert await client.execute("tell") == {}
            event = await listener.get()
        assert event["data"] == {"by": "tell"}
        assert event["timestamp"] == {"seconds": 1, "microseconds": 1}
        answers = await asyncio.gather(*(client.execute("echo", {"n": n}) for n in range(50)))
        assert answers == [{"n": n} for n in range(50)]
