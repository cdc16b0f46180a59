"""Dags whose tasks use what Airflow offers to any task, and those of an operator of somebody's own."""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG, Asset, Param, TaskGroup, task

from durable_spark.operators.job import DurableJobOperator
from durable_spark.operators.spark import SparkJobOperator
from tests.airflow.small_jobs import shell_pod

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from airflow.sdk import Context

    from durable_spark.jobs import SparkJob

GATE = "{{ run_id }}"


def note(what: str) -> Callable[..., None]:
    """Return a callback that notes its task, the try, and the result if it gets one."""

    def write(context: Context, result: Any = None) -> None:
        ti = context["ti"]
        notes = Path(os.environ["AIRFLOW_HOME"], "notes", str(context["run_id"]))
        notes.parent.mkdir(exist_ok=True)
        with notes.open("a") as file:
            file.write(" ".join(filter(None, [ti.task_id, str(ti.try_number), what, result])) + "\n")

    return write


NOTED: dict[str, Any] = {
    "pre_execute": note("before"),
    "post_execute": note("after"),
    **{f"on_{what}_callback": note(what) for what in ("execute", "retry", "failure", "success")},
}

with DAG("task_told", schedule=None):
    told = SparkJobOperator(
        task_id="job",
        application_args=["job", "{{ run_id }}-{{ ti.try_number }}", "{{ 3 if ti.try_number == 1 else 0 }}"],
        outlets=[Asset("task-told")],
        **shell_pod(retries=1, **NOTED),
    )
    SparkJobOperator(
        task_id="broken",
        application_args=["broken", "0", "3"],
        outlets=[Asset("task-broken")],
        **shell_pod(retries=0, **NOTED),
    )
    SparkJobOperator(task_id="quiet", application_args=["quiet", "0", "0"], do_xcom_push=False, **shell_pod())

    @task
    def read(result: str, ti: Any = None) -> dict[str, str]:
        return {"output": result, "pulled": ti.xcom_pull(task_ids="job", key="spark_job_id")}

    read(told.output)  # type: ignore[arg-type]

with DAG("task_past", schedule=None):
    SparkJobOperator(task_id="job", depends_on_past=True, application_args=["job", GATE, "0"], **shell_pod())


def with_queues(context: Context) -> None:
    """Let the deferral of this process know queues, as it does where all of Airflow is configured so."""
    os.environ["AIRFLOW__TRIGGERER__QUEUES_ENABLED"] = "True"


with DAG("task_queue", schedule=None):
    SparkJobOperator(
        task_id="job",
        queue="spark-jobs",
        pre_execute=with_queues,
        application_args=["job", GATE, "0"],
        **shell_pod(),
    )


with DAG("task_slow_kill", schedule=None):
    SparkJobOperator(task_id="job", application_args=["job", GATE, "0"], **shell_pod(conn_id="kubernetes_proxied"))


class Nightly(SparkJobOperator):
    """A team's own operator, with defaults, and a field of its own of which its arguments are made."""

    template_fields: Sequence[str] = (*SparkJobOperator.template_fields, "night")

    def __init__(self, *, night: str = "{{ run_id }}", **arguments: Any) -> None:
        super().__init__(**{"name": "nightly", **arguments})
        self.night = night

    def describe_job(self) -> SparkJob:
        job = super().describe_job()
        return dataclasses.replace(job, application_args=[self.night, *job.application_args])


with DAG("task_shapes", schedule=None, default_args=shell_pod(retries=0)):
    begin = SparkJobOperator(task_id="begin", application_args=["begin", "0", "0"]).as_setup()  # type: ignore[no-untyped-call]
    group_defaults: dict[str, Any] = {"application_args": ["0", "3"]}
    with TaskGroup("group", default_args=group_defaults) as group:  # type: ignore[arg-type]
        Nightly(task_id="night")
    end = SparkJobOperator(task_id="end", application_args=["end", "0", "0"]).as_teardown(setups=begin)
    Nightly.partial(task_id="nights", application_args=["0", "0"]).expand(night=["monday", "tuesday"])
    begin >> group >> end


with DAG("task_process", schedule=None):
    DurableJobOperator.partial(
        task_id="job",
        hook="process_hook.ProcessHook",
        conn_id="processes",
        poll_interval=1,
        retries=1,
        retry_delay=timedelta(seconds=1),
    ).expand(job=[{"command": ["sh", "-c", f"sleep 1; echo one of the mapped; exit {code}"]} for code in (0, 3)])

for by in ("dags", "tasks"):
    with DAG(f"task_by_{by}", schedule=None, params={"exit_code": Param("0", type="string")}) as by_hand:
        SparkJobOperator(task_id="job", **shell_pod(application_args=["job", "1", "{{ params.exit_code }}"], retries=1))
        well = shell_pod(application_args=["job", "1", "0"], retries=1)
        SparkJobOperator(task_id="plain", durable=False, **well)
        SparkJobOperator(task_id="worker", deferrable=False, **well)
    globals()[by_hand.dag_id] = by_hand

with DAG("task_pool", schedule=None):
    for pool in ("counting", "plain"):
        SparkJobOperator.partial(task_id=pool, pool=f"task-pool-{pool}", **shell_pod()).expand(
            application_args=[[name, "3" if pool == "counting" else GATE, "0"] for name in "abcde"]
        )
    SparkJobOperator(
        task_id="urgent",
        pool="task-pool-counting",
        priority_weight=10,
        application_args=["urgent", "3", "0"],
        **shell_pod(),
    )
