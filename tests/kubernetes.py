"""Jobs for tests on a Kubernetes cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from durable_spark.jobs import SparkJob

__all__ = ["shell_job", "spark_job"]

APPS = Path(__file__).parent / "apps"


def shell_job(script: str, *, pod: dict[str, Any] | None = None, **options: Any) -> SparkJob:
    """Return a driver pod that runs no Spark: its container runs a shell script instead of the image's entrypoint."""
    container = {"name": "spark-kubernetes-driver", "command": ["sh", "-c", script]}
    spec = {"terminationGracePeriodSeconds": 2, **(pod or {}).get("spec", {})}
    spec["containers"] = [container, *spec.get("containers", [])]
    conf = {
        "spark.kubernetes.container.image": "localhost/spark:test",
        "spark.kubernetes.container.image.pullPolicy": "Never",
        "spark.kubernetes.driver.request.cores": "0.01",
        **options.pop("conf", {}),
    }
    given = {"pod": {**(pod or {}), "spec": spec}, **options.pop("options", {})}
    return SparkJob(application="local:///nothing.py", conf=conf, options=given, **options)


def spark_job(seconds: float, end: str = "0", *, conf: dict[str, str], **options: Any) -> SparkJob:
    """Return a PySpark application that sums on an executor, sleeps, and ends with an exit code or by ``raise``."""
    return SparkJob(
        application=f"local://{APPS / 'driver.py'}", application_args=[str(seconds), end], conf=conf, **options
    )
