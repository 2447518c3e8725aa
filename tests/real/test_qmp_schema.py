"""Our declarations, judged by QEMU: it refuses what we refuse, in our words, and tells types alike.

QEMU's commands are declared here as far as they are like ours, and the same arguments are given to
both. No command of QEMU's takes a `number`, so its text is read off the source alone.
"""

import itertools
import json
import subprocess
from typing import Annotated, Any, Literal

import pytest

from calotype.qmp.commands import ACTIONS, COMMANDS, EVENTS, JOB_TYPES
from calotype.qmp.introspection import merged
from calotype.qmp.schema import Branches, Choices, QmpStruct
from calotype.qmp.visiting import ParameterError, visit
from introspecting import by_name, conforms, referenced

pytestmark = [pytest.mark.qemu, pytest.mark.parametrize("qemu", ["system", "7.2"], indirect=True)]

MACHINE = ("-M", "none", "-display", "none", "-nodefaults", "-S")


@pytest.fixture
def qemu(request: pytest.FixtureRequest) -> str:
    if request.param == "7.2":
        request.getfixturevalue("qemu_7_2")
    return "qemu-system-x86_64"


def answers(qemu: str, *commands: dict[str, Any]) -> list[dict[str, Any]]:
    """What a QEMU that is started for this answers to each command; then it is ended."""
    sent = [{"execute": "qmp_capabilities"}, *commands]
    with subprocess.Popen(
        [qemu, *MACHINE, "-qmp", "stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write("\n".join(map(json.dumps, sent)))
            child.stdin.flush()
            messages = (json.loads(line) for line in child.stdout)
            replies = (each for each in messages if "return" in each or "error" in each)
            heard = list(itertools.islice(replies, len(sent)))
        finally:
            child.kill()  # `quit` would cut off what is not sent yet
    assert len(heard) == len(sent)
    return heard[1:]


# --- errors of arguments --------------------------------------------------------------------------


class SetLink(QmpStruct, frozen=True, kw_only=True):
    """set_link of qapi/net.json."""

    name: str
    up: bool


class SnapshotSave(QmpStruct, frozen=True, kw_only=True):
    """snapshot-save of qapi/migration.json."""

    job_id: str
    tag: str
    vmstate: str
    devices: tuple[str, ...]


class MonitorCommand(QmpStruct, frozen=True, kw_only=True):
    """human-monitor-command of qapi/misc.json."""

    command_line: str
    cpu_index: int | None = None


class Eject(QmpStruct, frozen=True, kw_only=True):
    """Eject of qapi/block.json."""

    exactly_one = ("device", "id")

    device: str | None = None
    id: str | None = None
    force: bool = False


Capability = Annotated[Literal["events"], Choices("MigrationCapability", "", {"events": ""})]


class CapabilityStatus(QmpStruct, frozen=True, kw_only=True):
    """MigrationCapabilityStatus of qapi/migration.json."""

    capability: Capability
    state: bool


class SetCapabilities(QmpStruct, frozen=True, kw_only=True):
    """migrate-set-capabilities of qapi/migration.json."""

    capabilities: tuple[CapabilityStatus, ...]


OobCapability = Annotated[Literal["oob"], Choices("QMPCapability", "", {"oob": ""})]


class Negotiation(QmpStruct, frozen=True, kw_only=True):
    """qmp_capabilities of qapi/control.json."""

    enable: tuple[OobCapability, ...] = ()


class Abort(QmpStruct, frozen=True, kw_only=True):
    """Abort of qapi/transaction.json."""


class BitmapAdd(QmpStruct, frozen=True, kw_only=True):
    """BlockDirtyBitmapAdd of qapi/block-core.json."""

    node: str
    name: str
    persistent: bool = False


class AbortAction(QmpStruct, frozen=True, kw_only=True, tag_field="type", tag="abort"):
    """AbortWrapper of qapi/transaction.json."""

    data: Abort


class BitmapAddAction(
    QmpStruct, frozen=True, kw_only=True, tag_field="type", tag="block-dirty-bitmap-add"
):
    """BlockDirtyBitmapAddWrapper of qapi/transaction.json."""

    data: BitmapAdd


ActionKind = Annotated[
    Literal["abort", "block-dirty-bitmap-add"],
    Choices("TransactionActionKind", "", {"abort": "", "block-dirty-bitmap-add": ""}),
]
TransactionAction = Annotated[
    AbortAction | BitmapAddAction, Branches("TransactionAction", "", ActionKind, "")
]
CompletionMode = Annotated[
    Literal["individual", "grouped"],
    Choices("ActionCompletionMode", "", {"individual": "", "grouped": ""}),
]


class Properties(QmpStruct, frozen=True, kw_only=True):
    """TransactionProperties of qapi/transaction.json."""

    completion_mode: CompletionMode = "individual"


class Transaction(QmpStruct, frozen=True, kw_only=True):
    """Transaction of qapi/transaction.json."""

    actions: tuple[TransactionAction, ...]
    properties: Properties | None = None


COMMANDS_OF_QEMU: dict[str, type[QmpStruct]] = {
    "set_link": SetLink,
    "snapshot-save": SnapshotSave,
    "human-monitor-command": MonitorCommand,
    "eject": Eject,
    "migrate-set-capabilities": SetCapabilities,
    "qmp_capabilities": Negotiation,
    "transaction": Transaction,
}

ABORT: dict[str, Any] = {"type": "abort", "data": {}}
SAVE = {"job-id": "j", "tag": "t", "vmstate": "v"}


def bitmap(**data: Any) -> dict[str, Any]:
    return {"type": "block-dirty-bitmap-add", "data": data}


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("set_link", {}),
    ("set_link", {"name": "x"}),
    ("set_link", {"name": 1, "up": True}),
    ("set_link", {"name": None, "up": True}),
    ("set_link", {"name": [], "up": True}),
    ("set_link", {"name": "x", "up": "on"}),
    ("set_link", {"name": "x", "up": 1}),
    ("set_link", {"name": "x", "up": None}),
    ("set_link", {"name": "x", "up": True, "down": 1}),
    ("set_link", {"name": "x", "up": True, "": 1}),
    ("set_link", {"name": "x", "up": True, "%s {name} 'ü\n": 1}),
    ("snapshot-save", SAVE),
    ("snapshot-save", {**SAVE, "devices": "a"}),
    ("snapshot-save", {**SAVE, "devices": None}),
    ("snapshot-save", {**SAVE, "devices": [3]}),
    ("snapshot-save", {**SAVE, "devices": ["a", {}]}),
    ("snapshot-save", {**SAVE, "devices": ["a", ["b"]]}),
    ("human-monitor-command", {"command-line": "help", "cpu-index": 0.5}),
    ("human-monitor-command", {"command-line": "help", "cpu-index": 1.0}),
    ("human-monitor-command", {"command-line": "help", "cpu-index": True}),
    ("human-monitor-command", {"command-line": "help", "cpu-index": None}),
    ("human-monitor-command", {"command-line": "help", "cpu-index": 2**63}),
    ("human-monitor-command", {"command-line": "help", "cpu-index": -(2**63) - 1}),
    ("human-monitor-command", {"command-line": "help", "cpu-index": 2**70}),
    ("human-monitor-command", {"command_line": "help"}),
    ("eject", {}),
    ("eject", {"force": True}),
    ("eject", {"device": "a", "id": "b"}),
    ("eject", {"device": "a", "id": "b", "more": 1}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "events"}]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "%s", "state": True}]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "", "state": True}]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": 3, "state": True}]}),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "events", "state": True, "more": None}]},
    ),
    ("qmp_capabilities", {"enable": ["no"]}),
    ("qmp_capabilities", {"enable": ["oob", 3]}),
    ("transaction", {}),
    ("transaction", {"actions": {}}),
    ("transaction", {"actions": [3]}),
    ("transaction", {"actions": [None]}),
    ("transaction", {"actions": [[]]}),
    ("transaction", {"actions": [ABORT, {}]}),
    ("transaction", {"actions": [{"data": {}}]}),
    ("transaction", {"actions": [{"type": None, "data": {}}]}),
    ("transaction", {"actions": [{"type": 1, "data": {}}]}),
    ("transaction", {"actions": [ABORT, {"type": "no", "data": {}}]}),
    ("transaction", {"actions": [ABORT, {"type": "abort"}]}),
    ("transaction", {"actions": [{**ABORT, "more": 1}]}),
    ("transaction", {"actions": [{"type": "abort", "data": {"more": 1}}]}),
    ("transaction", {"actions": [{"type": "abort", "data": 3}]}),
    ("transaction", {"actions": [ABORT, bitmap(node="n")]}),
    ("transaction", {"actions": [bitmap(node="n", name="b", persistent="x")]}),
    ("transaction", {"actions": [bitmap(node="n", name="b", more={})]}),
    ("transaction", {"actions": [], "properties": {"completion-mode": "x"}}),
    ("transaction", {"actions": [], "properties": {"more": "x"}}),
    ("transaction", {"actions": [], "properties": []}),
    ("transaction", {"actions": [{**ABORT, "more": 1}, 3], "properties": [], "more": 1}),
]
"""Commands and arguments that both refuse; each has one fault, or faults that QEMU has in order."""


def refusal(declared: type[QmpStruct], arguments: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ParameterError) as raised:
        visit(declared, arguments)
    return {"class": "GenericError", "desc": raised.value.problem}


def test_arguments_are_refused_in_the_words_of_qemu(qemu: str) -> None:
    asked = [{"execute": name, "arguments": arguments} for name, arguments in REFUSED]
    expected = [refusal(COMMANDS_OF_QEMU[name], arguments) for name, arguments in REFUSED]
    replies = answers(qemu, *asked)
    told = [(*case, reply["error"]) for case, reply in zip(REFUSED, replies, strict=True)]
    assert told == [(*case, error) for case, error in zip(REFUSED, expected, strict=True)]


def test_what_is_accepted_qemu_does_not_refuse_for_its_arguments(qemu: str) -> None:
    """It refuses because there is no such thing, which is not said in the words above."""
    accepted: list[tuple[str, dict[str, Any]]] = [
        ("set_link", {"name": "", "up": False}),
        ("eject", {"device": "a"}),
        ("eject", {"id": "b"}),
        ("snapshot-save", {**SAVE, "devices": []}),
        ("transaction", {"actions": [bitmap(node="n", name="b")], "properties": {}}),
        ("migrate-set-capabilities", {"capabilities": []}),
    ]
    asked = [{"execute": name, "arguments": arguments} for name, arguments in accepted]
    for (name, arguments), reply in zip(accepted, answers(qemu, *asked), strict=True):
        visit(COMMANDS_OF_QEMU[name], arguments)
        desc = reply.get("error", {}).get("desc", "")
        assert not desc.startswith(("Parameter ", "Invalid parameter type", "Need exactly")), name


# --- introspection --------------------------------------------------------------------------------


def qemu_schema(qemu: str) -> list[dict[str, Any]]:
    (reply,) = answers(qemu, {"execute": "query-qmp-schema"})
    entities = reply["return"]
    assert isinstance(entities, list)
    return entities


def test_every_name_that_is_referenced_is_in_the_merged_schema_once(qemu: str) -> None:
    before = qemu_schema(qemu)
    entities = merged(before)
    named = by_name(entities)
    assert {name for each in entities for name in referenced(each)} <= named.keys()
    assert by_name(before).keys() < named.keys()
    assert {*COMMANDS, *EVENTS} <= named.keys()


def test_the_merged_schema_is_what_qemu_says_that_a_schema_is(qemu: str) -> None:
    before = by_name(qemu_schema(qemu))
    returned = before["query-qmp-schema"]["ret-type"]
    after = merged(before.values())
    assert conforms(after, returned, before)
    assert not conforms([*after, {"name": "x", "meta-type": "command"}], returned, before)


def test_a_transaction_of_qemus_takes_our_action_as_well(qemu: str) -> None:
    before = qemu_schema(qemu)
    example: dict[str, Any] = {"job-id": "j", "tag": "t", "destination": {"type": "none"}}
    ours = {"actions": [ABORT, {"type": "machine-state-save", "data": example}]}
    assert not conforms(ours, argument(by_name(before), "transaction"), by_name(before))
    after = by_name(merged(before))
    assert conforms(ours, argument(after, "transaction"), after)
    del example["tag"]
    assert not conforms(ours, argument(after, "transaction"), after)


def argument(schema: dict[str, Any], command: str) -> str:
    return str(schema[command]["arg-type"])


def test_of_qemus_own_only_the_actions_and_the_types_of_jobs_grow(qemu: str) -> None:
    before = qemu_schema(qemu)
    after = by_name(merged(before))
    grown = [each for each in before if after[each["name"]] != each]
    assert sorted(each["meta-type"] for each in grown) == ["enum", "enum", "object"]
    added = set()
    for each in grown:
        now = after[each["name"]]
        if each["meta-type"] == "enum":
            assert now["values"][: len(each["values"])] == each["values"]
            assert now["members"][: len(each["members"])] == each["members"]
            added |= set(now["values"]) - set(each["values"])
        else:
            assert now["variants"][: len(each["variants"])] == each["variants"]
    assert added == {*ACTIONS, *JOB_TYPES}


def test_a_job_of_ours_is_one_that_query_jobs_may_list(qemu: str) -> None:
    after = by_name(merged(qemu_schema(qemu)))
    job = {"id": "j", "status": "running", "current-progress": 1, "total-progress": 2}
    listed = [{**job, "type": each} for each in (*JOB_TYPES, "snapshot-save")]
    assert conforms(listed, after["query-jobs"]["ret-type"], after)
    assert not conforms([{**job, "type": "other"}], after["query-jobs"]["ret-type"], after)
