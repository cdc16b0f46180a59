"""
From a :class:`~durable_spark.jobs.SparkJob` to the body of a ``CreateSubmissionRequest``.

Pure: no I/O, so that every argument can be checked before anything is sent. What cannot be done by a
standalone cluster is an error here, never silently dropped.

The trap: for PySpark the driver's main class is ``SparkSubmit`` itself, run inside the driver. It
reads some settings from its arguments alone (without ``--master`` it silently runs ``local[*]`` in
the driver), and everything else from the ``-D`` options that the properties become. Arguments are
shown in clear in the driver's launch command, while properties with telling names are redacted
there; so nothing goes into the arguments that does not have to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from durable_spark.hooks._spark_arguments import (
    check_main_class,
    given,
    merge_properties,
    parse_properties,
    string,
    string_map,
    strings,
)
from durable_spark.jobs import BadArguments

if TYPE_CHECKING:
    from durable_spark.jobs import SparkJob, Submission

__all__ = ["DEPLOYMENT", "OWNER", "TOKEN", "build_request", "labels", "parse_properties", "refuse_labels"]

TOKEN = "spark.airflow.submission"  # noqa: S105 - the name says "submission" because Spark redacts *token*
OWNER = "spark.airflow.owner"
DEPLOYMENT = "spark.airflow.deployment"

_SPARK_SUBMIT = "org.apache.spark.deploy.SparkSubmit"

_ONLY_ELSEWHERE = {
    "keytab": "Kerberos keytabs are for YARN and Kubernetes",
    "principal": "Kerberos principals are for YARN and Kubernetes",
    "proxy_user": "drivers of a standalone cluster run as its workers' user",
    "num_executors": "Spark ignores it on a standalone cluster: set total_executor_cores and executor_cores",
}

_FILES_OF = {
    "files": "spark.files",
    "archives": "spark.archives",
    "jars": "spark.jars",
    "py_files": "spark.submit.pyFiles",
}

_ARGUMENT_OF = {
    "spark.jars.packages": "--packages",
    "spark.jars.excludes": "--exclude-packages",
    "spark.jars.repositories": "--repositories",
    "spark.jars": "--jars",
    "spark.files": "--files",
    "spark.archives": "--archives",
    "spark.submit.pyFiles": "--py-files",
}
"""What the SparkSubmit inside a PySpark driver takes from its arguments alone."""


def build_request(
    job: SparkJob, submission: Submission, *, master: str, defaults: Mapping[str, str], version: str
) -> dict[str, Any]:
    """
    Return the body of the ``CreateSubmissionRequest`` for a job.

    :param master: the master URL that the driver registers with, all masters named.
    :param defaults: properties that the job's own override, from its properties file.
    :param version: Spark's version on the master.
    :raises BadArguments: naming the argument, what is wrong with it, and the fix.
    """
    for name, why in _ONLY_ELSEWHERE.items():
        if given(job, name) is not None:
            raise BadArguments(f"{name} cannot be used with a standalone cluster: {why}")
    if job.options:
        names = ", ".join(sorted(map(str, job.options)))
        raise BadArguments(f"a standalone cluster does not know {names}: leave out what is another kind of cluster's")
    application = _uri("application", job.application)
    python = urlsplit(application).path.endswith(".py")
    check_main_class(job, language="Python" if python else None)
    properties = _properties(job, defaults) | labels(submission) | {"spark.master": master}
    arguments = strings("application_args", job.application_args)
    if python:
        arguments = _python_arguments(properties, master=master, application=application) + arguments
    else:
        properties["spark.submit.deployMode"] = "cluster"
    return {
        "action": "CreateSubmissionRequest",
        "clientSparkVersion": version,
        "appResource": application,
        "mainClass": _SPARK_SUBMIT if python else job.java_class,
        "appArgs": arguments,
        "environmentVariables": string_map("env_vars", job.env_vars),
        "sparkProperties": properties,
    }


def _properties(job: SparkJob, defaults: Mapping[str, str]) -> dict[str, str]:
    refuse_labels(string_map("conf", job.conf))
    properties = merge_properties(job, defaults, {"total_executor_cores": "spark.cores.max"})
    for name, key in _FILES_OF.items():
        if (value := given(job, name)) is not None:
            properties[key] = _uris(name, value)
    if job.supervise is not None:
        properties["spark.driver.supervise"] = "true" if job.supervise else "false"
    return properties


def refuse_labels(conf: Mapping[str, str]) -> None:
    """Check that none of the user's properties is one of ours."""
    for key in (TOKEN, OWNER, DEPLOYMENT):
        if key in conf:
            raise BadArguments(f"conf must not set {key}: it is how this package finds its jobs again")


def labels(submission: Submission) -> dict[str, str]:
    """Return the properties by which a submission's driver is found again: they show in its launch command."""
    values = {TOKEN: submission.token, OWNER: submission.owner, DEPLOYMENT: submission.deployment}
    return {key: value for key, value in values.items() if value}


def _python_arguments(properties: dict[str, str], *, master: str, application: str) -> list[str]:
    """Move what SparkSubmit takes from its arguments alone out of the properties."""
    arguments = ["--master", master, "--name", properties["spark.app.name"]]
    for key, argument in _ARGUMENT_OF.items():
        if value := properties.pop(key, ""):
            arguments += [argument, value]
    return [*arguments, application]


def _uris(name: str, value: object) -> str:
    parts = [part.strip() for part in string(name, value).split(",")]
    return ",".join(_uri(name, part) for part in parts if part)


def _uri(name: str, value: object) -> str:
    """
    Return a URI that the cluster can resolve, as spark-submit's ``Utils.resolveURI`` makes it.

    The worker fetches ``file:`` from its own disk. ``local:`` says the same, but its fetcher does
    not know that scheme ("No FileSystem for scheme", tried on 4.3.0).
    """
    text = string(name, value).strip()
    scheme = urlsplit(text).scheme
    if scheme == "local":
        text = "file:" + text.partition(":")[2]
    elif not scheme and text.startswith("/"):
        text = f"file:{text}"
    elif not scheme:
        raise BadArguments(
            f"{name} is {text[:200]!r}, a relative path: give an absolute path or a URL that the cluster's machines "
            "can read"
        )
    if not urlsplit(text).path.strip("/"):
        raise BadArguments(f"{name} is {text[:200]!r}, which names no file")
    return text
