"""Dags of the soak: jobs that are submitted natively."""

from __future__ import annotations

from typing import Any

from airflow.sdk import DAG, Param, task

from dev.soak_tasks import APPS, COMMON, ENDS, FEW_JVMS, KEY, KUBERNETES_CONF, dag, pod, pod_arguments
from dev.spark import SMALL_JVM
from durable_spark.operators.spark import SparkJobOperator

one_pod = pod(KEY, "{{ params.seconds }}", "{{ params.failures }}")

with dag("pod"):
    SparkJobOperator(task_id="job", **pod_arguments(pod=one_pod))

with dag("held"):
    SparkJobOperator(task_id="job", **pod_arguments(pod=one_pod, hold_pod=True, pod_at_end="delete"))

with dag("blocking"):
    SparkJobOperator(task_id="job", pool="blocking", **pod_arguments(pod=one_pod, deferrable=False))

with DAG("batch", schedule=None, params={"jobs": Param([], type="array")}):

    @task(retries=COMMON["retries"], retry_delay=COMMON["retry_delay"])
    def pods(params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return the pods that the run is to make."""
        return [pod(job["key"], job["seconds"], job["failures"]) for job in (params or {})["jobs"]]

    SparkJobOperator.partial(task_id="job", **pod_arguments()).expand(pod=pods())

with dag("spark"):
    SparkJobOperator(
        task_id="job",
        **pod_arguments(
            application=f"local://{APPS}/driver.py",
            application_args=ENDS,
            conf=KUBERNETES_CONF,
            pod={"metadata": {"labels": {"soak": KEY}}},
            pool_slots=2,
            **FEW_JVMS,
        ),
    )

with dag("driver"):
    SparkJobOperator(
        task_id="job",
        conn_id="standalone",
        application=f"{APPS}/Driver.java",
        java_class="org.codehaus.janino.SimpleCompiler",
        application_args=[f"{APPS}/Driver.java", "Driver", *ENDS, f"key={KEY}"],
        driver_memory="128m",
        conf={"spark.driver.extraJavaOptions": SMALL_JVM},
        poll_interval=2,
        **FEW_JVMS,
        **COMMON,
    )
