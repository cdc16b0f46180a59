"""A Dag with templates in all fields that take them. It has its own file, as Kubernetes' client is slow to import."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG, Param
from kubernetes.client import V1Container, V1EnvVar, V1ObjectMeta, V1Pod, V1PodSpec  # type: ignore[import-untyped]

from durable_spark.operators.spark import SparkJobOperator
from tests.airflow.small_jobs import shell_pod

if TYPE_CHECKING:
    from airflow.sdk import Context

GATE = "{{ run_id }}"


class Shown(SparkJobOperator):
    """Returns what its fields were rendered to, in place of a submission."""

    def execute(self, context: Context) -> Any:
        return {
            **{name: getattr(self, name) for name in self.template_fields},
            **dataclasses.asdict(self.describe_job()),
        }


TEXTS = {name: f"{name}-{GATE}" for name in SparkJobOperator.template_fields}
NESTED: dict[str, Any] = {
    "conf": {"spark.hadoop.one": f"conf-{GATE}"},
    "env_vars": {"ONE": f"env_vars-{GATE}", "TWO": GATE},
    "application_args": [f"one-{GATE}", GATE],
    "pod": {"spec": {"containers": [{"name": "side", "env": [{"name": "ONE", "value": f"pod-{GATE}"}]}]}},
}

with DAG("task_fields", schedule=None, params={"cores": Param(3)}):
    Shown(task_id="job", **{**TEXTS, **NESTED})
    SparkJobOperator(
        task_id="client",
        **shell_pod(
            application_args=["client", "0", "0"],
            num_executors="{{ params.cores }}",
            name="named-{{ run_id }}",
            pod=V1Pod(
                metadata=V1ObjectMeta(labels={"one": "label-{{ run_id }}"}),
                spec=V1PodSpec(
                    containers=[
                        V1Container(
                            name="spark-kubernetes-driver",
                            command=["true"],
                            env=[V1EnvVar(name="ONE", value="env-{{ run_id }}-{{ params.cores }}")],
                        )
                    ]
                ),
            ),
        ),
    )
