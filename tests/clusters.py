"""
All that it takes to run ``spark-submit`` on each cluster: connections, arguments, an environment, a witness.

Everything is as a user of the Spark provider has it: connections of its type, a kubeconfig, a Hadoop configuration.
The jobs are as small as each cluster takes them; who counts them is the cluster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dev.kubernetes import RequestFailed
from dev.processes import wait_until
from dev.spark import SMALL_JVM

if TYPE_CHECKING:
    from dev.kubernetes import KubernetesCluster
    from dev.spark import StandaloneCluster
    from dev.yarn import YarnCluster

__all__ = ["CLUSTERS", "Clusters", "Job", "change_import", "marked", "spark_submits"]

CLUSTERS = ("standalone", "kubernetes", "yarn")
APPS = Path(__file__).parent / "apps"
_RIGHTS = Path(__file__).parents[1] / "docs" / "kubernetes"
_COMPILER = "org.codehaus.janino.SimpleCompiler"
_UPSTREAM = "from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator"
_OURS = "from durable_spark.operators.spark_submit import SparkSubmitOperator"
_SCRIPT = """
shift $(($# - 2)); echo begun
case $1 in
  /*) until [ -e "$1" ]; do sleep 0.5; done ;;
  *) sleep "$1" ;;
esac
echo exiting with "$2"; exit "$2"
"""
"""Of a driver pod: what spark-submit gives the container as arguments ends with the application's own two."""
_MARK = "mark"
"""The label of driver pods for :attr:`Job.mark`."""
_TOKEN_OF_A_DRIVER = re.compile(r"-Dspark\.airflow\.submission=([0-9a-f]{32})")
_TOKEN_OF_AN_APPLICATION = re.compile(r"submission=([0-9a-f]{32})")


@dataclasses.dataclass(frozen=True)
class Job:
    """A job by its cluster's own record."""

    id: str
    state: str
    """``running``, ``succeeded``, ``failed``, ``killed``; ``deleted``; ``gone``: deleted, and has never run."""
    mark: str = dataclasses.field(default="", compare=False)
    """What can tell whose it is: a driver's memory, an application's name, a pod's label."""
    token: str = dataclasses.field(default="", compare=False)
    """Of its submission, if it is this package's: in a driver's launch command, an application's tag, a pod's label."""
    began: float = dataclasses.field(default=0.0, compare=False)
    """Seconds since the epoch."""
    ended: float = dataclasses.field(default=0.0, compare=False)
    """Likewise; 0 if it has not, or the cluster does not say."""


@dataclasses.dataclass(frozen=True)
class Clusters:
    """The three clusters as ``spark-submit`` is told of them."""

    standalone: StandaloneCluster
    kubernetes: KubernetesCluster
    yarn: YarnCluster
    directory: Path
    """For files that ``spark-submit`` reads."""

    def connections(self) -> dict[str, dict[str, Any]]:
        """Return connections of the Spark provider's type, as its users have them."""
        own = {
            "standalone": self.standalone.connection(),
            "yarn": self.yarn.connection(),
            "kubernetes": self.kubernetes.connection(),
        }
        return {f"submit_{name}": _upstream_connection(connection) for name, connection in own.items()}

    def environment(self) -> dict[str, str]:
        """Return the variables of a worker on which ``spark-submit`` is installed."""
        notes = self.directory / "notes"
        notes.mkdir(exist_ok=True)
        environment = self.yarn.environment()
        changed = {name: value for name, value in environment.items() if os.environ.get(name) != value}
        for name in ("HADOOP_CONF_DIR", "SPARK_LAUNCHER_OPTS", "SPARK_SUBMIT_OPTS"):
            del changed[name]  # the first is given by the Dag, as upstream's users may; the others are ours to set
        token = self.kubernetes.token_for("spark-submit", _documented_rights(), lifetime=6 * 3600)
        kubeconfig = str(self.kubernetes.kubeconfig(self.directory / "kubeconfig", token=token))
        return {
            **changed,
            "PATH": os.pathsep.join([str(self.yarn.spark.home / "bin"), os.environ["PATH"]]),
            "KUBECONFIG": kubeconfig,
            "AIRFLOW__KUBERNETES_EXECUTOR__IN_CLUSTER": "False",  # where upstream's operator looks
            "AIRFLOW__KUBERNETES_EXECUTOR__CONFIG_FILE": kubeconfig,
            "SUBMIT_ARGUMENTS": json.dumps(self.arguments()),
            "SUBMIT_NOTES": str(notes),
            "SUBMIT_GATES": str(self.gates),
        }

    @property
    def gates(self) -> Path:
        """The folder of the files for which jobs may wait."""
        gates = self.directory / "gates"
        gates.mkdir(exist_ok=True)
        return gates

    def arguments(self) -> dict[str, dict[str, Any]]:
        """
        Return the arguments of upstream's operator on each cluster.

        The application takes the seconds that it lives, or the file that it waits for, and its exit code.
        """
        jar = self.directory / "nothing.jar"
        with zipfile.ZipFile(jar, "w") as archive:
            archive.writestr("nothing", "")
        quick = {"spark.driver.extraJavaOptions": SMALL_JVM}
        return {
            "standalone": {
                "application": str(jar),
                "java_class": _COMPILER,
                "application_args": [str(APPS / "Driver.java"), "Driver"],
                "driver_memory": "128m",
                "conf": quick,
            },
            "yarn": {
                "application": str(jar),
                "java_class": _COMPILER,
                "application_args": [str(APPS / "SparkDriver.java"), "SparkDriver"],
                "conf": _without_executors(self.yarn.spark_conf()),
                "env_vars": {"HADOOP_CONF_DIR": str(self.yarn.conf_dir)},
                "yarn_track_via_rm_api": True,
            },
            "kubernetes": {
                "application": "local:///nothing.jar",
                "java_class": "Nothing",
                "conf": {
                    **self.kubernetes.conf(),
                    "spark.kubernetes.driver.podTemplateFile": str(self._pod_template()),
                },
                "track_driver_via_k8s_api": True,
            },
        }

    def command(self, cluster: str, *, seconds: float) -> list[str]:
        """Return a command line of ``spark-submit``, which does not wait for the job."""
        arguments = self.arguments()[cluster]
        masters = {"standalone": self.standalone.url, "yarn": "yarn", "kubernetes": f"k8s://{self.kubernetes.url}"}
        conf = {
            **arguments["conf"],
            "spark.yarn.submit.waitAppCompletion": "false",
            "spark.kubernetes.submission.waitAppCompletion": "false",
            "spark.kubernetes.namespace": self.kubernetes.namespace,
        }
        command = [str(self.yarn.spark.home / "bin" / "spark-submit"), "--master", masters[cluster]]
        command += ["--deploy-mode", "cluster", "--class", arguments["java_class"]]
        if "driver_memory" in arguments:
            command += ["--driver-memory", arguments["driver_memory"]]
        command += [part for name, value in conf.items() for part in ("--conf", f"{name}={value}")]
        return [*command, arguments["application"], *arguments.get("application_args", ()), str(seconds), "0"]

    def jobs(self, cluster: str, mark: str | None = None) -> list[Job]:
        """
        Return all jobs that the cluster has ever had, the oldest first.

        :param mark: of those that are asked for; see :func:`marked`.
        """
        if cluster == "kubernetes":  # where each job is a request of its own
            return list(self._pods(mark))
        return self._drivers(mark) if cluster == "standalone" else self._applications(mark)

    def kill(self, cluster: str, job: Job) -> None:
        """End a job without any of the package's code."""
        if cluster == "standalone":
            self.standalone.kill_driver(job.id)
        elif cluster == "yarn":
            self.yarn.kill_app(job.id)
        else:
            self.kubernetes.delete_pod(job.id.partition(":")[2])
        wait_until(
            lambda: job.id not in {j.id for j in self.jobs(cluster) if j.state == "running"}, 60, f"{job} to end"
        )

    def _drivers(self, mark: str | None) -> list[Job]:
        states = {"FINISHED": "succeeded", "FAILED": "failed", "ERROR": "failed", "KILLED": "killed"}
        return [
            Job(
                driver.id,
                states.get(driver.state, "running"),
                its_mark,
                token=self._launch_command(driver.id),
                began=driver.started,
            )
            for driver in self.standalone.drivers()
            if mark in (None, its_mark := f"{driver.memory}m")
        ]

    def _launch_command(self, driver: str) -> str:
        """Return the token in a driver's launch command, which its worker has put on the disk."""
        for worker in self.standalone.workers:
            with contextlib.suppress(OSError), (worker.directory / driver / "stderr").open(errors="replace") as log:
                if found := _TOKEN_OF_A_DRIVER.search(log.read(1 << 16)):
                    return found[1]
        return ""

    def _applications(self, mark: str | None) -> list[Job]:
        ends = {"SUCCEEDED": "succeeded", "FAILED": "failed", "KILLED": "killed"}
        return [
            Job(
                app.id,
                ends.get(app.final_status, "running"),
                app.name,
                token=found[1] if (found := _TOKEN_OF_AN_APPLICATION.search(" ".join(app.tags))) else "",
                began=app.started,
                ended=app.finished,
            )
            for app in sorted(self.yarn.apps(), key=lambda app: app.id)
            if mark in (None, app.name)
        ]

    def _pods(self, mark: str | None) -> Iterator[Job]:
        phases = {"Succeeded": "succeeded", "Failed": "failed"}
        for created in self.kubernetes.created_pods():
            metadata = created.entry["responseObject"]["metadata"]
            labels = metadata.get("labels", {})
            if mark not in (None, labels.get(_MARK, "")):
                continue
            state, ended = "deleted" if self.kubernetes.has_run(created.uid) else "gone", 0.0
            try:
                pod = self.kubernetes.pod(created.name)
            except RequestFailed as error:
                if error.status != 404:
                    raise
            else:
                if pod["metadata"]["uid"] == created.uid:
                    state = phases.get(pod["status"]["phase"], "running")
                    ends = [each["state"].get("terminated") for each in pod["status"].get("containerStatuses", ())]
                    ended = max((_seconds(end["finishedAt"]) for end in ends if end), default=0.0)
            yield Job(
                f"{created.namespace}:{created.name}",
                state,
                labels.get(_MARK, ""),
                token=labels.get("durable-spark/token", ""),
                began=_seconds(metadata["creationTimestamp"]),
                ended=ended if state != "running" else 0.0,
            )

    def _pod_template(self) -> Path:
        path = self.directory / "driver.yaml"
        gates = str(self.gates)
        mounts = [{"name": "gates", "mountPath": gates}]
        container = {"name": "driver", "command": ["sh", "-c", _SCRIPT], "volumeMounts": mounts}
        volumes = [{"name": "gates", "hostPath": {"path": gates}}]
        spec = {"terminationGracePeriodSeconds": 1, "containers": [container], "volumes": volumes}
        pod = {"apiVersion": "v1", "kind": "Pod", "spec": spec}
        path.write_text(yaml.safe_dump(pod))
        return path


def _documented_rights() -> list[dict[str, Any]]:
    """Return the rules that the documentation asks for, of whoever runs ``spark-submit`` and follows its jobs."""
    rules: list[dict[str, Any]] = []
    for name, role in (("rbac.yaml", "airflow"), ("rbac-spark-submit.yaml", "spark-submit")):
        for manifest in yaml.safe_load_all((_RIGHTS / name).read_text()):
            if manifest["kind"] == "Role" and manifest["metadata"]["name"] == role:
                rules += manifest["rules"]
    return rules


def _seconds(timestamp: str) -> float:
    """Return a time of Kubernetes' in seconds since the epoch."""
    return datetime.datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp()


def spark_submits(mark: str) -> list[int]:
    """Return the processes of ``spark-submit`` with a word in their command line or environment, the guard included."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes()
            marked = mark.encode() in command + (directory / "environ").read_bytes()
        except OSError:
            continue
        if marked and any(
            word in command for word in (b"SparkSubmit", b"spark-submit", b"_guard.py", b"launcher.Main")
        ):
            found.append(int(directory.name))
    return found


def marked(cluster: str, mark: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return an operator's arguments with what lets its jobs be told from others.

    :param mark: on a standalone cluster an amount of memory, such as ``150m``; else a name.
    """
    if cluster == "standalone":
        return {**arguments, "driver_memory": mark}
    if cluster == "yarn":
        return {**arguments, "name": mark}
    return {**arguments, "conf": {**arguments["conf"], f"spark.kubernetes.driver.label.{_MARK}": mark}}


def change_import(source: str) -> str:
    """Return a Dag file with nothing but its import changed, from upstream's operator to ours."""
    assert source.count(_UPSTREAM) == 1
    return source.replace(_UPSTREAM, _OURS)


def _upstream_connection(connection: dict[str, Any]) -> dict[str, Any]:
    extra = {name: value for name, value in connection["extra"].items() if name not in ("ca",)}
    return {
        **{name: value for name, value in connection.items() if name != "password"},
        "conn_type": "spark",
        "extra": {**extra, "deploy-mode": "cluster"},
    }


def _without_executors(conf: dict[str, str]) -> dict[str, str]:
    dynamic = "spark.dynamicAllocation"
    return {
        **{name: value for name, value in conf.items() if name != "spark.executor.instances"},
        f"{dynamic}.enabled": "true",
        f"{dynamic}.shuffleTracking.enabled": "true",
        f"{dynamic}.minExecutors": "0",
        f"{dynamic}.initialExecutors": "0",
        f"{dynamic}.maxExecutors": "1",
    }
