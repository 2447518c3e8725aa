"""A job's states, what each accepts, and what is told of it."""

from collections.abc import Mapping
from typing import Any

import pytest

from calotype.qmp.server import Refusal
from calotype.service.jobs import Job, Jobs, named_job

Told = list[tuple[str, str]]


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def jobs(told: Told) -> Jobs:
    def tell(event: str, data: Mapping[str, Any]) -> None:
        assert event == "JOB_STATUS_CHANGE"
        told.append((data["id"], data["status"]))

    return Jobs(tell)


def begun(jobs: Jobs, cancelled: list[bool]) -> Job:
    job = Job("j", "system-snapshot-save", lambda: cancelled.append(True))
    jobs.add(job)
    return job


def test_one_that_succeeds(jobs: Jobs, told: Told) -> None:
    job = begun(jobs, [])
    job.done_bytes, job.expected_bytes = 10, 40
    assert jobs.infos()[0]["current-progress"] == 10
    jobs.conclude(job)
    (info,) = jobs.infos()
    assert info == {
        "id": "j",
        "type": "system-snapshot-save",
        "status": "concluded",
        "current-progress": 40,
        "total-progress": 40,
    }
    jobs.apply("job-dismiss", "j")
    assert jobs.infos() == []
    assert [status for _, status in told] == ["created", "running", "concluded", "null"]


def test_one_that_is_cancelled_is_aborting_until_it_has_ended(jobs: Jobs, told: Told) -> None:
    cancelled: list[bool] = []
    job = begun(jobs, cancelled)
    jobs.apply("job-cancel", "j")
    assert cancelled == [True]
    assert jobs.infos()[0]["status"] == "aborting"
    with pytest.raises(Refusal, match="in state 'aborting' cannot accept command verb 'cancel'"):
        jobs.apply("job-cancel", "j")
    jobs.conclude(job, "Operation canceled")
    assert jobs.infos()[0]["error"] == "Operation canceled"
    assert [status for _, status in told] == ["created", "running", "aborting", "concluded"]


@pytest.mark.parametrize("verb", ["pause", "resume", "complete", "finalize", "dismiss"])
def test_what_a_running_one_does_not_accept(jobs: Jobs, verb: str) -> None:
    begun(jobs, [])
    with pytest.raises(Refusal, match=f"in state 'running' cannot accept command verb '{verb}'"):
        jobs.apply(f"job-{verb}", "j")


@pytest.mark.parametrize("name", ["", "1", "a b", "é"])
def test_a_name_that_qemu_would_not_take(jobs: Jobs, name: str) -> None:
    with pytest.raises(Refusal, match="Invalid job ID"):
        jobs.require_free(name)


def test_a_name_is_taken_as_soon_as_it_is_reserved(jobs: Jobs) -> None:
    with jobs.reserved("j"), pytest.raises(Refusal, match="Job ID 'j' already in use"):
        jobs.require_free("j")
    jobs.require_free("j")


@pytest.mark.parametrize(
    ("command", "arguments", "name"),
    [
        ("job-cancel", {"id": "j"}, "j"),
        ("job-cancel", {"id": 1}, None),
        ("job-cancel", {}, None),
        ("block-job-cancel", {"device": "j"}, None),
        ("stop", {"id": "j"}, None),
    ],
)
def test_which_job_a_command_is_about(
    command: str, arguments: dict[str, Any], name: str | None
) -> None:
    assert named_job(command, arguments) == name
