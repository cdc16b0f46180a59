"""
Applications for tests on a YARN cluster, submitted without any of the package's code.

What flows in is a :class:`YarnJob` and the tags of the application, what flows out is its ID. It is submitted over
REST, as the package does, and no JVM is started here; :func:`spark_submit` is Spark's own program.

The trap: 202 to a submission is no promise. The manager has stored the application when its state is past
``NEW_SAVING``, and that is waited for.
"""

from __future__ import annotations

import base64
import dataclasses
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dev.processes import wait_until
from dev.yarn import RequestFailed

if TYPE_CHECKING:
    from dev.yarn import YarnCluster

__all__ = ["YarnJob", "body", "new_application", "spark_submit", "submit_app"]

APPS = Path(__file__).parent / "apps"

_QUICK_JVM = "-Xms16m -Xmx64m -Xss512k -XX:+UseSerialGC -XX:TieredStopAtLevel=1"


@dataclasses.dataclass(frozen=True)
class YarnJob:
    """An application of which nothing but the master runs: a small JVM, or a shell command."""

    seconds: float = 0.0
    """How long it runs, from its registration on."""
    until: Path | None = None
    """A file: it runs until there is one."""
    end: str | int = "SUCCEEDED"
    """The final status, ``FAILED`` or ``KILLED`` as well, or an exit code, with which it ends without unregistering."""
    diagnostics: str = ""
    """What it says at the end. May have several lines."""
    tracking_url: str = ""
    command: str | None = None
    """A shell command instead of the JVM. It never registers: the application is ACCEPTED, and FAILED at its end."""
    name: str = "tests"
    type: str = "SPARK"
    queue: str = "default"
    attempts: int = 1
    memory: int = 128
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def new_application(cluster: YarnCluster, *, number: int = 0, user: str | None = None) -> str:
    """Return the ID of an application that has yet to be submitted."""
    answer = cluster.request("POST", "/ws/v1/cluster/apps/new-application", number=number, user=user)
    if answer.status != 200:
        raise RequestFailed("new-application", answer)
    app_id: str = answer.json()["application-id"]
    return app_id


def submit_app(
    cluster: YarnCluster,
    job: YarnJob,
    tags: Sequence[str] = (),
    app_id: str | None = None,
    *,
    user: str | None = None,
) -> str:
    """
    Submit an application to the active manager; return its ID when the manager has stored it.

    :param app_id: one of :func:`new_application`; a new one when ``None``.
    :param user: whose it is; the cluster's usual one when ``None``.
    """
    number = cluster.managers.index(cluster.active())
    app_id = app_id or new_application(cluster, number=number, user=user)
    answer = cluster.request("POST", "/ws/v1/cluster/apps", body(cluster, job, tags, app_id), number=number, user=user)
    if answer.status != 202:
        raise RequestFailed(f"submission of {app_id}", answer)
    wait_until(lambda: cluster.app(app_id).state not in ("NEW", "NEW_SAVING"), 30, f"{app_id} to be stored")
    return app_id


def body(cluster: YarnCluster, job: YarnJob, tags: Sequence[str], app_id: str) -> dict[str, Any]:
    """Return an application as it is submitted over REST."""
    # The node writes it into double quotes, and then the names in braces and angles.
    command = re.sub(r'([\\"$`])', r"\\\1", job.command or _java(cluster, job))
    return {
        "application-id": app_id,
        "application-name": job.name,
        "application-type": job.type,
        "queue": job.queue,
        "max-app-attempts": job.attempts,
        "resource": {"memory": job.memory, "vCores": 1},
        "am-container-spec": {
            "commands": {"command": f"({command}) 1><LOG_DIR>/stdout 2><LOG_DIR>/stderr"},
            "environment": {"entry": [{"key": key, "value": value} for key, value in job.environment.items()]},
        },
        **({"application-tags": {"tag": list(tags)}} if tags else {}),
    }


def _java(cluster: YarnCluster, job: YarnJob) -> str:
    compiler = [*cluster.spark.home.glob("jars/janino-*.jar"), *cluster.spark.home.glob("jars/commons-compiler-*.jar")]
    classpath = ":".join([str(cluster.conf_dir), *map(str, compiler), cluster.hadoop.classpath])
    diagnostics = base64.b64encode(job.diagnostics.encode()).decode()
    arguments = [str(APPS / "Application.java"), "Application", str(job.seconds), str(job.end), diagnostics]
    command = [*_QUICK_JVM.split(), "-cp", classpath, "org.codehaus.janino.SimpleCompiler", *arguments]
    return "exec {{JAVA_HOME}}/bin/java " + shlex.join([*command, job.tracking_url, str(job.until or "/")])


def spark_submit(
    cluster: YarnCluster,
    application: str | Path,
    *arguments: str,
    tags: Sequence[str] = (),
    conf: Mapping[str, str] | None = None,
    java_class: str | None = None,
    wait: bool = False,
) -> str:
    """
    Submit an application in cluster mode with Spark's own ``spark-submit``, and return its ID. It takes seconds.

    :param conf: further Spark properties.
    :param wait: whether to wait for the application's end.
    """
    properties = {
        **cluster.spark_conf(),
        "spark.yarn.submit.waitAppCompletion": str(wait).lower(),
        **({"spark.yarn.tags": ",".join(tags)} if tags else {}),
        **(conf or {}),
    }
    options = [part for name, value in properties.items() for part in ("--conf", f"{name}={value}")]
    if java_class:
        options += ["--class", java_class]
    command = [f"{cluster.spark.home}/bin/spark-submit", "--master", "yarn", "--deploy-mode", "cluster", *options]
    ended = subprocess.run(
        [*command, str(application), *arguments],
        env=cluster.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = re.search(r"Submitted application (application_\d+_\d+)", ended.stderr)
    if found is None or (ended.returncode and not wait):
        raise AssertionError(f"spark-submit ended with {ended.returncode}:\n{ended.stdout}{ended.stderr[-4000:]}")
    return found[1]
