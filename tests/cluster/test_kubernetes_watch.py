"""
What a feed tells of pods, over all that can happen to the API server: no word lost, none made up, none late.

The pods are those of a cluster without a node, so that they are as the tests patch them; where pods must run on by
themselves they are those of one with a node.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from dev.kubernetes import KubernetesCluster
from durable_spark.hooks import _http
from durable_spark.hooks._kubernetes_watch import Watches
from durable_spark.hooks.kubernetes import KubernetesHook
from durable_spark.jobs import JobRef, JobState, new_token
from durable_spark.triggers.feed import FeedKey
from tests.conftest import require
from tests.kubernetes import shell_job
from tests.submitting import Follower, following, submit, until

if TYPE_CHECKING:
    from tests.cluster.conftest import Connect

    MakeHook = Callable[[], KubernetesHook]

CONTAINER = "spark-kubernetes-driver"


@pytest.fixture(scope="module")
def pods_at_rest() -> Iterator[KubernetesCluster]:
    """A cluster without a node: nothing happens to a pod but what a test does."""
    with require(lambda: KubernetesCluster(node=False)) as cluster:
        yield cluster


@pytest.fixture
def make_hook(pods_at_rest: KubernetesCluster, connect: Connect) -> MakeHook:
    return lambda: connect(pods_at_rest.connection(), KubernetesHook)


def name_of(job: JobRef) -> str:
    return job.id.partition(":")[2]


# --- what a status means

RUNNING: dict[str, Any] = {"phase": "Running"}


def waiting(reason: str, message: str) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"phase": "Pending", "containerStatuses": [_container(state)]}


def terminated(phase: str, code: int, reason: str = "Error") -> dict[str, Any]:
    times = {"startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:01:00Z"}
    state = {"terminated": {"exitCode": code, "reason": reason, **times}}
    return {"phase": phase, "containerStatuses": [_container(state)]}


def _container(state: dict[str, Any]) -> dict[str, Any]:
    return {"name": CONTAINER, "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": state}


UNSCHEDULABLE = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/3 nodes are available: 3 Insufficient memory.",
    "lastTransitionTime": "2026-01-01T00:00:00Z",
}


@pytest.mark.parametrize(
    ("status", "state", "raw", "message"),
    [
        (RUNNING, JobState.RUNNING, "Running", ""),
        (terminated("Succeeded", 0, "Completed"), JobState.SUCCEEDED, "Succeeded", ""),
        (terminated("Failed", 7), JobState.FAILED, "Failed", f"container {CONTAINER} ended with exit code 7"),
        (terminated("Failed", 137, "OOMKilled"), JobState.FAILED, "Failed: OOMKilled", "exit code 137 (OOMKilled)"),
        (
            terminated("Failed", 137) | {"reason": "DeadlineExceeded", "message": "longer than the specified deadline"},
            JobState.FAILED,
            "Failed: DeadlineExceeded",
            "longer than the specified deadline",
        ),
        (
            {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."},
            JobState.FAILED,
            "Failed: Evicted",
            "low on resource: memory",
        ),
        ({"phase": "Failed", "reason": "NodeLost"}, JobState.FAILED, "Failed: NodeLost", ""),
        (waiting("ErrImagePull", "not found"), JobState.PENDING, "Pending: ErrImagePull", "not found"),
        (waiting("ImagePullBackOff", "Back-off"), JobState.PENDING, "Pending: ErrImagePull", "Back-off"),
        (waiting("ContainerCreating", ""), JobState.PENDING, "Pending: ContainerCreating", ""),
        (
            {"phase": "Pending", "conditions": [UNSCHEDULABLE]},
            JobState.PENDING,
            "Pending: Unschedulable",
            "Insufficient memory",
        ),
        ({"phase": "Unknown", "reason": "NodeLost"}, JobState.UNKNOWN, "Unknown", ""),
        pytest.param(terminated("Pending", 0, "Completed"), JobState.PENDING, "Pending", "", id="ended, not told yet"),
        pytest.param(terminated("Running", 0, "Completed"), JobState.RUNNING, "Running", "", id="one container ended"),
    ],
)
async def test_what_a_status_means(
    status: dict[str, Any],
    state: JobState,
    raw: str,
    message: str,
    pods_at_rest: KubernetesCluster,
    make_hook: MakeHook,
) -> None:
    """Told by the watch and by a poll alike."""
    hook = make_hook()
    _, job = await submit(hook, shell_job("exit 0"))
    async with following(make_hook, job) as (follower,):
        await follower.until(JobState.PENDING)
        pods_at_rest.patch_status(name_of(job), status)
        told = await follower.until(state)
        while told.raw != raw:
            assert await follower.subscription.changed(10), f"it says only {told}"
            told = await follower.until(state)
    assert message in told.message
    assert {each.state for each in follower.told} <= {JobState.PENDING, state}
    polled = (await hook.poll([job]))[job]
    assert (polled.state, polled.raw, polled.message) == (told.state, told.raw, told.message)
    pods_at_rest.delete_pod(name_of(job), 0)


# --- what can happen to an API server


@pytest.fixture
def make_impatient_hook(
    kubernetes_cluster: KubernetesCluster, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> MakeHook:
    """Return what makes a hook on pods that run, and that takes seconds of silence for a hung API server."""
    monkeypatch.setattr(_http, "READ_TIMEOUT", 1.0)
    monkeypatch.setattr(_http, "CONNECT_TIMEOUT", 1.0)

    def make() -> KubernetesHook:
        hook: KubernetesHook = connect(kubernetes_cluster.connection(), KubernetesHook)
        hook.bookmark_seconds = 2.0
        return hook

    return make


@contextlib.asynccontextmanager
async def jobs_that_end(make_hook: MakeHook, count: int) -> AsyncIterator[dict[Follower, JobState]]:
    """Follow jobs that end one after the other, a second apart, every other one in failure."""
    hook = make_hook()
    ends = [(number, number % 2 * 3) for number in range(count)]
    jobs = [(await submit(hook, shell_job(f"sleep {seconds}; exit {code}")))[1] for seconds, code in ends]
    states = [JobState.FAILED if code else JobState.SUCCEEDED for _, code in ends]
    async with following(make_hook, *jobs) as followers:
        yield dict(zip(followers, states, strict=True))


async def as_they_ended(expected: dict[Follower, JobState]) -> None:
    """Expect of every job its end, and nothing wrong before it."""
    await asyncio.gather(*(follower.until(state) for follower, state in expected.items()))
    for follower, state in expected.items():
        assert {status.state for status in follower.told} <= {JobState.PENDING, JobState.RUNNING, state}


async def test_killed_and_restarted_no_end_is_lost(
    kubernetes_cluster: KubernetesCluster, make_impatient_hook: MakeHook
) -> None:
    """kill -9, twice, among jobs that end all the while. A restarted API server has no history: 410 inside a 200."""
    async with jobs_that_end(make_impatient_hook, 12) as expected:
        for number in (1, 4):
            follower = list(expected)[number]
            await follower.until(expected[follower])
            await asyncio.to_thread(kubernetes_cluster.restart_api_server)
        await as_they_ended(expected)


async def test_history_that_is_gone_is_listed_anew(
    pods_at_rest: KubernetesCluster, make_hook: MakeHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """410, inside a 200: what happened since is told all the same."""
    list_pods = Watches._list
    lists = 0

    async def list_and_forget(self: Watches, namespace: str) -> str:
        nonlocal lists
        lists += 1
        version = await list_pods(self, namespace)
        if lists > 1:
            return version
        pods_at_rest.patch_status(name_of(job), RUNNING)
        return "1"

    monkeypatch.setattr(Watches, "_list", list_and_forget)
    await asyncio.to_thread(pods_at_rest.restart_api_server)
    hook = make_hook()
    _, job = await submit(hook, shell_job("exit 0"))
    async with following(make_hook, job, interval=60) as (follower,):
        await follower.until(JobState.RUNNING, deadline=20)
    assert lists == 2
    pods_at_rest.delete_pod(name_of(job), 0)


async def test_followed_anew_after_an_end_that_the_watch_has_told_already(
    pods_at_rest: KubernetesCluster, make_hook: MakeHook
) -> None:
    """As after a clear: the old try's trigger has left, the new one's comes before the feed looks round again."""
    hook, key = make_hook(), FeedKey(hook="tests", conn_id=new_token(), cluster=())
    jobs = [(await submit(hook, shell_job("exit 0")))[1] for _ in range(2)]
    job, other = jobs
    async with following(make_hook, other, interval=60, key=key) as (after,):
        async with following(make_hook, job, interval=60, key=key) as (old,):
            await old.until(JobState.PENDING)
        pods_at_rest.patch_status(name_of(job), terminated("Succeeded", 0))
        pods_at_rest.patch_status(name_of(other), RUNNING)
        await after.until(JobState.RUNNING)  # one watch tells of both in their order
        async with following(make_hook, job, interval=60, key=key) as (new,):
            await new.until(JobState.SUCCEEDED, deadline=20)
    for each in jobs:
        pods_at_rest.delete_pod(name_of(each), 0)


async def test_hung_no_end_is_lost(kubernetes_cluster: KubernetesCluster, make_impatient_hook: MakeHook) -> None:
    """The API server keeps its sockets open and says nothing: that is noticed, and what was missed is told later."""
    async with jobs_that_end(make_impatient_hook, 8) as expected:
        first, *_, last = expected
        await first.until(expected[first])
        kubernetes_cluster.api_server.suspend()
        try:
            while last.subscription.outage is None:
                assert await last.subscription.changed(20), "the silence is not noticed"
        finally:
            kubernetes_cluster.api_server.resume()
        await as_they_ended(expected)


async def test_deletion_that_no_watch_saw_is_no_success(
    kubernetes_cluster: KubernetesCluster, make_impatient_hook: MakeHook
) -> None:
    """Deleted as soon as the API server is back, which has forgotten that by the time it is asked."""
    hook = make_impatient_hook()
    jobs = [(await submit(hook, shell_job("exec sleep 600", options={"hold_pod": held})))[1] for held in (False, True)]
    for job in jobs:
        await until(hook, job, JobState.RUNNING)
    async with following(make_impatient_hook, *jobs) as (plain, held):
        await plain.until(JobState.RUNNING)
        await held.until(JobState.RUNNING)

        def restart_and_delete() -> None:
            kubernetes_cluster.restart_api_server()
            for job in jobs:
                kubernetes_cluster.delete_pod(name_of(job), 0)

        await asyncio.to_thread(restart_and_delete)
        await plain.until(JobState.ABSENT, JobState.KILLED)
        assert "exit code" in (await held.until(JobState.KILLED)).message, "its end was held"
    await hook.release(jobs[1])
