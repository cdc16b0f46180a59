"""
Many jobs on Kubernetes, of which the cluster gets two at a time.

A deferred task holds no slot of its pool, so a pool limits nothing here, unless it counts deferred tasks, too:
``airflow pools set spark_drivers 2 "drivers at a time" --include-deferred``. Needs this pool, and the connection
``spark_kubernetes`` as the example of one job on Kubernetes does.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from durable_spark.operators.spark import SparkJobOperator

with DAG(
    dag_id="durable_spark_pool_example",
    schedule=None,
    catchup=False,
    tags=["example", "durable-spark"],
    params={
        "image": Param("apache/spark:4.0.0", type="string", description="with Spark and the application"),
        "application": Param("local:///opt/jobs/region.py", type="string"),
    },
) as dag:
    SparkJobOperator.partial(
        task_id="region",
        map_index_template="{{ task.application_args[0] }}",
        pool="spark_drivers",
        conn_id="spark_kubernetes",
        application="{{ params.application }}",
        name="region",
        conf={
            "spark.kubernetes.container.image": "{{ params.image }}",
            "spark.kubernetes.authenticate.driver.serviceAccountName": "spark",
        },
        retries=2,
        retry_delay=timedelta(seconds=30),
    ).expand(application_args=[["africa"], ["america"], ["asia"], ["europe"], ["oceania"]])
