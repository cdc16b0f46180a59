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

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from durable_spark.jobs import BadArguments

if TYPE_CHECKING:
    from durable_spark.jobs import SparkJob, Submission

__all__ = ["DEPLOYMENT", "OWNER", "TOKEN", "build_request", "parse_properties"]

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

_PROPERTY_OF = {
    "driver_memory": "spark.driver.memory",
    "driver_cores": "spark.driver.cores",
    "driver_class_path": "spark.driver.extraClassPath",
    "executor_memory": "spark.executor.memory",
    "executor_cores": "spark.executor.cores",
    "total_executor_cores": "spark.cores.max",
    "packages": "spark.jars.packages",
    "exclude_packages": "spark.jars.excludes",
    "repositories": "spark.jars.repositories",
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

_COUNTS = ("driver_cores", "executor_cores", "total_executor_cores", "num_executors")

_MEMORY = re.compile(r"([0-9]+)([a-z]*)\Z")
_MEMORY_UNITS = {"b": 0, "k": 10, "kb": 10, "m": 20, "mb": 20, "g": 30, "gb": 30, "t": 40, "tb": 40, "p": 50, "pb": 50}
"""As ``org.apache.spark.network.util.JavaUtils`` has them, as powers of two."""


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
        if _given(job, name) is not None:
            raise BadArguments(f"{name} cannot be used with a standalone cluster: {why}")
    if job.options:
        raise BadArguments(f"a standalone cluster does not know {', '.join(sorted(map(str, job.options)))}")
    application = _uri("application", job.application)
    python = urlsplit(application).path.endswith(".py")
    _check_main_class(job, python=python)
    properties = _properties(job, defaults) | _labels(submission) | {"spark.master": master}
    arguments = _strings("application_args", job.application_args)
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
        "environmentVariables": _string_map("env_vars", job.env_vars),
        "sparkProperties": properties,
    }


def parse_properties(text: str) -> dict[str, str]:
    """
    Parse a Java properties file the way spark-submit does: ``key=value``, ``key: value``, ``key value``.

    Only Spark's own properties are kept, as spark-submit keeps them.
    """
    properties: dict[str, str] = {}
    for line in _logical_lines(text):
        key, value = _split_property(line)
        if key.startswith("spark."):
            properties[key] = value.strip()
    return properties


def _given(job: SparkJob, name: str) -> object:
    """Return an argument, ``None`` also for an empty string, which templates leave behind."""
    value = getattr(job, name)
    return None if value == "" else value


def _check_main_class(job: SparkJob, *, python: bool) -> None:
    if job.java_class is not None and not isinstance(job.java_class, str):
        raise BadArguments(f"java_class must be a string, not {type(job.java_class).__name__}")
    if python and job.java_class:
        raise BadArguments("java_class has no meaning for a Python application: leave it out")
    if not python and not job.java_class:
        raise BadArguments(
            f"java_class is missing: application {job.application!r} is not a .py file, and the main class of a jar "
            "cannot be read from here"
        )


def _properties(job: SparkJob, defaults: Mapping[str, str]) -> dict[str, str]:
    """Defaults, then conf, then the arguments: as with spark-submit, the more explicit one wins."""
    conf = _string_map("conf", job.conf)
    for key in conf:
        if key in (TOKEN, OWNER, DEPLOYMENT):
            raise BadArguments(f"conf must not set {key}: it is how this package finds its jobs again")
        if not key.startswith("spark."):
            raise BadArguments(f"conf has {key!r}, which Spark would ignore: its properties begin with 'spark.'")
    if "spark.master" in conf:
        raise BadArguments("conf must not set spark.master: the master comes from the connection")
    properties = {**defaults, **conf}
    if properties.pop("spark.submit.deployMode", "cluster") != "cluster":
        raise BadArguments("spark.submit.deployMode must be 'cluster': the driver runs on the cluster, not in Airflow")
    for name, key in _PROPERTY_OF.items():
        if (value := _given(job, name)) is not None:
            properties[key] = _count(name, value) if name in _COUNTS else _string(name, value)
    for name, key in _FILES_OF.items():
        if (value := _given(job, name)) is not None:
            properties[key] = _uris(name, value)
    if job.supervise is not None:
        properties["spark.driver.supervise"] = "true" if job.supervise else "false"
    properties["spark.app.name"] = _string("name", job.name)
    for key in ("spark.driver.memory", "spark.executor.memory"):
        if key in properties:
            _check_memory(key, properties[key])
    for key in ("spark.driver.cores", "spark.executor.cores", "spark.cores.max"):
        if key in properties:
            _count(key, properties[key])
    return properties


def _labels(submission: Submission) -> dict[str, str]:
    labels = {TOKEN: submission.token, OWNER: submission.owner, DEPLOYMENT: submission.deployment}
    return {key: value for key, value in labels.items() if value}


def _python_arguments(properties: dict[str, str], *, master: str, application: str) -> list[str]:
    """Move what SparkSubmit takes from its arguments alone out of the properties."""
    arguments = ["--master", master, "--name", properties["spark.app.name"]]
    for key, argument in _ARGUMENT_OF.items():
        if value := properties.pop(key, ""):
            arguments += [argument, value]
    return [*arguments, application]


def _uris(name: str, value: object) -> str:
    parts = [part.strip() for part in _string(name, value).split(",")]
    return ",".join(_uri(name, part) for part in parts if part)


def _uri(name: str, value: object) -> str:
    """
    Return a URI that the cluster can resolve, as spark-submit's ``Utils.resolveURI`` makes it.

    The worker fetches ``file:`` from its own disk. ``local:`` says the same, but its fetcher does
    not know that scheme ("No FileSystem for scheme", tried on 4.3.0).
    """
    text = _string(name, value).strip()
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


def _check_memory(key: str, value: str) -> None:
    """Accept what Spark accepts, except a number without a unit, which it takes for bytes, that is 0 MiB."""
    match = _MEMORY.match(value.strip().lower())
    unit = _MEMORY_UNITS.get(match[2]) if match else None
    if match is None or unit is None:
        raise BadArguments(f"{key} is {value!r}: give a whole number and a unit, such as 512m or 2g")
    if int(match[1]) << unit < 1 << 20:
        raise BadArguments(f"{key} is {value!r}, less than a mebibyte")


def _count(name: str, value: object) -> str:
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal() or int(text) == 0:
        raise BadArguments(f"{name} is {value!r}: give a whole number greater than 0")
    return text


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadArguments(f"{name} must be a string, not {type(value).__name__}")
    if not value.strip():
        raise BadArguments(f"{name} is empty")
    if "\0" in value:
        raise BadArguments(f"{name} holds a NUL character")
    return value


def _strings(name: str, values: Sequence[str]) -> list[str]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise BadArguments(f"{name} must be a list of strings, not {type(values).__name__}")
    for index, value in enumerate(values):
        if not isinstance(value, str) or "\0" in value:
            raise BadArguments(f"{name}[{index}] must be a string, not {type(value).__name__}")
    return list(values)


def _string_map(name: str, values: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(values, Mapping):
        raise BadArguments(f"{name} must be a mapping of strings, not {type(values).__name__}")
    for key, value in values.items():
        if not isinstance(key, str) or not re.fullmatch(r"[^\s=\0]+", key):
            raise BadArguments(f"{name} has the key {key!r}, which is not a name")
        if not isinstance(value, str) or "\0" in value:
            raise BadArguments(f"the value of {key} in {name} must be a string, not {type(value).__name__}: quote it")
    return dict(values)


def _logical_lines(text: str) -> list[str]:
    """Join continued lines; drop blank lines and comments. After ``java.util.Properties.load``."""
    lines: list[str] = []
    continued = False
    for raw in re.split(r"\r\n|\r|\n", text):
        line = raw.lstrip(" \t\f")
        if not continued and (not line or line[0] in "#!"):
            continue
        if continued:
            lines[-1] += line
        else:
            lines.append(line)
        slashes = len(line) - len(line.rstrip("\\"))
        continued = slashes % 2 == 1
        if continued:
            lines[-1] = lines[-1][:-1]
    return lines


_SEPARATOR = re.compile(r"(?:[^\\:= \t\f]|\\.)*", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_CONTROL = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}


def _split_property(line: str) -> tuple[str, str]:
    match = _SEPARATOR.match(line)
    end = match.end() if match else 0
    value = re.sub(r"\A[ \t\f]*[:=]?[ \t\f]*", "", line[end:])
    return _unescape(line[:end]), _unescape(value)


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda m: chr(int(m[1], 16)) if m[1] else _CONTROL.get(m[2], m[2]), text)
