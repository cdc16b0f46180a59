"""
The soak: hundreds of deferred jobs on three real clusters, while whatever can die does: ``scripts/soak --minutes 30``.

A real Airflow (PostgreSQL, two schedulers, two triggerers) follows as many jobs at once as ``--jobs`` says; one that
has ended is replaced by the next. Meanwhile schedulers, triggerers, tasks' processes, the database, its connections and
the clusters are killed and stopped, by a timeline that is drawn from a seed, as the jobs are: ``--seed`` draws the same
ones again. When the time is up nothing dies any more, and each task must come to its end. Then every task is held
against the clusters' own records, see :func:`dev.soak_jobs.judge`. The exit code is 0 only if every promise held.

The witnesses are the audit log of the Kubernetes API server, the disk of the standalone worker with the page of its
master, and the ResourceManager; the trap is that a master that was killed has forgotten which drivers had ended, so
its page is read all along.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import httpx
import psycopg2  # type: ignore[import-untyped]

from benchmarks.report import ALL_CLUSTERS, publish
from dev.airflow import IMPATIENT, Airflow, ApiError, connection_text
from dev.kubernetes import KubernetesCluster
from dev.postgres import Postgres
from dev.processes import ToolMissing, descendants, wait_until
from dev.reaper import Reaper
from dev.soak_chaos import ACTS, Chaos, Done, Parts, draw, title
from dev.soak_jobs import KINDS, Ended, Job, Judgement, Planned, Run, judge, plan
from dev.spark import StandaloneCluster
from dev.yarn import YarnCluster
from tests.clusters import Clusters

JVMS = 15
"""At once, at most, beside those of the clusters' own servers."""
_ROOT = Path(__file__).resolve().parent.parent
_PAGE = _ROOT / "docs" / "reliability.md"
_LAST_MINUTE = 60.0
"""Seconds before the end in which no job begins."""
_COMES_TO_ITS_END = 600.0
"""Seconds that the tasks have for that when nothing dies any more, beside those of the longest job."""
_SETTLED = 30.0
"""Seconds that a job has for its death after its task has ended."""
_POD_TOKEN, _DRIVER_TOKEN, _APP_TOKEN = "durable-spark/token", "spark.airflow.submission", "durable-spark.submission"
_PHASES = {"Succeeded": "succeeded", "Failed": "failed"}
_DRIVERS = {"FINISHED": "succeeded", "FAILED": "failed", "ERROR": "failed", "KILLED": "killed"}
_APPS = {"SUCCEEDED": "succeeded", "FAILED": "failed", "KILLED": "killed"}

Key = tuple[str, int]
"""A run's ID and a map index."""


class Clock:
    """Lines for a person to read, each with the seconds since the begin."""

    def __init__(self) -> None:
        self.begun = time.time()

    def say(self, text: str, *, at: float | None = None) -> None:
        print(f"{(at or time.time()) - self.begun:7.1f} s  {text}", flush=True)


@dataclasses.dataclass
class Peaks:
    """The most that there ever was at once."""

    deferred: int = 0
    jvms: int = 0


class Soak:
    """
    One soak, from the first job to the judgement.

    :param directory: where everything has its files.
    """

    def __init__(self, parts: Parts, directory: Path, runs: Iterator[Run], clock: Clock) -> None:
        self.parts = parts
        self.airflow = parts.airflow
        self.directory = directory
        self.runs = runs
        self.clock = clock
        self.planned: dict[Key, Planned] = {}
        self.states: dict[Key, tuple[str, int]] = {}
        """State and tries of each task that has ended."""
        self.peaks = Peaks()
        self.drivers: dict[str, str] = {}
        """What the master's page last said of each driver."""
        self._refused: Run | None = None
        self._counts: dict[str, int] = {}

    # While it runs

    def run(self, chaos: Chaos, *, seconds: float, jobs: int) -> None:
        """Keep so many jobs alive for so long, then see them end."""
        until = self.clock.begun + seconds

        def goes_on() -> bool:
            left = until - time.time()
            if left > _LAST_MINUTE:
                self._refill(jobs, left)
            return left > 0

        self._look_on(chaos, goes_on)
        chaos.stop()
        self.clock.say("nothing dies any more")
        longest = max((job.seconds for job in self.planned.values()), default=0.0)
        until_all_have_ended = time.time() + _COMES_TO_ITS_END + longest
        self._look_on(chaos, lambda: self._alive() > 0 and time.time() < until_all_have_ended)

    def _look_on(self, chaos: Chaos, goes_on: Callable[[], bool]) -> None:
        next_line = 0.0
        while goes_on() and not chaos.failed:
            self._look()
            if time.time() > next_line:
                next_line = time.time() + 30
                self._say_how_it_stands(chaos)
            time.sleep(1)
        if chaos.failed:
            raise RuntimeError(f"an act went wrong: {chaos.failed}")

    def _alive(self) -> int:
        return len(self.planned) - len(self.states)

    def _refill(self, jobs: int, left: float) -> None:
        """Trigger runs until enough jobs are alive, or Airflow does not take them now."""
        while self._alive() < jobs:
            run = self._refused or next(self.runs)
            self._refused = run = run.within(left)
            if not self._trigger(run):
                return
            self._refused = None
            self.planned.update({(job.run_id, job.map_index): job for job in run.jobs})

    def _trigger(self, run: Run) -> bool:
        body = {"dag_run_id": run.id, "logical_date": None, "conf": run.conf()}
        try:
            self.airflow.api("POST", f"/dags/{run.kind.name}/dagRuns", body)
        except ApiError as error:
            if error.status != 409 and error.status < 500:
                raise
            return error.status == 409  # an earlier request, the answer to which was lost
        except httpx.TransportError:
            return False
        return True

    def _look(self) -> None:
        """Take note of what has ended, on either side."""
        with contextlib.suppress(OSError):
            self.drivers.update({driver.id: driver.state for driver in self.parts.standalone.drivers()})
        with contextlib.suppress(psycopg2.OperationalError):
            query = self.parts.postgres.query
            ended = "select run_id, map_index, state, try_number from task_instance where task_id = 'job'"
            for run_id, map_index, state, tries in query(f"{ended} and state in ('success', 'failed')"):
                if (run_id, map_index) in self.planned:
                    self.states[run_id, map_index] = (state, tries)
            counts = query("select state, count(*) from task_instance group by state")
            self._counts = {state or "without a state": number for state, number in counts}
            self.peaks.deferred = max(self.peaks.deferred, self._counts.get("deferred", 0))
        self.peaks.jvms = max(self.peaks.jvms, self._jvms())

    def _jvms(self) -> int:
        """Return how many JVMs jobs have, and their submissions."""
        servers = {server.pid for server in self.parts.servers().values()}
        java = [pid for pid in descendants(os.getpid()) if title(pid).split(b"\0")[0].endswith(b"/java")]
        return len(set(java) - servers)

    def _say_how_it_stands(self, chaos: Chaos) -> None:
        counts = ", ".join(f"{number} {state}" for state, number in sorted(self._counts.items()))
        self.clock.say(f"{self._alive()} alive, {len(self.states)} ended, {len(chaos.done)} acts; tasks: {counts}")

    # The judgement

    def jobs(self) -> list[Job]:
        """Return all jobs that there ever were, by the clusters' own records, the oldest of each task first."""
        return [*self._pods(), *self._drivers(), *self._apps()]

    def _pods(self) -> Iterator[Job]:
        now = {pod["metadata"]["uid"]: pod for pod in self.parts.kubernetes.pods()}
        for created in self.parts.kubernetes.created_pods():
            metadata = created.entry["responseObject"]["metadata"]
            labels = metadata.get("labels", {})
            if "soak" not in labels:
                continue  # an executor
            pod = now.get(metadata["uid"])
            if pod is not None:
                raw = pod["status"].get("phase", "")
                state = _PHASES.get(raw, "running")
            else:
                state, raw = self._deleted(labels["soak"], metadata["name"])
            yield Job(labels["soak"], labels.get(_POD_TOKEN, ""), metadata["name"], state, raw)

    def _deleted(self, key: str, name: str) -> tuple[str, str]:
        """Return how a pod ended that is gone, by the note that it left."""
        notes = (self.directory / "notes" / key).read_text() if (self.directory / "notes" / key).exists() else ""
        if ended := re.search(rf"^ended {re.escape(name)} (\d+)$", notes, re.MULTILINE):
            return ("succeeded" if ended[1] == "0" else "failed"), f"deleted after it had exited with {ended[1]}"
        return ("killed", "deleted while it ran") if f"begun {name}\n" in notes else ("gone", "deleted")

    def _drivers(self) -> Iterator[Job]:
        with contextlib.suppress(OSError):
            self.drivers.update({driver.id: driver.state for driver in self.parts.standalone.drivers()})
        on_disk = self.parts.standalone.workers[0].directory.glob("driver-*/stderr")
        for stderr in sorted(on_disk, key=lambda path: path.parent.name):
            text = stderr.read_text(errors="replace")
            token = re.search(rf"-D{re.escape(_DRIVER_TOKEN)}=([0-9a-f]+)", text)
            key = re.search(r'"key=([^"]+)"', text)
            raw = self.drivers.get(stderr.parent.name, "not listed")
            exited = re.search(r"^exiting with (\d+)$", text, re.MULTILINE)
            if raw not in _DRIVERS and exited:
                raw = {"0": "FINISHED"}.get(exited[1], "FAILED")
            yield Job(
                key[1] if key else "", token[1] if token else "", stderr.parent.name, _DRIVERS.get(raw, "running"), raw
            )

    def _apps(self) -> Iterator[Job]:
        for app in self.parts.yarn.apps():
            tags = dict(tag.split("=", 1) for tag in app.tags if "=" in tag)
            ended = app.state in ("FINISHED", "FAILED", "KILLED")
            state = _APPS.get(app.final_status, "failed") if ended else "running"
            yield Job(app.name, tags.get(_APP_TOKEN, ""), app.id, state, f"{app.state} / {app.final_status}")

    def settled_jobs(self) -> list[Job]:
        """Return all jobs when none runs any more, or when they had time enough for it."""
        with contextlib.suppress(TimeoutError):
            wait_until(
                lambda: all(job.state != "running" for job in self.jobs()), _SETTLED, "the last jobs to end", interval=1
            )
        return self.jobs()

    def ended(self, planned: Planned) -> Ended:
        """Return what Airflow says of a task now."""
        key = (planned.run_id, planned.map_index)
        record = self.airflow.store(planned.kind.name, planned.run_id, "job", planned.map_index).get("durable_spark")
        state, tries = self.states.get(key, (None, 0))
        if state is None:
            task = self.airflow.task(planned.kind.name, planned.run_id, "job", planned.map_index)
            state, tries = task.state, task.try_number
        logs = self.logs(planned)
        error = logs[-1].read_text(errors="replace")[-20000:] if logs else ""
        if record is None:
            return Ended(state, tries, error=error)
        tokens = [record["submission"]["token"], *(previous[0] for previous in record["previous"])]
        return Ended(state, tries, tuple(dict.fromkeys(tokens)), record["submission"]["ordinal"], error)

    def logs(self, planned: Planned) -> list[Path]:
        """Return the log files of a task, the oldest try first."""
        folder = self.airflow.home / "logs" / f"dag_id={planned.kind.name}" / f"run_id={planned.run_id}" / "task_id=job"
        if planned.map_index >= 0:
            folder /= f"map_index={planned.map_index}"
        return sorted(folder.glob("attempt=*.log*"), key=lambda file: (_number(file), file.stat().st_mtime))


def _number(log: Path) -> int:
    return int(log.name.split("=")[1].split(".")[0])


@dataclasses.dataclass
class Verdict:
    """All that came out."""

    tasks: Sequence[tuple[Planned, Ended, Sequence[Job], Judgement]]
    strays: list[str]
    """What is nobody's, or is left over."""

    @property
    def broken(self) -> int:
        return sum(len(judgement.broken) for *_, judgement in self.tasks) + len(self.strays)

    @property
    def limits(self) -> collections.Counter[str]:
        return collections.Counter(limit for *_, judgement in self.tasks for limit in judgement.limits)


def judge_all(soak: Soak) -> Verdict:
    """Hold every task against the clusters' records."""
    jobs = soak.settled_jobs()
    by_key: dict[str, list[Job]] = collections.defaultdict(list)
    for job in jobs:
        by_key[job.key].append(job)
    held: dict[str, list[str]] = collections.defaultdict(list)
    for pod in soak.parts.kubernetes.pods():
        metadata = pod["metadata"]
        if metadata.get("finalizers"):
            held[metadata.get("labels", {}).get("soak", "")].append(f"pod {metadata['name']} is held for ever")
    tasks = []
    for planned in soak.planned.values():
        ended, mine = soak.ended(planned), by_key.pop(planned.key, [])
        judgement = judge(planned, ended, mine)
        judgement.broken += held.pop(planned.key, ())
        tasks.append((planned, ended, mine, judgement))
    strays = [f"{job.id} is no task's: {job}" for left in by_key.values() for job in left]
    strays += [text for left in held.values() for text in left]
    if jvms := soak._jvms():
        strays.append(f"{jvms} JVMs are left")
    return Verdict(tasks, strays)


def tell(soak: Soak, verdict: Verdict, chaos: Chaos) -> None:
    """Print every task of which something is to be said: in full, if a promise was broken."""
    for planned, ended, jobs, judgement in verdict.tasks:
        for limit in judgement.limits:
            print(f"limit   {planned.key}: {limit}; {', '.join(f'{job.id} {job.raw}' for job in jobs)}")
        if not judgement.broken:
            continue
        for text in judgement.broken:
            print(f"BROKEN  {planned.key}: {text}")
        print(f"  planned: {planned.jobs} jobs of {planned.seconds} s, to {'succeed' if planned.succeeds else 'fail'}")
        print(f"  Airflow: {ended.state} after {ended.tries} tries; {ended.submissions} submissions {ended.tokens}")
        for job in jobs:
            print(f"  cluster: {job}")
        logs = soak.logs(planned)
        for log in logs:
            print(f"  --- {log.parent.name}/{log.name}")
            for line in log.read_text(errors="replace").splitlines():
                print(f"    {_readable(line)}")
        if logs:
            begun, last = logs[0].stat().st_ctime - 60, logs[-1].stat().st_mtime + 60
            begun = min(begun, soak.clock.begun)
            for done in sorted(chaos.done, key=lambda done: done.began):
                if done.ended > begun and done.began < last:
                    print(f"  {done.began - soak.clock.begun:7.1f} s  {done}")
    for text in verdict.strays:
        print(f"BROKEN  {text}")


def _readable(line: str) -> str:
    """Return a line of a task's log, which is JSON, as a person reads it."""
    try:
        entry = json.loads(line)
        raised = [f"\n      {error['exc_type']}: {error['exc_value']}" for error in entry.get("error_detail") or ()]
        said = f"{entry['timestamp']} {entry['level']} {entry['event']}{''.join(raised)}"
    except (ValueError, TypeError, KeyError):
        said = line
    return said[:1500]


def table(soak: Soak, verdict: Verdict, chaos: Chaos, arguments: argparse.Namespace) -> list[str]:
    """Return what was run and what came out, as Markdown."""
    most = f"{soak.peaks.deferred} tasks were deferred at once, and {soak.peaks.jvms} JVMs ran beside the clusters' own"
    lines = [
        f"Seed `{arguments.seed}`, {arguments.minutes:g} minutes, {arguments.jobs} jobs alive at once. At most {most}.",
        "",
        "| jobs | tasks | succeeded | failed | tries | submissions | jobs | broken promises |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    total = collections.Counter[str]()
    for kind in KINDS.values():
        row = collections.Counter[str]()
        for planned, ended, jobs, judgement in verdict.tasks:
            if planned.kind is kind:
                row += collections.Counter(
                    {
                        "tasks": 1,
                        str(ended.state): 1,
                        "tries": ended.tries,
                        "submissions": ended.submissions,
                        "jobs": len(jobs),
                        "broken": len(judgement.broken),
                    }
                )
        total += row
        lines.append(_row(f"{_CLUSTERS[kind.cluster]}: {kind.about}", row))
    total["broken"] += len(verdict.strays)
    lines += [_row("**all**", total), "", "| what was done | how often |", "|---|---:|"]
    acts = collections.Counter(done.act.name for done in chaos.done)
    lines += [f"| {name} | {acts[name]} |" for name in ACTS]
    lines += [f"| **all** | {len(chaos.done)} |", ""]
    if chaos.restarted:
        parts = ", ".join(f"{name} {number} times" for name, number in sorted(chaos.restarted.items()))
        lines += [f"Ended by themselves, and were started again: {parts}.", ""]
    limits = [f"| {name} | {number} |" for name, number in sorted(verdict.limits.items())]
    return [*lines, "| limits that showed | how often |", "|---|---:|", *(limits or ["| none | 0 |"])]


_CLUSTERS = {"kubernetes": "Kubernetes", "standalone": "standalone", "yarn": "YARN"}


def _row(name: str, row: Mapping[str, int]) -> str:
    columns = ("tasks", "success", "failed", "tries", "submissions", "jobs", "broken")
    return f"| {name} | " + " | ".join(str(row.get(column, 0)) for column in columns) + " |"


# Setting up


@contextlib.contextmanager
def stage(directory: Path, say: Callable[[str], None]) -> Iterator[Parts]:
    """Start everything in a directory; at the end stop all of it, also what its parts have lost sight of."""
    with contextlib.ExitStack() as stack:
        reaper = Reaper(directory)
        reaper.start()
        stack.callback(reaper.stop)
        say("starting the clusters")
        standalone = stack.enter_context(StandaloneCluster(recovery=True, directory=directory / "standalone"))
        kubernetes = stack.enter_context(KubernetesCluster(directory=directory / "kubernetes"))
        yarn = stack.enter_context(YarnCluster(directory=directory / "yarn"))
        for name in ("submit", "notes"):
            (directory / name).mkdir()
        clusters = Clusters(standalone, kubernetes, yarn, directory / "submit")
        say("starting Airflow")
        postgres = stack.enter_context(Postgres(home=directory / "postgres"))
        airflow = stack.enter_context(_airflow(directory, clusters, postgres))
        _make_ready(airflow)
        yield Parts(airflow, postgres, kubernetes, standalone, yarn)


def _airflow(directory: Path, clusters: Clusters, postgres: Postgres) -> Airflow:
    connections = {
        "standalone": clusters.standalone.connection(),
        "kubernetes": clusters.kubernetes.connection(),
        **clusters.connections(),
    }
    many = 100_000
    return Airflow(
        Path(__file__).with_name("soak_dags"),
        home=directory / "airflow",
        database=postgres.url,
        schedulers=2,
        triggerers=2,
        connections={name: connection_text(connection) for name, connection in connections.items()},
        config={
            **IMPATIENT,
            "core": {
                "max_active_runs_per_dag": many,
                "max_active_tasks_per_dag": many,
                "parallelism": 4,
                "dag_discovery_safe_mode": False,  # which looks for the word airflow
            },
            # So busy a machine that a part which was just slow would be taken for dead, and its tasks from it, again
            # and again: more patience than IMPATIENT has.
            "scheduler": {
                **IMPATIENT["scheduler"],
                "task_instance_heartbeat_timeout": 40,
                "max_dagruns_per_loop_to_schedule": 50,
            },
            "triggerer": {**IMPATIENT["triggerer"], "triggerer_health_check_threshold": 12},
        },
        env={
            **clusters.environment(),
            "KUBERNETES_CONF": json.dumps(clusters.kubernetes.conf()),
            "SOAK_APPS": str(_ROOT / "tests" / "apps"),
            "SOAK_NOTES": str(directory / "notes"),
        },
    )


def _make_ready(airflow: Airflow) -> None:
    for name, slots in (("jvms", JVMS), ("blocking", 3)):
        airflow.api("POST", "/pools", {"name": name, "slots": slots, "include_deferred": True})
    for name in KINDS:
        airflow.wait_for_dag(name)
        airflow.unpause(name)


def _stop(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def main() -> int:
    """Run a soak; return its exit code."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description="Hundreds of jobs, while whatever can die does.")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long things die (30)")
    parser.add_argument("--jobs", type=int, default=200, help="how many jobs are alive at once (200)")
    parser.add_argument("--seed", default=secrets.token_hex(4), help="draws the same jobs and the same acts again")
    parser.add_argument("--keep", action="store_true", help="leave the files: logs of everything")
    parser.add_argument("--write", action="store_true", help="write what came out into docs/reliability.md")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    directory = Path(tempfile.mkdtemp(prefix="durable-spark-soak-"))
    try:
        return _soak(arguments, directory)
    except KeyboardInterrupt:
        print("\nStopped; nothing is left running.")
        return 130
    except (ToolMissing, OSError, RuntimeError, subprocess.SubprocessError, httpx.HTTPError) as error:
        print(f"\nBROKEN  {type(error).__name__}: {error}")
        return 1
    finally:
        if arguments.keep:
            print(f"The files are in {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


def _soak(arguments: argparse.Namespace, directory: Path) -> int:
    seconds = arguments.minutes * 60
    acts = draw(arguments.seed, seconds)
    again = f"scripts/soak --seed {arguments.seed} --minutes {arguments.minutes:g} --jobs {arguments.jobs}"
    print(f"Seed {arguments.seed}: {again}\nThe timeline:", flush=True)
    for act in acts:
        print(f"  {act.at:7.1f} s  {act.name} ({act.target}), {act.seconds} s")
    clock = Clock()
    with stage(directory, clock.say) as parts:
        clock.say("all is up; the time begins")
        clock.begun = time.time()
        soak = Soak(parts, directory, plan(arguments.seed, seconds / 4), clock)
        with Chaos(parts, acts, functools.partial(_say_done, clock)) as chaos:
            soak.run(chaos, seconds=seconds, jobs=arguments.jobs)
            clock.say("judging")
            verdict = judge_all(soak)
            tell(soak, verdict, chaos)
    lines = table(soak, verdict, chaos, arguments)
    if arguments.write:
        publish("soak", lines, versions=ALL_CLUSTERS, page=_PAGE)
    else:
        print("\n".join(["", *lines]))
    print(f"\n{verdict.broken} broken promises. Again: {again}")
    return 1 if verdict.broken else 0


def _say_done(clock: Clock, done: Done) -> None:
    clock.say(str(done), at=done.began)


if __name__ == "__main__":
    sys.exit(main())
