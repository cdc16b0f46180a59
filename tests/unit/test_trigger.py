"""What a trigger makes of what it hears, and when it kills."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import TaskInstanceState
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
from airflow.sdk.execution_time.xcom import XCom

from dev.processes import wait_until_async
from durable_spark.jobs import (
    ENDED_BY_A_PERSON,
    TRY_XCOM_KEY,
    AuthenticationFailed,
    BadConfiguration,
    ClusterUnreachable,
    Found,
    JobRef,
    JobState,
    JobStatus,
    Link,
    RequestRefused,
    Submission,
    SubmissionUncertain,
)
from durable_spark.triggers import feed as feed_module
from durable_spark.triggers import job as trigger_module
from durable_spark.triggers.job import (
    NOTE_XCOM_KEY,
    JobEvent,
    JobTrigger,
    JobTriggerArguments,
    SubmissionTrigger,
    noted_end,
    state_of,
)
from tests.unit import tries
from tests.unit.tries import Job, Service

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

    def get(*, key: str, **_: Any) -> Any:
        if key != TRY_XCOM_KEY:
            return said["pushed"].get(key)
        if isinstance(said["try"], Exception):
            raise said["try"]
        return said["try"]

    def push(*, key: str, value: Any, **_: Any) -> None:
        if said.get("deaf"):
            raise said["deaf"]
        said["pushed"][key] = value

    async def aget(**asked: Any) -> Any:
        said["cut_off_able"] = True
        return get(**asked)

    async def apush(**asked: Any) -> None:
        said["cut_off_able"] = True
        push(**asked)

    def state_of(**_: Any) -> Any:
        if isinstance(said["state"], Exception):
            raise said["state"]
        return said["state"]

    monkeypatch.setattr(XCom, "get_one", get)
    monkeypatch.setattr(XCom, "set", push)
    monkeypatch.setattr(XCom, "aget_one", aget)
    monkeypatch.setattr(XCom, "aset", apush)
    monkeypatch.setattr(trigger_module, "state_of", state_of)
    return said


def trigger(kind: Any = JobTrigger, **arguments: Any) -> Any:
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
    return kind(JobTriggerArguments(**{**defaults, **arguments}).to_json())


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


async def test_a_successor_that_is_never_found_is_given_up_like_an_outage(service: Service) -> None:
    """The page of its worker is gone for good, perhaps: it is not lost, nor is it waited for without end."""
    service.jobs["job-1"].state = JobState.RELAUNCHED
    fired = await asyncio.wait_for(event(trigger(outage_timeout=0.3)), 5)
    assert (fired.kind, fired.job.id) == ("outage", "job-1")
    assert "successor could not be found" in fired.message


async def test_a_double_of_a_submission_sent_twice_is_killed(service: Service, later: Any) -> None:
    service.add(TOKEN)

    def end() -> None:
        assert service.kills == ["job-2"]
        service.jobs["job-1"].state = JobState.SUCCEEDED

    later(end)
    assert (await asyncio.wait_for(event(trigger(sent_before=True)), 5)).kind == "succeeded"
    assert service.releases == ["job-2"]


async def test_a_double_that_comes_late_is_seen_at_the_end(service: Service, later: Any) -> None:
    """Its sender was suspended, and woke up when the first look was over."""

    def end() -> None:
        service.add(TOKEN)
        service.jobs["job-1"].state = JobState.SUCCEEDED

    later(end)
    told = trigger(sent_before=True, interval=1e-9)
    assert (await asyncio.wait_for(event(told), 5)).kind == "succeeded"
    assert service.kills == ["job-2"]


async def test_links_are_kept_up_to_date(service: Service, airflow: dict[str, Any]) -> None:
    service.jobs["job-1"].state = JobState.SUCCEEDED
    await event(trigger())
    assert airflow["pushed"] == {"durable_spark_job_link": "http://service/job-1"}


async def test_a_double_that_ended_first_does_not_speak_for_the_job(service: Service) -> None:
    """The older job is the one that is meant; what became of ours is not its end."""
    service.jobs["job-1"].state = JobState.FAILED
    service.add(TOKEN, state=JobState.SUCCEEDED)
    told = trigger(job=JobRef("job-2"), sent_before=True, interval=1e-9)
    fired = await asyncio.wait_for(event(told), 5)
    assert (fired.kind, fired.job.id) == ("failed", "job-1")


async def test_a_job_that_was_one_too_many_undoes_no_end(service: Service) -> None:
    service.jobs["job-1"].state = JobState.KILLED
    service.add(TOKEN, state=JobState.SUCCEEDED)
    fired = await asyncio.wait_for(event(trigger(job=JobRef("job-2"), sent_before=True)), 5)
    assert (fired.kind, fired.job.id) == ("succeeded", "job-2")


async def test_nor_does_it_speak_for_a_job_that_is_gone(service: Service) -> None:
    service.jobs["job-1"] = Job("", "", JobState.ABSENT)
    service.add(TOKEN, state=JobState.KILLED)
    fired = await asyncio.wait_for(event(trigger(sent_before=True, interval=0.02)), 5)
    assert (fired.kind, fired.job.id) == ("lost", "job-1")


@pytest.mark.parametrize("end", [JobState.FAILED, JobState.KILLED])
async def test_a_bad_end_is_told_when_it_can_be_told_whether_there_is_a_double(
    service: Service, later: Any, end: JobState
) -> None:
    """Else the next try would submit beside it."""
    service.add(TOKEN, state=end)
    service.find_error = SubmissionUncertain("queued")

    def told() -> None:
        service.find_error = None
        service.jobs["job-1"].state = JobState.SUCCEEDED

    later(told)
    fired = await asyncio.wait_for(event(trigger(job=JobRef("job-2"), sent_before=True, interval=0.02)), 5)
    assert (fired.kind, fired.job.id) == ("succeeded", "job-1")


async def test_a_success_waits_until_it_can_be_told_whether_there_is_a_double(
    service: Service, later: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in the queue shows whose it is when it gets the place of ours; it would run beside what comes next."""
    find, told = tries.MemoryHook.find, False

    async def queued(self: tries.MemoryHook, submission: Submission) -> Any:
        found = await find(self, submission)
        assert isinstance(found, Found)
        return found if told else dataclasses.replace(found, younger=(), untold=SubmissionUncertain("queued"))

    def launch() -> None:
        nonlocal told
        told = True
        assert service.kills == []

    monkeypatch.setattr(tries.MemoryHook, "find", queued)
    service.jobs["job-1"].state = JobState.SUCCEEDED
    service.add(TOKEN)
    later(launch)
    fired = await asyncio.wait_for(event(trigger(sent_before=True, interval=0.02)), 5)
    assert (fired.kind, fired.job.id) == ("succeeded", "job-1")
    assert service.running == []


@pytest.mark.parametrize("ends", ["patience", "outage_timeout", "deadline"])
async def test_but_it_counts_in_the_end(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ends: str
) -> None:
    arguments: dict[str, Any] = {}
    if ends == "patience":
        monkeypatch.setattr(trigger_module, "_SUCCESS_WAITS", 0.2)
    else:
        arguments[ends] = 0.2 if ends == "outage_timeout" else time.time() + 0.2
    service.jobs["job-1"].state = JobState.SUCCEEDED
    service.find_error = SubmissionUncertain("queued")
    fired = await asyncio.wait_for(event(trigger(sent_before=True, interval=0.02, **arguments)), 5)
    assert (fired.kind, fired.job.id) == ("succeeded", "job-1")
    said = capsys.readouterr().out
    assert "job-1 has succeeded; whether its submission has a second job could not be told: one may run yet" in said


async def test_also_for_a_triggerer_that_takes_over_when_it_is_forgotten(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_back, looks = asyncio.Event(), 0

    async def queued(self: tries.MemoryHook, submission: Submission) -> Any:
        nonlocal looks
        looks += 1
        if looks > 1:
            held_back.set()
        raise SubmissionUncertain("queued")

    monkeypatch.setattr(tries.MemoryHook, "find", queued)
    service.jobs["job-1"].state = JobState.SUCCEEDED
    first = asyncio.create_task(event(trigger(sent_before=True, interval=0.02)))
    await asyncio.wait_for(held_back.wait(), 5)
    first.cancel()
    await asyncio.wait([first])
    service.jobs["job-1"] = Job("", "", JobState.ABSENT)
    fired = await asyncio.wait_for(event(trigger(sent_before=True, interval=0.02)), 5)
    assert (fired.kind, fired.job.id) == ("succeeded", "job-1")


async def test_a_double_of_which_nothing_can_be_told_is_given_up_like_an_outage(service: Service) -> None:
    service.add(TOKEN, state=JobState.FAILED)
    service.find_error = SubmissionUncertain("queued")
    told = trigger(job=JobRef("job-2"), sent_before=True, interval=0.02, outage_timeout=0.2)
    fired = await asyncio.wait_for(event(told), 5)
    assert (fired.kind, fired.job.id) == ("outage", "job-2")
    assert "second job could not be told" in fired.message


async def test_the_deadline_counts_while_an_end_waits_for_word(service: Service) -> None:
    service.add(TOKEN)
    service.jobs["job-1"].state = JobState.FAILED
    service.find_error = SubmissionUncertain("a worker's page is out of reach")
    told = trigger(sent_before=True, deadline=time.time() + 0.3)
    fired = await asyncio.wait_for(event(told), 5)
    assert (fired.kind, fired.confirmed) == ("timeout", False)


async def test_a_failure_does_not_count_when_a_double_can_never_be_told(service: Service) -> None:
    """The retry says so, and does not submit."""
    service.jobs["job-1"].state = JobState.FAILED
    service.find_error = SubmissionUncertain("its worker is gone", permanent=True)
    fired = await asyncio.wait_for(event(trigger(sent_before=True, interval=0.02, outage_timeout=0.2)), 5)
    assert fired.kind == "outage"


async def test_no_word_of_the_job_is_given_up_like_an_outage(service: Service) -> None:
    service.jobs["job-1"].state = JobState.UNKNOWN
    fired = await asyncio.wait_for(event(trigger(outage_timeout=0.3)), 5)
    assert (fired.kind, "could not tell what has become of it" in fired.message) == ("outage", True)


async def test_a_triggerer_that_was_stopped_for_long_looks_first(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the model: the last word that it has of the job is hours old."""
    hours, slept, changed = 0.0, 0, feed_module.Subscription.changed
    monkeypatch.setattr(trigger_module, "time", SimpleNamespace(time=lambda: time.time() + 3600 * hours))
    service.jobs["job-1"].state = JobState.UNKNOWN

    async def stopped(self: Any, timeout: float | None) -> bool:
        nonlocal hours, slept
        slept += 1
        if slept == 3:
            hours, service.jobs["job-1"].state = 2.0, JobState.SUCCEEDED
            return True
        return await changed(self, timeout)

    monkeypatch.setattr(feed_module.Subscription, "changed", stopped)
    assert (await asyncio.wait_for(event(trigger()), 5)).kind == "succeeded"


async def test_a_start_that_was_given_up_in_vain_does_not_make_a_loss_a_failure(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill is not answered, for the cluster is away; a node has come, and the job runs for hours."""
    service.jobs["job-1"] = Job(TOKEN, "", JobState.PENDING, "no node", time.time() - 1000)

    async def kill(*_: Any) -> None:
        service.jobs["job-1"] = Job(TOKEN, "", JobState.RUNNING)
        raise ClusterUnreachable("connection refused")

    narrate = trigger_module._Narrator.status

    async def vanish(self: Any, status: JobStatus, **more: Any) -> None:
        await narrate(self, status, **more)
        if status.state is JobState.RUNNING:
            service.jobs["job-1"] = Job("", "", JobState.ABSENT)

    monkeypatch.setattr(tries.MemoryHook, "kill", kill)
    monkeypatch.setattr(trigger_module._Narrator, "status", vanish)
    assert (await asyncio.wait_for(event(trigger(start_timeout=900.0)), 5)).kind == "lost"


@pytest.mark.parametrize("how", ["relaunched", "double"])
async def test_marked_failed_no_job_of_the_submission_lives_on(
    service: Service, airflow: dict[str, Any], how: str
) -> None:
    service.add(TOKEN)
    if how == "relaunched":
        service.jobs["job-1"].state = JobState.RELAUNCHED
    airflow["state"] = "failed"
    await trigger(sent_before=how == "double").on_kill()
    assert service.running == []


@pytest.mark.parametrize("sent_before", [False, True])
async def test_marked_failed_while_others_cannot_be_told_the_job_is_killed(
    service: Service, airflow: dict[str, Any], monkeypatch: pytest.MonkeyPatch, sent_before: bool
) -> None:
    monkeypatch.setattr(trigger_module, "_OTHERS_FOUND_WITHIN", 0.05)
    monkeypatch.setattr(trigger_module, "_ON_KILL_BOUND", 1.0)
    monkeypatch.setattr(tries.MemoryHook, "find", hang)
    airflow["state"] = "failed"
    await asyncio.wait_for(trigger(sent_before=sent_before).on_kill(), 5)
    assert service.running == []
    assert (service.kills == ["job-1"]) is not sent_before, "only what may have another is looked at again"


@pytest.mark.parametrize("kind", [JobTrigger, SubmissionTrigger])
@pytest.mark.parametrize(
    "doubt", [SubmissionUncertain("queued"), ClusterUnreachable("away"), RequestRefused("not read yet"), None]
)
async def test_marked_failed_it_looks_until_it_can_tell_whether_a_late_request_made_another(
    service: Service, airflow: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: Any, doubt: Exception | None
) -> None:
    """``None``: the first look finds one, and another that it cannot tell yet."""
    service.add(TOKEN)
    find, looks = tries.MemoryHook.find, 0

    async def not_yet(self: tries.MemoryHook, submission: Submission) -> Any:
        nonlocal looks
        looks += 1
        if looks > 2:
            return await find(self, submission)
        if doubt is not None:
            raise doubt
        status = JobStatus(job=JobRef("job-1"), state=JobState.RUNNING)
        return Found(status=status, untold=SubmissionUncertain("job-2 is being launched"))

    monkeypatch.setattr(tries.MemoryHook, "find", not_yet)
    airflow["state"] = "failed"
    await asyncio.wait_for(trigger(kind, sent_before=True).on_kill(), 20)
    assert (looks, service.running) == (3, [])


@pytest.mark.parametrize("permanent", [False, True])
async def test_marked_failed_it_says_what_it_could_not_tell(
    service: Service,
    airflow: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    permanent: bool,
) -> None:
    monkeypatch.setattr(trigger_module, "_ON_KILL_BOUND", 1.0)
    service.find_error = SubmissionUncertain("its log has been removed", permanent=permanent)
    airflow["state"] = "failed"
    await asyncio.wait_for(trigger(sent_before=True).on_kill(), 20)
    assert service.running == []
    said = capsys.readouterr().out
    assert f"Whether a job of token {TOKEN} still runs cannot be told: its log has been removed" in said
    assert "may still run" not in said


async def test_a_doubt_of_earlier_is_not_held_against_a_later_one(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is not known for a while, runs for an hour, and fails; a second one cannot be told at either end."""
    hours, ends = 0.0, 0
    monkeypatch.setattr(trigger_module, "time", SimpleNamespace(time=lambda: time.time() + 3600 * hours))
    service.jobs["job-1"] = Job("", "", JobState.ABSENT)
    service.find_error = SubmissionUncertain("queued")
    end, narrate = JobTrigger._end, trigger_module._Narrator.status

    async def untold(self: Any, subscription: Any, status: JobStatus) -> Any:
        nonlocal ends
        ends += 1
        outcome = await end(self, subscription, status)
        if ends == 1:
            assert status.state is JobState.ABSENT
            service.jobs["job-1"] = Job(TOKEN, "", JobState.RUNNING)
        elif ends == 5:
            service.find_error = None
        return outcome

    async def known_again(self: Any, status: JobStatus, **more: Any) -> None:
        nonlocal hours
        await narrate(self, status, **more)
        if status.state is JobState.RUNNING:
            hours, service.jobs["job-1"].state = 1.0, JobState.FAILED

    monkeypatch.setattr(JobTrigger, "_end", untold)
    monkeypatch.setattr(trigger_module._Narrator, "status", known_again)
    told = trigger(sent_before=True, interval=0.02, outage_timeout=3000.0)
    fired = await asyncio.wait_for(event(told), 5)
    assert (fired.kind, fired.job.id) == ("failed", "job-1")


async def test_a_failure_is_told_when_a_younger_double_is_dead(service: Service, later: Any) -> None:
    service.jobs["job-1"].state = JobState.FAILED
    service.add(TOKEN)
    service.outlives_kills = True

    def dies() -> None:
        assert service.running == ["job-2"]
        service.jobs["job-2"].state = JobState.KILLED

    later(dies)
    fired = await asyncio.wait_for(event(trigger(sent_before=True, interval=0.02)), 5)
    assert (fired.kind, fired.job.id, service.running) == ("failed", "job-1", [])
    assert "job-2" in service.kills


async def test_the_younger_double_of_a_lost_job_is_killed(service: Service) -> None:
    service.jobs["job-1"].state = JobState.ABSENT
    service.add(TOKEN)
    fired = await asyncio.wait_for(event(trigger(sent_before=True, interval=0.02)), 5)
    assert (fired.kind, fired.job.id, service.running) == ("lost", "job-1", [])


async def test_a_double_that_cannot_be_killed_is_not_followed(
    service: Service, later: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trigger_module, "_SUCCESS_WAITS", 0.2)
    service.add(TOKEN)

    def refuse() -> None:
        service.jobs["job-1"].state = JobState.SUCCEEDED
        raise RequestRefused("no")

    service.before_kill = refuse
    fired = await asyncio.wait_for(event(trigger(job=JobRef("job-2"), sent_before=True)), 5)
    assert (fired.kind, fired.job.id) == ("succeeded", "job-1")


async def hang(*_: Any) -> None:
    await asyncio.sleep(60)


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

    @pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
    async def test_a_job_that_ends_by_itself_in_the_same_second_counts_by_its_end(
        self, service: Service, state: JobState
    ) -> None:
        service.before_kill = lambda: setattr(service.jobs["job-1"], "state", state)
        fired = await asyncio.wait_for(event(trigger(deadline=time.time() + 0.05)), 5)
        assert (fired.kind, fired.state, service.kills) == (state.value, state.name, ["job-1"])

    @pytest.mark.parametrize("state", [JobState.FAILED, JobState.KILLED])
    async def test_what_ended_while_no_triggerer_ran_has_ended(self, service: Service, state: JobState) -> None:
        service.jobs["job-1"].state = state
        fired = await asyncio.wait_for(event(trigger(deadline=time.time() - 100)), 5)
        assert (fired.kind, service.kills) == (state.value, [])

    async def test_what_was_lost_while_no_triggerer_ran_was_not_killed(self, service: Service) -> None:
        service.jobs.clear()
        fired = await asyncio.wait_for(event(trigger(deadline=time.time() - 100)), 5)
        assert (fired.kind, service.kills) == ("lost", [])

    async def test_no_word_at_all_does_not_stop_it(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        async def silent(self: Any, jobs: Any) -> Any:
            await asyncio.sleep(60)

        monkeypatch.setattr(trigger_module, "_KILL_CONFIRMED_WITHIN", 0.1)
        monkeypatch.setattr(tries.MemoryHook, "poll", silent)
        fired = await asyncio.wait_for(event(trigger(deadline=time.time() - 100)), 5)
        assert (fired.kind, fired.confirmed, fired.message) == ("timeout", False, "killed, not yet seen dead")
        assert service.kills == ["job-1"]

    async def test_says_that_the_kill_was_not_answered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trigger_module, "_KILL_CONFIRMED_WITHIN", 0.1)
        monkeypatch.setattr(tries.MemoryHook, "kill", hang)
        fired = await asyncio.wait_for(event(trigger(deadline=time.time() + 0.05)), 5)
        assert (fired.kind, fired.message) == ("timeout", "the kill was not accepted: no answer within 0 s")

    @pytest.mark.parametrize("forgotten", [False, True])
    async def test_follows_a_successor(self, service: Service, forgotten: bool) -> None:
        def relaunch() -> None:
            service.before_kill, service.outlives_kills = die, True
            service.jobs["job-1"].state = JobState.RELAUNCHED
            if forgotten:
                service.jobs["job-1"] = Job("", "", JobState.ABSENT)
            service.add(TOKEN)

        def die() -> None:
            service.outlives_kills = False

        service.before_kill = relaunch
        fired = await asyncio.wait_for(event(trigger(deadline=time.time() + 0.05)), 5)
        assert (fired.kind, fired.confirmed, fired.job.id) == ("timeout", True, "job-2")
        assert service.kills == ["job-1", "job-2"]

    async def test_a_job_that_could_not_be_started_either_is_timed_out(self, service: Service) -> None:
        job = service.jobs["job-1"]
        job.state, job.held_up_since = JobState.PENDING, time.time() - 1000
        service.outlives_kills = True

        def die_of_the_second() -> None:
            if service.kills:
                job.state = JobState.KILLED

        service.before_kill = die_of_the_second
        fired = await asyncio.wait_for(event(trigger(deadline=time.time() + 0.1, start_timeout=900)), 5)
        assert (fired.kind, fired.confirmed) == ("timeout", True)


class TestNote:
    """A triggerer may die between its kill and its event."""

    DEADLINE = {"deadline": 1.0}
    START = {"start_timeout": 900}

    @pytest.fixture
    def stuck(self, service: Service) -> Job:
        job = service.jobs["job-1"]
        job.state, job.message, job.held_up_since = JobState.PENDING, "no such image", time.time() - 1000
        return job

    @staticmethod
    async def die_after_the_kill(service: Service, **arguments: Any) -> None:
        """Run a trigger until it has sent its kill, which takes effect when it is dead."""
        service.outlives_kills = True
        predecessor = asyncio.create_task(event(trigger(**arguments)))

        async def killed() -> list[str]:
            return service.kills

        await wait_until_async(killed, 5, "a kill", interval=0.005)
        predecessor.cancel()
        await asyncio.gather(predecessor, return_exceptions=True)
        service.kills.clear()

    @pytest.mark.parametrize("gone", [JobState.KILLED, JobState.ABSENT])
    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            (DEADLINE, "timeout", "killed"),
            (START, "failed", "it could not be started in 900 s (start_timeout) and was killed: no such image"),
        ],
        ids=["deadline", "start_timeout"],
    )
    async def test_a_successor_reports_what_was_to_be_reported(
        self, service: Service, stuck: Job, gone: JobState, arguments: dict[str, Any], kind: str, message: str
    ) -> None:
        await self.die_after_the_kill(service, **arguments)
        stuck.state, stuck.held_up_since = gone, None
        fired = await asyncio.wait_for(event(trigger(**arguments)), 5)
        assert (fired.kind, fired.message, fired.confirmed) == (kind, message, kind == "timeout")
        assert service.kills == [], "it is dead already"

    @pytest.mark.parametrize(
        "change",
        [{"ti_id": "another"}, {"job_id": "job-9"}, {"uid": "another"}, {"token": "f" * 32}, {"kind": "fine"}],
    )
    async def test_of_something_else_says_nothing(
        self, service: Service, airflow: dict[str, Any], stuck: Job, change: dict[str, str]
    ) -> None:
        await self.die_after_the_kill(service, **self.DEADLINE)
        airflow["pushed"][NOTE_XCOM_KEY].update(change)
        stuck.state = JobState.ABSENT
        assert (await asyncio.wait_for(event(trigger(**self.DEADLINE)), 5)).kind == "lost"

    async def test_that_cannot_be_written_keeps_nobody_from_killing(
        self, service: Service, airflow: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        airflow["deaf"] = RuntimeError("the API server is away")
        fired = await asyncio.wait_for(event(trigger(**self.DEADLINE)), 5)
        assert (fired.kind, fired.confirmed, service.kills) == ("timeout", True, ["job-1"])
        assert "could not be noted" in capsys.readouterr().out

    async def test_of_a_refused_kill_is_taken_back(
        self, service: Service, airflow: dict[str, Any], stuck: Job, later: Any
    ) -> None:
        def refuse() -> None:
            raise RequestRefused("alice may not")

        service.before_kill = refuse
        later(lambda: setattr(stuck, "state", JobState.ABSENT))
        assert (await asyncio.wait_for(event(trigger(**self.START)), 5)).kind == "lost"
        assert airflow["pushed"][NOTE_XCOM_KEY] == {}

    async def test_of_a_kill_that_may_have_arrived_stays(self, service: Service, stuck: Job, later: Any) -> None:
        def cut_off() -> None:
            raise ClusterUnreachable("the answer was lost")

        service.before_kill = cut_off
        later(lambda: setattr(stuck, "state", JobState.ABSENT))
        assert (await asyncio.wait_for(event(trigger(**self.START)), 5)).kind == "failed"

    async def test_an_end_that_is_held_back_is_not_lost(self, service: Service, airflow: dict[str, Any]) -> None:
        service.jobs["job-1"].state = JobState.SUCCEEDED
        first = asyncio.create_task(event(trigger(quiet=60)))

        async def noted() -> Any:
            return NOTE_XCOM_KEY in airflow["pushed"]

        await wait_until_async(noted, 5, "the note", interval=0.005)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        service.jobs.clear()
        assert (await asyncio.wait_for(event(trigger()), 5)).kind == "succeeded"

    @pytest.mark.parametrize("value", [None, {}, "x", [1], {"ti_id": "this"}])
    def test_garbage_is_none(self, value: Any) -> None:
        assert noted_end(value, ti_id="this") is None


class TestLost:
    async def test_says_what_is_known(self, service: Service, later: Any, capsys: pytest.CaptureFixture[str]) -> None:
        later(service.jobs.clear)
        fired = await asyncio.wait_for(event(trigger()), 5)
        assert (fired.kind, fired.state) == ("lost", "RUNNING")
        assert re.fullmatch(r"last seen as RUNNING at \S+ \S+ UTC; not known since \S+ \S+ UTC", fired.message)
        assert fired.message in capsys.readouterr().out

    async def test_also_when_nothing_is(self, service: Service) -> None:
        service.jobs.clear()
        fired = await asyncio.wait_for(event(trigger()), 5)
        assert (fired.kind, fired.state) == ("lost", "")
        assert fired.message.startswith("not seen since it is followed here")

    async def test_an_end_that_was_seen_counts(
        self, service: Service, later: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The trigger is busy with something else while the job ends and is forgotten."""
        forgotten = asyncio.Event()
        polls = 0
        original = tries.MemoryHook.poll

        async def poll(self: Any, jobs: Any) -> Any:
            nonlocal polls
            polls += 1
            if polls == 2:
                service.jobs["job-1"].state = JobState.SUCCEEDED
            elif polls == 3:
                service.jobs.clear()
            elif polls == 7:
                forgotten.set()
            return await original(self, jobs)

        async def busy(*_: Any) -> None:
            await forgotten.wait()

        monkeypatch.setattr(tries.MemoryHook, "poll", poll)
        monkeypatch.setattr(JobTrigger, "push_links", busy)
        assert (await asyncio.wait_for(event(trigger()), 5)).kind == "succeeded"


class TestWaitingForWord:
    """Whether a submission has become a job cannot be told yet."""

    @pytest.mark.parametrize("error", [SubmissionUncertain("queued"), AuthenticationFailed("expired"), None])
    async def test_ends_when_it_can_be_told(self, service: Service, later: Any, error: Exception | None) -> None:
        service.find_error, service.unreachable = error, error is None
        answered: list[bool] = []

        def answer() -> None:
            service.find_error, service.unreachable = None, False
            answered.append(True)

        later(answer)
        assert (await asyncio.wait_for(event(trigger(SubmissionTrigger)), 5)).kind == "told"
        assert answered, "not before"

    @pytest.mark.parametrize("error", [SubmissionUncertain("forgotten", permanent=True), RequestRefused("no")])
    async def test_ends_when_asking_again_does_not_help(self, service: Service, error: Exception) -> None:
        service.find_error = error
        assert (await asyncio.wait_for(event(trigger(SubmissionTrigger)), 5)).kind == "told"

    async def test_ends_with_its_time(self, service: Service) -> None:
        service.unreachable = True
        assert (await asyncio.wait_for(event(trigger(SubmissionTrigger, deadline=time.time() + 0.2)), 5)).kind == "told"

    async def test_leaves_a_cluster_alone_that_asks_for_it(self, service: Service) -> None:
        service.find_error = ClusterUnreachable("busy", retry_after=0.5)
        began = time.monotonic()
        asked: list[float] = []
        original = tries.MemoryHook.find

        async def find(self: Any, submission: Submission) -> Any:
            asked.append(time.monotonic() - began)
            if len(asked) == 2:
                service.find_error = None
            return await original(self, submission)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tries.MemoryHook, "find", find)
            await asyncio.wait_for(event(trigger(SubmissionTrigger)), 5)
        assert asked[1] >= 0.5

    async def test_a_pause_ends_with_the_waiting(self, service: Service) -> None:
        service.find_error = ClusterUnreachable("busy", retry_after=600)
        waiting = event(trigger(SubmissionTrigger, deadline=time.time() + 0.5, interval=None))
        assert (await asyncio.wait_for(waiting, 10)).kind == "told"

    async def test_does_not_hurry_when_the_clock_is_set_forward(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = time.time
        waiting = trigger(SubmissionTrigger, deadline=now() + 0.5, interval=None)
        asked: list[Submission] = []

        async def find(_: Any, submission: Submission) -> Any:
            asked.append(submission)
            monkeypatch.setattr(time, "time", lambda: now() + 3600)
            raise ClusterUnreachable("down")

        monkeypatch.setattr(tries.MemoryHook, "find", find)
        assert (await asyncio.wait_for(event(waiting), 5)).kind == "told"
        assert 2 <= len(asked) < 10

    @pytest.mark.parametrize(("kill", "kills"), [(True, ["job-1", "job-2"]), (False, [])])
    async def test_on_kill_looks_for_what_has_come_of_it(
        self, service: Service, airflow: dict[str, Any], kill: bool, kills: list[str]
    ) -> None:
        service.add(TOKEN)
        airflow["state"] = "failed"
        await trigger(SubmissionTrigger, job=JobRef("the job of a token"), kill=kill).on_kill()
        assert (service.kills, service.releases) == (kills, ["job-1", "job-2"])

    async def test_on_kill_of_what_cannot_be_told_yet(
        self, service: Service, airflow: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        airflow["state"] = "failed"
        find = tries.MemoryHook.find

        async def not_yet(self: tries.MemoryHook, submission: Submission) -> Any:
            monkeypatch.setattr(tries.MemoryHook, "find", find)
            raise SubmissionUncertain("a driver is still queued", permanent=False)

        monkeypatch.setattr(tries.MemoryHook, "find", not_yet)
        await trigger(SubmissionTrigger).on_kill()
        assert service.kills == ["job-1"]

    @pytest.mark.parametrize(
        ("errors", "killed"),
        [
            ({"job-1": [RequestRefused("it is another user's, who has copied our labels")] * 1000}, {"job-2"}),
            ({"job-1": [ClusterUnreachable("away")], "job-2": [RequestRefused("no")] * 1000}, {"job-1"}),
        ],
    )
    async def test_on_kill_one_that_is_refused_does_not_spare_the_other(
        self,
        service: Service,
        airflow: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        errors: dict[str, list[Exception]],
        killed: set[str],
    ) -> None:
        """Nor does it keep that from a second kill, if it did not answer the first."""
        monkeypatch.setattr(trigger_module, "_ON_KILL_BOUND", 1.0)
        service.add(TOKEN)
        airflow["state"] = "failed"
        kill, left = tries.MemoryHook.kill, {job: list(each) for job, each in errors.items()}

        async def fail(self: tries.MemoryHook, job: JobRef) -> None:
            if left.get(job.id):
                raise left[job.id].pop()
            await kill(self, job)

        monkeypatch.setattr(tries.MemoryHook, "kill", fail)
        await trigger(SubmissionTrigger).on_kill()
        assert set(service.kills) == killed

    async def test_on_kill_of_nothing(self, service: Service, airflow: dict[str, Any]) -> None:
        service.jobs.clear()
        airflow["state"] = "failed"
        await trigger(SubmissionTrigger).on_kill()
        assert service.kills == []

    def test_is_stored_as_what_it_is(self) -> None:
        path, arguments = trigger(SubmissionTrigger).serialize()
        assert path == f"{SubmissionTrigger.__module__}.{SubmissionTrigger.__qualname__}"
        assert SubmissionTrigger(**arguments).serialize() == (path, arguments)


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

    async def test_goes_on_when_airflow_cancels_it(self, service: Service, airflow: dict[str, Any]) -> None:
        airflow["state"] = "failed"
        killing = asyncio.create_task(trigger().on_kill())
        await asyncio.sleep(0)
        killing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await killing
        assert service.kills == []
        await asyncio.gather(*trigger_module._letting_go)
        assert service.kills == ["job-1"]
        assert not trigger_module._letting_go

    async def test_a_task_that_was_cleared_meanwhile_keeps_its_job(
        self, service: Service, airflow: dict[str, Any]
    ) -> None:
        airflow["state"] = "failed"

        def cleared_meanwhile() -> None:
            airflow["state"] = "deferred"  # with on_clear="reconnect": a new try follows the job on
            service.before_kill = None
            raise ClusterUnreachable("failing over")

        service.before_kill = cleared_meanwhile
        await trigger().on_kill()
        assert service.before_kill is None, "it was tried once"
        assert service.kills == []

    async def test_says_that_a_kill_was_not_answered(
        self,
        service: Service,
        airflow: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(tries.MemoryHook, "kill", hang)
        monkeypatch.setattr(trigger_module, "_ON_KILL_BOUND", 0.1)
        airflow["state"] = "failed"
        await asyncio.wait_for(trigger().on_kill(), 10)
        assert "job-1 could not be killed and may still run: no answer in time" in capsys.readouterr().out

    async def test_a_kill_that_is_refused_is_sent_again(self, service: Service, airflow: dict[str, Any]) -> None:
        """By an API server that has just started."""
        errors = [RequestRefused("its roles are not read yet")]

        def refuse_once() -> None:
            if errors:
                raise errors.pop()

        service.before_kill = refuse_once
        airflow["state"] = "failed"
        await asyncio.wait_for(trigger().on_kill(), 10)
        assert (service.kills, service.releases) == (["job-1"], ["job-1"])

    async def test_kills_nothing_when_airflow_does_not_answer(
        self, service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        answers = threading.Event()
        monkeypatch.setattr(trigger_module, "state_of", lambda **_: answers.wait(60) and "failed")
        monkeypatch.setattr(trigger_module, "_ON_KILL_BOUND", 0.1)
        try:
            await asyncio.wait_for(trigger().on_kill(), 10)
        finally:
            answers.set()
        assert service.kills == []
        assert "the state of the task could not be read: TimeoutError()" in capsys.readouterr().out

    async def test_keeps_if_so_asked(self, service: Service, airflow: dict[str, Any]) -> None:
        airflow["state"] = "failed"
        await trigger(kill=False).on_kill()
        assert service.kills == []

    @pytest.mark.parametrize(("kill", "alive"), [(True, []), (False, ["job-1"])])
    async def test_lets_go_of_it_afterwards(
        self, service: Service, airflow: dict[str, Any], kill: bool, alive: list[str]
    ) -> None:
        running: list[list[str]] = []
        service.before_release = lambda: running.append(service.running)
        airflow["state"] = "failed"
        await trigger(kill=kill).on_kill()
        assert (service.releases, running) == (["job-1"], [alive])

    @pytest.mark.parametrize("state", ["deferred", "running", "up_for_retry", RuntimeError("away")])
    @pytest.mark.parametrize("kill", [True, False])
    async def test_lets_go_of_nothing_that_goes_on(
        self, service: Service, airflow: dict[str, Any], state: Any, kill: bool
    ) -> None:
        airflow["state"] = state
        await trigger(kill=kill).on_kill()
        assert service.releases == []

    async def test_lets_go_of_nothing_on_another_cluster(
        self, service: Service, airflow: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        airflow["state"] = "failed"
        service.names = ("service://two",)
        await trigger().on_kill()
        assert (service.kills, service.releases) == ([], [])
        said = capsys.readouterr().out
        assert "job-1 could not be killed and may still run: connection 'memory' names another cluster" in said

    async def test_tries_to_let_go_again(self, service: Service, airflow: dict[str, Any]) -> None:
        airflow["state"] = "failed"
        errors = [ClusterUnreachable("failing over")]

        def fail_once() -> None:
            if errors:
                raise errors.pop()

        service.before_release = fail_once
        await trigger().on_kill()
        assert (service.running, service.releases) == ([], ["job-1"])


@pytest.mark.parametrize(
    ("answer", "runs", "index", "state"),
    [
        ({"run": {"task": "deferred"}}, 1, -1, "deferred"),
        ({"run": {"task_3": TaskInstanceState.FAILED}}, 1, 3, "failed"),
        ({}, 0, -1, None),
        ({}, 1, -1, "no_status"),
        ({"run": {"other": "failed"}}, 1, -1, "no_status"),
        ({"run": {"task": None}}, 1, -1, "no_status"),
        ({"run": {"task_3": None}}, 1, 3, "no_status"),
    ],
)
def test_what_has_no_state_is_not_gone(
    monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], runs: int, index: int, state: str | None
) -> None:
    """A task that a dead scheduler had queued, or that was deleted from its run, is scheduled again: its job lives."""
    monkeypatch.setattr(RuntimeTaskInstance, "get_task_states", lambda **_: answer)
    monkeypatch.setattr(RuntimeTaskInstance, "get_dr_count", lambda **_: runs)
    assert state_of(dag_id="dag", run_id="run", task_id="task", map_index=index) == state
    assert (state in ENDED_BY_A_PERSON) == (state in (None, "failed"))


async def test_nothing_is_let_go_of_before_the_end_is_recorded(service: Service, later: Any) -> None:
    """That is for the worker to do, which records it."""
    later(lambda: setattr(service.jobs["job-1"], "state", JobState.SUCCEEDED))
    await asyncio.wait_for(event(trigger()), 5)
    await asyncio.wait_for(event(trigger(deadline=time.time() - 1)), 5)
    assert service.releases == []


def status(held_up_since: float | None, message: str = "", *, state: JobState = JobState.PENDING) -> JobStatus:
    return JobStatus(
        job=JobRef("job-1"), state=state, raw="PENDING", message=message, held_up_since=held_up_since, links={}
    )


class TestStartTimeout:
    @pytest.fixture
    def stuck(self, service: Service) -> Job:
        """A job of which the cluster has said since long ago why it cannot start it."""
        job = service.jobs["job-1"]
        job.state, job.message, job.held_up_since = JobState.PENDING, "no such image", time.time() - 1000
        return job

    @pytest.mark.parametrize(
        ("start_timeout", "held_up_since", "due"),
        [(60.0, 1000.0, 1060.0), (60, 1000.0, 1060.0), (60.0, None, None), (None, 1000.0, None)],
    )
    def test_counts_seconds_since_the_trouble_began(
        self, start_timeout: float | None, held_up_since: float | None, due: float | None
    ) -> None:
        assert trigger(start_timeout=start_timeout)._start_due(status(held_up_since)) == due
        assert trigger(start_timeout=start_timeout)._start_due(None) is None

    async def test_a_job_that_cannot_be_started_is_killed_and_has_failed(self, service: Service, stuck: Job) -> None:
        fired = await asyncio.wait_for(event(trigger(start_timeout=900)), 5)
        assert (fired.kind, fired.state) == ("failed", "KILLED")
        assert fired.message == "it could not be started in 900 s (start_timeout) and was killed: no such image"
        assert (service.kills, service.releases) == (["job-1"], [])

    async def test_a_long_cause_does_not_hide_what_to_do(self, service: Service, stuck: Job) -> None:
        stuck.message = "x" * 5000
        fired = await asyncio.wait_for(event(trigger(start_timeout=900)), 5)
        assert "start_timeout" in fired.message

    async def test_is_waited_for_no_shorter(self, service: Service, stuck: Job) -> None:
        stuck.held_up_since = since = time.time()
        await asyncio.wait_for(event(trigger(start_timeout=0.3)), 5)
        assert time.time() - since >= 0.3

    @pytest.mark.parametrize(
        ("start_timeout", "held_up_since"),
        [(None, 1.0), (1e10, 1.0), (0.01, None)],
        ids=["for ever", "not yet", "in a queue"],
    )
    async def test_a_job_that_may_start_yet_is_left_alone(
        self, service: Service, stuck: Job, later: Any, start_timeout: float | None, held_up_since: float | None
    ) -> None:
        stuck.held_up_since = held_up_since
        later(lambda: setattr(stuck, "state", JobState.SUCCEEDED))
        assert (await asyncio.wait_for(event(trigger(start_timeout=start_timeout)), 5)).kind == "succeeded"
        assert service.kills == []

    @pytest.mark.parametrize("said", [{"ti_id": "another"}, RuntimeError("the API server is away")])
    async def test_another_try_in_charge_is_left_alone(
        self, service: Service, airflow: dict[str, Any], stuck: Job, later: Any, said: Any
    ) -> None:
        airflow["try"] = said
        later(lambda: setattr(stuck, "state", JobState.SUCCEEDED))
        assert (await asyncio.wait_for(event(trigger(start_timeout=900)), 5)).kind == "succeeded"
        assert service.kills == []

    async def test_a_kill_that_is_refused_is_sent_again(
        self, service: Service, stuck: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(trigger_module, "_KILL_CONFIRMED_WITHIN", 0.05)
        errors = [RequestRefused("not now"), ClusterUnreachable("away")]

        def fail_twice() -> None:
            if errors:
                raise errors.pop()

        service.before_kill = fail_twice
        assert (await asyncio.wait_for(event(trigger(start_timeout=900)), 5)).kind == "failed"
        assert (service.kills, errors) == (["job-1"], [])

    @pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
    async def test_one_that_ended_by_itself_meanwhile_has_ended(
        self, service: Service, stuck: Job, state: JobState
    ) -> None:
        stuck.message = ""
        service.before_kill = lambda: setattr(stuck, "state", state)
        fired = await asyncio.wait_for(event(trigger(start_timeout=900)), 5)
        assert (fired.kind, fired.state, fired.message) == (state.value, state.name, "")

    @pytest.mark.parametrize("gone", [JobState.KILLED, JobState.ABSENT])
    async def test_one_that_dies_slowly_is_neither_lost_nor_killed_by_somebody(
        self, service: Service, stuck: Job, monkeypatch: pytest.MonkeyPatch, gone: JobState
    ) -> None:
        monkeypatch.setattr(trigger_module, "_KILL_CONFIRMED_WITHIN", 0.02)
        service.outlives_kills = True

        def die_at_last() -> None:
            if len(service.kills) == 2:
                stuck.state = gone

        service.before_kill = die_at_last
        fired = await asyncio.wait_for(event(trigger(start_timeout=900)), 5)
        assert fired.kind == "failed"
        assert "no such image" in fired.message

    async def test_its_successor_is_a_job_of_its_own(self, service: Service, stuck: Job) -> None:
        def relaunch() -> None:
            service.before_kill, service.outlives_kills = None, True
            stuck.state = JobState.RELAUNCHED
            service.add(TOKEN, state=JobState.KILLED)

        service.before_kill = relaunch
        fired = await asyncio.wait_for(event(trigger(start_timeout=900)), 5)
        assert (fired.kind, fired.job.id) == ("killed", "job-2")


class TestNarration:
    @staticmethod
    async def lines(capsys: pytest.CaptureFixture[str], *statuses: JobStatus) -> list[str]:
        narrator = trigger_module._Narrator(trigger(on_worker=True))
        for told in statuses:
            await narrator.status(told)
        return [line for line in capsys.readouterr().out.splitlines() if "job-1" in line]

    async def test_says_why_a_job_does_not_start_and_whatever_becomes_of_it(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first, second, third, fourth = await self.lines(
            capsys,
            status(None),
            status(1.0, "no such image"),
            status(1.0, "no such image"),
            status(1.0, "no such host"),
            status(None),
        )
        assert ("no such image" in second, "no such host" in third) == (True, True)
        assert not [line for line in (first, fourth) if "no such" in line]

    async def test_says_nothing_of_a_message_that_is_no_trouble(self, capsys: pytest.CaptureFixture[str]) -> None:
        first, second = status(None, "one", state=JobState.RUNNING), status(None, "two", state=JobState.RUNNING)
        assert len(await self.lines(capsys, first, second)) == 1

    async def test_pushes_links_that_become_known(
        self, airflow: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        narrator = trigger_module._Narrator(trigger())
        for links in ({}, {Link.LOG: "http://log"}, {Link.HISTORY: "http://history"}):
            await narrator.status(JobStatus(job=JobRef("job-1"), state=JobState.RUNNING, raw="RUNNING", links=links))
        assert airflow["pushed"] == {
            "durable_spark_log_link": "http://log",
            "durable_spark_history_link": "http://history",
        }


class TestArguments:
    def test_are_plain_json(self) -> None:
        path, arguments = trigger().serialize()
        assert path == f"{JobTrigger.__module__}.{JobTrigger.__qualname__}"
        assert json.loads(json.dumps(arguments)) == arguments
        assert JobTrigger(**arguments).serialize() == (path, arguments)

    def test_keys_of_a_newer_version_are_ignored(self) -> None:
        arguments = trigger()._args.to_json()
        assert JobTrigger({**arguments, "v": 2, "surprise": 1})._args == trigger()._args

    def test_of_an_older_version_are_understood(self) -> None:
        arguments = trigger(start_timeout=5.0)._args.to_json()
        assert JobTrigger(arguments)._args.start_timeout == 5.0
        del arguments["start_timeout"]
        assert JobTrigger(arguments)._args == trigger(start_timeout=None)._args

    @pytest.mark.parametrize("arguments", [None, "", "[]", "{}", "[" * 100_000, {}])
    def test_what_are_none_fail_this_trigger_alone(self, arguments: Any) -> None:
        with pytest.raises(TypeError, match="not the arguments of a trigger"):
            JobTrigger(arguments)

    @pytest.mark.parametrize(
        "change",
        [
            {"job": None},
            {"job": ["a", "b", "c"]},
            {"cluster": "spark://m"},
            {"submission": {"token": "x"}},
            {"hook": None},
            {"deadline": "soon"},
            {"outage_timeout": None},
            {"outage_timeout": float("inf")},
            {"kill": "yes"},
            {"map_index": True},
        ],
        ids=str,
    )
    def test_what_is_wrong_fails_this_trigger_alone(self, change: dict[str, Any]) -> None:
        """Whatever a constructor raises but TypeError ends the triggerer, and the next one (Airflow 3.3.2)."""
        with pytest.raises(TypeError, match="not the arguments of a trigger"):
            JobTrigger({**trigger()._args.to_json(), **change})

    @pytest.mark.parametrize("name", ["hook", "job", "submission", "ti_id"])
    def test_what_is_missing_does_so_too(self, name: str) -> None:
        arguments = trigger()._args.to_json()
        del arguments[name]
        with pytest.raises(TypeError, match="not the arguments of a trigger"):
            JobTrigger(arguments)

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
