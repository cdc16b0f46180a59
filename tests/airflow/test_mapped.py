"""
Mapped tasks: each item has a job of its own, and keeps it, or never gets another item's, whatever the list comes to.

Counted by the API server's audit log, in which each pod names its item.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable

import pytest

from dev.airflow import ApiError, TaskInstance
from dev.processes import wait_until
from durable_spark.jobs import owner_of
from tests.airflow.conftest import ENDED, LAST_LOOK, Run, Stage
from tests.airflow.gates import open_gate
from tests.airflow.small_jobs import ShellPod, shell_pods
from tests.airflow.together import fatal, from_the_start, together


@dataclasses.dataclass
class Mapped:
    """The task instances of a run's mapped task."""

    run: Run

    def tis(self) -> dict[int, TaskInstance]:
        """Return the task instances by their map index."""
        path = f"/dags/{self.run.dag}/dagRuns/{self.run.id}/taskInstances/{self.run.task}/listMapped"
        answer = self.run.stage.airflow.api("GET", path, params={"limit": 100})
        return {raw["map_index"]: TaskInstance.from_json(raw) for raw in answer["task_instances"]}

    def wait(self, *states: str, deadline: float = 120, index: int | None = None, try_number: int = 0) -> None:
        """Wait until all, or one, are in one of the states, in this try or a later one."""

        def reached() -> bool:
            seen = [told for i, told in self.states().items() if index in (None, i) and told[0] != "removed"]
            return bool(seen) and all(state in states and number >= try_number for state, number in seen)

        what = f"{self.run.dag}[{'all' if index is None else index}] to be {' or '.join(states)}"
        try:
            wait_until(reached, deadline, what, interval=1)
        except TimeoutError as error:
            seen = self.states()
            logs = "\n".join(self.log(i, number)[-2000:] for i, (_, number) in seen.items())
            raise AssertionError(f"{error}: they are {seen}\n{logs[-8000:]}") from None

    def states(self) -> dict[int, tuple[str | None, int]]:
        """Return the state and the number of the try by map index, once the task is expanded."""
        return {index: told for index, told in self.run.states().items() if index >= 0}

    def log(self, index: int, try_number: int = 1) -> str:
        return self.run.stage.airflow.log_text(*self.run.key, try_number, index)

    def result(self, index: int) -> object:
        return self.run.stage.airflow.xcoms(*self.run.key, index).get("return_value")

    def wait_for_line(self, part: str) -> None:
        """Wait until the first try's log of each index has a line with this in it."""
        for index in self.states():
            self.run.wait_until_said(part, map_index=index, deadline=60)

    def pods(self) -> dict[str, list[ShellPod]]:
        """Return the pods that were created for each item, the oldest first."""
        made: dict[str, list[ShellPod]] = {}
        for pod in shell_pods(self.run):
            made.setdefault(pod.item, []).append(pod)
        return made

    def wait_for_pods(self, counts: dict[str, int]) -> dict[str, list[ShellPod]]:
        """Wait until so many pods were created for each item, and return them."""

        def reached() -> bool:
            return {item: len(made) for item, made in self.pods().items()} == counts

        wait_until(reached, 90, f"{counts} pods of {self.run.dag}", interval=1)
        return self.pods()


def phase(stage: Stage, pod: ShellPod) -> str | None:
    """Return a pod's phase, ``None`` when it is gone."""
    return next((str(p["status"]["phase"]) for p in stage.pod_cluster.pods() if p["metadata"]["uid"] == pod.uid), None)


def set_items(stage: Stage, dag: str, items: str) -> None:
    """Let the Dag's list be another one from now on."""
    variable = {"key": dag, "value": items}
    with contextlib.suppress(ApiError):
        stage.airflow.api("POST", "/variables", variable)
        return
    stage.airflow.api("PATCH", f"/variables/{dag}", variable)


@from_the_start
def test_a_hundred_items_have_a_job_each(stage: Stage, run: Callable[..., Run]) -> None:
    job = Mapped(run("map_hundred"))
    job.wait(*ENDED, deadline=600)
    tis = job.tis()
    assert {(ti.state, ti.try_number) for ti in tis.values()} == {("success", 1)}
    pods = job.pods()
    assert Counter({item: len(made) for item, made in pods.items()}) == {f"item-{n}": 1 for n in range(100)}
    collect = (job.run.dag, job.run.id, "collect")
    stage.airflow.wait_for_state(*collect, "success")
    collected = stage.airflow.xcoms(*collect)["return_value"]
    assert collected == [pods[f"item-{index}"][0].job_id for index in range(100)], "each index returns its own job"
    for index in range(100):
        owner = owner_of(deployment="", dag_id=job.run.dag, run_id=job.run.id, task_id="job", map_index=index)
        assert pods[f"item-{index}"][0].labels["durable-spark/owner"] == owner
    ends = [ti.end for ti in tis.values() if ti.end]
    starts = [ti.start for ti in tis.values() if ti.start]
    print(f"100 mapped jobs: {(max(ends) - min(starts)).total_seconds():.0f} s")


@pytest.mark.parametrize("dag", ["map_xcom", "map_literal"])
@together
def test_a_retry_that_meets_another_item_begins_anew(stage: Stage, run: Callable[..., Run], dag: str) -> None:
    """Their workers die when the jobs run, and meanwhile the list has another order: nobody follows another's job."""
    set_items(stage, dag, "a b c")
    with contextlib.ExitStack() as stack:
        looks = [f"{LAST_LOOK}.*dag_id={dag}&.*map_index={index}$" for index in range(3)]
        held = [stack.enter_context(stage.execution_api.holding("GET", look)) for look in looks]
        job = Mapped(run(dag))
        for hold in held:
            hold.wait(90)
        old = job.wait_for_pods({"a": 1, "b": 1, "c": 1})
        set_items(stage, dag, "b a c")
        if dag == "map_xcom":
            stage.airflow.clear(dag, job.run.id, ["items"], reset_dag_runs=False)
            stage.airflow.wait_for_state(dag, job.run.id, "items", "success", try_number=2)
        for index, hold in enumerate(held):
            stage.airflow.kill_task_process(*job.run.key, map_index=index)
            hold.drop()
    job.wait("deferred", try_number=2)
    new = job.wait_for_pods({"a": 2, "b": 2, "c": 1})
    assert [phase(stage, old[item][0]) for item in "abc"] == [None, None, "Running"], "no item's job beside its old one"
    for index in (0, 1):
        assert "because the mapped arguments have changed" in job.log(index, 2)
    assert "Reconnecting to existing job" in job.log(2, 2)
    open_gate(job.run)
    job.wait(*ENDED)
    assert {(ti.state, ti.try_number) for ti in job.tis().values()} == {("success", 2)}
    assert [job.result(index) for index in range(3)] == [new[item][-1].job_id for item in "bac"]
    assert job.pods() == new


@pytest.mark.parametrize("dag", ["map_kwargs", "map_group"])
@together
def test_cleared_with_a_list_that_changed_and_shrank(stage: Stage, run: Callable[..., Run], dag: str) -> None:
    """Of kwargs, ``on_clear="reconnect"`` takes up the job of an item that stayed in its place, and of no other."""
    set_items(stage, dag, "a b c d")
    job = Mapped(run(dag, task="job" if dag == "map_kwargs" else "each.job"))
    wait_until(lambda: len(job.states()) == 4, 60, "the expansion", interval=1)
    job.wait("deferred")
    job.wait_for_line(" is Running")
    old = job.wait_for_pods({"a": 1, "b": 1, "c": 1, "d": 1})
    set_items(stage, dag, "b a c")
    stage.airflow.clear(dag, job.run.id, ["items"], include_downstream=True)
    kept = dag == "map_kwargs"
    new = job.wait_for_pods({"a": 2, "b": 2, "c": 1 if kept else 2, "d": 1})
    job.wait("deferred", try_number=2)
    assert job.tis()[3].state == "removed"
    wait_until(lambda: phase(stage, old["d"][0]) is None, 60, "the removed index's job to be killed", interval=1)
    assert [phase(stage, old[item][0]) for item in "abc"] == [None, None, "Running" if kept else None]
    for index in (0, 1):
        assert "because the mapped arguments have changed" in job.log(index, 2)
    assert ("Reconnecting to existing job" if kept else "because the task was cleared") in job.log(2, 2)
    open_gate(job.run)
    job.wait(*ENDED)
    assert {ti.state for index, ti in job.tis().items() if index < 3} == {"success"}
    assert [job.result(index) for index in range(3)] == [new[item][-1].job_id for item in "bac"]
    assert job.pods() == new
    if dag == "map_group":
        assert [new[item][-1].arguments[0] for item in "bac"] == ["prepared-b", "prepared-a", "prepared-c"]


@together
def test_one_index_is_retried_while_the_others_run(stage: Stage, run: Callable[..., Run]) -> None:
    job = Mapped(run("map_retry"))
    job.wait("failed", index=1)
    pods = job.wait_for_pods({"a": 1, "b": 2, "c": 1})
    tis = job.tis()
    assert [(tis[index].state, tis[index].try_number) for index in range(3)] == [
        ("deferred", 1),
        ("failed", 2),
        ("deferred", 1),
    ]
    assert tis[1].raw["rendered_map_index"] == "b"
    open_gate(job.run)
    job.wait("success", index=0)
    job.wait("success", index=2)
    assert job.pods() == pods
    assert [job.result(0), job.result(2)] == [pods["a"][0].job_id, pods["c"][0].job_id]


@fatal
def test_cleared_and_moved_before_the_list_is_made_again(stage: Stage, run: Callable[..., Run]) -> None:
    """
    A triggerer that wakes up too late finds a task that has no state: it was cleared, and its list is still being made.

    It is not gone: its job is taken up afterwards.
    """
    set_items(stage, "map_slow", "a b")
    job = Mapped(run("map_slow"))
    wait_until(lambda: len(job.states()) == 2, 60, "the expansion", interval=1)
    job.wait("deferred")
    job.wait_for_line(" is Running")
    pods = job.wait_for_pods({"a": 1, "b": 1})
    triggerer_of = functools.partial(stage.airflow.triggerer_of, *job.run.key)
    before = [triggerer_of(index) for index in range(2)]
    late = stage.airflow.triggerers[before[0] or 0]
    late.freeze()
    try:
        stage.airflow.clear("map_slow", job.run.id, ["items"], include_downstream=True)
        wait_until(lambda: triggerer_of(0) not in (None, before[0]), 60, "another triggerer to take over", interval=1)
    finally:
        late.thaw()
    job.run.wait_until_said("invoking on_kill", map_index=0, deadline=60)
    job.run.wait_until_said("its task is no_status", map_index=0, deadline=30)
    open_gate(job.run, of="-2")  # for the list
    job.wait("deferred", try_number=2)
    assert "Reconnecting to existing job" in job.log(0, 2)
    open_gate(job.run)
    job.wait(*ENDED)
    assert [job.result(index) for index in range(2)] == [pods[item][0].job_id for item in "ab"]
    assert job.pods() == pods
