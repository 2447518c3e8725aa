"""How commands fail: in one line each, with an exit code, and never with a traceback."""

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from builders import SNAPSHOT, make_manifest, make_record
from calotype.cli.main import main
from calotype.cli.output import UNDONE, one_line, report_error, run_async
from calotype.engine import lifecycle, operations
from calotype.errors import HostError, InterruptError, MismatchError, QemuError
from calotype.model.names import LONGEST_TAG
from calotype.plan.restore_plan import RestorePlan
from calotype.store.store import Store

COMMAND = (sys.executable, "-m", "calotype")


def ran(*words: str | bytes, **settings: Any) -> "subprocess.CompletedProcess[bytes]":
    """One run of the command, in a process of its own."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.run([*COMMAND, *words], check=False, **given)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALOTYPE_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def failing(
    capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[object, dict[str, Any], list[str]]:
    """The exit code, the error object and the lines of a command that fails."""
    with pytest.raises(SystemExit) as caught:
        main([*words, "--json"])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return caught.value.code, json.loads(said.out)["error"], said.err.splitlines()


# --- what nobody foresaw --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), RecursionError(), TimeoutError(), KeyError(1)]
)
@pytest.mark.usefixtures("root")
def test_what_nobody_foresaw_is_one_line_with_a_way_to_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    async def take(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(operations, "take", take)
    code, told, lines = failing(capsys, "take", "web")
    assert (code, told["family"]) == (1, "error")
    assert type(error).__name__ in told["problem"]
    assert "CALOTYPE_DEBUG=1" in told["remedy"]
    assert lines == [f"calotype: {told['problem']}", f"calotype: what to do: {told['remedy']}"]


def test_a_traceback_is_shown_to_who_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CALOTYPE_DEBUG", "1")
    problem = HostError("it is wrong", "put it right")
    problem.__cause__ = ValueError("deep")
    assert report_error(problem, []) == 9
    err = capsys.readouterr().err
    assert "direct cause" in err
    assert "ValueError: deep" in err


@pytest.mark.usefixtures("root")
def test_what_the_system_refuses_is_a_failure_of_the_host(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def take(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "/vm/lock")

    monkeypatch.setattr(operations, "take", take)
    code, told, _ = failing(capsys, "take", "web")
    assert (code, told["family"], told["path"]) == (9, "host", "/vm/lock")
    assert told["problem"] == "/vm/lock: Permission denied"
    assert told["remedy"]


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("words", [("take", "web"), ("delete", "web", "--leftovers")])
def test_a_closed_standard_error_changes_no_exit_code(words: tuple[str, ...]) -> None:
    store = Store(Path(os.environ["CALOTYPE_STORE"]))
    store.make_vm_folder(make_record().id)
    store.save(make_record())
    expected = ran(*words).returncode
    closed = ("sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, *words)
    assert subprocess.run(closed, check=False).returncode == expected != 1


def test_no_file_of_ours_gets_the_number_of_a_stream_that_is_closed(tmp_path: Path) -> None:
    code = "import os; from calotype.cli import main; main._prepare(); print(os.open('/', 0))"
    closed = ("sh", "-c", 'exec "$@" 2>&- <&-', "sh", sys.executable, "-c", code)
    done = subprocess.run(closed, check=False, stdout=subprocess.PIPE, cwd=tmp_path)
    assert int(done.stdout) > 2


# --- bytes that are no text -----------------------------------------------------------------------


def test_an_error_about_a_path_that_is_no_text_is_told(tmp_path: Path) -> None:
    store = os.fsencode(tmp_path) + b"/\xff"
    Path(os.fsdecode(store)).write_text("a file, not a folder")
    done = ran("--store", store, "ps", "--json")
    assert done.returncode == 9
    assert b"\\udcff" in done.stderr
    assert b"Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["path"] == os.fsdecode(store)


def test_a_result_with_a_path_that_is_no_text_is_told(tmp_path: Path) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    store = Store(root)
    for vm_id, name in (("00000000000000a0", "one"), ("00000000000000a1", "two")):
        store.make_vm_folder(vm_id)
        store.save(make_record(id=vm_id, name=name))
    plain = ran("--store", os.fsencode(root), "forget", "one")
    assert (plain.returncode, plain.stderr) == (0, b"")
    told = ran("--store", os.fsencode(root), "forget", "two", "--json")
    assert json.loads(told.stdout)["kept"]["folder"].startswith(str(root))


def test_a_terminal_that_knows_few_letters_gets_the_tree_all_the_same(root: Path) -> None:
    store = Store(root)
    store.make_vm_folder(make_record().id)
    store.save(make_record())
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = ran("list", env=environment)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_command_line_that_is_no_text_is_refused_before_anything_is_made(root: Path) -> None:
    done = ran("run", "web", "--", "/nosuch/qemu", "-drive", b"file=\xff.raw,format=raw")
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert Store(root).records() == []


TAGS = {
    "no text": ("\udcff", "is not UTF-8"),
    "a line break": ("a\nb", "control characters"),
    "an order to the terminal": ("\x1b[2J", "control characters"),
    "too long": ("x" * (LONGEST_TAG + 1), "1025 characters"),
}


@pytest.mark.parametrize("name", TAGS)
def test_a_tag_that_cannot_be_kept_is_refused_before_anything_is_looked_at(
    root: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    tag, problem = TAGS[name]
    code, told, lines = failing(capsys, "take", "nosuch", f"--tag={tag}")
    assert (code, told["family"]) == (2, "request")
    assert problem in told["problem"]
    assert told["remedy"]
    assert len(lines) == 2
    assert not root.exists()


@pytest.mark.usefixtures("root")
def test_the_longest_tag_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(capsys, "take", "nosuch", "--tag", "é" * LONGEST_TAG)[0] == 3


@pytest.mark.usefixtures("root")
def test_a_description_may_have_lines_but_must_be_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(capsys, "take", "nosuch", "--description", "a\nb")[0] == 3
    assert failing(capsys, "take", "nosuch", "--description", "\udcff")[0] == 2


# --- one line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        ("a\nb\r\n\n  c\n", "a; b; c"),
        ("\x1b[2J", "\\x1b[2J"),
        ("tab\there", "tab\\there"),
        ("\udcff", "\\udcff"),
        ("ü ☃", "ü ☃"),
    ],
)
def test_what_is_wrong_is_folded_into_one_line(text: str, line: str) -> None:
    assert one_line(text) == line


def test_qemus_own_words_are_cut_in_the_line_and_whole_in_the_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = "\n".join(f"qemu: line {number}" for number in range(100))
    error = QemuError(f"QEMU did not start: {said}", "see its log", qemu=said)
    report_error(error, ["--json"])
    out, err = capsys.readouterr()
    told = json.loads(out)["error"]
    assert told["qemu"] == said
    assert 290 < len(told["problem"]) <= 300
    assert told["problem"].startswith("QEMU did not start: qemu: line 0; ")
    assert told["problem"].endswith("line 99")
    assert err.splitlines()[0] == f"calotype: {told['problem']}"
    assert len(err.splitlines()) == 2


def test_what_stands_nowhere_else_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    report_error(MismatchError("x" * 1000, "put it back"), [])
    assert capsys.readouterr().err.startswith(f"calotype: {'x' * 1000}\n")


def test_a_note_and_a_remedy_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    error = QemuError("it is wrong", "do\nthis")
    error.add_note("a\nb")
    report_error(error, [])
    assert capsys.readouterr().err.splitlines() == [
        "calotype: it is wrong",
        "calotype: a; b",
        "calotype: what to do: do; this",
    ]


# --- nobody to tell it to -------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("ps",), ("ps", "--json"), ("--help",), ("take", "--json")])
def test_a_full_disk_below_the_output_is_told_without_a_traceback(
    root: Path, words: tuple[str, ...]
) -> None:
    with Path("/dev/full").open("wb") as full:
        done = ran("--store", str(root), *words, stdout=full)
    assert done.returncode == (2 if words[0] == "take" else 9)
    assert done.stderr.startswith(b"calotype: ")
    assert b"Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_nobody_who_reads_the_errors_changes_no_exit_code(root: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        assert ran("--store", str(root), "show", "nosuch", stderr=full).returncode == 3


@pytest.mark.parametrize("words", [("ps", "--json"), ("show", "nosuch", "--json")])
def test_a_reader_who_left_gets_no_traceback(root: Path, words: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = ran("--store", str(root), *words, stdout=pipe)
    assert done.returncode in (1, 3)
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


# --- a folder that is gone ------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--qemu",)])
def test_logs_that_nobody_reads_are_no_fault(tmp_path: Path, more: tuple[str, ...]) -> None:
    store = Store(tmp_path / "store")
    store.make_vm_folder(make_record().id)
    store.save(make_record())
    for name in ("console.log", "qemu.log"):
        (store.folder(make_record().id) / name).write_text("said\n")
    words = [sys.executable, "-m", "calotype", "logs", "web", *more, "--store", str(store.root)]
    shell = f"{shlex.join(words)} >&-"
    done = subprocess.run(["/bin/sh", "-c", shell], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("run", "web", "--", "/nosuch/qemu"), 9),
        (("--store", "relative", "ps"), 9),
        (("ps",), 0),
    ],
)
def test_a_working_directory_that_is_gone_is_told(
    tmp_path: Path, root: Path, words: tuple[str, ...], code: int
) -> None:
    script = 'mkdir here; cd here; rmdir ../here; exec "$@"'
    environment = {**os.environ, "CALOTYPE_STORE": str(root)}
    done = subprocess.run(
        ["sh", "-c", script, "sh", *COMMAND, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    if code:
        assert b"the working directory is gone" in done.stderr


# --- being interrupted ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay_s", [0.06, 0.1, 0.15, 0.2])
def test_an_interrupt_before_anything_is_begun_is_answered_too(
    root: Path, number: signal.Signals, delay_s: float
) -> None:
    """At each moment from the first line of ours on, imports included."""
    words = ["--store", str(root), "ps", "--json"]
    with subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        time.sleep(0.01)
        _await_the_first_line_of_ours(child.pid)
        time.sleep(delay_s - 0.05)
        child.send_signal(number)
        out, err = child.communicate()
    assert b"Traceback" not in err
    if child.returncode == 0:  # it was done by then
        return
    assert child.returncode == 130
    assert json.loads(out)["error"]["family"] == "interrupt"
    assert err.splitlines()[0] == b"calotype: stopped"


def _await_the_first_line_of_ours(pid: int) -> None:
    """Wait until it holds the two signals back: Python itself does not."""
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        blocked = next(line for line in status.splitlines() if line.startswith("SigBlk:"))
        if int(blocked.split()[1], 16) & 1 << signal.SIGTERM - 1:
            return
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("stop", "web"), "stopped waiting: the power button may be pressed"),
        (("stop", "web", "--now"), "stopped"),
        (("take", "web", "--plan"), "stopped"),
        (("take", "web"), "stopped: what was begun has been undone"),
        (("start", "web"), "stopped: what was begun has been undone"),
    ],
)
@pytest.mark.usefixtures("root")
def test_only_what_was_undone_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    problem: str,
) -> None:
    async def work(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    for module, name in (
        (operations, "take"), (operations, "plan_only"), (lifecycle, "stop"), (lifecycle, "start"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, work)
    code, told, lines = failing(capsys, *words)
    assert (code, told["family"]) == (130, "interrupt")
    assert told["problem"].partition(",")[0] == problem
    assert told["remedy"]
    assert len(lines) == 2


def test_what_could_not_be_undone_is_not_said_to_be() -> None:
    async def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            error.add_note("undoing One failed")
            raise

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptError, match="not all of what was begun") as caught:
        run_async(work(), UNDONE)
    assert caught.value.__notes__ == ["undoing One failed"]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("root")
def test_an_interrupt_outside_of_the_work_has_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "sound_records", interrupted)
    code, told, lines = failing(capsys, "list")
    assert (code, told["problem"]) == (130, "stopped")
    assert len(lines) == 2


# --- commands that are suggested ------------------------------------------------------------------


@pytest.mark.parametrize("by_option", [True, False])
def test_the_way_back_names_the_store_that_was_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    by_option: bool,
) -> None:
    root = tmp_path / "it's a store"
    _restorable(monkeypatch, root)
    if by_option:
        monkeypatch.delenv("CALOTYPE_STORE", raising=False)
    else:
        monkeypatch.setenv("CALOTYPE_STORE", str(root))
    words = ["restore", "web", "--latest", *(["--store", str(root)] if by_option else [])]
    with pytest.raises(SystemExit):
        main([*words, "--json"])
    undo = [
        ["calotype", "stop", "web", "--now", "--store", str(root)],
        ["calotype", "restore", "web", "--id", "b" * 16, "--store", str(root)],
    ]
    assert json.loads(capsys.readouterr().out)["undo"] == undo
    with pytest.raises(SystemExit):
        main(words)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"--store {shlex.quote(str(root))}")


def test_the_way_back_leaves_out_a_store_that_nobody_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("CALOTYPE_STORE", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    _restorable(monkeypatch, tmp_path / "calotype")
    with pytest.raises(SystemExit):
        main(["restore", "web", "--latest", "--json"])
    undo = json.loads(capsys.readouterr().out)["undo"]
    assert undo == [
        ["calotype", "stop", "web", "--now"],
        ["calotype", "restore", "web", "--id", "b" * 16],
    ]


def _restorable(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """A store whose VM is restored without a QEMU."""
    store, manifest = Store(root), make_manifest()
    store.make_vm_folder(manifest.vm_id)
    store.save(make_record())
    store.make_snapshot_folder(manifest.vm_id, SNAPSHOT)
    store.commit(manifest)
    plan = RestorePlan(SNAPSHOT, "b" * 16, True, "running", {}, (), ())

    async def restore(*_: Any) -> operations.Restored:
        return operations.Restored(manifest, plan, 1.0, None, 2.0, False, ())

    monkeypatch.setattr(operations, "restore", restore)


@pytest.mark.parametrize(
    "words", [("logs", "it's"), ("console", "it's"), ("show", "it's", "--latest")]
)
def test_a_name_in_a_suggested_command_is_a_word_of_the_shell(
    root: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    store = Store(root)
    store.make_vm_folder(make_record().id)
    store.save(make_record(name="it's"))
    assert """'it'"'"'s'""" in failing(capsys, *words)[1]["remedy"]
