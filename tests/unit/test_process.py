"""What counts as a process that is gone."""

import subprocess
import sys
import time
from pathlib import Path

from calotype.qemu import process

HALF_GONE = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""
"""Its first thread ends, and another goes on: so a QEMU that was killed looks for a moment."""


def test_a_process_is_not_gone_while_a_thread_of_it_holds_its_files() -> None:
    child = subprocess.Popen([sys.executable, "-c", HALF_GONE])
    try:
        deadline = time.monotonic() + 20
        while _state(child.pid) != "Z" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert _state(child.pid) == "Z"
        assert process.start_ticks(child.pid) is not None
    finally:
        child.kill()
        child.wait(20)
    assert process.start_ticks(child.pid) is None


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
