"""
Tries of a task on a real standalone cluster, where its submission has, or may have, two drivers.

Operator, trigger and cluster are real; what Airflow keeps of the task is in memory. The witness is what the master
lists.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk.exceptions import AirflowException

from dev.processes import wait_until
from dev.proxy import Proxy
from durable_spark.hooks import _http
from durable_spark.hooks.standalone import StandaloneHook
from durable_spark.jobs import JobRef, Submission, SubmissionUncertain
from durable_spark.operators.spark import SparkJobOperator
from durable_spark.triggers import job as trigger_module
from tests.cluster.test_standalone import evict, ids, processes_of
from tests.standalone import jvm_job
from tests.unit import test_trigger
from tests.unit.test_operator import job_of
from tests.unit.test_trigger import airflow
from tests.unit.tries import TaskInstance, waits

if TYPE_CHECKING:
    from dev.spark import StandaloneCluster
    from durable_spark.triggers.job import JobEvent, JobTrigger
    from tests.cluster.conftest import Guarded

__all__ = ["airflow"]  # a fixture

CONN_ID = "two_drivers"


def task(monkeypatch: pytest.MonkeyPatch, connection: dict[str, Any], **arguments: Any) -> TaskInstance:
    """Return a task instance whose driver runs for ten minutes."""
    monkeypatch.setenv(f"AIRFLOW_CONN_{CONN_ID.upper()}", json.dumps(connection))
    monkeypatch.setattr(_http, "READ_TIMEOUT", 2.0)  # of a page that does not answer
    monkeypatch.setattr(StandaloneHook, "queue_patience", 2.0)
    job = jvm_job(600)
    names = ("application", "java_class", "application_args", "driver_memory", "conf")
    described = {name: getattr(job, name) for name in names}
    return TaskInstance(SparkJobOperator, conn_id=CONN_ID, retries=2, **described, **arguments)


@dataclasses.dataclass
class Drivers:
    """Those that a test has made, as the master lists them."""

    cluster: StandaloneCluster
    before: set[str]

    def states(self) -> dict[str, str]:
        """Return the state of each, the oldest first."""
        return {driver.id: driver.state for driver in self.cluster.drivers() if driver.id not in self.before}

    def wait(self, *states: str) -> list[str]:
        """Wait until there are drivers in these states and no others; return their IDs."""
        wait_until(lambda: tuple(self.states().values()) == states, 60, f"drivers in {states}", interval=0.1)
        return list(self.states())


class TestASuccessor:
    """The cluster has started a supervised driver again, under another ID."""

    @pytest.mark.parametrize("forgotten", [False, True], ids=["relaunched", "and_forgotten"])
    def test_a_clear_submits_nothing_while_it_cannot_be_told(
        self, guarded: Guarded, monkeypatch: pytest.MonkeyPatch, forgotten: bool
    ) -> None:
        cluster = guarded.cluster
        (worker,) = cluster.workers
        instance = task(monkeypatch, guarded.connection(), supervise=True)
        others = ids(cluster)
        first = job_of(instance.begin().execute())
        drivers = Drivers(cluster, others)
        wait_until(lambda: drivers.states().get(first) == "RUNNING", 60, "the driver to run", interval=0.1)
        worker.server.kill()
        try:  # queued, the successor does not show whose it is
            wait_until(lambda: "SUBMITTED" in drivers.states().values(), 60, "the successor", interval=0.1)
            (successor,) = [driver for driver, state in drivers.states().items() if state == "SUBMITTED"]
            if forgotten:  # the master of this cluster remembers one at a time
                asyncio.run(_evict(cluster, first))
            instance.clear()
            known = drivers.states()
            with pytest.raises(AirflowException, match=f"cannot be told: {successor} is queued"):
                instance.begin(kill_timeout=1.0).execute()
            assert drivers.states() == known, "it was submitted beside"
        finally:
            worker.server.start()
            cluster.wait_for_workers(1)
        wait_until(lambda: drivers.states()[successor] == "RUNNING", 60, "the successor to run", interval=0.1)
        last = job_of(instance.begin().execute())
        assert drivers.states().get(successor, "KILLED") == "KILLED"
        assert [driver for driver, state in drivers.states().items() if state in ("SUBMITTED", "RUNNING")] == [last]
        asyncio.run(_kill(last))


async def _evict(cluster: StandaloneCluster, driver: str) -> None:
    async with StandaloneHook(CONN_ID) as hook:
        await evict(hook, cluster, JobRef(driver))


async def _kill(driver: str) -> None:
    async with StandaloneHook(CONN_ID) as hook:
        await hook.kill(JobRef(driver))


class TestALateRequest:
    """The request of a try that was cut off arrives when the retry has proven the absence."""

    @pytest.fixture
    def drivers(self, standalone_cluster: StandaloneCluster) -> Iterator[Drivers]:
        drivers = Drivers(standalone_cluster, ids(standalone_cluster))
        yield drivers
        for driver, state in drivers.states().items():
            if state in ("SUBMITTED", "RUNNING"):
                standalone_cluster.kill_driver(driver)

    @pytest.fixture
    def rest(self, drivers: Drivers) -> Iterator[Proxy]:
        with Proxy(f"http://127.0.0.1:{drivers.cluster.master.rest_port}") as rest:
            yield rest

    @pytest.fixture
    def instance(self, drivers: Drivers, rest: Proxy, monkeypatch: pytest.MonkeyPatch) -> TaskInstance:
        return task(monkeypatch, drivers.cluster.connection(rest_port=str(rest.port)))

    @pytest.fixture
    def late(self, drivers: Drivers, rest: Proxy, instance: TaskInstance) -> Callable[..., str]:
        """Return a function that lets the first try's request arrive, perhaps with more cores, and returns the ID."""
        held = rest.hold("POST", "/create$")
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(instance.begin().execute)
            request = held.wait()
            held.drop()
            assert waits(first.result(60))

        def arrive(cores: int = 1) -> str:
            body = json.loads(request.body)
            body["sparkProperties"]["spark.driver.cores"] = str(cores)
            again = urllib.request.Request(
                f"http://127.0.0.1:{drivers.cluster.master.rest_port}{request.path}",
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(again, timeout=30) as answer:
                return str(json.load(answer)["submissionId"])

        return arrive

    @pytest.fixture
    def failed(self, drivers: Drivers, instance: TaskInstance, late: Callable[[], str]) -> tuple[str, str]:
        """The retry's driver, which has failed, and the late one, which runs."""
        older = job_of(instance.begin().execute())
        drivers.wait("RUNNING")
        younger = late()
        assert drivers.wait("RUNNING", "RUNNING") == [older, younger]
        for process in processes_of(older):
            os.kill(int(process.parent.name), signal.SIGKILL)
        drivers.wait("FAILED", "RUNNING")
        return older, younger

    def test_no_failure_counts_while_it_cannot_be_told(
        self, instance: TaskInstance, drivers: Drivers, rest: Proxy, failed: tuple[str, str]
    ) -> None:
        older, younger = failed
        (worker,) = drivers.cluster.workers
        worker.server.suspend()  # whose pages tell whose a driver is
        try:
            told = self.told(instance, outage_timeout=4.0)
            assert (told.kind, told.job.id) == ("outage", older)
            assert "whether its submission has a second job could not be told" in told.message
            with pytest.raises(AirflowException, match="SubmissionUncertain"):
                instance.begin().execute()
            assert drivers.states() == {older: "FAILED", younger: "RUNNING"}
        finally:
            worker.server.resume()
        # The retry of a failure submits anew: when the younger one is dead.
        with ThreadPoolExecutor(1) as pool, rest.holding("POST", "/create$") as held:
            retry = pool.submit(instance.begin().execute)
            held.wait()
            assert drivers.states() == {older: "FAILED", younger: "KILLED"}
            held.release()
            anew = job_of(retry.result(60))
        assert list(drivers.states()) == [older, younger, anew]

    def test_a_failure_is_told_when_the_younger_is_dead(
        self, instance: TaskInstance, drivers: Drivers, failed: tuple[str, str]
    ) -> None:
        older, younger = failed
        told = self.told(instance)
        assert (told.kind, told.job.id, told.state) == ("failed", older, "FAILED")
        assert drivers.states() == {older: "FAILED", younger: "KILLED"}

    @pytest.mark.parametrize(
        ("cores", "end"), [(16, "KILLED"), (17, "SUBMITTED")], ids=["gets_its_place", "never_does"]
    )
    def test_a_success_waits_for_one_in_the_queue(
        self,
        instance: TaskInstance,
        drivers: Drivers,
        late: Callable[[int], str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        cores: int,
        end: str,
    ) -> None:
        """Which shows whose it is when it is launched. A limit that the docs name: it does not wait for ever."""
        monkeypatch.setattr(trigger_module, "_SUCCESS_WAITS", 30.0 if end == "KILLED" else 2.0)
        gate = tmp_path / "gate"
        source, main, *_ = jvm_job(0).application_args
        older = job_of(instance.begin(application_args=[source, main, str(gate), "0"]).execute())
        drivers.wait("RUNNING")
        younger = late(cores)
        drivers.wait("RUNNING", "SUBMITTED")
        gate.touch()
        told = self.told(instance)
        assert (told.kind, told.job.id) == ("succeeded", older)
        assert drivers.states() == {older: "FINISHED", younger: end}

    def test_who_was_killed_as_one_too_many_gives_way(
        self, instance: TaskInstance, drivers: Drivers, rest: Proxy, late: Callable[[], str]
    ) -> None:
        """It overtakes the retry's request; its sender sees two, and kills the younger, which is the retry's."""
        with ThreadPoolExecutor(1) as pool, rest.holding("POST", "/create$") as held:
            retry = pool.submit(instance.begin().execute)
            held.wait()
            older = late()
            held.release()
            ours = job_of(retry.result(60))
        assert drivers.wait("RUNNING", "RUNNING") == [older, ours]
        drivers.cluster.kill_driver(ours)
        drivers.wait("RUNNING", "KILLED")
        assert job_of(instance.begin().execute()) == older
        assert drivers.states() == {older: "RUNNING", ours: "KILLED"}
        drivers.cluster.kill_driver(older)
        drivers.wait("KILLED", "KILLED")
        told = self.told(instance)
        assert (told.kind, told.job.id) == ("killed", older)

    def test_marked_failed_neither_lives_on(
        self, instance: TaskInstance, drivers: Drivers, late: Callable[[], str], airflow: dict[str, Any]
    ) -> None:
        job_of(instance.begin().execute())
        drivers.wait("RUNNING")
        late()
        drivers.wait("RUNNING", "RUNNING")
        airflow["state"] = "failed"
        asyncio.run(asyncio.wait_for(self.trigger(instance).on_kill(), 30))
        drivers.wait("KILLED", "KILLED")

    def test_marked_failed_while_it_cannot_be_told_neither_lives_on(
        self,
        instance: TaskInstance,
        drivers: Drivers,
        late: Callable[[], str],
        airflow: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Nor does one whose worker answers only when the first look is over."""
        job_of(instance.begin().execute())
        drivers.wait("RUNNING")
        late()
        drivers.wait("RUNNING", "RUNNING")
        (worker,) = drivers.cluster.workers
        find, doubts = StandaloneHook.find, []

        async def doubt(self: StandaloneHook, submission: Submission) -> Any:
            try:
                return await find(self, submission)
            except SubmissionUncertain as error:
                doubts.append(error)
                worker.server.resume()
                raise

        monkeypatch.setattr(StandaloneHook, "find", doubt)
        airflow["state"] = "failed"
        worker.server.suspend()  # whose pages tell whose a driver is
        try:
            asyncio.run(asyncio.wait_for(self.trigger(instance).on_kill(), 60))
        finally:
            worker.server.resume()
        assert doubts
        drivers.wait("KILLED", "KILLED")

    def test_after_a_clear_nobody_looks_for_it(
        self, instance: TaskInstance, drivers: Drivers, late: Callable[[], str]
    ) -> None:
        """A limit that the docs name: the clear's submission has another token. The command for orphans lists it."""
        instance.clear()
        ours = job_of(instance.begin().execute())
        drivers.wait("RUNNING")
        stray = late()
        assert drivers.wait("RUNNING", "RUNNING") == [ours, stray]
        drivers.cluster.kill_driver(ours)
        told = self.told(instance)
        assert (told.kind, told.job.id) == ("killed", ours)
        assert drivers.states() == {ours: "KILLED", stray: "RUNNING"}

    def told(self, instance: TaskInstance, **arguments: Any) -> JobEvent:
        """Return what a trigger that follows the record's job reports."""
        return asyncio.run(asyncio.wait_for(test_trigger.event(self.trigger(instance, **arguments)), 120))

    def trigger(self, instance: TaskInstance, **arguments: Any) -> JobTrigger:
        """Return a trigger that follows the record's job."""
        record = instance.store["durable_spark"]
        trigger: JobTrigger = test_trigger.trigger(
            hook="durable_spark.hooks.standalone.StandaloneHook",
            conn_id=CONN_ID,
            cluster=tuple(record["cluster"]),
            job=JobRef(*record["job"]),
            submission=Submission.from_json(record["submission"]),
            sent_before=record["resent"],
            interval=0.5,
            **arguments,
        )
        return trigger
