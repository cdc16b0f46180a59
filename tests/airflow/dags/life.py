"""Dags of the Airflow suite: one Spark-less driver each, whose length and exit code come from the run's conf."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Param

from durable_spark.operators.spark import SparkJobOperator

SOURCE = str(Path(__file__).resolve().parents[2] / "apps" / "Driver.java")


def dag_of_one_job(dag_id: str, **arguments: Any) -> DAG:
    """Return a Dag whose task ``job`` runs ``Driver.java``."""
    with DAG(
        dag_id=dag_id,
        schedule=None,
        params={"seconds": Param("1", type="string"), "exit_code": Param("0", type="string")},
    ) as dag:
        SparkJobOperator(
            task_id="job",
            **{
                "application": SOURCE,
                "java_class": "org.codehaus.janino.SimpleCompiler",
                "application_args": [SOURCE, "Driver", "{{ params.seconds }}", "{{ params.exit_code }}"],
                "driver_memory": "128m",
                "conf": {"spark.driver.extraJavaOptions": "-XX:+UseSerialGC"},
                "conn_id": "spark_default",
                "poll_interval": 1,
                "retries": 2,
                "retry_delay": timedelta(seconds=1),
                "retry_exponential_backoff": False,
                **arguments,
            },
        )
    return dag


life = dag_of_one_job("life")
proxied = dag_of_one_job("proxied", conn_id="spark_proxied")
blocking = dag_of_one_job("blocking", deferrable=False)
single = dag_of_one_job("single", retries=0)
