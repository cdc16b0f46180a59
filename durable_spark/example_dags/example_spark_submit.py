"""
A Spark job on YARN, submitted by ``spark-submit``: the Spark provider's operator with its import changed.

Needs the extra ``spark-submit``, and a connection ``spark_yarn`` of the type ``spark``: host ``yarn``, extra
``yarn_resourcemanager_webapp_address``.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from durable_spark.operators.spark_submit import SparkSubmitOperator

with DAG(
    dag_id="durable_spark_submit_example",
    schedule=None,
    catchup=False,
    tags=["example", "durable-spark"],
    params={"application": Param("hdfs:///jobs/pi.py", type="string")},
) as dag:
    SparkSubmitOperator(
        task_id="pi",
        conn_id="spark_yarn",
        deploy_mode="cluster",
        application="{{ params.application }}",
        conf={"spark.yarn.tags": "nightly"},
        executor_memory="2g",
        num_executors=4,
        retries=3,
        retry_delay=timedelta(minutes=1),
        execution_timeout=timedelta(hours=6),
    )
