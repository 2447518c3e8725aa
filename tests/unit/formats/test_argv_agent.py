"""Where the guest's agent is reached, as the command line says."""

import pytest

from calotype.errors import CommandLineError
from calotype.formats.argv import CommandLine, agent_socket

JSON = '{"driver":"virtserialport","chardev":"c","name":"org.qemu.guest_agent.0"}'
SOCKET = "-chardev socket,id=c,path=a.sock,server=on,wait=off"
OTHER = "-chardev pty,id=p -device virtserialport,chardev=p,name=other"
NAMED = "name=org.qemu.guest_agent.0"


def found(text: str) -> str:
    return agent_socket(CommandLine.parse(["qemu", *text.split()]), "/vm")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (f"{SOCKET} -device virtserialport,chardev=c,{NAMED}", "/vm/a.sock"),
        (f"-device virtserialport,{NAMED},chardev=c {SOCKET}", "/vm/a.sock"),
        (f"{SOCKET.replace('a.sock', '/run/a.sock')} -device virtserialport,chardev=c,{NAMED}",
         "/run/a.sock"),
        (f"{SOCKET.replace('server=on', 'server')} -device virtserialport,chardev=c,{NAMED}",
         "/vm/a.sock"),
        (f"{SOCKET} -device {JSON}", "/vm/a.sock"),
        (f"{SOCKET.replace('id=c', 'id=qga0')} -device isa-serial,chardev=qga0", "/vm/a.sock"),
        (f"{SOCKET} -device isa-serial,chardev=c,id=org.qemu.guest_agent.0", "/vm/a.sock"),
        (f"{OTHER} {SOCKET} -device virtserialport,chardev=c,{NAMED}", "/vm/a.sock"),
    ],
)  # fmt: skip
def test_the_socket_is_found(text: str, path: str) -> None:
    assert found(text) == path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the VM has no port for a guest agent"),
        (SOCKET, "no port"),
        (f"{SOCKET} -device virtserialport,chardev=c,name=other", "no port"),
        (f"{SOCKET} -device isa-serial,chardev=c", "no port"),
        (f"-device virtserialport,chardev=c,{NAMED}", "there is no -chardev with the id 'c'"),
        (f"-device virtserialport,{NAMED}", "there is no -chardev with the id ''"),
        (f"-chardev pty,id=c -device virtserialport,chardev=c,{NAMED}", "a unix socket only"),
        (f"-chardev socket,id=c,host=h,port=1,server=on -device virtserialport,chardev=c,{NAMED}",
         "a unix socket only"),
        (f"-chardev socket,id=c,path=a -device virtserialport,chardev=c,{NAMED}",
         "connects to another program"),
        (f"{SOCKET},abstract=on -device virtserialport,chardev=c,{NAMED}", "with a path only"),
    ],
)  # fmt: skip
def test_why_there_is_none_is_said(text: str, problem: str) -> None:
    with pytest.raises(CommandLineError, match=problem) as raised:
        found(text)
    assert "-chardev socket" in raised.value.remedy
