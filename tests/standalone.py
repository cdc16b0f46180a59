"""Jobs and connections for tests on standalone clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from durable_spark.jobs import SparkJob

APPS = Path(__file__).parent / "apps"


def jvm_job(seconds: float, exit_code: int = 0, **options: Any) -> SparkJob:
    """Return a driver that runs no Spark: it sleeps and exits."""
    source = str(APPS / "Driver.java")
    return SparkJob(
        application=source,
        java_class="org.codehaus.janino.SimpleCompiler",
        application_args=[source, "Driver", str(seconds), str(exit_code)],
        **{"driver_memory": "128m", "conf": {"spark.driver.extraJavaOptions": "-XX:+UseSerialGC"}, **options},
    )


def pyspark_job(seconds: float, end: str = "0", **options: Any) -> SparkJob:
    """Return a PySpark application that counts on an executor, sleeps, and ends with an exit code or by ``raise``."""
    return SparkJob(
        application=str(APPS / "driver.py"),
        application_args=[str(seconds), end],
        **{"driver_memory": "512m", "executor_memory": "512m", "total_executor_cores": 1, **options},
    )
