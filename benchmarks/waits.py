"""
What thousands of waits cost in Airflow's triggerer, ours beside a poll per trigger: ``scripts/bench waits``.

Each run has a cluster in a process of its own (:mod:`benchmarks.served`), and a triggerer in another
(:mod:`benchmarks.triggerer`), in which all triggers start at once, as after a restart. When all of them know their
jobs, it is measured for a while what it costs to go on while jobs end. The floor is the same without anything: triggers
that only wait.

``--clusters``, ``--jobs``, ``--window`` and ``--only`` choose less, which is printed. The whole of it is written into
``docs/performance.md``, with the curves and a verdict on each target.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import STATIC, milliseconds, publish
from dev.airflow import connection_text
from dev.processes import Server, free_port, wait_until
from durable_spark.hooks.job import load_hook_class

HOOK = "durable_spark.hooks.spark.SparkHook"
TITLES = {"standalone": "standalone", "yarn": "YARN", "kubernetes": "Kubernetes"}
INTERVAL = 5.0
"""Seconds between two polls, of all."""
WINDOW = 30.0
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
    def name(self) -> str:
        if self.kind == "nothing":
            return "triggers that only wait"
        if self.kind != "ours":
            return f"a poll each, {self.kind}"
        more = f", beside {self.others:,} of others" if self.others else ""
        return f"**ours**, {TITLES[self.cluster]}{more}{', beside a cluster that hangs' if self.beside else ''}"

    @property
    def followed(self) -> int:
        """How many jobs are followed, those on the cluster that hangs among them."""
        return self.jobs + (BESIDE if self.beside else 0)

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
    os.environ[f"AIRFLOW_CONN_{conn_id.upper()}"] = connection_text(connection)

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


@dataclasses.dataclass(frozen=True)
class Figure:
    """
    One figure of all runs.

    :param of: returns it.
    :param text: writes it.
    :param target: what ours must not exceed; ``None`` where there is none.
    :param above: whether it is told, and judged, above the floor.
    :param clusters: whether it says how well a cluster's jobs are followed, and not what their triggerer needs for all.
    """

    name: str
    of: Callable[[Result], float]
    text: Callable[[float], str]
    target: float | None = None
    above: bool = True
    clusters: bool = False


def percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def kibibytes(size: float) -> str:
    return f"{size / 1024:.1f} KiB"


def seconds(time: float) -> str:
    return f"{time:.2f} s" if time < 10 else f"{time:.1f} s"


def plain(number: float) -> str:
    return f"{number:,.1f}"


FIGURES = (
    Figure("requests per interval", lambda one: one.requests, plain, above=False, clusters=True),
    Figure("CPU of a core", lambda one: one.raw["cpu"], percent, 0.03),
    Figure("loop lag, 99 %", lambda one: one.raw["lag_p99"], milliseconds, 0.020),
    Figure("loop lag, longest", lambda one: one.raw["lag_max"], milliseconds, 0.100),
    Figure("without Python's collections", lambda one: one.raw["lag_max_own"], milliseconds, 0.100),
    Figure("memory per job", lambda one: one.raw["memory"] / one.followed, kibibytes, 4096),
    Figure("objects per job", lambda one: one.raw["objects"] / one.followed, plain),
    Figure("end told, 50 %", lambda one: one.latency(0.5), seconds, above=False, clusters=True),
    Figure("99 %", lambda one: one.latency(0.99), seconds, above=False, clusters=True),
    Figure("all known after", lambda one: one.raw["known_after"], seconds, 5.0, clusters=True),
    Figure("requests for that", lambda one: one.start_requests, plain, above=False, clusters=True),
)
CURVES = ("requests per interval", "CPU of a core", "memory per job", "all known after")
LATENCIES = {"standalone": (INTERVAL / 2 + 0.5, INTERVAL + 0.5), "kubernetes": (0.05, 0.3)}
"""Seconds from an end to its event, 50 % and 99 %; YARN's are standalone's."""
EACH_END = 1.0
"""Requests for each job that ends, where there is no watch."""


def told(figure: Figure, one: Result, floors: dict[int, Result]) -> float:
    """Return a figure as it is told: above the floor, where it has one."""
    return figure.of(one) - (figure.of(floors[one.jobs]) if figure.above else 0.0)


def rows(results: Sequence[Result], floors: dict[int, Result]) -> list[str]:
    """Return the table, the floor first, of which everything else is told above."""
    table = [
        f"| triggers | jobs | {' | '.join(figure.name for figure in FIGURES)} |",
        "|---" + "|---:" * (len(FIGURES) + 1) + "|",
    ]
    for floor in floors.values():
        cells = [figure.text(figure.of(floor)) if figure.above else "" for figure in FIGURES]
        table.append(f"| {floor.name} | {floor.jobs:,} | {' | '.join(cells)} |")
    for one in results:
        cells = [figure.text(told(figure, one, floors)) for figure in FIGURES]
        if not one.raw["all_known"]:
            cells[-2] = "never"
        table.append(f"| {one.name} | {one.jobs:,} | {' | '.join(cells)} |")
    return table


def verdicts(results: Sequence[Result], floors: dict[int, Result]) -> list[str]:
    """Return which targets hold, and by how much the others are missed."""
    ours = [one for one in results if one.kind == "ours"]
    alone = [one for one in ours if not one.others and not one.beside]
    table = ["| target | met | missed |", "|---|---|---|"]

    def judge(target: str, cases: Sequence[tuple[str, bool, str]]) -> None:
        met = [name for name, holds, _ in cases if holds]
        missed = [f"{name}: {text}" for name, holds, text in cases if not holds]
        everywhere = "everywhere" if not missed else f"{len(met)} of {len(cases)}"
        table.append(f"| {target} | {everywhere} | {'; '.join(missed)} |")

    def at(one: Result) -> str:
        return f"{TITLES[one.cluster]}, {one.jobs:,}"

    def requests(one: Result) -> tuple[str, bool, str]:
        ends = 0.0 if one.cluster == "kubernetes" else EACH_END * one.raw["changes"] / one.raw["intervals"]
        return at(one), one.requests <= 1.25 + ends, plain(one.requests)

    judge("one request an interval, and one for each job that ends; on Kubernetes one watch", [*map(requests, alone)])
    for figure in FIGURES:
        if figure.target is not None:
            limit = figure.target
            cases = [(at(one), (value := told(figure, one, floors)) <= limit, figure.text(value)) for one in alone]
            judge(f"{figure.name}: at most {figure.text(limit)} above the floor", cases)

    def latency(one: Result) -> tuple[str, bool, str]:
        limits = LATENCIES.get(one.cluster, LATENCIES["standalone"])
        values = (one.latency(0.5), one.latency(0.99))
        return at(one), all(map(float.__le__, values, limits)), " and ".join(map(seconds, values))

    judge(
        "an end is told within half an interval + 0.5 s (50 %) and an interval + 0.5 s (99 %); on Kubernetes within "
        "50 ms and 0.3 s",
        [*map(latency, alone)],
    )

    def like_alone(one: Result, allowed: float, figures: Sequence[Figure] = FIGURES) -> tuple[str, bool, str]:
        """Whether no figure is worse than without what is beside, by more than a factor, or the tenth of its target."""
        like = next(each for each in alone if (each.cluster, each.jobs) == (one.cluster, one.jobs))
        worse = []
        for figure in figures:
            before, after = told(figure, like, floors), told(figure, one, floors)
            if after > max(allowed * before, before + (figure.target or 1.0) / 10):
                worse.append(f"{figure.name} {figure.text(after)} for {figure.text(before)}")
        return TITLES[one.cluster], not worse, ", ".join(worse)

    judge("beside the jobs of others no figure doubles", [like_alone(one, 2.0) for one in ours if one.others])
    healthy = [figure for figure in FIGURES if figure.clusters]
    judge(
        "beside a cluster that hangs no figure of the healthy one grows by a quarter",
        [like_alone(one, 1.25, healthy) for one in ours if one.beside],
    )
    return table


def draw(results: Sequence[Result], floors: dict[int, Result], path: Path) -> None:
    """Draw the curves over the number of jobs, both on a log scale."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "waits", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figures = [figure for figure in FIGURES if figure.name in CURVES]
    picture, axes = pyplot.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    alone = [one for one in results if not one.others and not one.beside]
    for figure, axis in zip(figures, axes.flat, strict=True):
        for name in dict.fromkeys(one.name for one in [*floors.values(), *alone]):
            points = sorted((one.jobs, figure.of(one)) for one in [*floors.values(), *alone] if one.name == name)
            style = "-" if "ours" in name else ":" if "only wait" in name else "--"
            axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name.replace("**", ""))
        if figure.name == "requests per interval":
            axis.set_yscale("symlog", linthresh=1)
        else:
            axis.set_yscale("log")
        axis.set_xscale("log")
        axis.set_xticks(sorted(floors), [f"{jobs:,}" for jobs in sorted(floors)], minor=False)
        axis.minorticks_off()
        axis.set_title(f"{figure.name}{UNITS.get(figure.name, '')}")
        axis.set_xlabel("jobs that are followed")
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    picture.savefig(path, metadata={"Date": None, "Creator": None})


UNITS = {"CPU of a core": " (1 = all of it)", "memory per job": " (bytes)", "all known after": " (seconds)"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench waits", description=__doc__)
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
    if options.only is not None:
        print("\n".join(rows(results, floors)))
        return
    most = max(options.jobs)
    results += [run("ours", cluster, most, others=OTHERS[cluster]) for cluster in options.clusters]
    results += [run("ours", cluster, most, beside=True) for cluster in options.clusters]
    results += [run(peer, PEERS_ON, jobs) for peer in PEERS for jobs in options.jobs]
    table, judged = rows(results, floors), verdicts(results, floors)
    if (options.clusters, options.jobs) != (list(TITLES), list(JOBS)):
        print("\n".join([*table, "", *judged]))
        return
    draw(results, floors, STATIC / "waits.svg")
    publish("waits", table)
    publish("waits-targets", judged)


if __name__ == "__main__":
    main()
