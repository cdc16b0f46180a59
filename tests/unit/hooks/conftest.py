"""Fake clusters and hooks on them."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from tenacity import wait_none

from durable_spark.hooks import kubernetes
from durable_spark.hooks.kubernetes import KubernetesHook
from tests.unit.hooks.fake import FakeCluster, QuickHook
from tests.unit.hooks.fake_kubernetes import FakeApi
from tests.unit.hooks.fake_yarn import FakeYarn, QuickYarnHook

if TYPE_CHECKING:
    from durable_spark.hooks.job import JobHook


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def cluster(stack: AsyncExitStack) -> FakeCluster:
    return await FakeCluster().start(stack)


@pytest.fixture
async def two_masters(stack: AsyncExitStack) -> FakeCluster:
    return await FakeCluster(masters=2).start(stack)


@pytest.fixture
async def connect_to(stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a hook of a class on a connection."""

    def hook(kind: type[JobHook], connection: dict[str, Any]) -> JobHook:
        monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", json.dumps(connection))
        hook = kind("cluster")
        stack.push_async_callback(hook.aclose)
        return hook

    return hook


@pytest.fixture
def connect(connect_to: Callable[..., QuickHook]) -> Callable[[dict[str, Any]], QuickHook]:
    """Return a standalone hook on a connection."""
    return functools.partial(connect_to, QuickHook)


@pytest.fixture
def hook(cluster: FakeCluster, connect: Callable[[dict[str, Any]], QuickHook]) -> QuickHook:
    return connect(cluster.connection())


@pytest.fixture
async def api(stack: AsyncExitStack) -> FakeApi:
    return await FakeApi().start(stack)


@pytest.fixture
def connect_kubernetes(
    connect_to: Callable[..., KubernetesHook], monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any]], KubernetesHook]:
    """Return a Kubernetes hook on a connection, which does not wait before it submits again."""
    monkeypatch.setattr(kubernetes, "wait_random_exponential", lambda **_: wait_none())
    return functools.partial(connect_to, KubernetesHook)


@pytest.fixture
def kubernetes_hook(api: FakeApi, connect_kubernetes: Callable[[dict[str, Any]], KubernetesHook]) -> KubernetesHook:
    return connect_kubernetes(api.connection())


@pytest.fixture
async def yarn(stack: AsyncExitStack) -> FakeYarn:
    return await FakeYarn().start(stack)


@pytest.fixture
async def yarn_pair(stack: AsyncExitStack) -> FakeYarn:
    return await FakeYarn(managers=2).start(stack)


@pytest.fixture
def connect_yarn(
    connect_to: Callable[..., QuickYarnHook], monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any]], QuickYarnHook]:
    """Return a YARN hook on a connection, which finds no Hadoop configuration but what a test gives it."""
    for name in ("HADOOP_CONF_DIR", "YARN_CONF_DIR"):
        monkeypatch.delenv(name, raising=False)
    return functools.partial(connect_to, QuickYarnHook)


@pytest.fixture
def yarn_hook(yarn: FakeYarn, connect_yarn: Callable[[dict[str, Any]], QuickYarnHook]) -> QuickYarnHook:
    return connect_yarn(yarn.connection())
