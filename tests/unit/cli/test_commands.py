"""The commands as a user and a program meet them: words, one JSON object, exit codes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

from builders import (
    OTHER,
    SNAPSHOT,
    VM_ID,
    disk_path,
    make_disk_record,
    make_facts,
    make_manifest,
    make_part,
    make_record,
)
from calotype.cli.list_cmd import Place, draw
from calotype.cli.main import COMMANDS, main
from calotype.cli.output import UNDONE, duration, report_error, run_async, size
from calotype.engine import lifecycle, operations
from calotype.errors import FAMILIES, CalotypeError, InterruptError, QemuError
from calotype.model.snapshot import Manifest, Timings
from calotype.model.vm import Image, Process, Stray, VmRecord
from calotype.plan.restore_plan import RestorePlan
from calotype.plan.take import plan_take
from calotype.plan.take_plan import TakePlan, TakeRequest
from calotype.store import images
from calotype.store.index import SnapshotEntry, entry_of
from calotype.store.journal import Began, Journal
from calotype.store.store import Store


class Said(NamedTuple):
    """What one call of the command said."""

    code: object
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on standard output."""
        assert self.out.count("\n") == 1
        return json.loads(self.out)


Calotype = Callable[..., Said]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the store is, named by the environment."""
    monkeypatch.setenv("CALOTYPE_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def calotype(root: Path, capsys: pytest.CaptureFixture[str]) -> Calotype:
    def call(*words: str) -> Said:
        assert root.name == "store"
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(words))
        return Said(caught.value.code, *capsys.readouterr())

    return call


def keep(root: Path, record: VmRecord | None = None, *manifests: Manifest) -> VmRecord:
    """Put a VM that does not run, and its snapshots, into the store."""
    store, record = Store(root), record or make_record()
    store.make_vm_folder(record.id)
    store.save(record)
    for manifest in manifests:
        store.make_snapshot_folder(record.id, manifest.id)
        store.commit(manifest)
    return record


# --- what all commands have -----------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_explains_itself(calotype: Calotype, name: str, flag: str) -> None:
    said = calotype(name, flag)
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"Usage: calotype {name} ")
    assert "--store DIR" in said.out
    assert "--json" in said.out


@pytest.mark.parametrize("words", [("--help",), ("-h",), ()])
def test_the_commands_are_listed_in_the_order_in_which_a_user_meets_them(
    calotype: Calotype, words: tuple[str, ...]
) -> None:
    said = calotype(*words)
    listed = (said.out + said.err).partition("Commands:\n")[2]
    assert [line.split()[0] for line in listed.splitlines()] == list(COMMANDS)


def test_the_version_is_told(calotype: Calotype) -> None:
    assert calotype("--version").out.startswith("calotype, version ")


@pytest.mark.parametrize(
    "words",
    [
        ("nosuch",),
        ("take",),
        ("take", "web", "--nosuch"),
        ("take", "web", "--machine-state", "some"),
        ("take", "web", "--method", "quick"),
        ("take", "web", "--pause-limit", "0"),
        ("take", "web", "--pause-limit", "nan"),
        ("take", "web", "--pause-limit", "inf"),
        ("take", "web", "--machine-state", "none", "--method", "paused"),
        ("take", "-x"),
        ("restore", "web", "--run-state", "off"),
        ("list", "one", "two"),
        ("doctor", "web"),
        ("stop", "web", "--timeout", "soon"),
        ("stop", "web", "--timeout", "-1"),
        ("stop", "web", "--timeout", "0"),
        ("stop", "web", "--timeout", "nan"),
        ("stop", "web", "--timeout", "inf"),
    ],
)
def test_words_that_are_wrong_are_exit_code_2(calotype: Calotype, words: tuple[str, ...]) -> None:
    said = calotype(*words)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("calotype: ")


@pytest.mark.parametrize("words", [("take", "--json"), ("list", "--json", "--nosuch")])
def test_words_that_are_wrong_are_told_as_json_too(
    calotype: Calotype, words: tuple[str, ...]
) -> None:
    said = calotype(*words)
    assert said.code == 2
    assert said.out
    assert said.json["error"]["family"] == "request"


@pytest.mark.parametrize("name", ["start", "stop", "forget", "logs", "take", "list", "show"])
@pytest.mark.parametrize("vm", ["nosuch", "-x", "--json", "a/b", "it's"])
def test_a_vm_that_is_not_there_is_exit_code_3_whatever_it_is_called(
    calotype: Calotype, name: str, vm: str
) -> None:
    said = calotype(name, "--", vm)
    assert (said.code, said.out) == (3, "")
    assert said.err.splitlines() == [
        f"calotype: there is no VM called {vm!r}",
        "calotype: what to do: see `calotype ps`",
    ]


def test_a_name_that_is_no_text_is_not_found_either(calotype: Calotype) -> None:
    """A byte that is not UTF-8 reaches Python as a lone surrogate."""
    assert calotype("show", "\udcff").code in (2, 3)


@pytest.mark.parametrize("name", ["", "-x", "a\nb", "\x1b[31m", "\x00", "\udcff"])
def test_what_cannot_name_a_vm_is_refused(calotype: Calotype, root: Path, name: str) -> None:
    said = calotype("run", "--", name, "/nosuch/qemu")
    assert said.code == 2
    assert "cannot name a VM" in said.err
    assert "\x1b" not in said.err
    assert Store(root).records() == []


def test_the_store_is_the_one_named_last_and_nearest(
    calotype: Calotype, root: Path, tmp_path: Path
) -> None:
    keep(root, make_record(name="by environment"))
    keep(tmp_path / "group", make_record(name="by group"))
    keep(tmp_path / "command", make_record(name="by command"))
    group, command = ("--store", str(tmp_path / "group")), ("--store", str(tmp_path / "command"))
    assert calotype("ps", "-q").out == "by environment\n"
    assert calotype("ps", "-q", *command).out == "by command\n"
    assert calotype(*group, "ps", "-q", *command).out == "by command\n"


def test_the_group_takes_a_store_too(
    calotype: Calotype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CALOTYPE_STORE")
    keep(tmp_path / "group", make_record(name="by group"))
    assert calotype("--store", str(tmp_path / "group"), "ps", "-q").out == "by group\n"


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_of_errors_has_its_exit_code_and_its_name(
    family: type[CalotypeError], capsys: pytest.CaptureFixture[str]
) -> None:
    error = family("it is wrong", "put it right", path="/a b", place=Path("/c"), count=3)
    error.add_note("undoing One failed")
    assert report_error(error, ["take", "--json"]) == family.exit_code
    said = Said(0, *capsys.readouterr())
    assert said.json == {
        "schema": 1,
        "error": {
            "family": family.family,
            "problem": "it is wrong",
            "remedy": "put it right",
            "notes": ["undoing One failed"],
            "path": "/a b",
            "place": "/c",
            "count": 3,
        },
    }
    assert said.err.splitlines() == [
        "calotype: it is wrong",
        "calotype: undoing One failed",
        "calotype: what to do: put it right",
    ]


def test_an_error_without_a_remedy_gives_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_error(QemuError("it is wrong"), ["take"]) == 7
    assert capsys.readouterr() == ("", "calotype: it is wrong\n")


def spoil_record(root: Path) -> None:
    keep(root)
    (root / "vms" / VM_ID / "record.json").write_text("{")


def file_as_store(root: Path) -> None:
    root.write_text("")


def forget_image(root: Path) -> None:
    keep(root, make_record(), make_manifest())


def program(*argv: str) -> Callable[[Path], object]:
    return lambda root: keep(root, make_record(disks=(), argv=argv, cwd="/"))


@pytest.mark.parametrize(
    ("prepare", "words", "code", "family"),
    [
        (keep, ("show", "web", "--tag", "a", "--latest"), 2, "request"),
        (keep, ("show", "web", "--id", "xyz"), 2, "request"),
        (keep, ("take", "web", "--disk", "a=b"), 2, "request"),
        (keep, ("run", "web2", "--", "/nosuch/qemu", "-daemonize"), 2, "request"),
        (keep, ("run", "web2"), 2, "request"),
        (keep, ("show", "nosuch"), 3, "not-found"),
        (keep, ("show", "web", "--latest"), 3, "not-found"),
        (keep, ("logs", "web"), 3, "not-found"),
        (forget_image, ("restore", "web", "--latest"), 5, "mismatch"),
        (keep, ("take", "web"), 6, "conflict"),
        (keep, ("take", "web", "--plan"), 6, "conflict"),
        (keep, ("stop", "web"), 6, "conflict"),
        (keep, ("console", "web"), 6, "conflict"),
        (program("/bin/false"), ("start", "web"), 7, "qemu"),
        (program("/nosuch/qemu"), ("start", "web"), 9, "host"),
        (keep, ("start", "web"), 9, "host"),
        (file_as_store, ("ps",), 9, "host"),
        (spoil_record, ("show", "web"), 10, "store"),
    ],
)
def test_an_error_is_told_by_whose_fault_it_is(
    calotype: Calotype,
    root: Path,
    prepare: Callable[[Path], object],
    words: tuple[str, ...],
    code: int,
    family: str,
) -> None:
    prepare(root)
    plain = calotype(*words)
    assert (plain.code, plain.out) == (code, "")
    said = calotype(words[0], "--json", *words[1:])
    assert said.code == code
    assert said.json.keys() == {"schema", "error"}
    error = said.json["error"]
    assert said.json["schema"] == 1
    assert error["family"] == family
    assert error.keys() >= {"family", "problem", "remedy", "notes"}
    assert error["notes"] == []
    assert plain.err.startswith(f"calotype: {error['problem']}\n")


def test_every_difference_is_told_to_a_program(calotype: Calotype, root: Path) -> None:
    keep(root, make_record(), make_manifest())
    error = calotype("restore", "web", "--latest", "--json").json["error"]
    kinds = [mismatch["kind"] for mismatch in error["mismatches"]]
    assert {"missing", "definition"} <= set(kinds)
    assert all(mismatch.keys() == {"kind", "subject", "text"} for mismatch in error["mismatches"])
    assert all(mismatch["text"] in error["problem"] for mismatch in error["mismatches"])


def test_words_after_the_dashes_are_qemus(calotype: Calotype) -> None:
    qemu = ("--", "/nosuch/qemu", "-daemonize", "--json")
    assert calotype("run", "web", *qemu).out == ""
    said = calotype("run", "--json", "web", *qemu)
    assert said.json["error"]["family"] == "request"


def test_a_reader_that_has_enough_is_no_error_of_ours(root: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        ended = subprocess.run(
            [sys.executable, "-m", "calotype", "--store", str(root), "ps"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (1, b"")


# --- being interrupted ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_cancels_the_work_and_tells_what_could_not_be_undone(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work() -> None:
        os.kill(os.getpid(), number)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            error.add_note("undoing One failed")
            raise

    with pytest.raises(InterruptError) as caught:
        run_async(work())
    assert caught.value.__notes__ == ["undoing One failed"]
    assert report_error(caught.value, []) == 130
    assert "undoing One failed" in capsys.readouterr().err


def test_a_second_interrupt_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)

    with pytest.raises(InterruptError):
        run_async(work(), UNDONE)
    assert capsys.readouterr().err == "calotype: undoing what was begun; please wait\n"


def test_work_that_fails_is_not_called_interrupted() -> None:
    async def work() -> None:
        raise QemuError("it is wrong")

    with pytest.raises(QemuError):
        run_async(work())


# --- take ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("disk0",), "--disk 'disk0' is not understood"),
        (("=skip",), "--disk '=skip' is not understood"),
        (("disk0=",), "--disk 'disk0=' is not understood"),
        (("disk0=Skip",), "--disk 'disk0=Skip' is not understood"),
        (("disk0=none",), "--disk 'disk0=none' is not understood"),
        (("",), "--disk '' is not understood"),
        (("disk0=skip", "disk0=internal"), "--disk names 'disk0' twice"),
        (("disk0=skip", "disk0=skip"), "--disk names 'disk0' twice"),
    ],
)
def test_a_disk_that_is_not_understood_is_refused_before_anything_is_looked_at(
    calotype: Calotype, words: tuple[str, ...], problem: str
) -> None:
    options = [word for value in words for word in ("--disk", value)]
    said = calotype("take", "nosuch", *options)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"calotype: {problem}\n")


@pytest.mark.parametrize("method", ["live", "paused"])
def test_a_way_to_save_what_is_not_saved_is_refused(calotype: Calotype, method: str) -> None:
    said = calotype("take", "web", "--machine-state", "none", "--method", method)
    assert said.code == 2
    assert f"--method {method} says how the machine state is saved" in said.err


def test_who_types_a_command_wrongly_is_sent_to_its_own_help(calotype: Calotype) -> None:
    assert "see `calotype take --help`" in calotype("take", "web", "--nosuch").err
    assert "see `calotype --help`" in calotype("tkae", "web").err


def asked(
    monkeypatch: pytest.MonkeyPatch, calotype: Calotype, *words: str
) -> tuple[TakeRequest, Mapping[str, Any]]:
    """What the operation is asked for by `take web` and *words*."""
    given: list[Any] = []

    async def take(_: Store, name: str, request: TakeRequest, **rest: Any) -> Manifest:
        given.extend((name, request, rest))
        return make_manifest()

    monkeypatch.setattr(operations, "take", take)
    assert calotype("take", "web", *words).code == 0
    assert given[0] == "web"
    return given[1], given[2]


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        ((), TakeRequest("external", "auto", 2000.0, {})),
        (("--machine-state", "none"), TakeRequest("none")),
        (("--method", "paused", "--pause-limit", "70.5"), TakeRequest("external", "paused", 70.5)),
        (("--disk", "a=skip"), TakeRequest(disks={"a": "skip"})),
        (
            ("--disk", "/m/d=0=internal", "--disk", "#block1=external"),
            TakeRequest(disks={"/m/d=0": "internal", "#block1": "external"}),
        ),
    ],
)
def test_the_words_of_a_take_become_a_request(
    monkeypatch: pytest.MonkeyPatch,
    calotype: Calotype,
    words: tuple[str, ...],
    request_: TakeRequest,
) -> None:
    assert asked(monkeypatch, calotype, *words)[0] == request_


@pytest.mark.parametrize("tag", ["before upgrade", "2", "--json", "-q", "it's"])
def test_a_tag_and_a_description_are_taken_as_they_are(
    monkeypatch: pytest.MonkeyPatch, calotype: Calotype, tag: str
) -> None:
    _, rest = asked(monkeypatch, calotype, f"--tag={tag}", f"--description={tag}")
    assert (rest["tag"], rest["description"]) == (tag, tag)


@pytest.mark.parametrize(
    ("pause_ms", "words"),
    [(12.5, "pause 12.5 ms"), (0.0, "pause 0.0 ms"), (None, "the guest was not stopped")],
)
def test_what_was_taken_is_told(
    monkeypatch: pytest.MonkeyPatch, calotype: Calotype, pause_ms: float | None, words: str
) -> None:
    manifest = make_manifest(
        [make_part(0), make_part(1, "skip")], tag="x", timings=Timings(pause_ms, 1500.0, {})
    )

    async def take(*_: Any, **__: Any) -> Manifest:
        return manifest

    monkeypatch.setattr(operations, "take", take)
    assert calotype("take", "web").out == f"{SNAPSHOT}  {words}, 1 MiB in 1.5 s\n"
    assert calotype("take", "web", "-q").out == f"{SNAPSHOT}\n"
    assert calotype("take", "web", "--json").json == {
        "schema": 1,
        "id": SNAPSHOT,
        "tag": "x",
        "vm": "web",
        "parent": None,
        "instant": manifest.instant,
        "pause_ms": pause_ms,
        "total_ms": 1500.0,
        "bytes": 1 << 20,
        "parts": {"disk0": "external", "disk1": "skip"},
        "consistency": "machine",
    }


@pytest.mark.parametrize(
    ("facts", "code"),
    [(make_facts(), 0), (make_facts(block_jobs=("mirror0",), strays=(Stray("a stray"),)), 4)],
)
def test_a_plan_says_all_and_ends_with_whether_it_can_be_carried_out(
    monkeypatch: pytest.MonkeyPatch, calotype: Calotype, facts: Any, code: int
) -> None:
    plan = plan_take(facts, make_record(), TakeRequest(), SNAPSHOT)

    async def plan_only(*_: Any) -> TakePlan:
        return plan

    monkeypatch.setattr(operations, "plan_only", plan_only)
    said = calotype("take", "web", "--plan")
    assert said.code == code
    for expected in (plan.method_reason, plan.disks[0].overlay, "pause 24 ms", "PassInstant"):
        assert expected in said.out
    for blocker in plan.blockers:
        assert f"blocker: {blocker.problem}; what to do: {blocker.remedy}\n" in said.out
    told = calotype("take", "web", "--plan", "--json")
    assert told.code == code
    assert told.json["plan"]["snapshot"] == SNAPSHOT
    assert len(told.json["plan"]["blockers"]) == len(plan.blockers)
    assert ("error" in told.json) == bool(plan.blockers)
    assert bool(said.err) == bool(plan.blockers)


def test_a_plan_that_is_blocked_is_told_with_its_error(
    monkeypatch: pytest.MonkeyPatch, calotype: Calotype
) -> None:
    async def plan_only(*_: Any) -> TakePlan:
        facts = make_facts(block_jobs=("mirror0",), strays=(Stray("a stray"),))
        return plan_take(facts, make_record(), TakeRequest(), SNAPSHOT)

    monkeypatch.setattr(operations, "plan_only", plan_only)
    error = calotype("take", "web", "--plan", "--json").json["error"]
    assert error["family"] == "blocked"
    assert error["problem"] == "no snapshot of 'web' can be taken: a stray (and 1 more: see --plan)"
    assert len(error["blockers"]) == 2
    assert error["remedy"] == error["blockers"][0][1]


# --- list ----------------------------------------------------------------------------------------


def entry(snapshot: str, parent: str | None = None, **changes: Any) -> SnapshotEntry:
    return replace(entry_of(make_manifest(id=snapshot, parent=parent)), **changes)


def shape(now: str | None, *entries: SnapshotEntry) -> list[str]:
    """The tree, each snapshot as its id alone."""
    return [line.partition("  2025-")[0] for line in draw(Place(now), entries)]


TREES: dict[str, tuple[str | None, list[SnapshotEntry], list[str]]] = {
    "empty": (None, [], ["└── now"]),
    "one, and now at the root": (None, [entry("a")], ["├── a", "└── now"]),
    "one, and now after it": ("a", [entry("a")], ["└── a", "    └── now"]),
    "chain": (
        "c",
        [entry("a"), entry("b", "a"), entry("c", "b")],
        ["└── a", "    └── b", "        └── c", "            └── now"],
    ),
    "now in the middle": (
        "a",
        [entry("a"), entry("b", "a"), entry("c", "b")],
        ["└── a", "    ├── b", "    │   └── c", "    └── now"],
    ),
    "branches": (
        "d",
        [entry("a"), entry("b", "a"), entry("c", "b"), entry("d", "a"), entry("e", "a")],
        [
            "└── a",
            "    ├── b",
            "    │   └── c",
            "    ├── d",
            "    │   └── now",
            "    └── e",
        ],
    ),
    "two roots": ("a", [entry("a"), entry("b")], ["├── a", "│   └── now", "└── b"]),
    "parent unknown": ("b", [entry("b", "gone")], ["└── b", "    └── now"]),
    "now after one that is gone": ("gone", [entry("a")], ["├── a", "└── now"]),
    "child before its parent": ("b", [entry("b", "a"), entry("a")],
                                ["└── a", "    └── b", "        └── now"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_snapshots_are_drawn_as_a_tree(name: str) -> None:
    now, entries, expected = TREES[name]
    assert shape(now, *entries) == expected


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "a  2025-01-02 03:04:05  live  machine-consistent  1 MiB  pause 12.5 ms"),
        ({"pause_ms": None}, "a  2025-01-02 03:04:05  live  machine-consistent  1 MiB"),
        (
            {"tag": "it's"},
            'a  2025-01-02 03:04:05  "it\'s"  live  machine-consistent  1 MiB  pause 12.5 ms',
        ),
        (
            {
                "machine_state": "none",
                "bytes": 0,
                "pause_ms": None,
                "method": "left-behind",
                "consistency": "crash",
            },
            "a  2025-01-02 03:04:05  left-behind  crash-consistent",
        ),
        (
            {"description": "two\nlines\x1b[2J", "pause_ms": None},
            "a  2025-01-02 03:04:05  live  machine-consistent  1 MiB  - 'two\\nlines\\x1b[2J'",
        ),
    ],
)
def test_a_snapshot_is_one_line_whatever_the_user_wrote(
    changes: dict[str, Any], label: str
) -> None:
    assert draw(Place(None), [entry("a", None, **changes)])[0] == f"├── {label}"


def under_way(root: Path, record: VmRecord) -> None:
    """The record names a snapshot from before the instant on; its manifest is written last."""
    keep(root, record, make_manifest())
    store = Store(root)
    store.make_snapshot_folder(VM_ID, OTHER)
    store.save(replace(record, parent=OTHER))


def test_a_snapshot_under_way_is_no_root(calotype: Calotype, root: Path) -> None:
    under_way(root, make_record())
    heading, first, now = calotype("list").out.splitlines()
    assert heading == "web"
    assert first.startswith(f"└── {SNAPSHOT}  ")
    assert now == f"a snapshot is under way: {OTHER}"
    (vm,) = calotype("list", "--json").json["vms"]
    assert (vm["now"], vm["under_way"]) == (None, OTHER)
    assert f"descends from: a snapshot under way, {OTHER}\n" in calotype("show", "web").out
    Store(root).commit(make_manifest(id=OTHER, parent=SNAPSHOT))
    (vm,) = calotype("list", "--json").json["vms"]
    assert (vm["now"], vm["under_way"]) == (OTHER, None)


def test_while_a_snapshot_is_under_way_now_is_where_it_was(calotype: Calotype, root: Path) -> None:
    record = make_record(parent=SNAPSHOT)
    under_way(root, record)
    owner = Process(os.getpid(), 1)
    began = Began("take", "c" * 16, OTHER, "2025-01-02T03:04:05+00:00", owner, None, record, ())
    Journal.begin(Store(root).folder(VM_ID), began)
    _, first, now, told = calotype("list").out.splitlines()
    assert first.startswith(f"└── {SNAPSHOT}  ")
    assert (now, told) == ("    └── now", f"a snapshot is under way: {OTHER}")
    (vm,) = calotype("list", "--json").json["vms"]
    assert (vm["now"], vm["under_way"]) == (SNAPSHOT, OTHER)


def test_a_long_chain_is_drawn_too() -> None:
    chain = [entry("0"), *(entry(str(at), str(at - 1)) for at in range(1, 2000))]
    assert len(shape("1999", *chain)) == 2001


def test_a_list_names_each_vm_and_where_it_is_now(calotype: Calotype, root: Path) -> None:
    keep(root, make_record(parent=SNAPSHOT), make_manifest(tag="x"))
    keep(root, make_record(id="00000000000000a1", name="mail"))
    assert calotype("list").out.splitlines() == [
        "mail",
        "└── now",
        "web",
        f"└── {SNAPSHOT}  2025-01-02 03:04:05  'x'  live  machine-consistent  1 MiB  pause 12.5 ms",
        "    └── now",
    ]
    assert calotype("list", "mail").out.splitlines() == ["mail", "└── now"]
    assert calotype("list", "-q").out == f"{SNAPSHOT}\n"
    mail, web = calotype("list", "--json").json["vms"]
    assert (mail["name"], mail["now"], mail["snapshots"]) == ("mail", None, [])
    assert (web["vm_id"], web["now"]) == (VM_ID, SNAPSHOT)
    assert web["snapshots"][0]["id"] == SNAPSHOT
    assert web["snapshots"][0].keys() == set(SnapshotEntry.__struct_fields__)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "2 KiB"),
        (1 << 20, "1 MiB"),
        (300 << 20, "300 MiB"),
        (1 << 30, "1.0 GiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5120.0 GiB"),
    ],
)
def test_a_size_is_told_in_the_largest_unit_that_fits(count: int, words: str) -> None:
    assert size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (90061, "1 d 1 h"),
    ],
)
def test_a_time_span_is_told_in_its_two_greatest_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# --- restore -------------------------------------------------------------------------------------


CLOCKS: list[tuple[str, float | None, bool, list[str]]] = [
    # the run state, by how much the clock is behind, whether it was set -> what is told of it
    ("running", None, False, []),
    ("running", 7.25, False, ["the guest's clock is 7.2 s behind"]),
    ("paused", 61.0, False, ["the guest's clock is 1 min 1 s behind, and stands still"]),
    ("running", 61.0, True, ["the guest's clock was 1 min 1 s behind, and was set"]),
]


@pytest.mark.parametrize(("run_state", "behind_s", "is_set", "told"), CLOCKS)
def test_a_restore_tells_by_how_much_the_clock_is_behind(
    monkeypatch: pytest.MonkeyPatch,
    calotype: Calotype,
    root: Path,
    run_state: Any,
    behind_s: float | None,
    is_set: bool,
    told: list[str],
) -> None:
    keep(root, make_record(), make_manifest())
    requests = []

    async def restore(*words: Any) -> operations.Restored:
        requests.append(words[-1])
        plan = RestorePlan(SNAPSHOT, OTHER, False, run_state, {}, (), ())
        return operations.Restored(
            make_manifest(), plan, 1.0, None, behind_s, is_set, ("a warning",)
        )

    monkeypatch.setattr(operations, "restore", restore)
    words = ("restore", "web", "--latest", "--sync-time")
    assert calotype(*words).out.splitlines()[1:] == [*told, "warning: a warning"]
    answer = calotype(*words, "--json").json
    assert (answer["clock_behind_s"], answer["is_clock_set"]) == (behind_s, is_set)
    assert answer["warnings"] == ["a warning"]
    assert requests[0].sync_time


@pytest.mark.parametrize(
    ("word", "rest"), [("start", {"vm": "web", "vm_id": VM_ID}), ("stop", {"vm": "web"})]
)
def test_what_is_not_over_yet_is_said_by_those_that_go_on_all_the_same(
    monkeypatch: pytest.MonkeyPatch, calotype: Calotype, root: Path, word: str, rest: Any
) -> None:
    record = keep(root)

    async def work(*_: Any, **__: Any) -> VmRecord:
        return record

    monkeypatch.setattr(lifecycle, word, work)
    assert calotype(word, "web", "--json").json == {"schema": 1, "unfinished": 0, **rest}
    journal = Store(root).folder(VM_ID) / "journal" / f"{SNAPSHOT}.jsonl"
    journal.parent.mkdir()
    journal.write_bytes(b"")
    assert calotype(word, "web", "--json").json == {"schema": 1, "unfinished": 1, **rest}
    assert "`calotype recover web" in calotype(word, "web").out


# --- the others that need no QEMU ----------------------------------------------------------------


def test_ps_tells_what_does_not_run(calotype: Calotype, root: Path) -> None:
    keep(root, make_record(), make_manifest())
    heading, line = calotype("ps").out.splitlines()
    assert heading.split() == ["NAME", "STATE", "PID", "SNAPSHOTS", "DISKS"]
    assert line.split() == ["web", "off", "-", "1", "disk0"]
    assert calotype("ps", "-q").out == "web\n"
    assert calotype("ps", "--json").json["vms"] == [
        {
            "name": "web", "vm_id": VM_ID, "run_state": "off", "pid": None,
            "disks": ["disk0"], "snapshots": 1,
        }
    ]  # fmt: skip


def test_show_tells_which_image_is_the_active_one(calotype: Calotype, root: Path) -> None:
    active = Image(f"{disk_path(0)}.{SNAPSHOT}.qcow2", "qcow2")
    record = keep(root, make_record([make_disk_record(active=active)], parent=SNAPSHOT))
    said = calotype("show", "web")
    assert f"disk disk0: active image {active.path} (qcow2)\n" in said.out
    assert f"the command line names {disk_path(0)}, which is frozen\n" in said.out
    assert "qemu-system-x86_64 -m 1G -drive file=disk0.qcow2,if=virtio\n" in said.out
    assert calotype("show", "web", "--json").json["vm"]["id"] == record.id


@pytest.mark.parametrize(
    ("mode", "is_immutable", "protection", "words"),
    [
        (0o444, True, "immutable", "frozen: immutable, for root too"),
        (0o444, False, "read-only", "frozen: read-only by its mode alone"),
        (0o644, False, "writable", "not frozen"),
        (None, False, "missing", "missing"),
    ],
)
def test_show_tells_how_a_frozen_image_is_protected(
    calotype: Calotype,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: int | None,
    is_immutable: bool,
    protection: str,
    words: str,
) -> None:
    path = tmp_path / "disk0.qcow2"
    if mode is not None:
        path.touch(mode)
        path.chmod(mode)
    monkeypatch.setattr(images, "_flags", lambda _: 0x10 * is_immutable)
    origin = Image(str(path), "qcow2")
    keep(
        root,
        make_record([make_disk_record(origin=origin)]),
        make_manifest([make_part(image=origin), make_part(1, "internal"), make_part(2, "skip")]),
    )
    for choice in ((), ("--latest",)):
        assert f"  {words}" in calotype("show", "web", *choice).out
        told = calotype("show", "web", *choice, "--json").json["protection"]
        assert told == {str(path): protection}


@pytest.mark.parametrize("choice", [("--latest",), ("--tag", "x"), ("--id", SNAPSHOT[:-1])])
def test_show_tells_all_of_a_snapshot(
    calotype: Calotype, root: Path, choice: tuple[str, ...]
) -> None:
    parts = [make_part(0), make_part(1, "internal"), make_part(2, "skip", reason="asked for")]
    keep(root, make_record(), make_manifest(parts, tag="x", parent=OTHER))
    said = calotype("show", "web", *choice)
    for line in (
        f"{SNAPSHOT}  'x'",
        "instant: 2025-01-02T03:04:05.000006+00:00, live, the VM was running",
        f"parent: {OTHER}",
        "machine state: 1 MiB, stream",
        f"disk disk0: external, {disk_path(0)} (qcow2)",
        f"disk disk1: internal, {disk_path(1)} (qcow2), inside as calotype-{SNAPSHOT}",
        "disk disk2: skipped: asked for",
        "machine: pc-q35-10.0, 1.0 GiB, 1 CPUs",
        "pause: 12.5 ms",
    ):
        assert f"{line}\n" in said.out
    told = calotype("show", "web", *choice, "--json").json["snapshot"]
    assert (told["id"], told["parent"]) == (SNAPSHOT, OTHER)
    assert [part["kind"] for part in told["storage"]] == ["external", "internal", "skip"]


def test_forget_tells_what_stays(calotype: Calotype, root: Path) -> None:
    keep(root, make_record(), make_manifest())
    kept = calotype("forget", "web", "--json").json["kept"]
    assert kept["snapshots"] == [SNAPSHOT]
    assert kept["active_images"] == {"disk0": disk_path(0)}
    assert (Path(kept["folder"]) / "record.json").exists()
    assert calotype("forget", "web").code == 3


@pytest.mark.parametrize(
    ("words", "out"),
    [((), b"login: \xff\r\n"), (("--qemu",), b"qemu: warning\n"), (("-f",), b"login: \xff\r\n")],
)
def test_logs_print_what_was_said_byte_by_byte(
    root: Path, capfdbinary: pytest.CaptureFixture[bytes], words: tuple[str, ...], out: bytes
) -> None:
    keep(root)
    (root / "vms" / VM_ID / "console.log").write_bytes(b"login: \xff\r\n")
    (root / "vms" / VM_ID / "qemu.log").write_bytes(b"qemu: warning\n")
    with pytest.raises(SystemExit) as caught:
        main(["logs", "web", *words])
    assert caught.value.code == 0
    assert capfdbinary.readouterr().out == out


SECRET_ARGV = (
    "qemu-system-x86_64",
    "-object", "secret,id=s0,data=hunter2",
    "-device", "isa-applesmc,osk=hunter2",
)  # fmt: skip


def test_no_secret_of_a_command_line_is_shown(calotype: Calotype, root: Path) -> None:
    definition = (("device", "driver=isa-applesmc,osk=hunter2"),)
    record = keep(
        root,
        make_record(argv=SECRET_ARGV),
        make_manifest(argv=SECRET_ARGV, definition=definition),
    )
    (Store(root).folder(record.id) / "qemu.log").write_text(
        "started\nqemu: -object secret,id=s0,data=hunter2: no\nthe end"
    )
    for words in (
        ("show", "web"), ("show", "web", "--latest"), ("show", "web", "--latest", "--paths"),
        ("logs", "web", "--qemu"), ("list",), ("ps",), ("history", "web"),
    ):  # fmt: skip
        for as_json in ((), ("--json",)):
            said = calotype(*words, *as_json)
            assert said.code == 0
            assert "hunter2" not in said.out + said.err, words
    assert calotype("show", "web", "--json").json["vm"]["argv"][2] == "secret,id=s0,data=REDACTED"
    assert "REDACTED: no\nthe end" in calotype("logs", "web", "--qemu").out
    refused = calotype("restore", "web", "--latest", "--json")
    assert refused.code == 5
    assert "hunter2" not in refused.out + refused.err
    assert Store(root).find("web").argv == SECRET_ARGV
    kept = Store(root).folder(record.id) / "record.json"
    assert kept.stat().st_mode & 0o077 == 0


def test_show_tells_where_each_part_is(calotype: Calotype, root: Path) -> None:
    keep(root, None, make_manifest([make_part(0), make_part(1, "internal"), make_part(2, "skip")]))
    lines = calotype("show", "web", "--latest", "--paths").out.splitlines()
    assert lines == [
        "disk disk0: external",
        f"  {disk_path(0)} (qcow2)",
        f"disk disk1: internal, inside as calotype-{SNAPSHOT} (id 1)",
        f"  {disk_path(1)} (qcow2)",
        "disk disk2: skip",
        "machine state: stream",
        f"  {root}/vms/{VM_ID}/snapshots/{SNAPSHOT}/machine-state",
    ]
    assert calotype("show", "web", "--paths").code == 2


def test_extract_names_what_it_cannot_copy(calotype: Calotype, root: Path) -> None:
    keep(root, None, make_manifest())
    words = ("extract", "web", "disk0", "--latest")
    assert calotype(*words).code == 2
    assert calotype(*words, "-o", "x", "--format", "vmdk").code == 2
    assert calotype("extract", "web", "disk0", "-o", "x").code == 2
    assert calotype("extract", "web", "disk7", "--latest", "-o", "x").code == 3
    missing = calotype(*words, "-o", str(root / "x"))
    assert (missing.code, "is missing" in missing.err) == (5, True)
    assert not (root / "x").exists()


def test_logs_are_text_in_json(calotype: Calotype, root: Path) -> None:
    keep(root)
    (root / "vms" / VM_ID / "console.log").write_bytes(b"login: \xff\n")
    assert calotype("logs", "web", "--json").json == {
        "schema": 1, "vm": "web", "text": "login: \ufffd\n",
    }  # fmt: skip


DAMAGED: dict[str, tuple[str, set[str], list[str]]] = {
    "record": ("record.json", {"ps", "list"}, ["web"]),
    "process": ("process.json", {"ps"}, ["mail", "web"]),
    "manifest": (f"snapshots/{OTHER}/manifest.json", {"list"}, ["mail", "web"]),
}
"""The file, the commands that look into it, and the VMs that are known without it."""


@pytest.mark.parametrize("is_indexed", [True, False])
@pytest.mark.parametrize("word", ["ps", "list"])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_and_hides_nothing_else(
    calotype: Calotype, root: Path, name: str, word: str, is_indexed: bool
) -> None:
    file, readers, names = DAMAGED[name]
    keep(root, make_record(), make_manifest())
    keep(root, make_record(id=OTHER, name="mail"), make_manifest(id=OTHER, vm_id=OTHER))
    path = root / "vms" / OTHER / file
    path.write_text("{")
    if not is_indexed:
        (root / "index.sqlite").unlink()
    said = calotype(word, "--json")
    assert said.code == 0
    assert [vm["name"] for vm in said.json["vms"]] == names
    is_looked_at = word in readers or (not is_indexed and name != "process")
    assert [error["path"] for error in said.json["damaged"]] == [str(path)] * is_looked_at
    assert all(error["remedy"] for error in said.json["damaged"])
    assert (str(path) in said.err) == is_looked_at
    assert calotype("show", "web", "--latest").code == 0


@pytest.mark.parametrize("words", [("du",), ("du", "web")])
def test_du_names_a_damaged_manifest_and_counts_the_rest(
    calotype: Calotype, root: Path, words: tuple[str, ...]
) -> None:
    keep(root, make_record([]), make_manifest([]), make_manifest([], id=OTHER))
    path = Store(root).snapshot_folder(VM_ID, OTHER) / "manifest.json"
    path.write_text("{")
    said = calotype(*words, "--json")
    assert said.code == 0
    assert [each["id"] for each in said.json["vms"][0]["snapshots"]] == [SNAPSHOT]
    assert [error["path"] for error in said.json["damaged"]] == [str(path)]
    assert str(path) in said.err


def test_a_damaged_snapshot_can_be_got_rid_of_as_a_delete_says(
    calotype: Calotype, root: Path
) -> None:
    keep(root, make_record([]), make_manifest([]), make_manifest([], id=OTHER))
    folder = Store(root).snapshot_folder(VM_ID, OTHER)
    (folder / "manifest.json").write_text("{")
    remedy = calotype("delete", "web", "--id", SNAPSHOT, "--json").json["error"]["remedy"]
    assert f"move {folder} away" in remedy
    assert "`calotype doctor --rebuild`" in remedy
    folder.rename(root / "elsewhere")
    assert calotype("doctor", "--rebuild").code == 0
    assert calotype("delete", "web", "--id", SNAPSHOT).code == 0


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb"])
def test_a_path_is_told_in_one_line_that_is_no_order_to_a_terminal(
    calotype: Calotype, root: Path, name: str
) -> None:
    keep(root, make_record([make_disk_record(active=Image(f"/vm/{name}", "qcow2"))]))
    line, *_ = [line for line in calotype("show", "web").out.splitlines() if "active" in line]
    assert line.startswith("disk disk0: active image /vm/a")
    assert line.endswith("b (qcow2)")
    assert "\x1b" not in line
    assert "\n  the command line names" in calotype("show", "web").out


def test_a_damaged_record_keeps_its_name_as_long_as_the_index_knows_it(
    calotype: Calotype, root: Path
) -> None:
    keep(root)
    (root / "vms" / VM_ID / "record.json").write_text("{")
    said = calotype("doctor", "--rebuild", "--json")
    assert (said.code, said.json["error"]["path"]) == (10, f"{root}/vms/{VM_ID}/record.json")
    assert calotype("show", "web").code == 10


def test_doctor_names_each_damaged_file(calotype: Calotype, root: Path) -> None:
    keep(root, make_record(), make_manifest(), make_manifest(id=OTHER))
    for snapshot in (SNAPSHOT, OTHER):
        (Store(root).snapshot_folder(VM_ID, snapshot) / "manifest.json").write_text("{")
    said = calotype("doctor", "--rebuild")
    assert said.code == 10
    assert [snapshot in said.err for snapshot in (SNAPSHOT, OTHER)] == [True, True]


def test_doctor_counts_what_it_found(calotype: Calotype, root: Path) -> None:
    keep(root, make_record(), make_manifest())
    assert calotype("doctor", "--rebuild").out == "the index holds 1 snapshots\n"
    assert calotype("doctor", "--rebuild", "--json").json == {"schema": 1, "snapshots": 1}
