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
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
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
    WINDOW,
    Case,
    Harness,
    MortalServer,
    backend,
    in_process,
    pairs,
    singles,
    usual,
)
from tests.crash.interposer import Interposer
from tests.crash.whole import WholeAirflow

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
_TAKES_PART = ("durable_spark", "dev", "tests/crash/*.py", "tests/clusters.py")
"""Where a change makes lives that were lived before it those of other code."""
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
    "upstream_yarn": "YARN, upstream's operator",
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
_OUTLIVES = 8.0
_PAUSE = 300.0
"""Seconds without a life, at least, where a run was broken off."""
_AT_ONCE = 6
"""Lives on a whole Airflow."""
_FAILING, _FAILING_OF_PAIRS = 1 / 8, 1 / 4
"""The share of lives whose jobs fail, each time that they are submitted."""
_ENOUGH = {"cluster": 12, "forgetful": 12, "slices": 10, "pairs": 3}
"""Deaths of a series, at least; 20 where nothing is said."""
_fork = multiprocessing.get_context("fork")


@dataclasses.dataclass
class Lives:
    """What was written down: a line for each life, and one for each series that came to its end."""

    file: Path
    cases: list[Case] = dataclasses.field(default_factory=list)
    over: list[list[str]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            if "over" in (value := json.loads(line)):
                self.over.append(value["over"])
            else:
                self.cases.append(Case(**value))

    def of(self, backend: str, kind: str) -> list[Case]:
        """Return those of a series."""
        return [case for case in self.cases if (case.backend, case.kind) == (backend, kind)]

    @property
    def origins(self) -> set[str]:
        """Which code they are lives of, and which seed: one, if they are to be told in one table."""
        return {case.of for case in self.cases}


@dataclasses.dataclass(frozen=True)
class Series:
    """Lives on one backend."""

    backend: str
    kind: str

    @property
    def one_way(self) -> bool:
        """Whether one way to die is drawn for each boundary, because the lives are long."""
        return self.kind == "whole" and self.backend.startswith("submit")

    def cases(self, clusters: Clusters, home: Path, seed: str, until: float, lived: Lives) -> Iterator[Case]:
        """Run them, but for those that an earlier run, which was broken off, has written down."""
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
                    if self.backend == "standalone":
                        place = dataclasses.replace(place, launched=clusters.standalone.launched)
                backends.append((place, interposer))
            if self.kind == "whole":
                environment = {name: value for name, value in os.environ.items() if name.startswith("AIRFLOW__")}
                whole = stack.enter_context(WholeAirflow(backends, home, environment))
                harnesses = [Harness(place, interposer, whole) for place, interposer in backends]
            else:
                harnesses = [stack.enter_context(in_process(*backends[0], server))]
            for harness in harnesses:
                harness.seed, harness.failing = seed, _FAILING
            done = lived.of(self.backend, self.kind)
            if self.kind == "slices":
                yield from harnesses[0].slices(_SLICE, [case.reached for case in done])
            elif self.kind == "pairs":
                yield from self._pairs(harnesses[0], seed, until, lived)
            else:
                drawn = seed if self.one_way else None
                yield from singles(harnesses, seed=drawn, done={case.plan[0]: case.reached for case in done})
            for harness in harnesses:
                if late := harness.late():
                    yield Case(self.backend, [], duplicates=[f"after all was over there came {late}"])

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

    def _pairs(self, harness: Harness, seed: str, until: float, lived: Lives) -> Iterator[Case]:
        """Run pairs until the time is up. How far a life goes is known from those in which one death came."""
        harness.failing = _FAILING_OF_PAIRS
        reached = [case for case in lived.of(self.backend, "singles") if case.reached]
        plans = pairs(f"{seed} {self.backend}", reached)
        for plan in itertools.islice(plans, len(lived.of(self.backend, self.kind)), None):
            if time.time() >= until:
                return
            yield harness.live(plan)

    def lacks(self, lives: Sequence[Case]) -> str:
        """Return what its lives must have shown, and have not; nothing if all is there."""
        died = [case for case in lives if case.killed]
        with_a_job = [case for case in died if case.left and case.left[0]]
        if len(died) < _ENOUGH.get(self.kind, 20):
            return f"only {len(died)} deaths"
        if self.kind not in ("slices", "pairs") and len(with_a_job) in (0, len(died)):
            return "no death before the submission, or none after it"
        if self.kind in _SERVER_DIES and not any("GET" in case.killed[0] for case in with_a_job):
            return "no death of the server while a job is followed"
        if self.kind == "pairs" and not any(len(case.killed) == 2 for case in died):
            return "no two deaths"
        if self.backend.startswith("upstream") and not any(
            case.duplicates and WINDOW in case.killed[0] for case in died
        ):
            return "no duplicate in the window that upstream documents: what shows none, proves nothing"
        return ""


def _run(series: Series, clusters: Clusters, file: Path, log: Path, seed: str, until: float) -> None:
    """Run a series in this process, which has just been forked and has not imported Airflow."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # nobody else ends it
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)

    def write(value: Any) -> None:
        with file.open("a") as lines:  # a line is written at once
            lines.write(json.dumps(value) + "\n")

    with tempfile.TemporaryDirectory(prefix="durable-spark-airflow-") as home:
        os.environ["AIRFLOW_HOME"] = home
        os.environ.update(usual(series.backend, whole=series.kind == "whole"))
        origin = _origin(seed)
        for case in series.cases(clusters, Path(home), seed, until, Lives(file)):
            case.kind, case.of = series.kind, origin
            write(dataclasses.asdict(case))
            print(f"=== {case}", flush=True)
    write({"over": [series.backend, series.kind]})


def _origin(seed: str) -> str:
    """Return the last commit that has changed what takes part in a life, and the seed."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", *_TAKES_PART]
        return subprocess.run(command, cwd=_PAGE.parents[1], capture_output=True, text=True, check=True).stdout.strip()

    changed = "-dirty" if git("status", "--porcelain") else ""
    return f"{git('log', '-1', '--format=%h', '--abbrev=10')}{changed} {seed}"


def _start(series: Series, *arguments: Any) -> BaseProcess:
    process = _fork.Process(target=_run, args=(series, *arguments), name=f"{series.backend} {series.kind}")
    process.start()
    return process


def _run_all(every: Iterable[Series], at_once: int, file: Path, start: Callable[[Series], BaseProcess]) -> bool:
    """Run series, a few at a time; tell of each life. Return whether all of them came to their end."""
    waiting, well, told = collections.deque(every), True, len(Lives(file).cases)
    running: list[BaseProcess] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                if [waiting[0].backend, waiting[0].kind] not in Lives(file).over:
                    running.append(start(waiting[0]))
                waiting.popleft()
            if running:
                running[0].join(1)
            for process in [process for process in running if not process.is_alive()]:
                running.remove(process)
                well = well and process.exitcode == 0
                print(f"{process.name} ended with {process.exitcode}", flush=True)
            cases = Lives(file).cases
            for case in cases[told:]:
                print(f"{case.seconds:6.1f} s  {case}", flush=True)
            told = len(cases)
    finally:  # broken off: nobody else would end the processes of their tasks
        for pid in [process.pid for process in running if process.pid is not None]:
            send_signal(descendants(pid), signal.SIGKILL)
    return well


def table(lives: Lives) -> list[str]:
    """Return the table of the page."""
    numbers = ("boundaries", "lives", "deaths", "with a job", "failing", "not reached")
    faults = ("duplicates", "losses", "false ends", "limits", "≤")
    rows = [f"| submitted to | killed | {' | '.join(numbers + faults)} |", f"|---|---|{'---:|' * 11}"]
    drawn: list[Case] = []
    for name in BACKENDS:
        for kind, title in _SERIES.items():
            if not (of := lives.of(name, kind)):
                continue
            series = Series(name, kind)
            if series.one_way:
                title = f"{title.removesuffix(_ALL_WAYS)}, in one way, which is drawn"
            if [name, kind] not in lives.over:
                title = f"{title} (not to its end)"
            reached = [case for case in of if case.reached and case.plan]
            boundaries = max(map(_boundary, reached), default=0) if kind not in ("slices", "pairs") else ""
            at_random = kind == "pairs" or series.one_way
            if kind == "pairs":
                drawn += of
            row = [boundaries, *_counts(of), _bound(of) if at_random else ""]
            rows.append(f"| {_TITLES[name]} | {title} | {' | '.join(map(str, row))} |")
    if drawn:
        row = ["", *_counts(drawn), _bound(drawn)]
        rows.append(f"| all of ours | {_SERIES['pairs']} | {' | '.join(map(str, row))} |")
    return rows


def _counts(cases: Sequence[Case]) -> list[int]:
    faults = ("duplicates", "losses", "false_ends", "limits")
    return [
        len(cases),
        sum(len(case.killed) for case in cases),
        sum(bool(case.left and case.left[0]) for case in cases),
        sum(bool(case.code) for case in cases),
        sum(not case.reached for case in cases),
        *(sum(bool(getattr(case, fault)) for case in cases) for fault in faults),
    ]


def _bound(cases: Sequence[Case]) -> str:
    """Return what the share of broken lives is at most, with 95 % confidence, if none was: the rule of three."""
    reached = sum(case.reached for case in cases)
    return "" if not reached or any(case.broken for case in cases) else f"{300 / reached:.1f} %"


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
    if (origins := Lives(file).origins) - {_origin(options.seed)}:
        parser.error(f"{file} has lives of {', '.join(sorted(origins))}, not of {_origin(options.seed)}")
    well = True
    try:
        if not options.report_only:
            well = _live(options, directory, file)
        lives = Lives(file)
    finally:
        if options.results or not file.exists():
            shutil.rmtree(directory, ignore_errors=True)
    lines = _report(lives, options.seed)
    print("\n".join(lines))
    complaints = [] if well else ["a series has not come to its end"]
    for series in _all_series(options.backends, options.series):
        if [series.backend, series.kind] not in lives.over:
            complaints.append(f"{series.backend} {series.kind} has not come to its end")
        elif lacks := series.lacks(lives.of(series.backend, series.kind)):
            complaints.append(f"{series.backend} {series.kind} proves nothing: {lacks}")
    for case in lives.cases:
        if case.broken and not case.backend.startswith("upstream"):
            complaints.append(f"BROKEN: {case}\n{case.log[-6000:]}")
    print("\n\n".join(complaints))
    if options.write and not complaints:
        if set(_all_series(options.backends, options.series)) != set(_all_series(BACKENDS, list(_SERIES))):
            parser.error("less was run than the page shows")
        publish("crash", lines, versions=ALL_CLUSTERS, page=_PAGE)
    sys.exit(bool(complaints))


def _report(lives: Lives, seed: str) -> list[str]:
    """Return what the page says of them."""
    together = sum(case.seconds for case in lives.cases) / 3600
    clock = sum(end - begin for begin, end in _sittings(lives.cases)) / 3600
    lingered = max((case.lingered for case in lives.cases), default=0.0)
    took = f"{len(lives.cases)} lives, which took {together:.1f} hours together, {clock:.1f} by the clock"
    outlived = f"`spark-submit` has outlived its task by {lingered * 1000:.0f} ms at most"
    return [f"Seed `{seed}`. {took}. {outlived}.", "", *table(lives)]


def _sittings(cases: Iterable[Case]) -> list[tuple[float, float]]:
    """Return from when to when lives were lived: a run that was broken off may have been gone on with days later."""
    sittings: list[tuple[float, float]] = []
    for began, ended in sorted((case.at - case.seconds, case.at) for case in cases):
        if sittings and began <= sittings[-1][1] + _PAUSE:
            since, until = sittings.pop()
            sittings.append((since, max(until, ended)))
        else:
            sittings.append((began, ended))
    return sittings


def _all_series(backends: Sequence[str], kinds: Sequence[str]) -> list[Series]:
    """Return all series of these backends and kinds, in the order in which they are run."""
    ours = [name for name in backends if not name.startswith("upstream")]
    of = {
        "singles": backends,
        "cluster": [name for name in backends if name in ("kubernetes", "standalone")],
        "forgetful": [name for name in backends if name == "standalone"],
        "whole": ours,
        "slices": [name for name in backends if name.startswith("submit")],
        "pairs": ours,
    }
    return [Series(name, kind) for kind, names in of.items() if kind in kinds for name in names]


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
        every = _all_series(options.backends, options.series)
        drawn = [series for series in every if series.kind == "pairs"]
        each = options.minutes * 60 * options.at_once / max(1, len(drawn))
        well = True
        for some in ([series for series in every if series not in drawn], drawn):  # the drawn ones ask the others
            well = well and _run_all(
                some,
                options.at_once,
                file,
                lambda series: _start(series, clusters, file, log, options.seed, time.time() + each),
            )
        return well


if __name__ == "__main__":
    main()
