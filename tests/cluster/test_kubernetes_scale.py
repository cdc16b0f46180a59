"""Thousands of pods on a real API server: how soon an end is told, and how long the event loop is kept waiting."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from dev.kubernetes import KubernetesCluster
from durable_spark.hooks._http import for_each
from durable_spark.hooks._kubernetes_api import Api
from durable_spark.hooks.kubernetes import KubernetesHook
from durable_spark.jobs import JobRef, JobState, new_token
from tests.conftest import require
from tests.kubernetes import spark_job
from tests.submitting import following, submit

if TYPE_CHECKING:
    from tests.cluster.conftest import Connect

    Crowd = Callable[[int], Awaitable[list[JobRef]]]

SLOWEST = 0.3
"""Seconds from a status patch to its being told, for 95 of 100."""
LONGEST_TURN = 0.1
"""Seconds that the event loop may be kept from its next turn; what holds it holds it for seconds."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[KubernetesCluster]:
    with require(lambda: KubernetesCluster(node=False)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def refs() -> list[JobRef]:
    """The pods that there are."""
    return []


@pytest.fixture
def make_hook(cluster: KubernetesCluster, connect: Connect) -> Callable[[], KubernetesHook]:
    return lambda: connect(cluster.connection(), KubernetesHook)


@pytest.fixture
def crowd(cluster: KubernetesCluster, refs: list[JobRef], make_hook: Callable[[], KubernetesHook]) -> Crowd:
    """Return what sees to it that there are so many driver pods, each as large as a real one."""

    async def make(count: int) -> list[JobRef]:
        hook = make_hook()
        _, first = await submit(hook, spark_job(0, conf=cluster.conf()))
        original = cluster.pod(first.id.partition(":")[2])
        api = Api(hook.conn_id, poll_interval=1.0)

        async def copy_once(_: int) -> None:
            pod = _copy_of(original)
            answer = await api.create("pods", cluster.namespace, pod)
            refs.append(JobRef(f"spark:{pod['metadata']['name']}", (await answer.json())["metadata"]["uid"]))

        try:
            await for_each(copy_once, range(count - len(refs)), at_once=24)
        finally:
            await api.aclose()
        return refs

    return make


def _copy_of(original: dict[str, Any]) -> dict[str, Any]:
    token = new_token()
    pod = copy.deepcopy(original)
    labels = pod["metadata"]["labels"] | {"durable-spark/token": token, "spark-app-selector": f"spark-{token}"}
    pod["metadata"] = {"name": f"tests-task-{token}", "labels": labels, "annotations": {"padding": "x" * 4000}}
    del pod["status"]
    return pod


@contextlib.asynccontextmanager
async def turns() -> AsyncIterator[list[float]]:
    """
    Gather the seconds between two turns of the event loop.

    Seconds of this process, of all its threads: others on this machine keep the loop waiting, too, and are not meant.
    """
    seconds: list[float] = []

    async def turn() -> None:
        while True:
            wall, own = time.perf_counter(), time.process_time()
            await asyncio.sleep(0.001)
            seconds.append(min(time.perf_counter() - wall, time.process_time() - own))

    task = asyncio.create_task(turn())
    try:
        yield seconds
    finally:
        task.cancel()


async def test_an_end_is_told_at_once(
    cluster: KubernetesCluster, crowd: Crowd, make_hook: Callable[[], KubernetesHook]
) -> None:
    """A thousand pods are followed, on an interval of a minute: nothing but the watch tells of a patch."""
    refs = await crowd(1000)
    took = []
    async with following(make_hook, *refs, interval=60) as followers:
        for follower in followers:
            await follower.until(JobState.PENDING)
        for follower in followers[::5]:
            name = follower.subscription.job.id.partition(":")[2]
            began = time.perf_counter()
            telling = asyncio.create_task(follower.until(JobState.SUCCEEDED))
            await asyncio.to_thread(cluster.patch_status, name, {"phase": "Succeeded"})
            await telling
            took.append(time.perf_counter() - began)
    took.sort()
    median, slow = took[len(took) // 2], took[int(len(took) * 0.95)]
    print(f"told after {median * 1000:.0f} ms at the median, {slow * 1000:.0f} ms p95")
    assert slow <= SLOWEST


async def test_a_burst_of_ends_is_told_at_once(
    cluster: KubernetesCluster, crowd: Crowd, make_hook: Callable[[], KubernetesHook]
) -> None:
    refs = (await crowd(1000))[1::5]
    took = []
    async with following(make_hook, *refs, interval=60) as followers:
        for follower in followers:
            await follower.until(JobState.PENDING)

        async def end(number: int) -> None:
            name = followers[number].subscription.job.id.partition(":")[2]
            telling = asyncio.create_task(followers[number].until(JobState.FAILED))
            await asyncio.to_thread(cluster.patch_status, name, {"phase": "Failed"})
            began = time.perf_counter()
            await telling
            took.append(time.perf_counter() - began)

        await for_each(end, range(len(followers)), at_once=8)
    took.sort()
    assert took[int(len(took) * 0.95)] <= SLOWEST


async def test_five_thousand_pods_do_not_hold_the_event_loop(
    crowd: Crowd, make_hook: Callable[[], KubernetesHook]
) -> None:
    """Neither when they are listed, nor when they are followed."""
    refs = await crowd(5000)
    hook = make_hook()
    gc.collect()
    gc.freeze()  # what pytest and Airflow have is not looked at again
    before = gc.get_stats()[2]["collections"]
    async with turns() as listing:
        began = time.perf_counter()
        statuses = await hook.poll(refs)
        took = time.perf_counter() - began
    assert gc.get_stats()[2]["collections"] - before <= 1, "it would be looked at all the time"
    assert {status.state for status in statuses.values()} >= {JobState.PENDING}
    assert JobState.ABSENT not in {status.state for status in statuses.values()}
    async with following(make_hook, *refs, interval=0.5) as followers, turns() as watching:
        give_up = time.monotonic() + 60
        while any(follower.subscription.status is None for follower in followers):
            assert time.monotonic() < give_up
            await asyncio.sleep(0.1)
        await asyncio.sleep(1.5)  # three times over, the feed asks whom to follow
    print(f"listed in {took:.1f} s; longest turns {max(listing) * 1000:.0f} ms, {max(watching) * 1000:.0f} ms")
    assert max(listing) <= LONGEST_TURN
    assert max(watching) <= LONGEST_TURN
    gc.unfreeze()
