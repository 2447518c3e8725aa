"""What the host lets a QEMU do, and what each QEMU can do: asked of it, never told by its version.

A QEMU that is asked is started without a machine, and ends as soon as it has answered.
"""

import asyncio
import contextlib
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from calotype.plan.sights import QemuSight
from calotype.qemu import process

CAPABILITIES = ("background-snapshot", "mapped-ram", "multifd", "x-ignore-shared")
COMMANDS = ("blockdev-set-active", "xen-save-devices-state")
"""What makes a difference, of capabilities and of commands."""

TOOLS = ("qemu-img", "setpriv")
PATIENCE_S = 10.0

_OPTIONS = (
    "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp", "stdio",
)  # fmt: skip
_QUESTIONS = (
    "qmp_capabilities", "query-version", "query-migrate-capabilities", "query-qmp-schema",
)  # fmt: skip
_LONGEST_LINE = 1 << 24
"""The schema is one line; QEMU 10's has 0.3 MB."""


def kernel() -> str:
    """The kernel's name and release."""
    return f"{platform.system()} {platform.release()}"


def has_kvm() -> bool:
    """Whether this user may use KVM."""
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


def may_track_writes() -> bool:
    """Whether a QEMU of this user may write-protect its memory."""
    return process.may_protect_memory(os.getpid())


def missing_tools() -> tuple[str, ...]:
    """The tools that are not installed."""
    return tuple(tool for tool in TOOLS if shutil.which(tool) is None)


def usual_program() -> str:
    """The QEMU for this host's own kind of machine; "" where it is not installed."""
    return shutil.which(f"qemu-system-{platform.machine()}") or ""


def program_of(word: str, cwd: str) -> str:
    """The program that *word* starts in the folder *cwd*; "" where there is none."""
    return shutil.which(str(Path(cwd, word)) if "/" in word else word) or ""


async def ask(program: str) -> QemuSight:
    """Ask a QEMU what it can do; one that does not answer is told as that."""
    try:
        qemu = await asyncio.create_subprocess_exec(
            program,
            *_OPTIONS,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=_LONGEST_LINE,
        )
    except OSError as error:
        return QemuSight(program, None, fault=error.strerror or str(error))
    questions = "".join(json.dumps({"execute": each, "id": each}) + "\n" for each in _QUESTIONS)
    try:
        async with asyncio.timeout(PATIENCE_S):
            output, said = await _answered(qemu, questions.encode())
            await qemu.wait()
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            qemu.kill()
        await qemu.wait()
        if isinstance(error, TimeoutError):
            return QemuSight(program, None, fault=f"no answer in {PATIENCE_S:g} s")
        raise
    return _read(program, output, said.decode(errors="replace").strip())


async def _answered(qemu: asyncio.subprocess.Process, questions: bytes) -> tuple[bytes, bytes]:
    """What QEMU says, until it has answered the last question; then it is ended.

    Not before: at the end of its input, and when it quits, QEMU drops what it has not said yet.
    """
    assert qemu.stdin
    assert qemu.stdout
    assert qemu.stderr
    output = b""
    with contextlib.suppress(ConnectionError, ValueError):  # it is no QEMU
        qemu.stdin.write(questions)
        await qemu.stdin.drain()
        while line := await qemu.stdout.readline():
            output += line
            if f'"id": "{_QUESTIONS[-1]}"'.encode() in line:
                qemu.stdin.write(b'{"execute": "quit"}\n')
                qemu.stdin.close()
    return output, await qemu.stderr.read()


def _read(program: str, output: bytes, said: str) -> QemuSight:
    """What the answers say."""
    try:
        messages: list[Any] = [json.loads(line) for line in output.splitlines()]
        answers = {message["id"]: message["return"] for message in messages if "id" in message}
        version = answers["query-version"]["qemu"]
        capabilities = {each["capability"] for each in answers["query-migrate-capabilities"]}
        commands = {
            each["name"] for each in answers["query-qmp-schema"] if each["meta-type"] == "command"
        }
        number = version["major"], version["minor"], version["micro"]
    except (ValueError, LookupError, TypeError):
        return QemuSight(program, None, fault=said.partition("\n")[0] or "it is no QEMU")
    can = [each for each in CAPABILITIES if each in capabilities]
    return QemuSight(program, number, tuple(can + [each for each in COMMANDS if each in commands]))
