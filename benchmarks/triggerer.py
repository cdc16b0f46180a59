"""
The process that is measured: Airflow's own ``TriggerRunner``, with triggers given to it as its supervisor gives them.

``python -m benchmarks.triggerer`` reads from its standard input what to follow, and writes what it measured to its
standard output. What the supervisor does, in another process, is not in it: the floor, of triggers that do nothing, is
measured in the same way.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import gc
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
from airflow.executors.workloads.task import TaskInstanceDTO
from airflow.executors.workloads.trigger import RunTrigger
from airflow.jobs.triggerer_job_runner import TriggerEventEntry, TriggerRunner
from airflow.models.trigger import Trigger
from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.comms import GetXCom, XComResult
from airflow.sdk.log import configure_logging

from benchmarks import peers
from durable_spark.jobs import JobRef, JobState, Submission
from durable_spark.triggers import feed
from durable_spark.triggers.job import JobTrigger, JobTriggerArguments

LOOK_EVERY = 0.1
"""Seconds between two looks whether all jobs are known."""
BEAT = 0.01
"""Seconds between two beats of the loop that are measured."""


class Events(collections.deque[TriggerEventEntry]):
    """The runner's events, and when each came: by job ID."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[str, float] = {}

    def append(self, entry: TriggerEventEntry) -> None:
        payload = entry.event.payload
        if isinstance(payload, dict):
            self.at[payload["job_id"]] = time.monotonic()
        super().append(entry)


class Comms:
    """
    Airflow as the triggers ask it, by way of their supervisor: answers at once, and counts.

    The way there and back is not in it.
    """

    def __init__(self) -> None:
        self._reader_task: asyncio.Task[Any] | None = None
        self.in_charge: dict[int | None, str] = {}
        self.requests: collections.Counter[str] = collections.Counter()

    async def asend(self, message: Any) -> Any:
        self.requests[type(message).__name__] += 1
        if isinstance(message, GetXCom):
            return XComResult(key=message.key, value={"ti_id": self.in_charge.get(message.map_index)})
        return None


class Runner(TriggerRunner):
    """Gets its triggers from here."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events = self.came = Events()
        self.given: list[RunTrigger] = []
        self.comms = Comms()

    async def init_comms(self) -> None:
        self.comms._reader_task = asyncio.create_task(asyncio.Event().wait())
        task_runner.SUPERVISOR_COMMS = self.comms_decoder = self.comms  # type: ignore[assignment]

    async def sync_state_to_supervisor(self, finished_ids: list[int]) -> None:
        self.process_trigger_events(finished_ids)
        given, self.given = self.given, []
        self.to_create.extend(given)


class Measured:
    """
    A run.

    :param wanted: what to do, see :func:`benchmarks.waits.measure`.
    """

    def __init__(self, wanted: dict[str, Any]) -> None:
        self.wanted = wanted
        self.runner = Runner()
        self.lags: list[tuple[float, float]] = []
        self.collections: list[tuple[float, float]] = []
        gc.callbacks.append(self._collected)
        self.numbers = iter(range(1, 1 << 30))

    async def run(self) -> dict[str, Any]:
        runner = asyncio.create_task(self.runner.arun())  # type: ignore[no-untyped-call]
        beats = asyncio.create_task(self._beat())
        async with aiohttp.ClientSession() as session:
            try:
                return await self._measure(session)
            finally:
                self.runner.stop = True
                beats.cancel()
                runner.cancel()
                await asyncio.gather(beats, runner, return_exceptions=True)

    async def _measure(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        wanted = self.wanted

        async def control(what: str, method: str = "GET") -> Any:
            async with session.request(method, f"{wanted['control']}/-/{what}") as response:
                return await response.json()

        interval, window = wanted["interval"], wanted["window"]
        first, *rest = wanted["jobs"]
        # What is paid once, for the first one.
        self.runner.given += [self._workload(*job) for job in (first, *wanted["beside"][:1])]
        await self._until(lambda: self._known() >= 1, 60)
        await asyncio.sleep(1.0)
        await control("requests")
        memory, objects = resident(), len(gc.get_objects())
        given = [self._workload(*job) for job in (*rest, *wanted["beside"][1:])]
        began, used = time.monotonic(), time.process_time()
        self.runner.given += given
        del given
        await self._until(lambda: self._known() >= len(wanted["jobs"]), wanted["patience"])
        known_after = time.monotonic() - began
        start_cpu = time.process_time() - used
        start_requests = await control("requests")
        await asyncio.sleep(2 * interval)
        grown, more_objects = resident() - memory, len(gc.get_objects()) - objects
        # Nothing but time: what it costs to go on.
        await control("requests")
        await control(f"changing?rate={wanted['rate']}", "POST")
        used, steady = time.process_time(), time.monotonic()
        await self._pass(window)
        cpu = time.process_time() - used
        steady_end = time.monotonic()
        requests = await control("requests")
        await control("changing?rate=0", "POST")
        await asyncio.sleep(2 * interval)
        changes = await control("changes")
        came = self.runner.came.at
        in_window = [lag for at, lag in self.lags if steady <= at <= steady_end]
        return {
            "known_after": known_after,
            "all_known": self._known() >= len(wanted["jobs"]) - len(changes),
            "start_cpu": start_cpu,
            "start_requests": start_requests,
            "memory": grown,
            "objects": more_objects,
            "cpu": cpu / (steady_end - steady),
            "intervals": (steady_end - steady) / interval,
            "requests": requests,
            "changes": len(changes),
            "asked_airflow": dict(self.runner.comms.requests),
            "latencies": sorted(came[job_id] - at for job_id, at in changes if job_id in came),
            "lag_p99": sorted(in_window)[int(0.99 * len(in_window))],
            "lag_max": max(lag for at, lag in self.lags if at >= began),
            "lag_max_own": max(lag - self._collecting(at, at + BEAT + lag) for at, lag in self.lags if at >= began),
        }

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        """Note when Python's garbage collector, which stops everything, looked through all objects."""
        if info["generation"] == 2:
            now = time.monotonic()
            if phase == "start":
                self.collections.append((now, now))
            else:
                self.collections[-1] = (self.collections[-1][0], now)

    def _collecting(self, begin: float, end: float) -> float:
        """Return how long it did so within a time."""
        return sum(max(0.0, min(end, to) - max(begin, since)) for since, to in self.collections)

    async def _beat(self) -> None:
        while True:
            at = time.monotonic()
            await asyncio.sleep(BEAT)
            self.lags.append((at, time.monotonic() - at - BEAT))

    async def _pass(self, window: float) -> None:
        """Let the time pass in which jobs end; the cluster sees to it, unless there are none."""
        if self.wanted["kind"] != "nothing":
            await asyncio.sleep(window)
            return
        for job_id in [job[0] for job in self.wanted["jobs"][: int(window * self.wanted["rate"])]]:
            peers.waiting[job_id].set()
            await asyncio.sleep(1 / self.wanted["rate"])

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not condition() and time.monotonic() < until:  # noqa: ASYNC110 nothing announces it
            await asyncio.sleep(LOOK_EVERY)

    def _known(self) -> int:
        if self.wanted["kind"] != "ours":
            return len(peers.known)
        of = tuple(self.wanted["cluster"])
        feeds = feed._feeds.get(asyncio.get_running_loop(), {})
        return sum(
            subscription.status is not None and subscription.status.state is not JobState.UNKNOWN
            for each in list(feeds.values())
            if each.key.cluster == of
            for group in each._subscriptions.values()
            for subscription in group
        )

    def _workload(self, job_id: str, uid: str, token: str, path: str, conn_id: str) -> RunTrigger:
        wanted, number = self.wanted, next(self.numbers)
        ti_id = uuid.uuid4()
        self.runner.comms.in_charge[number] = str(ti_id)
        trigger: Any
        if wanted["kind"] == "ours":
            arguments = JobTriggerArguments(
                hook=wanted["hook"],
                conn_id=conn_id,
                cluster=tuple(wanted["clusters"][conn_id]),
                job=JobRef(job_id, uid),
                submission=Submission(token=token, owner="0" * 64),
                dag_id="benchmark",
                run_id="manual__2026-11-27T00:00:00+00:00",
                task_id="job",
                map_index=number,
                ti_id=str(ti_id),
                deferred_at=time.time() - 3600,
                interval=wanted["interval"],
                deadline=time.time() + 86400,
            )
            trigger = JobTrigger(arguments.to_json())
        elif wanted["kind"] == "nothing":
            trigger = peers.Nothing(job_id)
        else:
            url = wanted["control"] + path
            trigger = peers.Polling(job_id, url, wanted["interval"], shared=wanted["kind"] == "shared session")
        class_path, kwargs = trigger.serialize()
        ti = TaskInstanceDTO.model_construct(
            id=ti_id,
            dag_version_id=ti_id,
            task_id="job",
            dag_id="benchmark",
            run_id="manual__2026-11-27T00:00:00+00:00",
            try_number=1,
            map_index=number,
            pool_slots=1,
            queue="default",
            priority_weight=1,
        )
        return RunTrigger(id=number, classpath=class_path, encrypted_kwargs=Trigger.encrypt_kwargs(kwargs), ti=ti)


def resident() -> int:
    """Return the bytes that this process has in memory, without what is only waiting to be given back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    wanted = json.load(sys.stdin)
    with open(os.devnull, "wb") as nobody:
        configure_logging(json_output=True, output=nobody)  # written as the triggerer does, to nobody
        result = asyncio.run(Measured(wanted).run())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
