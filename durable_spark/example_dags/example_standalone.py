"""
A PySpark job on a standalone cluster.

Needs a connection ``spark_default`` of the type ``durable_spark`` (or the Spark provider's ``spark``) with the
master URL, ``spark://host:7077``, and an application that every worker of the cluster can read.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from durable_spark.operators.spark import SparkJobOperator

with DAG(
    dag_id="durable_spark_example",
    schedule=None,
    catchup=False,
    tags=["example", "durable-spark"],
    params={
        "application": Param("/opt/jobs/pi.py", type="string", description="as the cluster's workers reach it"),
        "seconds": Param("4", type="string", description="the application's argument: how long it works"),
    },
) as dag:
    SparkJobOperator(
        task_id="pi",
        application="{{ params.application }}",
        application_args=["{{ params.seconds }}"],
        name="pi",
        conf={"spark.cores.max": "1", "spark.executor.memory": "512m"},
        driver_memory="512m",
        retries=2,
        retry_delay=timedelta(seconds=1),
    )
