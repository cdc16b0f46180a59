"""
A real Spark job on a real cluster, driven by a real Airflow, while parts of both are killed: ``scripts/demo``.

Three runs of the package's own example Dag: one undisturbed, one whose worker is killed after it has stored the
job's ID and before Airflow hears of the deferral, one whose triggerer is killed while the task is deferred. What
is shown comes from witnesses: the task's own log, Airflow's audit log, the page of Spark's master. The exit code
is 0 only if every promise held.

The trap: a worker that dies *after* its deferral has been accepted shows nothing. So Airflow's workers reach the
API server through a proxy that holds the deferral back until the worker is dead.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import httpx
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from dev.airflow import IMPATIENT, Airflow, ApiError, parse_time
from dev.processes import ToolMissing, free_port
from dev.proxy import Proxy
from dev.spark import SMALL_JVM, SPARK_VERSION, Driver, StandaloneCluster, ensure_spark

DAG, TASK = "durable_spark_example", "pi"
SLOT_LIMIT = 8.0
"""Seconds that a task may hold a worker slot, in all, for a job of any length."""
NOTICED_AFTER = 10
"""Seconds without a heartbeat after which this Airflow calls a worker dead; 300 by default."""

_HERE = Path(__file__).resolve().parent
_OURS = ("durable_spark", "airflow.task.operators.durable_spark")  # the loggers of this package
_EVENTS = ("running", "deferred", "success")  # of the audit log: those that carry the story
_EARLY, _BEFORE, _AFTER = "::group::Pre Execute", "::endgroup::", "::group::Post Execute"  # Airflow's own marks

console = Console(highlight=False, soft_wrap=True)


class Show:
    """Lines for a person to read, and under them, on a terminal, what is being waited for."""

    def __init__(self) -> None:
        self.broken: list[str] = []

    def title(self, text: str) -> None:
        console.print(f"\n[bold]{escape(text)}[/]")

    def line(self, text: str, *, at: float | None = None, style: str = "") -> None:
        """Print one line, ``at`` so many seconds after the start of what is told."""
        clock = "" if at is None else f"{at:5.1f} s  "
        line = f"  [dim]{clock}[/]" + (f"[{style}]{escape(text)}[/]" if style else escape(text))
        if style == "dim" and console.is_terminal:
            console.print(line, no_wrap=True, overflow="ellipsis", soft_wrap=False)
        else:
            console.print(line)

    def promise(self, kept: bool, text: str) -> None:
        """Print a promise and whether it held; remember it if it did not."""
        if not kept:
            self.broken.append(text)
        console.print(f"  [bold green]ok[/]      {escape(text)}" if kept else f"  [bold red]BROKEN[/]  {escape(text)}")

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show what is waited for; what is yielded changes it. Where nothing can be changed, it is one plain line."""
        if not console.is_terminal:
            if text:
                self.line(f"{text} ...")
            yield lambda _: None
            return
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            shown = progress.add_task(text, total=None)
            yield lambda now: progress.update(shown, description=now)


@dataclasses.dataclass(frozen=True)
class Slot:
    """What a task took of its worker, in seconds."""

    total: float
    ours: float

    def __str__(self) -> str:
        return f"{self.total:.1f} s: Airflow {self.total - self.ours:.1f} s, this package {self.ours:.1f} s"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    name: str
    drivers: Sequence[Driver]
    tries: int
    slot: Slot
    seconds: float


class Demo:
    """The cluster, Airflow, and what is told of them."""

    def __init__(self, cluster: StandaloneCluster, airflow: Airflow, proxy: Proxy, show: Show) -> None:
        self.cluster = cluster
        self.airflow = airflow
        self.proxy = proxy
        self.show = show

    def undisturbed(self) -> Outcome:
        """Nothing dies."""
        run = Run(self, "undisturbed", seconds=5)
        run.follow("success")
        return run.outcome()

    def worker_dies(self) -> Outcome:
        """The worker is killed between storing the job's ID and the deferral."""
        with self.proxy.holding("PATCH", r"/task-instances/[^/]+/state", body=r'"deferred"') as deferral:
            run = Run(self, "worker killed", seconds=15)
            process = self.airflow.task_process(DAG, run.id, TASK)
            deferral.wait(60)
            run.tell()
            stored = self.airflow.store(DAG, run.id, TASK).get("spark_job_id")
            run.say(f"the proxy holds the deferral back; stored: {stored}")
            for pid in (process.supervisor, process.runner):
                os.kill(pid, signal.SIGKILL)
            run.killed_at = time.time()
            run.say(f"kill -9 of the worker: its processes {process.supervisor} and {process.runner}", style="bold red")
            deferral.drop()
        run.say(f"Airflow notices after {NOTICED_AFTER} s without a heartbeat (300 s unless configured)", style="dim")
        run.follow("success")
        outcome = run.outcome()
        self.show.promise([stored] == run.submitted(), f"{stored} was stored before the worker died")
        self.show.promise(outcome.tries == 2, f"try {outcome.tries} took it up from there")
        return outcome

    def triggerer_dies(self) -> Outcome:
        """The triggerer is killed while the task is deferred."""
        run = Run(self, "triggerer killed", seconds=10)
        run.follow("deferred", until=lambda: run.logged("is RUNNING"))
        pid = self.airflow.triggerers[0].pid
        self.airflow.kill_triggerer()
        run.say(f"kill -9 of the triggerer: process {pid} and its child", style="bold red")
        self.airflow.start_triggerer()
        run.say(f"the triggerer is started again: process {self.airflow.triggerers[0].pid}")
        run.follow("success")
        outcome = run.outcome()
        self.show.promise(outcome.tries == 1, "the deferral outlived its triggerer: no retry was needed")
        return outcome


class Run:
    """One run of the example Dag, told line by line as it happens."""

    def __init__(self, demo: Demo, name: str, *, seconds: int) -> None:
        self.name = name
        self.killed_at: float | None = None
        self._airflow, self._cluster, self._show = demo.airflow, demo.cluster, demo.show
        self._before = {driver.id for driver in self._cluster.drivers()}
        self._told: set[tuple[str, str]] = set()
        self._deferred = False
        self._logs: dict[int, list[dict[str, Any]]] = {}
        self._events: list[dict[str, Any]] = []
        self._start = time.time()
        params = {"application": str(_HERE / "apps" / "pi.py"), "seconds": str(seconds)}
        self.id = self._airflow.trigger(DAG, conf=params)
        self.say(f"run {self.id} is triggered; its Spark job will work for {seconds} s")

    def say(self, text: str, *, at: float | None = None, style: str = "") -> None:
        """Tell what happened, now or at a time in seconds since the epoch."""
        self._show.line(text, at=(at or time.time()) - self._start, style=style)

    def follow(self, state: str, *, until: Callable[[], bool] = lambda: True, deadline: float = 150) -> None:
        """Tell what happens until the task is in this state and the condition holds."""
        end = time.monotonic() + deadline
        with self._show.waiting("") as update:
            while True:
                now = self._airflow.task(DAG, self.id, TASK)
                self.tell()
                if now.state == state and until():
                    return
                if now.state == "failed" or time.monotonic() > end:
                    log = self._airflow.log_text(DAG, self.id, TASK, now.try_number)
                    raise TimeoutError(f"the task is {now.state}, not {state}. The log of try {now.try_number}:\n{log}")
                drivers = ", ".join(f"{driver.id} {driver.state}" for driver in self._drivers()) or "no driver yet"
                update(f"task: {now.state or 'waiting'}   cluster: {drivers}")
                time.sleep(0.5)

    def tell(self) -> None:
        """Tell what is new in the task's log and in Airflow's audit log."""
        self._events = self._airflow.events(DAG, self.id, TASK)
        news = [(event["when"], event["event"], self._event(event)) for event in self._events]
        for number in range(1, self._airflow.task(DAG, self.id, TASK).try_number + 1):
            with contextlib.suppress(ApiError):  # a try that has not begun has no log
                self._logs[number] = self._airflow.log(DAG, self.id, TASK, number)
        for line in self._lines():
            if where := _where(line):
                news.append((line["timestamp"], line["event"], f"{where} log: {line['event'].splitlines()[0]}"))
        for when, key, text in sorted(news):
            if (when, key) not in self._told:
                self._told.add((when, key))
                self.say(text, at=_seconds(when), style="" if key in _EVENTS else "dim")

    def logged(self, text: str) -> bool:
        """Whether the task's log has this text."""
        return any(text in line["event"] for line in self._lines())

    def submitted(self) -> list[str]:
        """Return the drivers that the task's log says it submitted, in any try."""
        said = [line["event"] for line in self._lines() if _where(line)]
        return [text.split()[2] for text in said if text.startswith("Submitted as ")]

    def outcome(self) -> Outcome:
        """Look at the witnesses when the task has ended, and print what they say of the promises."""
        self.tell()
        task = self._airflow.task(DAG, self.id, TASK)
        returned = self._airflow.xcoms(DAG, self.id, TASK).get("return_value")
        drivers = self._drivers()
        slot = Slot(self._held(), self._ours())
        promise = self._show.promise
        promise(len(drivers) == 1, f"drivers on the cluster: {len(drivers)} ({', '.join(d.id for d in drivers)})")
        submitted = self.submitted()
        promise(len(submitted) == 1, f"submissions: {len(submitted)} ({', '.join(submitted)})")
        promise([driver.id for driver in drivers] == submitted == [returned], f"the task returned {returned}")
        promise(
            task.state == "success" and all(d.state == "FINISHED" for d in drivers),
            f"the task is {task.state}, the driver {', '.join(d.state for d in drivers)}",
        )
        promise(slot.total < SLOT_LIMIT, f"worker slot held for {slot}")
        seconds = _seconds(self._events[-1]["when"]) - self._start
        return Outcome(self.name, drivers, task.try_number, slot, seconds)

    def _drivers(self) -> list[Driver]:
        """Return the drivers that the master did not know before this run."""
        return [driver for driver in self._cluster.drivers() if driver.id not in self._before]

    def _lines(self) -> list[dict[str, Any]]:
        return [line for log in self._logs.values() for line in log]

    def _event(self, event: dict[str, Any]) -> str:
        name, number = event["event"], event["try_number"]
        runs = [e for e in self._events if e["event"] == "running" and e["try_number"] == number]
        if name == "running":
            return f"try {number} {'runs' if event == runs[0] else 'resumes'} on a worker"
        if name == "deferred":
            held = _seconds(event["when"]) - _seconds(runs[0]["when"])
            return f"worker slot free after {held:.1f} s: the task is deferred"
        if name == "success":
            return "the task is success"
        return f"Airflow's audit log: {name} (try {number})"

    def _held(self) -> float:
        """
        Return the seconds that the task held a worker slot, by Airflow's audit log: each *running* to what came next.

        A worker that was killed held it until then. That Airflow takes its time to notice is not counted:
        nobody works in that time, and how long it is, is a setting of Airflow's.
        """
        total = 0.0
        for number, event in enumerate(self._events):
            if event["event"] == "running":
                following = self._events[number + 1 : number + 2]
                ends = [_seconds(next_event["when"]) for next_event in following]
                if self.killed_at and self.killed_at > _seconds(event["when"]):
                    ends.append(self.killed_at)
                total += min(ends) - _seconds(event["when"])
        return total

    def _ours(self) -> float:
        """
        Return the seconds inside the operator's ``execute()`` and ``execute_complete()``.

        Airflow's task runner marks both ends in the log: it closes the group *Pre Execute* as the last
        thing before the call, and opens *Post Execute* as the first thing after it.
        """
        total = 0.0
        for log in self._logs.values():
            early, begun = False, None
            for line in log:
                if line["event"] == _EARLY:
                    early = True
                elif line["event"] == _BEFORE and early:
                    early, begun = False, _seconds(line["timestamp"])
                elif line["event"] == _AFTER and begun:
                    total, begun = total + _seconds(line["timestamp"]) - begun, None
            if begun and self.killed_at:
                total += self.killed_at - begun
        return total


def _where(line: dict[str, Any]) -> str | None:
    """Return which process of this package wrote a line of the task's log."""
    if not str(line.get("logger")).startswith(_OURS):
        return None
    return "triggerer" if "triggers" in line["logger"] else "worker"


def _seconds(when: str) -> float:
    parsed = parse_time(when)
    assert parsed is not None
    return parsed.timestamp()


def main() -> int:
    """Run the demo; return its exit code."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="What dies, and what survives.")
    parser.add_argument("--keep", action="store_true", help="leave everything running at the end, until Ctrl-C")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    show = Show()
    begun = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            demo = _start(stack, show)
            outcomes = _runs(demo)
            _summary(outcomes, time.monotonic() - begun)
            if arguments.keep:
                _keep(demo)
    except KeyboardInterrupt:
        console.print("\nStopped; nothing is left running.")
        return 130
    except ToolMissing as missing:
        console.print(f"\n[bold red]{escape(str(missing))}[/]")
        return 1
    except (OSError, RuntimeError, subprocess.SubprocessError, httpx.HTTPError) as error:
        console.print(f"\n[bold red]BROKEN[/]  {escape(f'{type(error).__name__}: {error}')}")
        return 1
    for text in show.broken:
        console.print(f"[bold red]BROKEN[/]  {escape(text)}")
    return 1 if show.broken else 0


def _stop(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def _start(stack: contextlib.ExitStack, show: Show) -> Demo:
    show.title("Setting up")
    begun = time.monotonic()
    with show.waiting(f"Spark {SPARK_VERSION} (got once, half a gigabyte)"):
        spark = ensure_spark()
    cluster = StandaloneCluster(spark=dataclasses.replace(spark, java_options=SMALL_JVM))
    stack.callback(cluster.stop)
    port = free_port()
    proxy = stack.enter_context(Proxy(f"http://127.0.0.1:{port}"))
    scheduler = {**IMPATIENT["scheduler"], "task_instance_heartbeat_timeout": NOTICED_AFTER}
    airflow = Airflow(
        _HERE.parent / "durable_spark" / "example_dags",
        connections={"spark_default": json.dumps(cluster.connection())},
        config={**IMPATIENT, "scheduler": scheduler},
        port=port,
        execution_api=proxy.url,
    )
    version = importlib.metadata.version("apache-airflow-core")
    with show.waiting(f"Spark {SPARK_VERSION}: master, worker.  Airflow {version}: the four processes"):
        with ThreadPoolExecutor(1) as pool:
            started = pool.submit(cluster.start)
            stack.callback(cluster.stop)
            stack.enter_context(airflow)
            started.result()
        airflow.wait_for_dag(DAG)
    show.line(f"Spark {SPARK_VERSION}: {cluster.master.ui} (a master and a worker)")
    show.line(f"Airflow {version}: {airflow.url} (API server, scheduler, ...)")
    show.line(f"all on loopback and free ports, SQLite, LocalExecutor; up in {time.monotonic() - begun:.0f} s")
    if (load := os.getloadavg()[0]) > 4 * (cores := os.cpu_count() or 1):
        show.line(f"this machine is busy (load {load:.0f} on {cores} cores): everything takes longer", style="yellow")
    return Demo(cluster, airflow, proxy, show)


def _runs(demo: Demo) -> list[Outcome]:
    scenes = (
        ("1. Nothing dies", demo.undisturbed),
        ("2. The worker is killed: the job's ID is stored, the task not yet deferred", demo.worker_dies),
        ("3. The triggerer is killed while the task is deferred", demo.triggerer_dies),
    )
    outcomes = []
    for title, scene in scenes:
        demo.show.title(title)
        outcomes.append(scene())
    return outcomes


def _summary(outcomes: Sequence[Outcome], seconds: float) -> None:
    table = Table(box=box.SIMPLE)
    for heading in ("run", "drivers", "tries", "took", "slot held", "Airflow", "ours"):
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    for outcome in outcomes:
        slot = outcome.slot
        held = (f"{part:.1f} s" for part in (slot.total, slot.total - slot.ours, slot.ours))
        drivers, took = str(len(outcome.drivers)), f"{outcome.seconds:.0f} s"
        table.add_row(outcome.name, drivers, str(outcome.tries), took, *held)
    console.print()
    console.print(table)
    console.print(f"All of it took {seconds:.0f} s.")


def _keep(demo: Demo) -> None:
    airflow = demo.airflow
    console.print(f"\nAirflow  [bold]{airflow.url}[/]  user {airflow.user}, password {airflow.password}")
    console.print(f"Spark    [bold]{demo.cluster.master.ui}[/]")
    console.print("Both stay up until Ctrl-C.")
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
