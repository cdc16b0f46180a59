"""
The whole crash test: every boundary of every backend, pairs of deaths drawn from a seed, upstream's operator beside it.

``scripts/crash-test``. The clusters are started once; each series of lives runs in a process of its own, with an
Airflow of its own, a few at a time. What flows out: a line for each life in a file, and the table of
``docs/reliability.md``, which is made of that file and of nothing else.

The trap: Airflow reads its configuration when it is imported, so it is imported in those processes alone.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import ALL_CLUSTERS, publish
from dev.kubernetes import KubernetesCluster
from dev.processes import descendants, send_signal
from dev.spark import SMALL_JVM, StandaloneCluster, archived_classes, ensure_spark
from dev.yarn import YarnCluster
from tests.clusters import Clusters
from tests.crash.boundaries import (
    BACKENDS,
    Case,
    Harness,
    MortalServer,
    backend,
    in_process,
    pairs,
    singles_side_by_side,
    usual,
)
from tests.crash.interposer import Interposer, Way
from tests.crash.whole import WholeAirflow

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
_SLICE = 0.05
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TITLES = {
    "kubernetes": "Kubernetes, natively",
    "standalone": "standalone, natively",
    "submit_kubernetes": "Kubernetes by spark-submit",
    "submit_standalone": "standalone by spark-submit",
    "submit_yarn": "YARN by spark-submit",
    "upstream_kubernetes": "Kubernetes, upstream's operator",
    "upstream_standalone": "standalone, upstream's operator",
}
_ALL_WAYS = ", in three ways"
_SERIES = {
    "singles": f"the task's process, at each boundary{_ALL_WAYS}",
    "whole": "the same, a worker or a triggerer, on a whole Airflow",
    "cluster": f"the cluster's server, at each request to it{_ALL_WAYS}",
    "forgetful": "the same, and it has no memory",
    "slices": f"the task's process, each {_SLICE * 1000:.0f} ms of spark-submit's life",
    "pairs": "the task's process twice, drawn",
}
_SERVER_DIES = ("cluster", "forgetful")
_NATIVE = {"cluster": ("kubernetes", "standalone"), "forgetful": ("standalone",)}
_OUTLIVES = 8.0
_AT_ONCE = 6
"""Lives on a whole Airflow."""
_fork = multiprocessing.get_context("fork")


@dataclasses.dataclass(frozen=True)
class Series:
    """Lives on one backend."""

    backend: str
    kind: str

    @property
    def one_way(self) -> bool:
        """Whether one way to die is drawn for each boundary: of lives that are long, or only show what is seen."""
        return self.backend.startswith("upstream") or (self.kind == "whole" and self.backend.startswith("submit"))

    def lives(self, file: Path) -> list[Case]:
        """Return those that were written down: an earlier run may have been broken off."""
        return [case for case in read(file) if (case.backend, case.kind) == (self.backend, self.kind)]

    def is_over(self, file: Path) -> bool:
        """Whether all of them have been lived."""
        lives = self.lives(file)
        if self.kind == "slices":
            return bool(lives) and not lives[-1].reached
        return self.kind != "pairs" and _complete(self.backend, self.kind, lives)

    def cases(self, clusters: Clusters, home: Path, seed: str, until: float, file: Path) -> Iterator[Case]:
        """Run them."""
        places = 1 if self.kind != "whole" else _AT_ONCE
        with contextlib.ExitStack() as stack:
            server = None
            if self.kind in _SERVER_DIES:
                server, clusters = self._own_cluster(clusters, stack)
            backends = []
            for number in range(places):
                interposer = Interposer()
                place = stack.enter_context(backend(self.backend, clusters, interposer, number=number))
                if server is not None:  # its job outlives it
                    place = dataclasses.replace(place, seconds=_OUTLIVES)
                backends.append((place, interposer))
            if self.kind == "whole":
                environment = {name: value for name, value in os.environ.items() if name.startswith("AIRFLOW__")}
                whole = stack.enter_context(WholeAirflow(backends, home, environment))
                harnesses = [Harness(place, interposer, whole) for place, interposer in backends]
                yield from singles_side_by_side(harnesses, seed if self.one_way else None)
            else:
                harness = stack.enter_context(in_process(*backends[0], server))
                harnesses = [harness]
                if self.kind == "slices":
                    yield from harness.slices(_SLICE, 1 + len(self.lives(file)))
                elif self.kind != "pairs":
                    tried = collections.Counter(map(_boundary, self.lives(file)))
                    over = (number for number in tried if tried[number] >= (1 if self.one_way else len(Way)))
                    yield from harness.singles(1 + max(over, default=0), seed if self.one_way else None)
                else:
                    yield from self._pairs(harness, seed, until, file)
            for harness in harnesses:
                if late := harness.late():
                    raise AssertionError(f"after all was over there came {late}")

    def _own_cluster(self, clusters: Clusters, stack: contextlib.ExitStack) -> tuple[MortalServer, Clusters]:
        """Start a cluster of which nobody else has need."""
        if self.backend == "kubernetes":
            pods = stack.enter_context(KubernetesCluster())
            server = MortalServer(pods.api_server.kill, pods.start_api_server)
            return server, dataclasses.replace(clusters, kubernetes=pods)
        spark = clusters.standalone.spark
        drivers = stack.enter_context(StandaloneCluster(spark=spark, recovery=self.kind != "forgetful"))
        server = MortalServer(drivers.master.server.kill, drivers.start_master)
        return server, dataclasses.replace(clusters, standalone=drivers)

    def _pairs(self, harness: Harness, seed: str, until: float, file: Path) -> Iterator[Case]:
        """Run pairs until the time is up. How far a life goes is known from those in which one death came."""
        singles = [case for case in read(file) if (case.backend, case.kind) == (self.backend, "singles")]
        lengths = [case.crossed for case in singles if case.reached] or [[40, 40]]
        crossed = [max(length[0] for length in lengths), max(length[-1] for length in lengths)]
        for number, plan in enumerate(pairs(f"{seed} {self.backend}", crossed)):
            if time.time() >= until:
                return
            yield harness.live(plan, code=1 if self.backend == "kubernetes" and number % 4 == 3 else 0)


def read(file: Path) -> list[Case]:
    """Return the lives that were written down."""
    return [Case(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def _run(series: Series, clusters: Clusters, file: Path, log: Path, seed: str, until: float) -> None:
    """Run a series in this process, which has just been forked and has not imported Airflow."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # nobody else ends it
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    with tempfile.TemporaryDirectory(prefix="durable-spark-airflow-") as home:
        os.environ["AIRFLOW_HOME"] = home
        os.environ.update(usual(series.backend, whole=series.kind == "whole"))
        for case in series.cases(clusters, Path(home), seed, until, file):
            case.kind = series.kind
            with file.open("a") as lines:  # a line is written at once
                lines.write(json.dumps(dataclasses.asdict(case)) + "\n")
            print(f"=== {case}", flush=True)


def _start(series: Series, *arguments: Any) -> BaseProcess:
    process = _fork.Process(target=_run, args=(series, *arguments), name=f"{series.backend} {series.kind}")
    process.start()
    return process


def _run_all(every: Iterable[Series], at_once: int, file: Path, start: Callable[[Series], BaseProcess]) -> bool:
    """Run series, a few at a time; tell of each life. Return whether all of them came to their end."""
    waiting, well, told = collections.deque(every), True, len(read(file))
    running: list[BaseProcess] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                if not waiting[0].is_over(file):
                    running.append(start(waiting[0]))
                waiting.popleft()
            if running:
                running[0].join(1)
            for process in [process for process in running if not process.is_alive()]:
                running.remove(process)
                well = well and process.exitcode == 0
                print(f"{process.name} ended with {process.exitcode}", flush=True)
            cases = read(file)
            for case in cases[told:]:
                print(f"{case.seconds:6.1f} s  {case}", flush=True)
            told = len(cases)
    finally:  # broken off: nobody else would end the processes of their tasks
        for pid in [process.pid for process in running if process.pid is not None]:
            send_signal(descendants(pid), signal.SIGKILL)
    return well


def table(cases: Sequence[Case]) -> list[str]:
    """Return the table of the page."""
    numbers = ("boundaries", "lives", "deaths", "with a job", "duplicates", "losses", "false ends", "limits", "≤")
    rows = [f"| submitted to | killed | {' | '.join(numbers)} |", f"|---|---|{'---:|' * len(numbers)}"]
    for name in BACKENDS:
        for kind, title in _SERIES.items():
            of = [case for case in cases if (case.backend, case.kind) == (name, kind) and case.killed]
            each = kind not in ("slices", "pairs")
            if not of or (each and not _complete(name, kind, cases)):
                continue
            boundaries = max(map(_boundary, of)) if each else ""
            broken = [sum(bool(getattr(case, what)) for case in of) for what in ("duplicates", "losses", "false_ends")]
            deaths = sum(len(case.killed) for case in of)
            present = sum(bool(case.left and case.left[0]) for case in of)
            bound = f"{300 / len(of):.1f} %" if not each and not any(broken) else ""
            limits = sum(bool(case.limits) for case in of)
            if each and max(collections.Counter(map(_boundary, of)).values()) == 1:
                title = f"{title.removesuffix(_ALL_WAYS)}, in one way"
            row = [boundaries, len(of), deaths, present, *broken, limits, bound]
            rows.append(f"| {_TITLES[name]} | {title} | {' | '.join(map(str, row))} |")
    return rows


def _complete(name: str, kind: str, cases: Sequence[Case]) -> bool:
    """Whether a backend's boundaries were gone through until there was none left."""
    ways, reached = collections.defaultdict(set), set()
    for case in cases:
        if (case.backend, case.kind) == (name, kind):
            ways[_boundary(case)].add(case.plan[0].partition("/")[2])
            if case.reached:
                reached.add(_boundary(case))
    tried = max(map(len, ways.values()), default=0)
    return any(len(ways[number]) == tried for number in ways.keys() - reached)


def _boundary(case: Case) -> int:
    return int(case.plan[0].split("/")[0])


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="scripts/crash-test", description=__doc__)
    parser.add_argument("backends", nargs="*", metavar="backend", help=f"{', '.join(BACKENDS)}: all by default")
    parser.add_argument("--series", nargs="*", default=list(_SERIES), choices=list(_SERIES))
    parser.add_argument("--minutes", type=float, default=60.0, help="for pairs of deaths, all backends together")
    parser.add_argument("--seed", default=datetime.date.today().isoformat(), help="of the pairs")
    parser.add_argument("--at-once", type=int, default=2, help="series that run at the same time")
    parser.add_argument("--results", type=Path, help="a file to add to: a run that was broken off is gone on with")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options.backends = options.backends or BACKENDS
    if unknown := set(options.backends) - set(BACKENDS):
        parser.error(f"there is no {', '.join(unknown)}")
    for name in [name for name in os.environ if name.startswith("AIRFLOW_")]:
        del os.environ[name]
    directory = Path(tempfile.mkdtemp(prefix="durable-spark-crash-"))
    file = options.results or directory / "lives.jsonl"
    well = True
    try:
        if not options.report_only:
            well = _live(options, directory, file)
        cases = read(file)
    finally:
        if options.results or not file.exists():
            shutil.rmtree(directory, ignore_errors=True)
    hours = sum(case.seconds for case in cases) / 3600
    lines = [f"Seed `{options.seed}`. {len(cases)} lives, which took {hours:.1f} hours together.", "", *table(cases)]
    print("\n".join(lines))
    for case in cases:
        if case.broken and not case.backend.startswith("upstream"):
            print(f"\nBROKEN: {case}\n{case.log[-6000:]}")
    if options.write:
        publish("crash", lines, versions=ALL_CLUSTERS, page=_PAGE)
    ours = [case for case in cases if not case.backend.startswith("upstream")]
    sys.exit(not well or any(case.broken for case in ours))


def _live(options: argparse.Namespace, directory: Path, file: Path) -> bool:
    spark = ensure_spark()
    classes = archived_classes(spark)
    standalone = StandaloneCluster(
        spark=dataclasses.replace(spark, java_options=classes),
        recovery=True,
        master_conf={"spark.deploy.retainedDrivers": "100000"},  # the witness is not to forget
        worker_conf={"spark.worker.ui.retainedDrivers": "100000"},
    )
    with contextlib.ExitStack() as stack:
        submits = any("_" in name for name in options.backends)
        wanted = {name.rpartition("_")[2] for name in options.backends}
        clusters = Clusters(standalone, KubernetesCluster(), YarnCluster(), directory)
        for name in ("kubernetes", "standalone", "yarn"):
            if name in wanted or (submits and name == "kubernetes"):  # which has to do with the environment
                stack.enter_context(getattr(clusters, name))
        os.environ.update(clusters.environment() if submits else {})
        os.environ["SPARK_SUBMIT_OPTS"] = f"{SMALL_JVM} {classes}"
        log = directory / "log"
        first = [Series(name, "singles") for name in options.backends if "singles" in options.series]
        first += [
            Series(name, kind)
            for kind, natives in _NATIVE.items()
            for name in options.backends
            if kind in options.series and name in natives
        ]
        first += [
            Series(name, "whole")
            for name in options.backends
            if "whole" in options.series and not name.startswith("upstream")
        ]
        first += [
            Series(name, "slices")
            for name in options.backends
            if "slices" in options.series and name.startswith("submit")
        ]
        well = _run_all(
            first, options.at_once, file, lambda series: _start(series, clusters, file, log, options.seed, 0.0)
        )
        if "pairs" not in options.series:
            return well
        drawn = [Series(name, "pairs") for name in options.backends if not name.startswith("upstream")]
        each = options.minutes * 60 * options.at_once / max(1, len(drawn))
        return well and _run_all(
            drawn,
            options.at_once,
            file,
            lambda series: _start(series, clusters, file, log, options.seed, time.time() + each),
        )


if __name__ == "__main__":
    main()
