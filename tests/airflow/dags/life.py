"""Dags of the Airflow suite: one Spark-less driver each, whose length and exit code come from the run's conf."""

from __future__ import annotations

from typing import Any

from airflow.sdk import DAG, Param

from durable_spark.operators.spark import SparkJobOperator
from tests.airflow.small_jobs import small_driver


def dag_of_one_job(dag_id: str, **arguments: Any) -> DAG:
    """Return a Dag whose task ``job`` runs ``Driver.java``."""
    with DAG(
        dag_id=dag_id,
        schedule=None,
        params={"seconds": Param("1", type="string"), "exit_code": Param("0", type="string")},
    ) as dag:
        job = small_driver("{{ params.seconds }}", "{{ params.exit_code }}")
        SparkJobOperator(task_id="job", **{**job, **arguments})
    return dag


life = dag_of_one_job("life")
proxied = dag_of_one_job("proxied", conn_id="spark_proxied")
blocking = dag_of_one_job("blocking", deferrable=False)
single = dag_of_one_job("single", retries=0)
