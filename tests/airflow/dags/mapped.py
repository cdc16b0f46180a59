"""Dags whose tasks are expanded over a list of items: from the file itself, from a variable, from an upstream task."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Variable, task, task_group

from durable_spark.operators.spark import SparkJobOperator
from tests.airflow.small_jobs import shell_pod

GATE = "{{ run_id }}"
ARGUMENTS: dict[str, Any] = shell_pod(priority_weight=100)  # before the hundred


def names(variable: str) -> list[str]:
    return str(Variable.get(variable, default="a b c")).split()


with DAG("map_hundred", schedule=None, max_active_tasks=4):  # a machine for others, too

    @task
    def collect(jobs: list[str]) -> list[str]:
        return list(jobs)

    hundred = SparkJobOperator.partial(task_id="job", **shell_pod()).expand(
        application_args=[[f"item-{number}", "20", "0"] for number in range(100)]
    )
    collect(hundred.output)  # type: ignore[arg-type]

with DAG("map_xcom", schedule=None):

    @task
    def items(run_id: Any = None) -> list[list[str]]:
        return [[name, run_id, "0"] for name in names("map_xcom")]

    SparkJobOperator.partial(task_id="job", **ARGUMENTS).expand(application_args=items())

with DAG("map_literal", schedule=None):
    # Each process that runs a task reads the file, and the variable, anew.
    SparkJobOperator.partial(task_id="job", **ARGUMENTS).expand(
        application_args=[[name, GATE, "0"] for name in names("map_literal")]
    )

for dag_id in ("map_kwargs", "map_slow"):
    with DAG(dag_id, schedule=None) as of_kwargs:

        @task(task_id="items")
        def kwargs_of_items(ti: Any = None) -> list[dict[str, Any]]:
            again = Path(os.environ["AIRFLOW_HOME"], "gates", f"{ti.run_id}-2")
            while ti.dag_id == "map_slow" and ti.try_number > 1 and not again.exists():
                time.sleep(0.2)
            return [
                {"application_args": [name, ti.run_id, "0"], "env_vars": {"ITEM": name}} for name in names(ti.dag_id)
            ]

        SparkJobOperator.partial(task_id="job", on_clear="reconnect", **ARGUMENTS).expand_kwargs(kwargs_of_items())
    globals()[dag_id] = of_kwargs

with DAG("map_group", schedule=None):

    @task(task_id="items")
    def items_of_groups() -> list[str]:
        return names("map_group")

    @task_group
    def each(item: str) -> None:
        @task
        def prepare(item: str) -> str:
            return f"prepared-{item}"

        SparkJobOperator(task_id="job", application_args=[prepare(item), item, GATE, "0"], **ARGUMENTS)

    each.expand(item=items_of_groups())

with DAG("map_retry", schedule=None):
    SparkJobOperator.partial(
        task_id="job", map_index_template="{{ task.application_args[0] }}", **{**ARGUMENTS, "retries": 1}
    ).expand(application_args=[["a", GATE, "0"], ["b", "0", "3"], ["c", GATE, "0"]])
