"""
The files of the Airflow worker that a job's description names: read here, in a thread, and sent to no cluster as files.

What flows in: paths, from arguments and properties. What flows out: what is in them, or a
:class:`~durable_spark.jobs.BadArguments` that names the argument.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from durable_spark.hooks._spark_arguments import parse_properties
from durable_spark.jobs import BadArguments

if TYPE_CHECKING:
    from durable_spark.jobs import SparkJob

__all__ = ["read_pod_template", "read_properties_file"]


async def read_properties_file(job: SparkJob) -> Mapping[str, str]:
    """Return the properties of the job's properties file; none if it has no such file."""
    if not job.properties_file:
        return {}
    return parse_properties(await _read(job.properties_file, "properties_file"))


async def read_pod_template(path: str | None) -> Mapping[str, Any] | None:
    """Return the pod in a template file, YAML or JSON; ``None`` if there is no path."""
    import yaml

    if path is None:
        return None
    name = "spark.kubernetes.driver.podTemplateFile"
    text = await _read(path, name)
    try:
        value = await asyncio.to_thread(yaml.safe_load, text)
    except yaml.YAMLError as error:
        raise BadArguments(f"{name} {path!r} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise BadArguments(f"{name} {path!r} holds no pod")
    return value


async def _read(path: str, name: str) -> str:
    try:
        return await asyncio.to_thread(Path(path).read_text, encoding="utf-8")
    except (OSError, ValueError, TypeError) as error:
        raise BadArguments(f"{name} {path!r} cannot be read on this Airflow worker: {error}") from error
