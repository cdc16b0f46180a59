"""
A PySpark job on Kubernetes.

Needs a connection ``spark_kubernetes`` of the type ``durable_spark`` with ``k8s://https://host:port``, and in its
namespace the rights of ``docs/kubernetes/rbac.yaml``, among them the service account ``spark`` of the driver.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from durable_spark.operators.spark import SparkJobOperator

with DAG(
    dag_id="durable_spark_kubernetes_example",
    schedule=None,
    catchup=False,
    tags=["example", "durable-spark"],
    params={
        "image": Param("apache/spark:4.0.0", type="string", description="with Spark and the application"),
        "application": Param("local:///opt/spark/examples/src/main/python/pi.py", type="string"),
    },
) as dag:
    SparkJobOperator(
        task_id="pi",
        conn_id="spark_kubernetes",
        application="{{ params.application }}",
        application_args=["10"],
        name="pi",
        conf={
            "spark.kubernetes.container.image": "{{ params.image }}",
            "spark.kubernetes.authenticate.driver.serviceAccountName": "spark",
            "spark.kubernetes.driver.request.cores": "0.5",
        },
        num_executors=2,
        executor_memory="1g",
        pod={"spec": {"tolerations": [{"key": "spark", "operator": "Exists"}]}},
        hold_pod=True,
        start_timeout=600,
        retries=2,
        retry_delay=timedelta(seconds=30),
    )
