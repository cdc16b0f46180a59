"""A fake cluster and a hook on it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.unit.hooks.fake import FakeCluster, QuickHook


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
async def connect(stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], QuickHook]:
    """Return a hook on a connection."""

    def hook(connection: dict[str, Any]) -> QuickHook:
        monkeypatch.setenv("AIRFLOW_CONN_STANDALONE", json.dumps(connection))
        hook = QuickHook("standalone")
        stack.push_async_callback(hook.aclose)
        return hook

    return hook


@pytest.fixture
def hook(cluster: FakeCluster, connect: Callable[[dict[str, Any]], QuickHook]) -> QuickHook:
    return connect(cluster.connection())
