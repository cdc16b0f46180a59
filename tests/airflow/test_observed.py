"""What is seen of jobs from outside: metrics, the decision in XCom, and the orphans that nobody follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dev.processes import wait_until
from tests.airflow.conftest import ENDED, Run, Stage
from tests.airflow.gates import open_gate
from tests.airflow.test_person import killed_before_it_defers
from tests.airflow.together import together

if TYPE_CHECKING:
    from dev.kubernetes import CreatedPod

NAMED = {"AIRFLOW__DURABLE_SPARK__DEPLOYMENT": "observed"}
"""As the Dag has it."""


def orphans(stage: Stage, *options: str) -> tuple[list[dict[str, Any]], str]:
    """Run the command on the connection ``kubernetes``; return its list, and what else it said."""
    command = ("durable-spark", "orphans", "kubernetes", "-o", "json", *options)
    done = stage.airflow.command(*command, env=NAMED)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout), done.stderr


def row_of(pod: CreatedPod, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((row for row in rows if row["job_id"] == f"spark:{pod.name}"), None)


@together
def test_orphans_are_listed_and_killed(stage: Stage, run: Callable[..., Run]) -> None:
    """A task that is marked as failed while it waits for its retry leaves its job to nobody: nothing runs then."""
    job = killed_before_it_defers(stage, run, "observed_orphan")
    (pod,) = job.pods()
    job.wait("up_for_retry")
    assert row_of(pod, orphans(stage)[0]) is None
    row = row_of(pod, orphans(stage, "--all")[0])
    assert row is not None
    assert (row["verdict"], row["reason"]) == ("followed", "its task instance is up_for_retry")

    stage.airflow.set_state(*job.key, "failed")
    row = row_of(pod, orphans(stage)[0])
    assert row is not None
    assert (row["dag_id"], row["run_id"], row["task_id"], row["map_index"]) == (*job.key, "-1")
    assert row["reason"].startswith("its task instance is failed; a clear would end this job")
    assert job.phase(pod) == "Running"
    _, said = orphans(stage, "--kill", "--yes")
    assert f"kubernetes: spark:{pod.name} was killed" in said
    job.wait_for_pod(None)
    assert row_of(pod, orphans(stage)[0]) is None
    assert job.pods() == [pod]


@together
def test_what_became_of_a_killed_worker_is_counted_and_told(stage: Stage, run: Callable[..., Run]) -> None:
    stage.airflow.connect("counted", stage.pod_cluster.connection(poll_interval=1))

    with stage.killed_before_it_defers(run, "observed_counted") as job:
        pass
    job.wait("deferred", try_number=2)
    told = job.xcoms()["durable_spark_decision"]
    assert told["why"] == "the cluster says Running"
    assert (told["decision"], told["try_number"], told["job_id"]) == ("reconnect", 2, job.store()["spark_job_id"])
    stage.wait_for_count("followed_jobs", "counted", "1", "g")
    open_gate(job)
    assert job.wait(*ENDED).state == "success"
    wait_until(lambda: stage.counted("followed_jobs", "counted", "g")[-1] == "0", 60, "the gauge to fall")
    assert stage.counted("submissions", "counted") == stage.counted("reconnects", "counted") == ["1"]
    assert stage.counted("lost_jobs", "counted") == []
