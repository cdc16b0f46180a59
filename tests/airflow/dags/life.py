"""One driver without Spark each, whose length and exit code come from the run's conf."""

from __future__ import annotations

from typing import Any

from airflow.sdk import DAG, Param

from durable_spark.operators.spark import SparkJobOperator
from tests.airflow.marks import mark_of
from tests.airflow.small_jobs import dag_of_driver, small_driver


def dag_of_one_job(dag_id: str, **arguments: Any) -> None:
    with DAG(
        dag_id=dag_id,
        schedule=None,
        params={"seconds": Param("1", type="string"), "exit_code": Param("0", type="string")},
    ):
        job = small_driver("{{ params.seconds }}", "{{ params.exit_code }}")
        SparkJobOperator(task_id="job", **{**job, "driver_memory": mark_of(dag_id), **arguments})


for name in ("life_short", "life_failing"):
    dag_of_one_job(name, retries=0)
for name in ("life_blocking", "life_blocking_marked"):
    dag_of_one_job(name, deferrable=False)
for name in ("life_marked", "retry_sent"):
    dag_of_one_job(name, conn_id="spark_proxied")
for name in ("life", "life_deferred", "retry_active", "retry_succeeded"):
    dag_of_one_job(name)
dag_of_one_job("retry_failed", retries=1)
dag_of_driver("life_followed")
