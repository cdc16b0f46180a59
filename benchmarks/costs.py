"""
What a job costs from its submission to its end, ours beside upstream's operator: ``scripts/bench costs [--only …]``.

A real Airflow (PostgreSQL, LocalExecutor), real clusters, one job of a minute at a time. Of each is told how long it
held a worker slot (Airflow's audit log), for how long JVMs ran on the worker (the system's processes, looked at ten
times a second), how many bytes went between Airflow and the cluster (relays before the cluster's ports), and how many
rows were written to Airflow's database (PostgreSQL's statistics).

What a job of an hour or of ten costs is that of a minute, and of each further second what one took in the middle of the
minute. That is measured, too; the hours are not waited for.

The traps: Airflow writes rows without any task: tables in which it does so while nothing runs are left out, and so is
that of Dag runs, which a scheduler touches each time it looks. And PostgreSQL tells of a row up to ten seconds late:
the middle begins long after the submission.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import Self

from benchmarks.relay import Relays
from benchmarks.report import conclude
from dev.airflow import Airflow, connection_text, parse_time
from dev.kubernetes import KubernetesCluster
from dev.postgres import Postgres
from dev.processes import descendants
from dev.soak_chaos import title
from dev.spark import StandaloneCluster
from dev.yarn import YarnCluster
from tests.clusters import Clusters

_UPSTREAM = "airflow.providers.apache.spark.operators.spark_submit.SparkSubmitOperator"
_DROP_IN = "durable_spark.operators.spark_submit.SparkSubmitOperator"
_NATIVE = "durable_spark.operators.spark.SparkJobOperator"
_TITLES = {"standalone": "standalone", "kubernetes": "Kubernetes", "yarn": "YARN"}
SECONDS = 60
"""How long the job's application takes."""
_MIDDLE = (23.0, 30.0)
"""Seconds after which the wait's middle begins, and that it lasts: a multiple of each poll interval."""
_IDLE = 20.0
"""Seconds in which it is seen which tables Airflow writes to by itself."""
_TOLD_WITHIN = 11.0
"""Seconds within which PostgreSQL's sessions tell of what they wrote: ten when they are idle (its ``pgstat.c``)."""
_LOOK_EVERY = 0.1
_LENGTHS = {"1 minute": 60, "1 hour": 3600, "10 hours": 36000}


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run a job, on one cluster."""

    cluster: str
    title: str
    operator: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Costs:
    """What something cost until now, or what it cost in a time."""

    slot: float
    jvm: float
    bytes: float
    rows: float

    def __sub__(self, other: Costs) -> Costs:
        return Costs(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def after(self, each_second: Costs, seconds: float) -> Costs:
        """Return these, and those of so many seconds more."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(each_second), strict=True)
        return Costs(*(now + seconds * each for now, each in pairs))


class Jvms:
    """
    Counts the seconds for which JVMs run below a process; a context manager, with a thread of its own.

    :param pid: returns the process.
    """

    def __init__(self, pid: Callable[[], int]) -> None:
        self.seconds = 0.0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._count, name="jvms", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)

    def _count(self) -> None:
        last = time.monotonic()
        while not self._over.wait(_LOOK_EVERY):
            running = sum(title(pid).split(b"\0")[0].endswith(b"/java") for pid in descendants(self._pid()))
            now = time.monotonic()
            self.seconds, last = self.seconds + running * (now - last), now


class Bench:
    """The machines, and what is measured on them."""

    def __init__(self, airflow: Airflow, postgres: Postgres, relays: Relays, jvms: Jvms) -> None:
        self.airflow, self.postgres, self.relays, self.jvms = airflow, postgres, relays, jvms
        before = self._written()
        time.sleep(_IDLE)
        after = self._written()
        self._own = {table for table, rows in after.items() if rows != before.get(table)} | {"dag_run"}
        print(f"not counted: {', '.join(sorted(self._own))}", flush=True)

    def measure(self, name: str) -> tuple[Costs, Costs]:
        """Run a job; return what it cost, and what each second in the middle of its wait did."""
        airflow = self.airflow
        before = self._now(name, "")
        began = time.monotonic()
        run = airflow.trigger(name)
        wait, lasts = _MIDDLE
        time.sleep(wait)
        at, first = time.monotonic(), self._now(name, run)
        time.sleep(lasts)
        middle, passed = self._now(name, run) - first, time.monotonic() - at
        state = airflow.task(name, run, "job").state
        if state not in ("running", "deferred") or time.monotonic() - began > SECONDS:
            said = "\n".join(map(json.dumps, airflow.log(name, run, "job")[-20:]))
            raise RuntimeError(f"{name}: the task is {state} in the middle of its job\n{said}")
        airflow.wait_for_state(name, run, "job", "success", deadline=120)
        time.sleep(_TOLD_WITHIN)
        costs = self._now(name, run) - before
        return costs, Costs(*(each / passed for each in dataclasses.astuple(middle)))

    def _now(self, dag: str, run: str) -> Costs:
        rows = sum(number for table, number in self._written().items() if table not in self._own)
        slot = self._slot(dag, run) if run else 0.0
        return Costs(slot, self.jvms.seconds, self.relays.bytes, rows)

    def _written(self) -> dict[str, int]:
        written = "n_tup_ins + n_tup_upd + n_tup_del"
        return dict(self.postgres.query(f"select relname, {written} from pg_stat_user_tables"))

    def _slot(self, dag: str, run: str) -> float:
        """Return how long the task has held a slot: from each start to the deferral, the end, or now."""
        total, since = 0.0, None
        for event in sorted(self.airflow.events(dag, run, "job"), key=lambda event: str(event["when"])):
            at = parse_time(event["when"])
            assert at is not None
            if event["event"] == "running":
                since = at.timestamp()
            elif event["event"] in ("deferred", "success", "failed") and since is not None:
                total, since = total + at.timestamp() - since, None
        return total + (time.time() - since if since is not None else 0.0)


def _ways(arguments: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Way]]:
    """Give each way, under the name of its Dag."""
    ends = [str(SECONDS), "0"]
    tracking: dict[str, tuple[str, dict[str, Any]]] = {
        "standalone": ("status_poll_interval=10", {"status_poll_interval": 10}),
        "kubernetes": ("track_driver_via_k8s_api", {"track_driver_via_k8s_api": True}),
        "yarn": ("yarn_track_via_rm_api", {"yarn_track_via_rm_api": True}),
    }
    switches = ("track_driver_via_k8s_api", "yarn_track_via_rm_api")
    for cluster, given in arguments.items():
        common = {name: value for name, value in given.items() if name not in switches}
        common["application_args"] = [*given.get("application_args", ()), *ends]
        submit = {"conn_id": f"submit_{cluster}", **common}
        option, more = tracking[cluster]
        if cluster == "standalone":
            yield f"{cluster}_upstream", Way(cluster, "upstream's, as it is", _UPSTREAM, submit)
        else:  # it cannot be durable without the option
            undurable = {**submit, "durable": False}
            yield f"{cluster}_upstream", Way(cluster, "upstream's, `durable=False`", _UPSTREAM, undurable)
        yield f"{cluster}_polling", Way(cluster, f"upstream's, `{option}`", _UPSTREAM, {**submit, **more})
        yield f"{cluster}_drop_in", Way(cluster, "**ours**, drop-in", _DROP_IN, submit)
        if cluster == "standalone":
            yield f"{cluster}_native", Way(cluster, "**ours**", _NATIVE, {**common, "conn_id": cluster})
        elif cluster == "kubernetes":
            yield f"{cluster}_native", Way(cluster, "**ours**", _NATIVE, _pod(common))


def _pod(arguments: Mapping[str, Any]) -> dict[str, Any]:
    container = {"name": "spark-kubernetes-driver", "command": ["sh", "-c", f"sleep {SECONDS}"]}
    image = {name: value for name, value in arguments["conf"].items() if "container.image" in name}
    pod = {"spec": {"terminationGracePeriodSeconds": 1, "containers": [container]}}
    return {"conn_id": "kubernetes", "application": "local:///nothing.py", "conf": image, "pod": pod}


@contextlib.contextmanager
def _bench(only: str) -> Iterator[tuple[Bench, dict[str, Way]]]:
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="durable-spark-costs-")))
        standalone = stack.enter_context(StandaloneCluster())
        kubernetes = stack.enter_context(KubernetesCluster())
        yarn = stack.enter_context(YarnCluster())
        postgres = stack.enter_context(Postgres())
        clusters = Clusters(standalone, kubernetes, yarn, directory)
        master = standalone.master
        ports = [master.port, master.rest_port, master.ui_port, kubernetes.port, *yarn.ports()]
        relays = stack.enter_context(Relays(ports))
        environment = clusters.environment()
        kubeconfig = Path(environment["KUBECONFIG"])
        kubeconfig.write_text(relays.before(kubeconfig.read_text()))
        copied = directory / "hadoop"
        copied.mkdir()
        relays.copy(yarn.conf_dir, copied)
        arguments = clusters.arguments()
        arguments["yarn"]["env_vars"]["HADOOP_CONF_DIR"] = str(copied)
        ways = {name: way for name, way in _ways(arguments) if re.search(only, name)}
        connections: dict[str, dict[str, Any]] = {
            "standalone": standalone.connection(),
            "kubernetes": kubernetes.connection(),
            **clusters.connections(),
        }
        airflow = Airflow(
            Path(__file__).with_name("costs_dags"),
            database=postgres.url,
            connections={name: relays.before(connection_text(connection)) for name, connection in connections.items()},
            config={"core": {"dag_discovery_safe_mode": False}},
            env={
                **environment,
                "BENCHMARK_WAYS": json.dumps({name: (way.operator, way.arguments) for name, way in ways.items()}),
            },
        )
        stack.enter_context(airflow)
        jvms = stack.enter_context(Jvms(lambda: airflow.schedulers[0].pid))
        for name in ways:
            airflow.wait_for_dag(name)
            airflow.unpause(name)
        yield Bench(airflow, postgres, relays, jvms), ways


def _row(way: Way, costs: Costs, each_second: Costs) -> str:
    told = [costs.after(each_second, seconds - SECONDS) for seconds in _LENGTHS.values()]
    cells = [
        " / ".join(f"{of.slot:,.0f}" for of in told),
        " / ".join(f"{of.jvm:,.0f}" for of in told),
        " / ".join(f"{of.bytes / 1024:,.0f}" for of in told),
        " / ".join(f"{of.rows:,.0f}" for of in told),
    ]
    return f"| {_TITLES[way.cluster]}: {way.title} | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench costs", description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression for the names of ways: nothing is published")
    only = parser.parse_args().only
    lines = [
        "| a job of 1 minute / 1 hour / 10 hours | slot, s | JVMs, s | KiB to and from the cluster | rows written |",
        "|---|---:|---:|---:|---:|",
    ]
    with _bench(only) as (bench, ways):
        for name, way in ways.items():
            costs, each_second = bench.measure(name)
            print(name, costs, each_second, flush=True)
            lines.append(_row(way, costs, each_second))
    conclude("costs", lines, whole=not only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
