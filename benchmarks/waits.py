"""
What thousands of waits cost in Airflow's triggerer, ours beside a poll per trigger: ``scripts/bench waits``.

Each run has a cluster in a process of its own (:mod:`benchmarks.served`), and a triggerer in another
(:mod:`benchmarks.triggerer`), in which all triggers start at once, as after a restart. When all of them know their
jobs, it is measured for a while what it costs to go on while jobs end. The floor is the same without anything: triggers
that only wait.

``--clusters``, ``--jobs`` and ``--window`` choose less. It prints what it found, and writes nothing into the docs yet.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import milliseconds
from dev.processes import Server, free_port, wait_until
from durable_spark.hooks.job import load_hook_class

HOOK = "durable_spark.hooks.spark.SparkHook"
TITLES = {"standalone": "standalone", "yarn": "YARN", "kubernetes": "Kubernetes"}
INTERVAL = 5.0
"""Seconds between two polls, of all."""
WINDOW = 40.0
RATE = 10.0
"""Jobs that end each second."""
JOBS = (1000, 5000, 10_000)
OTHERS = {"standalone": 2000, "yarn": 200_000, "kubernetes": 200_000}
BESIDE = 1000
"""Jobs on a cluster that hangs."""
PATIENCE = 120.0
PEERS = ("own session", "shared session")
PEERS_ON = "kubernetes"
"""Where a poll per trigger is measured: the deferrable operators of today are those of pods."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured in one run."""

    kind: str
    cluster: str
    jobs: int
    others: int
    beside: bool
    raw: dict[str, Any]

    @property
    def requests(self) -> float:
        """Requests an interval, without those of each job that ended."""
        return float(sum(self.raw["requests"].values()) / self.raw["intervals"])

    @property
    def start_requests(self) -> int:
        return int(sum(self.raw["start_requests"].values()))

    def latency(self, part: float) -> float:
        """Return how soon an end was told; that part of all were."""
        told = self.raw["latencies"]
        return float(told[min(len(told) - 1, int(part * len(told)))]) if told else float("nan")


@contextmanager
def served(cluster: str, jobs: int, others: int = 0) -> Iterator[str]:
    """Start a cluster; give its address."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.served", cluster, "--port", port]
    with tempfile.TemporaryDirectory(prefix="durable-spark-bench-") as folder:
        log = Path(folder) / "log"
        server = Server("cluster", [*map(str, command), "--jobs", str(jobs), "--others", str(others)], log=log)
        server.start()
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: _answers(url), 120, "the cluster", servers=[server], interval=0.2)
            yield url
        finally:
            server.kill()


def _answers(url: str) -> bool:
    try:
        ask(f"{url}/-/connection")
    except OSError:
        return False
    return True


def ask(url: str, *, method: str = "GET") -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=120) as told:
        return json.load(told)


def connect(conn_id: str, url: str) -> list[str]:
    """Let this process and those that it starts have the connection to a cluster; return what our hook calls it."""
    connection = ask(f"{url}/-/connection")
    text = json.dumps({**connection, "extra": json.dumps(connection["extra"])})
    os.environ[f"AIRFLOW_CONN_{conn_id.upper()}"] = text

    async def names() -> list[str]:
        async with load_hook_class(HOOK)(conn_id) as it:
            return list(await it.cluster())

    return asyncio.run(names())


def measure(
    kind: str, cluster: str, jobs: int, *, others: int = 0, beside: bool = False, window: float = WINDOW
) -> Result:
    """
    Run triggers of a kind for the jobs of a cluster.

    :param kind: ``ours``, ``nothing``, or one of :data:`PEERS`.
    :param others: jobs on the cluster that are not ours.
    :param beside: whether there is another cluster, which hangs.
    """
    with ExitStack() as stack:
        url = stack.enter_context(served(cluster, jobs, others))
        names = {"bench": connect("bench", url)}
        hanging: list[Any] = []
        if beside:
            other = stack.enter_context(served(cluster, BESIDE))
            names["bench_hanging"] = connect("bench_hanging", other)
            hanging = ask(f"{other}/-/jobs")
            ask(f"{other}/-/hang", method="POST")
        wanted = {
            "kind": kind,
            "control": url,
            "hook": HOOK,
            "clusters": names,
            "cluster": names["bench"],
            "jobs": [[*job, "bench"] for job in ask(f"{url}/-/jobs")],
            "beside": [[*job, "bench_hanging"] for job in hanging],
            "interval": INTERVAL,
            "window": window,
            "rate": RATE,
            "patience": PATIENCE,
        }
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.triggerer"],
            input=json.dumps(wanted),
            capture_output=True,
            text=True,
            timeout=600 + window,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the triggerer ended with {done.returncode}:\n{done.stderr[-4000:]}")
        result = Result(kind, cluster, jobs, others, beside, json.loads(done.stdout.strip().splitlines()[-1]))
    raw = {name: value for name, value in result.raw.items() if name != "latencies"}
    print(kind, cluster, jobs, others, beside, json.dumps(raw), f"p50 {result.latency(0.5):.3f}", flush=True)
    return result


def percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def rows(results: Sequence[Result], floors: dict[int, Result]) -> list[str]:
    """Return the table, everything above the floor."""
    heads = (
        "jobs",
        "requests per interval",
        "CPU of a core",
        "loop lag p99",
        "longest",
        "memory per job",
        "end told p50",
        "p99",
        "all known after",
        "requests for that",
    )
    table = [f"| triggers | {' | '.join(heads)} |", "|---" + "|---:" * len(heads) + "|"]
    for one in results:
        floor, raw = floors[one.jobs], one.raw
        known = f"{raw['known_after'] - floor.raw['known_after']:.1f} s" if raw["all_known"] else "never"
        latencies = [f"{one.latency(part):.2f} s" for part in (0.5, 0.99)]
        cells = [
            name_of(one),
            f"{one.jobs:,}",
            f"{one.requests:,.1f}",
            percent(raw["cpu"] - floor.raw["cpu"]),
            milliseconds(raw["lag_p99"] - floor.raw["lag_p99"]),
            milliseconds(raw["lag_max"] - floor.raw["lag_max"]),
            f"{(raw['memory'] - floor.raw['memory']) / one.jobs / 1024:.1f} KiB",
            *latencies,
            known,
            f"{one.start_requests:,}",
        ]
        table.append("| " + " | ".join(cells) + " |")
    return table


def floor_rows(floors: dict[int, Result]) -> list[str]:
    """Return the table of the floor itself."""
    table = ["| jobs | CPU of a core | loop lag p99 | longest | memory per job | all begun after |", "|---:" * 6 + "|"]
    for jobs, one in floors.items():
        raw = one.raw
        cells = [
            f"{jobs:,}",
            percent(raw["cpu"]),
            milliseconds(raw["lag_p99"]),
            milliseconds(raw["lag_max"]),
            f"{raw['memory'] / jobs / 1024:.1f} KiB",
            f"{raw['known_after']:.1f} s",
        ]
        table.append("| " + " | ".join(cells) + " |")
    return table


def name_of(one: Result) -> str:
    if one.kind != "ours":
        return f"a poll each, {one.kind}"
    more = f", beside {one.others:,} of others" if one.others else ", beside a cluster that hangs" if one.beside else ""
    return f"**ours**, {TITLES[one.cluster]}{more}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clusters", nargs="*", choices=TITLES, default=list(TITLES))
    parser.add_argument("--jobs", nargs="*", type=int, default=list(JOBS))
    parser.add_argument("--window", type=float, default=WINDOW, help="seconds")
    parser.add_argument("--only", choices=["ours", "floor"], help="nothing else")
    options = parser.parse_args()

    def run(kind: str, cluster: str, jobs: int, **more: Any) -> Result:
        return measure(kind, cluster, jobs, window=options.window, **more)

    floors = {jobs: run("nothing", PEERS_ON, jobs) for jobs in options.jobs}
    results = []
    if options.only != "floor":
        results += [run("ours", cluster, jobs) for cluster in options.clusters for jobs in options.jobs]
    if options.only is None:
        most = max(options.jobs)
        results += [run("ours", cluster, most, others=OTHERS[cluster]) for cluster in options.clusters]
        results += [run("ours", cluster, most, beside=True) for cluster in options.clusters]
        results += [run(peer, PEERS_ON, jobs) for peer in PEERS for jobs in options.jobs]
    print("\n".join([*rows(results, floors), "", *floor_rows(floors)]))


if __name__ == "__main__":
    main()
