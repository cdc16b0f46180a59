"""The command that lists and ends orphans, on real clusters; the witness of an end is the cluster itself."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred

from dev.kubernetes import RequestFailed
from dev.processes import wait_until_async
from durable_spark.hooks.kubernetes import KubernetesHook
from durable_spark.hooks.spark import SparkHook
from durable_spark.jobs import ClusterUnreachable, JobRef, JobState, Submission, new_token
from tests.kubernetes import shell_job
from tests.orphans import DEPLOYMENT, Metadata, Said, empty_metadata, run_orphans
from tests.standalone import jvm_job
from tests.submitting import until
from tests.unit.tries import TaskInstance
from tests.yarn import YarnJob, submit_app

if TYPE_CHECKING:
    from dev.kubernetes import KubernetesCluster
    from dev.yarn import YarnCluster
    from durable_spark.cli._tasks import TaskKey
    from durable_spark.jobs import OwnedJob

Call = Callable[..., Awaitable[Said]]
LIVE = shell_job("exec sleep 600")


@dataclasses.dataclass
class Place:
    """A cluster: how to reach it, and how a job gets there."""

    connection: Mapping[str, Any]
    send: Callable[[SparkHook, Submission], Awaitable[JobRef]]


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with empty_metadata() as metadata:
        yield metadata


@pytest.fixture(params=["standalone", "kubernetes", "yarn"])
def place(request: pytest.FixtureRequest) -> Place:
    cluster: Any = request.getfixturevalue(f"{request.param}_cluster")

    async def natively(hook: SparkHook, submission: Submission) -> JobRef:
        job = jvm_job(600) if request.param == "standalone" else LIVE
        return await hook.submit(job, await hook.prepare(job, submission))

    async def over_rest(hook: SparkHook, submission: Submission) -> JobRef:
        plan = await hook.prepare_cli({}, submission)
        tags = plan.conf["spark.yarn.tags"].split(",")
        yarn: YarnCluster = cluster
        return JobRef(await asyncio.to_thread(submit_app, yarn, YarnJob(seconds=600), tags))

    return Place(cluster.connection(), over_rest if request.param == "yarn" else natively)


def connect(monkeypatch: pytest.MonkeyPatch, connection: Mapping[str, Any]) -> str:
    """Return a connection's ID."""
    conn_id = f"c{new_token()[:8]}"  # one that nobody has read before
    monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(connection))
    return conn_id


@pytest.fixture
def call() -> Call:
    """Return a function that calls the command, in a thread: it has an event loop of its own."""

    async def call(*arguments: str) -> Said:
        return await asyncio.to_thread(run_orphans, *arguments)

    return call


def new(metadata: Metadata, key: TaskKey, deployment: str = DEPLOYMENT) -> Submission:
    """Return a submission of a task instance."""
    return Submission(token=new_token(), owner=metadata.owner(key), deployment=deployment, name="dag.job")


async def until_shown(hook: SparkHook, jobs: set[str]) -> None:
    """Wait until the labels of all these jobs can be seen; a cluster may not vouch for its list just after a start."""

    async def shown() -> bool:
        try:
            return jobs <= {each.status.job.id for each in await hook.find_owned(DEPLOYMENT)}
        except ClusterUnreachable:
            return False

    await wait_until_async(shown, 90, f"the labels of {jobs}", interval=0.2)


async def test_orphans_are_listed_and_ended(
    place: Place, metadata: Metadata, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Of a failed task, of a run that is gone, of a submission before a clear; not what is followed, just submitted, or
    another's.
    """
    conn_id = connect(monkeypatch, place.connection)
    async with SparkHook(conn_id) as hook:
        jobs: dict[str, JobRef] = {}
        for run_id, state in (
            ("followed", "deferred"),
            ("sending", "running"),
            ("late", "deferred"),
            ("failed", "failed"),
            ("gone", "failed"),
        ):
            key = metadata.task(state, run_id=run_id)
            submission = new(metadata, key)
            metadata.record(key, submission.token, job=None)
            jobs[run_id] = await place.send(hook, submission)
            if run_id == "late":
                metadata.record(key, new_token(), job=JobRef("another"))
            elif run_id != "sending":
                metadata.record(key, submission.token, job=jobs[run_id])
        metadata.delete_run("gone")
        jobs["foreign"] = await place.send(hook, new(metadata, key, deployment="another"))
        for job in jobs.values():
            await until(hook, job, JobState.RUNNING)

        ours = {job.id for name, job in jobs.items() if name != "foreign"}
        await until_shown(hook, ours)  # a job may run before its labels show
        said = await call(conn_id, "--all")
        assert said.code == 0, said.errors
        verdicts = {row["job_id"]: row["verdict"] for row in said.rows}
        assert {name: verdicts.get(job.id) for name, job in jobs.items()} == {
            "followed": "followed",
            "sending": "followed",
            "late": "orphan",
            "failed": "orphan",
            "gone": "orphan",
            "foreign": None,
        }
        ended = await call(conn_id, "--kill", "--yes")
        assert set(ended.orphans) >= {jobs[name].id for name in ("late", "failed", "gone")}
        assert ended.code == 0, ended.errors
        states = await hook.poll(list(jobs.values()))
        for name, job in jobs.items():
            assert states[job].state.active == (name in ("followed", "sending", "foreign")), (name, states[job])
        assert (await call(conn_id)).rows == []
        for job in jobs.values():
            await hook.kill(job)


async def test_a_job_is_never_called_an_orphan_while_its_task_lives(
    place: Place, metadata: Metadata, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through submissions, retries, clears and ends, while the command looks over and over."""
    conn_id = connect(monkeypatch, place.connection)
    key = metadata.task("running")
    called: list[Said] = []
    done = asyncio.Event()

    async def look_over_and_over() -> None:
        while not done.is_set():
            called.append(await call(conn_id))

    async def looks(count: int) -> None:
        until_then = len(called) + count
        while len(called) < until_then and not looking.done():
            await asyncio.wait([looking], timeout=0.05)

    async with SparkHook(conn_id) as hook:
        await until_shown(hook, set())
        looking = asyncio.ensure_future(look_over_and_over())
        for _ in range(3):
            metadata.set_state(key, "running")
            submission = new(metadata, key)
            metadata.record(key, submission.token, job=None)
            job = await place.send(hook, submission)
            await looks(2)
            metadata.record(key, submission.token, job=job)
            for state in ("deferred", "up_for_retry", "scheduled", "queued", "running", "restarting", None, "deferred"):
                metadata.set_state(key, state)
                await looks(1)
            await hook.kill(job)
            await until(hook, job, JobState.KILLED, JobState.ABSENT)
            metadata.record(key, submission.token, job=job, verdict=JobState.KILLED)
        done.set()
        await looking
    assert len(called) > 24
    assert [said for said in called if said.code or said.rows] == []


async def test_a_job_that_ends_while_the_command_looks_is_no_orphan(
    place: Place, metadata: Metadata, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is alive when the cluster is read; when the database is read, its task has ended with it."""
    conn_id = connect(monkeypatch, place.connection)
    key = metadata.task("running")
    looked, go_on = threading.Event(), threading.Event()
    find_owned = SparkHook.find_owned
    seen: list[Sequence[OwnedJob]] = []

    async def slow(hook: SparkHook, deployment: str, owner: str | None = None) -> Sequence[OwnedJob]:
        seen.append(await find_owned(hook, deployment, owner))
        looked.set()
        await asyncio.to_thread(go_on.wait, 120)
        return seen[-1]

    async with SparkHook(conn_id) as hook:
        submission = new(metadata, key)
        metadata.record(key, submission.token, job=None)
        job = await place.send(hook, submission)
        metadata.record(key, submission.token, job=job)
        metadata.set_state(key, "deferred")
        await until(hook, job, JobState.RUNNING)
        await until_shown(hook, {job.id})
        monkeypatch.setattr(SparkHook, "find_owned", slow)
        calling = asyncio.ensure_future(call(conn_id, "--kill", "--yes"))
        await asyncio.to_thread(looked.wait, 60)
        await hook.kill(job)
        await until(hook, job, JobState.KILLED, JobState.ABSENT)
        metadata.record(key, submission.token, job=job, verdict=JobState.KILLED)
        metadata.set_state(key, "failed")
        go_on.set()
        said = await calling
    assert job.id in {each.status.job.id for each in seen[0]}, "it was not seen alive"
    assert (said.rows, said.code) == ([], 0)


async def exists(cluster: KubernetesCluster, job: JobRef) -> bool:
    try:
        await asyncio.to_thread(cluster.pod, job.id.partition(":")[2])
    except RequestFailed as error:
        if error.status != 404:
            raise
        return False
    return True


async def test_a_pod_that_is_held_for_nobody_is_let_go_of(
    kubernetes_cluster: KubernetesCluster, metadata: Metadata, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its task could not tell whether it was submitted, or its trigger crashed; the one that is followed stays."""
    conn_id = connect(monkeypatch, kubernetes_cluster.connection())
    job = shell_job("exit 0", options={"hold_pod": True, "pod_at_end": "delete"})
    held: dict[str, JobRef] = {}
    async with SparkHook(conn_id) as hook:
        for run_id, state in (("over", "failed"), ("on", "deferred")):
            key = metadata.task(state, run_id=run_id)
            submission = new(metadata, key)
            metadata.record(key, submission.token, job=None)
            held[run_id] = await hook.submit(job, await hook.prepare(job, submission))
        for ref in held.values():
            await until(hook, ref, JobState.SUCCEEDED)
        listed = await call(conn_id, "--all")
        states = {row["job_id"]: (row["verdict"], row["state"]) for row in listed.rows}
        assert states[held["over"].id] == ("orphan", "Succeeded, kept")
        assert states[held["on"].id] == ("followed", "Succeeded, kept")
        ended = await call(conn_id, "--kill", "--yes")
        assert (ended.orphans, ended.code) == ([held["over"].id], 0)

        async def gone() -> bool:
            return not await exists(kubernetes_cluster, held["over"])

        await wait_until_async(gone, 30, "the pod to go", interval=0.2)
        assert await exists(kubernetes_cluster, held["on"])
        await hook.release(held["on"])


@pytest.mark.parametrize("by", ["the command", "hand"])
async def test_a_task_whose_orphan_was_ended_can_be_cleared(
    kubernetes_cluster: KubernetesCluster, metadata: Metadata, call: Call, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Its last worker died before it could store the job. Who deletes the pod by hand leaves it unable to tell."""
    conn_id = connect(monkeypatch, kubernetes_cluster.connection())
    ti = TaskInstance(hook=KubernetesHook, conn_id=conn_id, job=LIVE, retries=0)
    ti.max_tries = 0
    key = metadata.task("failed", run_id="run", task_id="task")
    first = ti.begin()
    await asyncio.to_thread(first.execute)
    ti.store = {"durable_spark": {**ti.store["durable_spark"], "job": None}}
    metadata.store(key, json.dumps(ti.store["durable_spark"]))
    async with SparkHook(conn_id) as hook:
        (job,) = [each.status.job for each in await hook.find_owned(DEPLOYMENT, metadata.owner(key))]
        await until(hook, job, JobState.RUNNING)
        if by == "hand":
            await hook.kill(job)
        else:
            assert (await call(conn_id, "--kill", "--yes")).code == 0
        await until(hook, job, JobState.KILLED, JobState.ABSENT)
        ti.store["durable_spark"] = metadata.stored(key).to_json()
        ti.clear()
        again = ti.begin()
        if by == "hand":
            with pytest.raises(AirflowFailException, match="Somebody has deleted it"):
                await asyncio.to_thread(again.execute)
            return
        assert isinstance(await asyncio.to_thread(again.execute), TaskDeferred)
        (second,) = [each.status.job for each in await hook.find_owned(DEPLOYMENT, metadata.owner(key))]
        assert second != job
        await hook.kill(second)
