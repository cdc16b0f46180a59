"""
What Airflow offers to any task, with a task that is deferred and durable: callbacks, assets, queues, pools, templates.

Counted by the API server's audit log, or by the job service of the page on writing a hook.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from dev.processes import wait_until
from durable_spark.operators.spark import SparkJobOperator
from tests.airflow.conftest import ENDED, Run, Stage
from tests.airflow.gates import open_gate
from tests.airflow.lives import lives_of
from tests.airflow.small_jobs import alive_at_once, shell_pods
from tests.airflow.together import together

REGION = Path(__file__).parents[1] / "apps" / "region.py"


def another_task(job: Run, task: str) -> Run:
    """Return another task of a run."""
    return Run(job.stage, job.dag, job.id, job._before, task)


@together
def test_callbacks_hooks_results_and_asset_events(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("task_told")
    for number in (1, 2):
        job.wait("deferred", try_number=number)
        Path(stage.airflow.home, "gates", f"{job.id}-{number}").touch()
    assert job.wait(*ENDED).state == "success", job.logs()
    pods = shell_pods(job)
    broken, quiet, read = (another_task(job, task) for task in ("broken", "quiet", "read"))
    assert job.wait_for_end() == "failed", "one of its tasks is broken"
    notes = [line.split(" ", 1) for line in (stage.airflow.home / "notes" / job.id).read_text().splitlines()]
    again = [f"{number} {what}" for number in (1, 2) for what in ("before", "execute") * 2]
    of_job = [what for task, what in notes if task == "job"]
    result = pods[1].job_id
    # What precedes execute() precedes each resumption, too; what follows it is called once.
    assert of_job == [*again[:4], "1 retry", *again[4:], f"2 after {result}", "2 success"]
    assert Counter(what for task, what in notes if task == "broken")["1 failure"] == 1
    assert not {"1 after", "1 success", "1 retry"} & {what for task, what in notes if task == "broken"}

    assert job.xcoms()["return_value"] == job.xcoms()["spark_job_id"] == result
    assert read.xcoms()["return_value"] == {"output": result, "pulled": result}
    assert quiet.ti.state == "success"
    assert not {"return_value", "spark_job_id"} & set(quiet.xcoms())
    assert quiet.store()["spark_job_id"] == shell_pods(quiet)[0].job_id, "the store has it all the same"

    def events(asked: Run) -> list[dict[str, Any]]:
        asked_for = {"source_dag_id": asked.dag, "source_run_id": asked.id, "source_task_id": asked.task}
        return list(stage.airflow.api("GET", "/assets/events", params=asked_for)["asset_events"])

    assert [event["name"] for event in events(job)] == ["task-told"], "once for the success, never for the first try"
    assert events(broken) == []


@together
def test_depends_on_past(stage: Stage, run: Callable[..., Run]) -> None:
    """While the first run's task is deferred, the second run's does not begin."""
    stage.airflow.wait_for_dag("task_past")
    stage.airflow.unpause("task_past")
    begin = datetime.now(timezone.utc) - timedelta(hours=2)
    runs = []
    for number in range(2):
        body = {"dag_run_id": f"past-{number}", "logical_date": (begin + timedelta(hours=number)).isoformat()}
        stage.airflow.api("POST", "/dags/task_past/dagRuns", body)
        runs.append(Run(stage, "task_past", f"past-{number}", set(), "job"))
    first, second = runs
    first.wait_for_followed_pod()
    assert second.ti.state is None
    assert len(shell_pods(first)) == 1
    for each in runs:
        open_gate(each)
    ended, later = first.wait(*ENDED), second.wait(*ENDED)
    assert ended.state == later.state == "success"
    assert len(shell_pods(first)) == 2
    assert ended.end is not None
    assert later.start is not None
    assert ended.end <= later.start


@together
def test_a_deferred_task_goes_to_the_triggerer_of_its_queue(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("task_queue")
    job.wait("deferred")
    job.wait_for_pod("Running")
    waiting = job.ti.raw
    assert waiting["trigger"]["queue"] == "spark-jobs"
    assert waiting["triggerer_job"] is None, "none of the others takes it"
    triggerer = stage.airflow._process("triggerer", "--skip-serve-logs", "--queues", "spark-jobs", number=9)
    assert triggerer.env is not None
    triggerer.env = {**triggerer.env, "AIRFLOW__TRIGGERER__QUEUES_ENABLED": "True"}
    triggerer.start()
    try:
        job.wait_until_followed()
        assert job.ti.raw["triggerer_job"]["hostname"] == triggerer.name
        open_gate(job)
        assert job.wait(*ENDED).state == "success"
    finally:
        triggerer.kill()
    assert len(shell_pods(job)) == 1


@together
def test_setup_teardown_groups_defaults_and_an_operator_of_ones_own(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("task_shapes", task="group.night")
    assert job.wait_for_end() == "failed", "the teardown's success does not hide the failure"
    begin, end, nights = (another_task(job, task) for task in ("begin", "end", "nights"))
    assert (begin.ti.state, job.ti.state, end.ti.state) == ("success", "failed", "success")
    (first,), (night,), (last,) = map(shell_pods, (begin, job, end))
    assert night.arguments == (job.id, "0", "3"), "the group's default arguments, and a field of the subclass"
    assert night.labels["spark-app-name"] == "nightly"
    assert "exit code 3" in job.logs()
    assert sorted(pod.item for pod in shell_pods(nights)) == ["monday", "tuesday"]
    assert [pod.item for pod in (first, last)] == ["begin", "end"]


@together
def test_templates_in_every_field(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("task_fields")
    assert job.wait_for_end() == "success", job.logs()
    shown = job.xcoms()["return_value"]
    for name in SparkJobOperator.template_fields:
        assert "{{" not in json.dumps(shown[name]), name
        assert job.id in json.dumps(shown[name]), name
    assert shown["conf"] == {"spark.hadoop.one": f"conf-{job.id}"}
    assert shown["env_vars"] == {"ONE": f"env_vars-{job.id}", "TWO": job.id}
    assert shown["application_args"] == [f"one-{job.id}", job.id]
    (container,) = shown["options"]["pod"]["spec"]["containers"]
    assert container["env"][0]["value"] == f"pod-{job.id}"
    untemplated = {"supervise", "options"}  # switches, and what the fields pod, hold_pod and pod_at_end come to
    described = set(shown) - {"conn_id", "pod"}
    assert described - set(SparkJobOperator.template_fields) == untemplated

    client = another_task(job, "client")
    (pod,) = shell_pods(client)
    manifest = stage.pod_cluster.pod(pod.name)
    variables = {each["name"]: each.get("value") for each in manifest["spec"]["containers"][0]["env"]}
    assert variables["ONE"] == f"env-{job.id}-3", "in an object of Kubernetes' client"
    assert pod.labels["one"] == f"label-{job.id}"
    assert f"named-{job.id}" in json.dumps(pod.labels)


@together
def test_jobs_of_another_service_are_mapped(stage: Stage, run: Callable[..., Run]) -> None:
    job = run("task_process")
    assert job.wait_for_end() == "failed", "of two items one fails, on both of its tries"
    jobs = stage.job_service.jobs("of the mapped")
    assert Counter(jobs.values()) == {"succeeded": 1, "failed": 2}
    result = stage.airflow.xcoms(*job.key, 0)
    assert jobs[result["return_value"]] == "succeeded"
    assert result["durable_job_id"] == result["return_value"]


@together
def test_a_kill_that_takes_its_time_is_not_cut_short(stage: Stage, run: Callable[..., Run]) -> None:
    """Airflow cancels a trigger anew each second until it has ended, and with it whatever its ``on_kill`` does."""
    job = run("task_slow_kill")
    pod = job.wait_for_followed_pod()
    with stage.kubernetes_api.holding("DELETE", rf"/pods/{pod.name}\b") as held:
        stage.airflow.set_state(*job.key, "failed")
        held.wait()
        cancelled_again = time.monotonic() + 5
        while time.monotonic() < cancelled_again:
            assert job.phase(pod) == "Running"
            time.sleep(0.5)
        held.drop()
    job.wait_for_pod(None)


# --- without scheduler and triggerer


def command(stage: Stage, *arguments: str) -> tuple[int, str]:
    """Run an ``airflow`` command in the stage's environment; return its exit code and all that it says."""
    done = stage.airflow.command(*arguments, timeout=240, env={"AIRFLOW__DURABLE_SPARK__EARLIEST_EVENT": "0"})
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("by", ["dags", "tasks"])
@together
def test_run_by_hand(stage: Stage, run: Callable[..., Run], by: str) -> None:
    """No triggerer is in it: the command follows the job itself, durable or not, deferred or not."""
    dag = f"task_by_{by}"
    stage.airflow.wait_for_dag(dag)

    def pods() -> list[int]:
        return [len(shell_pods(Run(stage, dag, "", set(), task))) for task in ("job", "plain", "worker")]

    if by == "dags":
        file = ("-B", "dags-folder", "-f", str(stage.dags / "tasks.py"))  # or all files are read, and written down
        code, said = command(stage, "dags", "test", dag, *file, "--conf", json.dumps({"exit_code": "3"}))
        assert code != 0, said
        assert pods() == [2, 1, 1], "the first one was tried twice"
    else:
        code, said = command(stage, "tasks", "test", dag, "job", "--task-params", json.dumps({"exit_code": "3"}))
        assert code == 0, "Airflow only prints how a single task has ended"
        assert pods() == [1, 0, 0]
    assert "ended as Failed" in said
    assert "exit code 3" in said


# --- pools


def set_pool(stage: Stage, name: str, slots: int, *, include_deferred: bool) -> None:
    body = {"name": name, "slots": slots, "include_deferred": include_deferred}
    stage.airflow.api("POST", "/pools", body)


def running(job: Run) -> int:
    """Return how many of a task's pods run now, by the API server."""
    phases = {pod["metadata"]["uid"]: pod["status"].get("phase") for pod in job.stage.pod_cluster.pods()}
    return sum(phases.get(pod.uid) == "Running" for pod in shell_pods(job))


@together
def test_a_pool_that_counts_deferred_tasks_holds_jobs_back(stage: Stage, run: Callable[..., Run]) -> None:
    set_pool(stage, "task-pool-counting", 2, include_deferred=True)
    set_pool(stage, "task-pool-plain", 2, include_deferred=False)
    counting = run("task_pool", task="counting")
    plain = another_task(counting, "plain")
    wait_until(lambda: running(plain) == 5, 120, "all jobs at once of the pool that does not count", interval=1)
    open_gate(counting)
    assert counting.wait_for_end(deadline=240) == "success"
    urgent = another_task(counting, "urgent")
    assert len(shell_pods(counting)) == 5
    assert alive_at_once(counting, urgent) == 2
    (first,) = lives_of(urgent)
    assert sum(life.created < first.created for life in lives_of(counting)) <= 1, "it has a slot before the others"


@together
def test_the_example_of_a_pool(stage: Stage, run: Callable[..., Run]) -> None:
    stage.airflow.connect("spark_kubernetes", stage.pod_cluster.connection())
    set_pool(stage, "spark_drivers", 2, include_deferred=True)
    job = run(
        "durable_spark_pool_example", task="region", image="localhost/spark:test", application=f"local://{REGION}"
    )
    state = job.wait_for_end(deadline=300)
    lives = lives_of(job)
    assert state == "success", [stage.pod_cluster.log(life.pod.name) for life in lives]
    said = [stage.pod_cluster.log(life.pod.name).splitlines() for life in lives]
    regions = {line for lines in said for line in lines if line.startswith("region ")}
    assert regions == {f"region {name}" for name in ("africa", "america", "asia", "europe", "oceania")}, said
    assert len(lives) == 5
    assert alive_at_once(job) == 2
