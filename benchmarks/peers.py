"""What our trigger is measured beside: a trigger that only waits, and a client and a poll for each trigger."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from airflow.triggers.base import BaseTrigger, TriggerEvent

__all__ = ["Nothing", "Polling", "known", "waiting"]

known: set[str] = set()
"""The jobs whose state a trigger knows; of one that does nothing: that it runs."""
waiting: dict[str, asyncio.Event] = {}
"""What a trigger that does nothing waits for, by job."""
_shared: list[aiohttp.ClientSession] = []


class Nothing(BaseTrigger):
    """Airflow's own part: a trigger that waits, and is told to end."""

    def __init__(self, job_id: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.job_id = job_id

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "benchmarks.peers.Nothing", {"job_id": self.job_id}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        known.add(self.job_id)
        waiting[self.job_id] = asyncio.Event()
        await waiting[self.job_id].wait()
        yield TriggerEvent({"job_id": self.job_id})


class Polling(BaseTrigger):
    """
    As every deferrable operator waits today: asks for its own job, sleeps, asks again.

    :param job_id: the job.
    :param url: where it is asked for.
    :param interval: seconds of sleep.
    :param shared: whether all triggers have one session. Most have one each.
    """

    def __init__(self, job_id: str, url: str, interval: float, shared: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.job_id, self.url, self.interval, self.shared = job_id, url, interval, shared

    def serialize(self) -> tuple[str, dict[str, Any]]:
        arguments = {"job_id": self.job_id, "url": self.url, "interval": self.interval, "shared": self.shared}
        return "benchmarks.peers.Polling", arguments

    async def run(self) -> AsyncIterator[TriggerEvent]:
        async with self._session() as session:
            while True:
                try:
                    async with session.get(self.url) as response:
                        over = _is_over(await response.json())
                except (aiohttp.ClientError, asyncio.TimeoutError):  # a machine that cannot keep up
                    over = False
                else:
                    known.add(self.job_id)
                if over:
                    yield TriggerEvent({"job_id": self.job_id})
                    return
                await asyncio.sleep(self.interval)

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        if not self.shared:
            async with aiohttp.ClientSession() as session:
                yield session
            return
        if not _shared:
            _shared.append(aiohttp.ClientSession())
        yield _shared[0]


def _is_over(told: Any) -> bool:
    """Whether an answer of one of the clusters says that a job has ended."""
    if "app" in told:
        return told["app"]["state"] in ("FINISHED", "FAILED", "KILLED")
    if "driverState" in told:
        return told["driverState"] not in ("SUBMITTED", "RUNNING")
    return told["status"]["phase"] in ("Succeeded", "Failed")
