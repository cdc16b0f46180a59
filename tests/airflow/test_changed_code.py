"""
A Dag file that is edited while a task's job runs: the job is followed on, and the next one gets what is new.

Each story writes a file of its own into the folder of Dags, where a changed file is read at once. What each pod was
told to run is in the API server's audit log.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dev.processes import wait_until
from tests.airflow.conftest import ENDED, Run, Stage
from tests.airflow.gates import open_gate
from tests.airflow.small_jobs import shell_pods
from tests.airflow.together import together

GATE = "{{ run_id }}"
FILE = """
from airflow.sdk import DAG

from durable_spark.operators.spark import SparkJobOperator
from tests.airflow.small_jobs import shell_pod

with DAG({dag!r}, schedule=None):
    SparkJobOperator(task_id={task!r}, **shell_pod(**{arguments!r}))
"""
BROKEN = "from airflow.sdk import DAG\nthis is no Python"
"""With the words by which Airflow knows a file that may have Dags."""


def write(stage: Stage, dag: str, *, task: str = "job", **arguments: Any) -> None:
    """Write the Dag file anew."""
    put(stage, dag, FILE.format(dag=dag, task=task, arguments=arguments))


def put(stage: Stage, dag: str, text: str) -> None:
    new = stage.dags / f"{dag}.new"
    new.write_text(text)
    os.replace(new, stage.dags / f"{dag}.py")  # nobody reads half a file


def broken_files(stage: Stage) -> set[str]:
    """Return the names of the files that Airflow cannot read."""
    return {Path(error["filename"]).name for error in stage.airflow.api("GET", "/importErrors")["import_errors"]}


@together
def test_a_retry_follows_the_old_job_on_and_the_next_gets_the_new(stage: Stage, run: Callable[..., Run]) -> None:
    write(stage, "code_changed", application_args=["old", GATE, "3"])
    with stage.killed_before_it_defers(run, "code_changed") as job:
        job.wait_for_pod("Running")
        write(stage, "code_changed", application="local:///other.py", application_args=["new", "0", "0"])
    job.wait("deferred", try_number=2)
    (pod,) = shell_pods(job)
    log = job.log(2)
    assert "Reconnecting to existing job" in log
    assert f"The arguments of this task have changed; {pod.job_id} runs on with the old ones" in log
    open_gate(job)
    ended = job.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 3), job.logs()
    made = shell_pods(job)
    assert [(each.application, each.item) for each in made] == [
        ("local:///nothing.py", "old"),
        ("local:///other.py", "new"),
    ]
    assert made[0] == pod
    assert job.xcoms()["return_value"] == made[1].job_id


@together
def test_arguments_that_are_wrong_by_now_do_no_harm_to_the_old_job(stage: Stage, run: Callable[..., Run]) -> None:
    """Before they are mended they harm the next one alone, which is not submitted, and not tried again."""
    write(stage, "code_wrong", application_args=["old", GATE, "0"])
    with stage.killed_before_it_defers(run, "code_wrong") as job:
        job.wait_for_pod("Running")
        write(stage, "code_wrong", application="", application_args=["new", GATE, "0"])
    job.wait("deferred", try_number=2)
    (pod,) = shell_pods(job)
    assert f"The arguments of this task are wrong by now, but {pod.job_id} runs on with the old ones" in job.log(2)
    open_gate(job)
    ended = job.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 2), job.logs()
    assert job.xcoms()["return_value"] == pod.job_id
    job.wait_for_end()  # one that is cleared in that very moment would be left alone by Airflow
    stage.airflow.clear(job.dag, job.id, ["job"])
    job.wait("failed", try_number=3)
    job.wait_for_end()
    assert "BadArguments: application: name the jar or the .py file to run" in job.logs()
    assert shell_pods(job) == [pod]
    write(stage, "code_wrong", application_args=["mended", GATE, "0"])
    stage.airflow.clear(job.dag, job.id, ["job"])
    job.wait("success", try_number=4)
    assert [each.item for each in shell_pods(job)] == ["old", "mended"]


@together
def test_a_file_that_is_broken_for_a_while_costs_no_job(stage: Stage, run: Callable[..., Run]) -> None:
    """Neither the retry comes before it is mended, nor is the deferred task resumed by a worker that cannot read it."""
    write(stage, "code_broken", application_args=["old", GATE, "0"])
    with stage.killed_before_it_defers(run, "code_broken") as job:
        job.wait_for_pod("Running")
        put(stage, "code_broken", BROKEN)
    wait_until(lambda: "code_broken.py" in broken_files(stage), 60, "the file to be found broken", interval=1)
    job.wait("up_for_retry", "up_for_reschedule")
    write(stage, "code_broken", application_args=["new", GATE, "0"])
    job.wait("deferred", try_number=2)
    assert "Reconnecting to existing job" in job.log(2)
    job.wait_until_followed()
    put(stage, "code_broken", BROKEN)
    wait_until(lambda: "code_broken.py" in broken_files(stage), 60, "the file to be found broken again", interval=1)
    open_gate(job)
    job.wait_until_said("Trigger fired event", try_number=2, deadline=60)
    write(stage, "code_broken", application_args=["new", GATE, "0"])
    ended = job.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 2), job.logs()
    assert [pod.item for pod in shell_pods(job)] == ["old"]


@together
def test_arguments_that_differ_on_each_try_make_no_double(stage: Stage, run: Callable[..., Run]) -> None:
    """The file is edited once more while the task is deferred: it resumes with the new code, and the old job's end."""
    write(stage, "code_template", application_args=["{{ ti.try_number }}", GATE, "0"])
    with stage.killed_before_it_defers(run, "code_template") as job:
        job.wait_for_pod("Running")
    job.wait("deferred", try_number=2)
    assert "The arguments of this task have changed" in job.log(2)
    write(stage, "code_template", application_args=["new", GATE, "0"])
    open_gate(job)
    ended = job.wait(*ENDED)
    assert (ended.state, ended.try_number) == ("success", 2), job.logs()
    assert [pod.item for pod in shell_pods(job)] == ["1"]


@together
def test_a_task_that_is_taken_out_of_its_dag_has_its_job_killed(stage: Stage, run: Callable[..., Run]) -> None:
    write(stage, "code_gone", application_args=["old", GATE, "0"])
    job = run("code_gone")
    job.wait_for_followed_pod()
    write(stage, "code_gone", task="another", application_args=["new", "0", "0"])
    job.wait_for_pod(None)
    assert job.ti.state == "removed"
    assert len(shell_pods(job)) == 1
