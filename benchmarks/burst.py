"""
Many submissions at once: ``scripts/bench burst [standalone|kubernetes|yarn]… [--tasks N]``.

Each cluster's real server, but nothing that would run a job: a driver waits for a worker, a pod for a node, an
application for a container. So what is measured is who submits, and what it is to the server.

Twice: a mapped task in a real Airflow (PostgreSQL, LocalExecutor), until each of its tasks is deferred; and hooks
alone, in one process, so many at once that the queue of a Spark master's port, which has room for fifty connections,
never overflows. On YARN, where ``spark-submit`` submits, there is no such hook, and a tenth of the tasks: each is a JVM
on the worker.

Of the server is told how much of a core it took, how many connections it had at once and how many were opened in the
worst second (relays before its ports), and how long it let another client wait for a small answer.
"""

from __future__ import annotations

import abc
import argparse
import asyncio
import bisect
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import Self

from benchmarks.relay import Relays
from benchmarks.report import conclude, milliseconds
from dev.airflow import Airflow, connection_text
from dev.kubernetes import KubernetesCluster, RequestFailed
from dev.postgres import Postgres
from dev.processes import Server, descendants, wait_until
from dev.spark import StandaloneCluster
from dev.yarn import YarnCluster
from durable_spark.hooks._http import for_each
from durable_spark.hooks.spark import SparkHook
from durable_spark.jobs import SparkJob, Submission, new_token
from tests.kubernetes import shell_job
from tests.standalone import jvm_job

AT_ONCE = 16
"""Tasks that this Airflow runs at once. One whose job is submitted makes room for the next."""
HOOKS_AT_ONCE = 40
"""Hooks that submit at the same time."""
_CLUSTERS = ("standalone", "kubernetes", "yarn")
_IDLE = 10.0
"""Seconds for which the server is watched before."""
_PROBE_EVERY = 0.1
_APP = Path(__file__).parents[1] / "tests" / "apps" / "driver.py"


class Case(abc.ABC):
    """One kind of cluster."""

    title: str
    operator = "durable_spark.operators.spark.SparkJobOperator"
    arguments: Mapping[str, Any]
    """The operator's."""
    ports: Sequence[int]
    server: Server
    share = 1
    """One in so many of the tasks that were asked for."""
    job: SparkJob | None = None
    """For the hook."""

    @abc.abstractmethod
    def connection(self) -> dict[str, Any]:
        """Return the connection."""

    @abc.abstractmethod
    def jobs(self) -> int:
        """Return how many jobs the cluster has ever had."""

    @abc.abstractmethod
    def probe(self) -> None:
        """Ask the server something small."""

    def environment(self, relays: Relays, directory: Path) -> Mapping[str, str]:
        """Return what Airflow's environment has to have. Files with ports in them go into the directory."""
        return {}


class OnStandalone(Case):
    title = "standalone"

    def __init__(self, cluster: StandaloneCluster) -> None:
        self.cluster = cluster
        self.ports = [cluster.master.port, cluster.master.rest_port, cluster.master.ui_port]
        self.server = cluster.master.server
        self.job = jvm_job(0)
        self.arguments = _arguments(self.job)

    def connection(self) -> dict[str, Any]:
        return self.cluster.connection()

    def jobs(self) -> int:
        return len(self.cluster.drivers())

    def probe(self) -> None:
        url = f"http://127.0.0.1:{self.cluster.master.rest_port}/v1/submissions/status/driver-none"
        with urllib.request.urlopen(url, timeout=30) as answer:
            answer.read()


class OnKubernetes(Case):
    title = "Kubernetes"

    def __init__(self, cluster: KubernetesCluster) -> None:
        self.cluster = cluster
        self.ports = [cluster.port]
        self.server = cluster.api_server
        self.job = shell_job("exit 0")
        self.arguments = {**_arguments(self.job), "pod": self.job.options["pod"]}

    def connection(self) -> dict[str, Any]:
        return self.cluster.connection()

    def jobs(self) -> int:
        return len(self.cluster.created_pods())

    def probe(self) -> None:
        with contextlib.suppress(RequestFailed):  # there is none
            self.cluster.pod("none")


class OnYarn(Case):
    title = "YARN, `spark-submit`"
    operator = "durable_spark.operators.spark_submit.SparkSubmitOperator"
    share = 10

    def __init__(self, cluster: YarnCluster) -> None:
        self.cluster = cluster
        self.ports = cluster.ports()
        self.server = cluster.managers[0].server
        self.arguments = {"application": str(_APP), "conf": cluster.spark_conf()}

    def connection(self) -> dict[str, Any]:
        return {**self.cluster.connection(), "conn_type": "spark"}

    def jobs(self) -> int:
        return len(self.cluster.apps())

    def probe(self) -> None:
        self.cluster.get("/ws/v1/cluster/info")

    def environment(self, relays: Relays, directory: Path) -> Mapping[str, str]:
        relays.copy(self.cluster.conf_dir, directory)
        found = {name: value for name, value in self.cluster.environment().items() if os.environ.get(name) != value}
        path = os.pathsep.join([str(self.cluster.spark.home / "bin"), os.environ["PATH"]])
        return {**found, "PATH": path, "HADOOP_CONF_DIR": str(directory)}


def _arguments(job: SparkJob) -> dict[str, Any]:
    given = ("application", "java_class", "application_args", "driver_memory", "conf")
    return {name: value for name in given if (value := getattr(job, name))}


@contextlib.contextmanager
def _case(name: str) -> Iterator[Case]:
    if name == "standalone":
        with StandaloneCluster(workers=0) as standalone:
            yield OnStandalone(standalone)
    elif name == "kubernetes":
        with KubernetesCluster(node=False) as kubernetes:
            yield OnKubernetes(kubernetes)
    else:
        with YarnCluster(node=False) as yarn:
            yield OnYarn(yarn)


class Watched:
    """
    What the server goes through for the length of a block: a context manager, with a thread that asks it.

    :ivar took: how long each of the thread's small requests took, in seconds.
    :ivar cores: how much of a core the server used.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._probe, name="probe", daemon=True)
        self.took: list[float] = []
        self.cores = 0.0

    def __enter__(self) -> Self:
        self._began, self._used = time.monotonic(), self._cpu()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cores = (self._cpu() - self._used) / (time.monotonic() - self._began)
        self._over.set()
        self._thread.join(60)

    def _cpu(self) -> float:
        """Return the seconds of processor time that the server has used."""
        used = 0
        for pid in descendants(self._case.server.pid):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used += int(fields[11]) + int(fields[12])
        return used / os.sysconf("SC_CLK_TCK")

    def _probe(self) -> None:
        while not self._over.wait(_PROBE_EVERY):
            began = time.monotonic()
            with contextlib.suppress(urllib.error.HTTPError):
                self._case.probe()
            self.took.append(time.monotonic() - began)


class Bench:
    """
    A cluster behind relays.

    :param count: how many jobs to submit at once.
    """

    def __init__(self, case: Case, relays: Relays, directory: Path, count: int) -> None:
        self.case, self.relays, self.directory, self.count = case, relays, directory, count
        self.connection = relays.before(connection_text(case.connection()))

    def rows(self) -> Iterator[str]:
        """Measure; give rows of the table."""
        if self.case.job is not None:
            yield self._measure(f"hooks alone, {HOOKS_AT_ONCE} at once", self._hooks)
        yield self._measure(f"tasks, {AT_ONCE} slots", self._tasks)

    def _measure(self, what: str, submit: Callable[[], float]) -> str:
        case, relays, before = self.case, self.relays, self.case.jobs()
        with Watched(case) as idle:
            time.sleep(_IDLE)
        opened, closed = len(relays.opened), len(relays.closed)
        with Watched(case) as busy:
            seconds = submit()
        if (made := case.jobs() - before) != self.count:
            raise RuntimeError(f"{case.title}: {self.count} jobs were to be submitted, and {made} were")
        came, went = relays.opened[opened:], relays.closed[closed:]
        changes = sorted([(at, 1) for at in came] + [(at, -1) for at in went])
        most = max(itertools.accumulate(change for _, change in changes))
        worst = max(bisect.bisect(came, at + 1.0) - index for index, at in enumerate(came))
        cells = [
            f"{case.title}: {what}",
            str(self.count),
            f"{seconds:,.1f} s",
            f"{100 * busy.cores:.0f} %",
            str(most),
            str(worst),
            " / ".join(milliseconds(statistics.quantiles(each.took, n=100)[98]) for each in (idle, busy)),
        ]
        line = f"| {' | '.join(cells)} |"
        print(line, flush=True)
        return line

    def _hooks(self) -> float:
        """Submit by hooks alone; return the seconds until the last one has submitted."""
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.burst", "--hooks"],
            input=json.dumps({"count": self.count, "job": dataclasses.asdict(self.case.job)}),  # type: ignore[arg-type]
            env={**os.environ, "AIRFLOW_CONN_BURST": self.connection},
            stdout=subprocess.PIPE,
            text=True,
            timeout=600,
            check=True,
        )
        return float(done.stdout.splitlines()[-1])

    def _tasks(self) -> float:
        """Submit by a mapped task; return the seconds from its run's beginning until each is deferred."""
        case, environment = self.case, self.case.environment(self.relays, self.directory)
        arguments = {**case.arguments, "conn_id": "burst"}
        with (
            Postgres() as postgres,
            Airflow(
                Path(__file__).with_name("burst_dags"),
                database=postgres.url,
                connections={"burst": self.connection},
                config={
                    "core": {"dag_discovery_safe_mode": False, "parallelism": AT_ONCE, "max_map_length": 10_000},
                    "triggerer": {"capacity": 10_000},
                },
                env={**environment, "BENCHMARK_BURST": json.dumps([case.operator, arguments, self.count])},
            ) as airflow,
        ):
            postgres.query("update slot_pool set slots = 10000")
            airflow.wait_for_dag("burst")
            airflow.unpause("burst")
            began = time.monotonic()
            run = airflow.trigger("burst")

            def deferred() -> bool:
                found = postgres.query("select state, count(*) from task_instance where task_id = 'job' group by state")
                states = {str(state): number for state, number in found}
                if states.get("failed") or states.get("up_for_retry"):
                    raise RuntimeError(f"{states}\n{self._said(airflow, run)}")
                return states == {"deferred": self.count}

            wait_until(deferred, 1800, f"{self.count} deferred tasks", interval=0.5)
            return time.monotonic() - began

    @staticmethod
    def _said(airflow: Airflow, run: str) -> str:
        """Return the end of the log of a task that failed."""
        listed = airflow.api("GET", f"/dags/burst/dagRuns/{run}/taskInstances", params={"limit": 1000})
        ended = [each["map_index"] for each in listed["task_instances"] if each["state"] in ("failed", "up_for_retry")]
        return airflow.log_text("burst", run, "job", map_index=ended[0])[-4000:] if ended else ""


async def _submit(job: SparkJob, count: int) -> float:
    async def submit(_: int) -> None:
        async with SparkHook("burst") as hook:
            submission = await hook.prepare(job, Submission(token=new_token(), name="burst.job"))
            await hook.submit(job, submission)

    began = time.perf_counter()
    await for_each(submit, range(count), at_once=HOOKS_AT_ONCE)
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench burst", description=__doc__)
    parser.add_argument(
        "clusters", nargs="*", metavar="cluster", help=f"some of {', '.join(_CLUSTERS)}: publishes nothing"
    )
    parser.add_argument("--tasks", type=int, default=500, help="another number: nothing is published")
    parser.add_argument("--hooks", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hooks:
        given = json.load(sys.stdin)
        print(asyncio.run(_submit(SparkJob(**given["job"]), given["count"])))
        return 0
    heads = ["submitted by", "jobs", "until the last", "CPU of the server", "connections at once, most"]
    heads += ["opened in a second, most", "its answer to another, 99 %: before / meanwhile"]
    if unknown := set(options.clusters) - set(_CLUSTERS):
        parser.error(f"{', '.join(unknown)}: there are {', '.join(_CLUSTERS)}")
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for name in options.clusters or _CLUSTERS:
        with (
            tempfile.TemporaryDirectory(prefix="durable-spark-burst-") as directory,
            _case(name) as case,
            Relays(case.ports) as relays,
        ):
            lines += Bench(case, relays, Path(directory), options.tasks // case.share).rows()
    conclude("burst", lines, whole=not options.clusters and options.tasks == parser.get_default("tasks"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
