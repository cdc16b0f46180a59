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
        "application_args": Param(["4"], type="array", description="arguments of the application"),
    },
    render_template_as_native_obj=True,
) as dag:
    SparkJobOperator(
        task_id="pi",
        application="{{ params.application }}",
        application_args="{{ params.application_args }}",
        name="pi",
        conf={"spark.cores.max": "1", "spark.executor.memory": "512m"},
        driver_memory="512m",
        retries=2,
        retry_delay=timedelta(seconds=1),
    )
