"""What becomes of a task whose submission has, or may have, two drivers: the real operator, trigger and hook."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk.exceptions import AirflowException

from durable_spark.hooks.standalone import CONCURRENCY
from durable_spark.jobs import Found, JobRef, JobState, Submission
from durable_spark.operators.spark import SparkJobOperator
from tests.unit.hooks.fake import NOW, FakeCluster, QuickHook, driver, fixed, launch_command
from tests.unit.hooks.test_standalone import prepared
from tests.unit.test_operator import job_of
from tests.unit.test_trigger import airflow, event, trigger
from tests.unit.tries import TaskInstance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from durable_spark.triggers.job import JobEvent

__all__ = ["airflow"]  # a fixture


@pytest.fixture(autouse=True)
async def intent(cluster: FakeCluster, hook: QuickHook) -> Submission:
    cluster.ran(driver(7, "FINISHED", start=NOW - 900), launch_command())
    return await prepared(hook)


@pytest.fixture
def task() -> TaskInstance:
    return TaskInstance(
        SparkJobOperator,
        hook=QuickHook,
        conn_id="cluster",
        application="/apps/job.py",
        retries=2,
        supervise=True,
        kill_timeout=1.0,
    )


async def submitted(task: TaskInstance, cluster: FakeCluster) -> tuple[Mapping[str, Any], str]:
    """Let a first try submit, and return its driver, which the master does not list any more, and its token."""
    await asyncio.to_thread(task.begin().execute)
    (ours,) = cluster.master.page["activedrivers"]
    cluster.master.page["activedrivers"] = []
    return ours, task.store["durable_spark"]["submission"]["token"]


async def told(hook: QuickHook, job: str, intent: Submission, **arguments: Any) -> JobEvent:
    """Return what a trigger reports that has just taken over."""
    following = trigger(
        hook="tests.unit.hooks.fake.QuickHook",
        conn_id="cluster",
        cluster=tuple(await hook.cluster()),
        job=JobRef(job),
        submission=intent,
        interval=0.05,
        **{"outage_timeout": 0.5, **arguments},
    )
    return await asyncio.wait_for(event(following), 10)


class TestAnotherCannotBeTold:
    """It is queued, and shows nothing of whose it is."""

    @pytest.fixture(autouse=True)
    def queued(self, cluster: FakeCluster, intent: Submission) -> None:
        cluster.ran(driver(99, "SUBMITTED", worker="None"), None)

    @pytest.mark.parametrize("readable", [True, False])
    async def test_a_failure_does_not_count(
        self, cluster: FakeCluster, hook: QuickHook, intent: Submission, readable: bool
    ) -> None:
        ours = cluster.ran(driver(9, "FAILED"), launch_command(intent.token) if readable else None)
        assert (await told(hook, ours["id"], intent, sent_before=True)).kind == "outage"

    async def test_a_failure_of_what_was_sent_once_does(
        self, cluster: FakeCluster, hook: QuickHook, intent: Submission
    ) -> None:
        ours = cluster.ran(driver(9, "FAILED"), launch_command(intent.token))
        assert (await told(hook, ours["id"], intent)).kind == "failed"

    async def test_nothing_is_submitted_beside_it(self, cluster: FakeCluster, task: TaskInstance) -> None:
        cluster.master.page["activedrivers"] = []
        ours, token = await submitted(task, cluster)
        task.store["durable_spark"]["resent"] = True  # as after a try that died before its request left
        cluster.ran({**ours, "state": "FAILED"}, launch_command(token))
        cluster.ran(driver(99, "SUBMITTED", worker="None"), None)
        with pytest.raises(AirflowException, match=r"SubmissionUncertain.*queued"):
            await asyncio.to_thread(task.begin().execute)
        assert len(cluster.master.created) == 1

    @pytest.mark.parametrize("then", ["cleared", "on_lost"])
    async def test_nor_beside_what_may_be_a_successor(
        self, cluster: FakeCluster, task: TaskInstance, then: str
    ) -> None:
        """Ours was relaunched, and is forgotten: its worker still has its log."""
        cluster.master.page["activedrivers"] = []
        ours, token = await submitted(task, cluster)
        cluster.master.page["completeddrivers"] = []
        cluster.worker.logs[ours["id"]] = launch_command(token)
        cluster.ran(driver(99, "SUBMITTED", worker="None"), None)
        arguments = {}
        if then == "cleared":
            task.clear()
        else:
            arguments["on_lost"] = "resubmit"
        with pytest.raises(AirflowException, match=r"SubmissionUncertain.*queued"):
            await asyncio.to_thread(task.begin(**arguments).execute)
        assert len(cluster.master.created) == 1


async def test_one_that_came_much_later_is_seen(cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
    ours = cluster.ran(driver(8, "RUNNING"), launch_command(intent.token))
    for number in range(9, 9 + 5 * CONCURRENCY):
        cluster.ran(driver(number, "FINISHED", start=NOW + number), launch_command())
    late = cluster.ran(driver(999, "RUNNING", start=NOW + 999), launch_command(intent.token))
    found = await hook.find(intent)
    assert isinstance(found, Found)
    assert (found.status.job.id, found.younger, found.untold) == (ours["id"], [JobRef(late["id"])], None)


class TestAForgottenPredecessor:
    """
    driver-8 was relaunched as driver-9, and the master has restarted since: it knows again what lives.

    The worker, which has come back, still has the log of driver-8.
    """

    def relaunch(self, cluster: FakeCluster, old: str, token: str, state: str = "RUNNING") -> str:
        cluster.master.page["completeddrivers"] = []
        cluster.worker.logs[old] = launch_command(token)
        return str(cluster.ran(driver(99, state, start=NOW + 90), launch_command(token))["id"])

    async def test_its_successor_is_the_job(self, cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
        successor = self.relaunch(cluster, driver(8, "RUNNING")["id"], intent.token)
        found = await hook.find(intent)
        assert isinstance(found, Found)
        assert (found.status.job.id, found.younger) == (successor, [])

    async def test_but_not_one_that_was_killed(self, cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
        """It was the younger of two, and one too many."""
        old = driver(8, "RUNNING")["id"]
        self.relaunch(cluster, old, intent.token, "KILLED")
        found = await hook.find(intent)
        assert isinstance(found, Found)
        assert (found.status.job.id, found.status.state) == (old, JobState.ABSENT)

    async def test_a_trigger_follows_the_successor(
        self, cluster: FakeCluster, hook: QuickHook, intent: Submission
    ) -> None:
        old = driver(8, "RUNNING")["id"]
        successor = self.relaunch(cluster, old, intent.token, "FINISHED")
        end = await told(hook, old, intent)
        assert (end.kind, end.job.id) == ("succeeded", successor)

    async def test_a_retry_follows_it_and_kills_nothing(self, cluster: FakeCluster, task: TaskInstance) -> None:
        old, token = await submitted(task, cluster)
        successor = self.relaunch(cluster, old["id"], token)
        assert job_of(await asyncio.to_thread(task.begin().execute)) == successor
        assert cluster.master.asked("POST", "/v1/submissions/kill") == 0


async def test_a_rest_server_that_stays_away_is_given_up(
    cluster: FakeCluster, hook: QuickHook, intent: Submission
) -> None:
    """The page can be read, and lists the driver no more; who could say whether it is known answers 5xx."""
    cluster.master.rest = fixed(503, "away")
    end = await told(hook, driver(8, "RUNNING")["id"], intent)
    assert (end.kind, "could not tell what has become of it" in end.message) == ("outage", True)
