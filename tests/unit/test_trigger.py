"""What a trigger makes of what it hears, and when it kills."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from airflow.sdk.execution_time.xcom import XCom

from durable_spark.jobs import BadConfiguration, JobRef, JobState, Submission
from durable_spark.triggers import feed as feed_module
from durable_spark.triggers import job as trigger_module
from durable_spark.triggers.job import JobEvent, JobTrigger, JobTriggerArguments
from tests.unit import tries
from tests.unit.tries import Service

TOKEN = "0123456789abcdef" * 2
HOOK = "tests.unit.tries.MemoryHook"


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(tries, "service", Service())
    monkeypatch.setattr(feed_module, "_NEWCOMER_PAUSE", 0.01)
    tries.service.add(TOKEN)
    return tries.service


@pytest.fixture(autouse=True)
def airflow(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Airflow would say: the state of the task instance, and the XCom of the try in charge."""
    said: dict[str, Any] = {"state": "deferred", "try": {"token": TOKEN, "ti_id": "this"}, "pushed": {}}

    async def get(**_: Any) -> Any:
        if isinstance(said["try"], Exception):
            raise said["try"]
        return said["try"]

    async def push(*, key: str, value: Any, **_: Any) -> None:
        said["pushed"][key] = value

    def state_of(**_: Any) -> Any:
        if isinstance(said["state"], Exception):
            raise said["state"]
        return said["state"]

    monkeypatch.setattr(XCom, "aget_one", get)
    monkeypatch.setattr(XCom, "aset", push)
    monkeypatch.setattr(trigger_module, "state_of", state_of)
    return said


def trigger(**arguments: Any) -> JobTrigger:
    defaults: dict[str, Any] = {
        "hook": HOOK,
        "conn_id": "memory",
        "cluster": ("service://one",),
        "job": JobRef("job-1"),
        "submission": Submission(token=TOKEN),
        "dag_id": "dag",
        "run_id": "run",
        "task_id": "task",
        "map_index": -1,
        "ti_id": "this",
        "interval": 0.01,
    }
    return JobTrigger(JobTriggerArguments(**{**defaults, **arguments}).to_json())


async def event(of: JobTrigger) -> JobEvent:
    async for fired in of.run():
        assert json.loads(json.dumps(fired.payload)) == fired.payload
        return JobEvent.from_json(fired.payload)
    raise AssertionError("no event")


@pytest.fixture
async def later() -> AsyncIterator[Callable[[Callable[[], Any]], None]]:
    """Do something when the trigger has been running for a moment."""
    tasks: list[asyncio.Task[None]] = []

    async def do(what: Callable[[], Any]) -> None:
        await asyncio.sleep(0.05)
        what()

    yield lambda what: tasks.append(asyncio.create_task(do(what)))
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.KILLED])
async def test_the_verdict_is_the_clusters(service: Service, later: Any, state: JobState) -> None:
    later(lambda: setattr(service.jobs["job-1"], "state", state))
    fired = await asyncio.wait_for(event(trigger()), 5)
    assert (fired.kind, fired.job.id, fired.token, fired.state) == (state.value, "job-1", TOKEN, state.name)


async def test_an_unknown_job_is_lost_never_a_success(service: Service, later: Any) -> None:
    later(service.jobs.clear)
    assert (await asyncio.wait_for(event(trigger()), 5)).kind == "lost"


async def test_no_event_earlier_than_allowed(service: Service) -> None:
    service.jobs["job-1"].state = JobState.SUCCEEDED
    began = time.monotonic()
    assert (await event(trigger(quiet=0.3))).kind == "succeeded"
    assert time.monotonic() - began >= 0.3


async def test_an_outage_is_given_up_after_its_time(service: Service) -> None:
    service.unreachable = True
    fired = await asyncio.wait_for(event(trigger(outage_timeout=0.1)), 5)
    assert fired.kind == "outage"
    assert "does not answer" in fired.message


async def test_a_relaunched_job_is_followed_under_its_new_id(service: Service, later: Any) -> None:
    def relaunch() -> None:
        service.jobs["job-1"].state = JobState.RELAUNCHED
        service.add(TOKEN, state=JobState.SUCCEEDED)

    later(relaunch)
    fired = await asyncio.wait_for(event(trigger()), 5)
    assert (fired.kind, fired.job.id) == ("succeeded", "job-2")


async def test_a_successor_that_cannot_be_told_yet_is_waited_for(service: Service, later: Any) -> None:
    service.jobs["job-1"].state = JobState.RELAUNCHED
    later(lambda: service.add(TOKEN, state=JobState.FAILED))
    assert (await asyncio.wait_for(event(trigger()), 5)).job.id == "job-2"


async def test_a_double_of_a_submission_sent_twice_is_killed(service: Service, later: Any) -> None:
    service.add(TOKEN)

    def end() -> None:
        assert service.kills == ["job-2"]
        service.jobs["job-1"].state = JobState.SUCCEEDED

    later(end)
    assert (await asyncio.wait_for(event(trigger(sent_before=True)), 5)).kind == "succeeded"


async def test_links_are_kept_up_to_date(service: Service, airflow: dict[str, Any]) -> None:
    service.jobs["job-1"].state = JobState.SUCCEEDED
    await event(trigger())
    assert airflow["pushed"] == {"durable_spark_job_link": "http://service/job-1"}


class TestDeadline:
    async def test_kills_and_sees_dead(self, service: Service) -> None:
        fired = await asyncio.wait_for(event(trigger(deadline=time.time() + 0.1)), 5)
        assert (fired.kind, fired.confirmed, fired.state) == ("timeout", True, "KILLED")
        assert service.kills == ["job-1"]

    async def test_that_has_passed_already_is_kept(self, service: Service) -> None:
        fired = await asyncio.wait_for(event(trigger(deadline=time.time() - 100)), 5)
        assert (fired.kind, fired.confirmed) == ("timeout", True)

    async def test_a_job_that_ended_in_time_has_ended(self, service: Service) -> None:
        service.jobs["job-1"].state = JobState.SUCCEEDED
        fired = await asyncio.wait_for(event(trigger(deadline=time.time() - 100)), 5)
        assert fired.kind == "succeeded"

    async def test_another_try_in_charge_is_left_alone(self, service: Service, airflow: dict[str, Any]) -> None:
        airflow["try"] = {"token": TOKEN, "ti_id": "another"}
        fired = await asyncio.wait_for(event(trigger(deadline=time.time() + 0.05)), 5)
        assert (fired.kind, fired.confirmed, service.kills) == ("timeout", False, [])

    async def test_unreadable_is_left_to_the_worker(self, service: Service, airflow: dict[str, Any]) -> None:
        airflow["try"] = RuntimeError("the API server is away")
        fired = await asyncio.wait_for(event(trigger(deadline=time.time() + 0.05)), 5)
        assert (fired.kind, fired.confirmed, service.kills) == ("timeout", False, [])

    async def test_kept_if_so_asked(self, service: Service) -> None:
        fired = await asyncio.wait_for(event(trigger(deadline=time.time() + 0.05, kill_on_timeout=False)), 5)
        assert (fired.kind, service.kills) == ("timeout", [])

    async def test_another_cluster_gets_no_kill(self, service: Service) -> None:
        later_names = ("service://two",)
        service.names = later_names
        fired = await asyncio.wait_for(event(trigger(deadline=time.time() + 0.05)), 5)
        assert (fired.kind, fired.confirmed, service.kills) == ("timeout", False, [])
        assert "another cluster" in fired.message


class TestOnKill:
    @pytest.mark.parametrize("state", ["failed", "success", "skipped", "removed", None])
    async def test_kills_when_a_person_has_ended_the_task(
        self, service: Service, airflow: dict[str, Any], state: str | None
    ) -> None:
        airflow["state"] = state
        await trigger().on_kill()
        assert service.kills == ["job-1"]

    @pytest.mark.parametrize(
        "state", ["deferred", "running", "queued", "scheduled", "up_for_retry", "restarting", RuntimeError("away")]
    )
    async def test_kills_on_nothing_else(self, service: Service, airflow: dict[str, Any], state: Any) -> None:
        airflow["state"] = state
        await trigger().on_kill()
        assert service.kills == []

    async def test_keeps_if_so_asked(self, service: Service, airflow: dict[str, Any]) -> None:
        airflow["state"] = "failed"
        await trigger(kill=False).on_kill()
        assert service.kills == []


class TestArguments:
    def test_are_plain_json(self) -> None:
        path, arguments = trigger().serialize()
        assert path == f"{JobTrigger.__module__}.{JobTrigger.__qualname__}"
        assert json.loads(json.dumps(arguments)) == arguments
        assert JobTrigger(**arguments).serialize() == (path, arguments)

    def test_keys_of_a_newer_version_are_ignored(self) -> None:
        arguments = trigger().arguments
        assert JobTrigger({**arguments, "v": 2, "surprise": 1})._args == trigger()._args

    @pytest.mark.parametrize("path", ["os.path.join", "subprocess.Popen", "no.such.Hook", "durable_spark.jobs.JobRef"])
    async def test_the_hook_must_be_one(self, path: str) -> None:
        with pytest.raises(BadConfiguration, match="hook"):
            await event(trigger(hook=path))


@pytest.mark.parametrize("value", [None, "success", [], {}, {"kind": "fine"}, {"kind": "succeeded", "job_id": 1}])
def test_what_is_no_event_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not an event"):
        JobEvent.from_json(value)


def test_an_event_is_small() -> None:
    told = JobEvent(kind="failed", job=JobRef("job-1"), token=TOKEN, message="x" * 100_000)
    assert len(json.dumps(told.to_json())) < 2000
