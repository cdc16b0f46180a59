"""A Dag whose task is a job of the job service, by the connection ``processes``."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from durable_spark.operators.job import DurableJobOperator

with DAG(
    dag_id="process_example",
    schedule=None,
    catchup=False,
    params={"script": Param("sleep 20; echo done", type="string")},
):
    DurableJobOperator(
        task_id="sleep",
        hook="process_hook.ProcessHook",
        conn_id="processes",
        job={"command": ["sh", "-c", "{{ params.script }}"]},
        poll_interval=1,
        retries=2,
        retry_delay=timedelta(seconds=1),
    )
