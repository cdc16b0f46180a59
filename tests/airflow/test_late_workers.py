"""
Workers that are cut off, not dead, and wake up when the retry is long in charge.

Each story suspends the two processes of a try at one instant of its life, lets Airflow give the try up, waits for the
retry, and wakes the old one up. Counted by the cluster: one job, or two of which the younger was killed at once.

Airflow gives up a try that has sent no heartbeat for ``task_instance_heartbeat_timeout``. Nobody waits for that here:
the last heartbeat is made an hour old. All else is Airflow's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dev.processes import wait_until
from tests.airflow.backdoor import let_be_given_up
from tests.airflow.conftest import ENDED, LAST_LOOK, Run, Stage
from tests.airflow.gates import open_gate
from tests.airflow.marks import mark_of
from tests.airflow.together import together

if TYPE_CHECKING:
    from dev.airflow import TaskInstance, TaskProcess
    from dev.proxy import Hold

FORGOTTEN = "k8s_driver_status"
"""A key that a try deletes from the store: the last thing that it asks of Airflow before it submits."""
STOPPED = "Another try of this task has begun"
"""What a process says when the store has refused its write."""


@dataclasses.dataclass
class Late:
    """A try that is cut off."""

    run: Run
    ti: TaskInstance
    process: TaskProcess
    held: Hold | None

    def wake(self) -> None:
        """Wake the processes up, and wait until the one that runs the task's code is gone."""
        self.process.thaw()
        if self.held is not None:
            self.held.release()
        gone = Path(f"/proc/{self.process.runner}")
        try:
            wait_until(lambda: not gone.exists(), 90, f"the old process of {self.run.dag} to end", interval=0.2)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.run.logs()}") from None
        assert Path(f"/proc/{self.process.supervisor}").exists(), "the executor's worker lives and takes other tasks"
        assert all(scheduler.alive for scheduler in self.run.stage.airflow.schedulers)

    @contextlib.contextmanager
    def heart_held(self) -> Iterator[None]:
        """
        Hold the try's heartbeats back.

        Else it may be told to stop by the answer to the first one, before it has done what it was about to do.
        """
        with self.run.stage.execution_api.holding("PUT", f"/task-instances/{self.ti.id}/heartbeat"):
            yield


def cut_off(run: Run, method: str, path: str, *, body: str = "", answered: bool = False) -> Late:
    """
    Suspend the run's first try when it sends a request to Airflow.

    :param path: regular expression; ``{ti}`` is the ID of the try.
    :param answered: Airflow gets the request at once, and the answer waits for the process to wake up; else
        Airflow gets it when the process wakes up.
    """
    ti = run.ti
    held = run.stage.execution_api.hold(method, path.format(ti=ti.id), body=body, after=answered)
    held.wait()
    process = run.stage.airflow.task_process(*run.key)
    process.freeze()
    if answered:
        held.release()
    return Late(run, ti, process, None if answered else held)


def record_of(run: Run) -> Any:
    return run.store()["durable_spark"]


def told_by_the_old_one(run: Run) -> str:
    """Return the log of the first try, with the causes of its errors."""
    return "\n".join(map(json.dumps, run.stage.airflow.log(*run.key, 1)))


def wait_for_the_retry(late: Late) -> Any:
    """Let the try be given up, wait until the retry follows its job, and return the record."""
    let_be_given_up(late.run, late.ti)
    late.run.wait("deferred", try_number=2)
    late.run.wait_until_followed()
    return record_of(late.run)


def assert_one_end(run: Run, job_id: str) -> None:
    """Let the job end: there is one verdict, that of the second try."""
    open_gate(run)
    ended = run.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 2)
    assert run.xcoms()["return_value"] == job_id
    record = record_of(run)
    assert (record["job"][0], record["verdict"]["state"]) == (job_id, "succeeded")


def assert_one_pod(run: Run) -> None:
    """There is the one pod, it lives, and its end is the task's."""
    (pod,) = run.pods()
    assert run.phase(pod) == "Running"
    assert_one_end(run, f"spark:{pod.name}")


# --- before it submits


@together
def test_before_the_intent_is_written(stage: Stage, run: Callable[..., Run]) -> None:
    """The retry finds no record; the old one's intent is refused."""
    late = cut_off(run("late_intent"), "PUT", "/store/.*{ti}/durable_spark$", body='"job": ?null')
    record = wait_for_the_retry(late)
    late.wake()
    assert record_of(late.run) == record
    assert STOPPED in told_by_the_old_one(late.run)
    assert_one_pod(late.run)


@together
def test_before_it_sends(stage: Stage, run: Callable[..., Run]) -> None:
    """The intent is stored. The old one sends when the retry has: the API server refuses a second pod of that name."""
    late = cut_off(run("late_post"), "DELETE", "/store/.*{ti}/" + FORGOTTEN, answered=True)
    record = wait_for_the_retry(late)
    with late.heart_held():
        late.process.thaw()
        wait_until(lambda: 409 in answers_to_creations(late.run), 60, "a late request for a pod", interval=0.2)
    late.wake()
    assert record_of(late.run) == record
    assert "Another try is in charge: leaving" in told_by_the_old_one(late.run)
    assert_one_pod(late.run)


def answers_to_creations(run: Run) -> list[int]:
    """Return the API server's answers to requests for pods of this run's job, by the audit log."""
    token = record_of(run)["submission"]["token"]
    return [
        entry["responseStatus"]["code"]
        for entry in run.stage.pod_cluster.audit()
        if entry["verb"] == "create"
        and entry["objectRef"]["resource"] == "pods"
        and token in str(entry["requestObject"])
    ]


@together
def test_before_it_sends_and_the_task_is_cleared(stage: Stage, run: Callable[..., Run]) -> None:
    """What it sends when it wakes up is another submission's, which nobody will look for: it kills that itself."""
    late = cut_off(run("late_cleared"), "DELETE", "/store/.*{ti}/" + FORGOTTEN, answered=True)
    job = late.run
    stage.airflow.set_state(*job.key, "failed")
    assert job.wait_for_end() == "failed"
    stage.airflow.clear(job.dag, job.id, ["job"])
    job.wait("deferred", try_number=2)
    job.wait_until_followed()
    record = record_of(job)
    (wanted,) = job.pods()
    with late.heart_held():
        late.process.thaw()
        wait_until(lambda: len(job.pods()) == 2, 60, "the late pod", interval=0.2)
    late.wake()
    job.wait_for_pod(None)
    assert record_of(job) == record
    assert "the try in charge runs another submission" in told_by_the_old_one(job)
    assert (len(job.pods()), job.phase(wanted)) == (2, "Running")
    assert_one_end(job, f"spark:{wanted.name}")


@together
def test_before_it_sends_where_nobody_refuses(stage: Stage, run: Callable[..., Run]) -> None:
    """A standalone master takes the late request, too: the younger of the two drivers is killed."""
    late = cut_off(run("late_driver"), "DELETE", "/store/.*{ti}/" + FORGOTTEN, answered=True)
    wait_for_the_retry(late)
    with late.heart_held():
        late.process.thaw()
        wait_until(lambda: len(drivers_of(late.run)) == 2, 60, "the late driver", interval=0.2)
    late.wake()
    assert_the_older_driver_stays(late.run)


@together
def test_its_request_is_still_on_its_way(stage: Stage, run: Callable[..., Run]) -> None:
    """So is that of the retry, which has proven that there is no driver: both arrive, the younger is killed."""
    with stage.submitting("late_request") as held:
        job = run("late_request")
        ti = job.ti
        held.wait()
        late = Late(job, ti, stage.airflow.task_process(*job.key), None)
        late.process.freeze()
        let_be_given_up(late.run, late.ti)
        wait_until(lambda: requests_for(job) == 2, 60, "the retry's request", interval=0.2)
    job.wait("deferred", try_number=2)
    wait_until(lambda: len(drivers_of(job)) == 2, 60, "two drivers", interval=0.2)
    late.wake()
    assert_the_older_driver_stays(job)


def requests_for(run: Run) -> int:
    memory = f'"{mark_of(run.dag)}"'
    return sum(request.method == "POST" and memory in request.body for request in run.stage.rest.requests)


def drivers_of(run: Run) -> list[tuple[str, str]]:
    """Return ID and state of each driver of the run, the oldest first."""
    return [(driver.id, driver.state) for driver in run.drivers()]


def assert_the_older_driver_stays(run: Run) -> None:
    (older, younger), began = drivers_of(run), time.monotonic()
    killed = (younger[0], "KILLED")
    wait_until(lambda: drivers_of(run)[1] == killed, 60, "the younger driver to be killed", interval=0.2)
    print(f"{run.dag}: there were two drivers for {time.monotonic() - began:.1f} s")
    assert drivers_of(run)[0] == (older[0], "RUNNING")
    assert_one_end(run, older[0])
    assert [state for _, state in drivers_of(run)] == ["FINISHED", "KILLED"]


# --- when it has submitted


@together
def test_before_the_id_is_written(stage: Stage, run: Callable[..., Run]) -> None:
    """The retry finds the pod by its name; the old one's ID is refused, and its pod is left to the retry."""
    late = cut_off(
        run("late_uid"), "PUT", "/store/.*{ti}/durable_spark$", body=r'"job": ?\["spark:[^"]+", ?"[0-9a-f-]{36}"'
    )
    record = wait_for_the_retry(late)
    late.wake()
    assert record_of(late.run) == record
    said = told_by_the_old_one(late.run)
    assert STOPPED in said
    assert "Another try is in charge: leaving" in said, said
    assert_one_pod(late.run)


@together
def test_before_the_deferral(stage: Stage, run: Callable[..., Run]) -> None:
    """It has seen that it is wanted, and defers when another one has long deferred."""
    late = cut_off(run("late_deferral"), "GET", LAST_LOOK + ".*dag_id=late_deferral&", answered=True)
    record = wait_for_the_retry(late)
    late.wake()
    assert record_of(late.run) == record
    assert (late.run.ti.state, late.run.ti.try_number) == ("deferred", 2)
    assert_one_pod(late.run)


@together
def test_while_it_waits_on_the_worker(stage: Stage, run: Callable[..., Run]) -> None:
    """It is told to stop when it wakes up, which is to kill its job: not one that is another try's by now."""
    job = run("late_waiting")
    ti = job.ti
    pod = job.wait_for_pod("Running")
    job.wait_until_followed()
    late = Late(job, ti, stage.airflow.task_process(*job.key), None)
    late.process.freeze()
    let_be_given_up(late.run, late.ti)
    job.wait("running", try_number=2)
    job.wait_until_followed()
    record = record_of(job)
    late.wake()
    said = told_by_the_old_one(job)
    assert "Told to stop: killing" in said
    assert STOPPED in said
    assert record_of(job) == record
    assert job.pods() == [pod]
    assert_one_pod(job)


# --- while it resumes


@together
def test_before_the_verdict_is_written(stage: Stage, run: Callable[..., Run]) -> None:
    late = cut_off_at_the_end(run("late_resume"), answered=False)
    assert late.run.wait(*ENDED, try_number=2).state == "success"
    record = record_of(late.run)
    late.wake()
    assert record_of(late.run) == record
    assert STOPPED in told_by_the_old_one(late.run)
    assert_ended_once(late.run)


@together
def test_when_the_verdict_is_written(stage: Stage, run: Callable[..., Run]) -> None:
    """The old one returns the result: the retry has done so before."""
    late = cut_off_at_the_end(run("late_verdict"), answered=True)
    assert late.run.wait(*ENDED, try_number=2).state == "success"
    record = record_of(late.run)
    late.wake()
    assert record_of(late.run) == record
    assert_ended_once(late.run)


def cut_off_at_the_end(run: Run, *, answered: bool) -> Late:
    """Suspend the process that writes the verdict down, and let the try be given up."""
    run.wait("deferred")
    run.wait_for_pod("Running")
    run.wait_until_followed()
    open_gate(run)
    late = cut_off(run, "PUT", "/store/.*{ti}/durable_spark$", body='"verdict": ?{', answered=answered)
    let_be_given_up(late.run, late.ti)
    return late


def assert_ended_once(run: Run) -> None:
    """The retry, which has taken the result over, has had the last word."""
    (pod,) = run.pods()
    assert "already completed successfully" in run.log(2)
    assert (run.ti.state, run.ti.try_number) == ("success", 2)
    assert run.xcoms()["return_value"] == f"spark:{pod.name}"
    assert re.findall("Deferring", run.log(2)) == []
