"""
Kill -9 of the task's process all along the life of ``spark-submit``, a slice every 100 ms, on each cluster.

After each kill: nothing of ``spark-submit`` is left when the retry begins, the retry ends with exactly one job, which
is the one in its record, and no second one comes afterwards. Counted by the clusters' own records. A few slices,
chosen by the day's seed; all of them with ``scripts/kill-slices``.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import os
import random
import secrets
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from airflow.sdk import DAG

from dev.processes import wait_until
from durable_spark.operators.spark_submit import SparkSubmitOperator
from tests.clusters import CLUSTERS, Clusters, Job, spark_submits
from tests.crash.tries import Task

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator

SLICE = 0.1
A_FEW = 4
"""Slices for each cluster, so a dozen in all."""
SETTLED = 1.0
"""Seconds after which what a dead process has sent is in the cluster's record."""


@pytest.fixture
def clusters(submit_clusters: Clusters | None, monkeypatch: pytest.MonkeyPatch) -> Clusters:
    """Return the clusters, with a worker's environment around."""
    if submit_clusters is None:
        pytest.skip("there is no Kubernetes or no YARN cluster")
    for name, value in submit_clusters.environment().items():
        monkeypatch.setenv(name, value)
    for name, connection in submit_clusters.connections().items():
        monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}", json.dumps(connection))
    return submit_clusters


class Killing:
    """Tasks on one cluster whose first try is killed."""

    def __init__(self, clusters: Clusters, cluster: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clusters = clusters
        self.cluster = cluster
        self.directory = directory
        self._monkeypatch = monkeypatch
        self._before: set[str] = set()

    def operator(self) -> BaseOperator:
        arguments = self.clusters.arguments()[self.cluster]
        arguments["application_args"] = [*arguments.get("application_args", ()), "600", "0"]
        with DAG("dag", schedule=None):
            return SparkSubmitOperator(task_id="task", conn_id=f"submit_{self.cluster}", retries=2, **arguments)

    def task(self) -> Task:
        """Begin a task's first try and wait for its intent, which is written just before spark-submit is started."""
        name = secrets.token_hex(4)
        directory = self.directory / name
        directory.mkdir()
        self.mark = f"case-{name}"
        self._monkeypatch.setenv("KILL_SLICES_CASE", self.mark)
        self._before = {job.id for job in self.clusters.jobs(self.cluster)}
        task = Task(directory, self.operator)
        task.begin()
        task.wait_for_intent()
        return task

    def jobs(self) -> list[Job]:
        """Return the jobs that came since the task began."""
        return [job for job in self.clusters.jobs(self.cluster) if job.id not in self._before]

    def life(self) -> float:
        """Return how long spark-submit lives, from the intent to the deferral, in seconds."""
        task = self.task()
        began = time.monotonic()
        assert task.wait(120) == "deferred", task.log()
        (job,) = self.jobs()
        self.clusters.kill(self.cluster, job)
        return time.monotonic() - began

    def kill_at(self, slice_: int) -> str:
        """Kill a first try in that slice, run the retry, check what came of it; return what the kill left behind."""
        task = self.task()
        time.sleep(slice_ * SLICE)  # the instant is what is tested
        task.kill()
        wait_until(lambda: not spark_submits(self.mark), 2, "spark-submit to die with its task", interval=0.01)
        time.sleep(SETTLED)
        after_kill = self.jobs()
        assert len(after_kill) <= 1, after_kill
        task.begin()
        end = task.wait(180)
        assert end == "deferred", f"slice {slice_}: {end}\n{task.log()}"
        time.sleep(SETTLED)
        running = [job for job in self.jobs() if job.state == "running"]
        others = [job for job in self.jobs() if job not in running]
        assert len(running) == 1, f"slice {slice_}: {self.jobs()}\n{task.log()}"
        assert all(job.state == "gone" for job in others), f"slice {slice_}: another job ran: {others}"
        assert task.store()["spark_job_id"] == running[0].id, task.log()
        self.clusters.kill(self.cluster, running[0])
        if others:
            return "half submitted"
        return "submitted" if after_kill else "nothing"


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_one_job_whenever_the_task_is_killed(
    request: pytest.FixtureRequest,
    clusters: Clusters,
    cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killing = Killing(clusters, cluster, tmp_path, monkeypatch)
    slices = range(math.ceil(killing.life() / SLICE) + 1)
    seed = os.environ.get("CRASH_SEED", datetime.date.today().isoformat())
    chosen = (
        list(slices) if request.config.getoption("--every-slice") else _stratified(slices, seed=f"{seed} {cluster}")
    )
    left = {slice_: killing.kill_at(slice_) for slice_ in chosen}
    counts = {what: list(left.values()).count(what) for what in ("nothing", "half submitted", "submitted")}
    print(f"\n{cluster}: seed {seed}, {len(chosen)} of {len(slices)} slices of {SLICE:g} s; left behind: {counts}")


def test_an_old_try_that_wakes_up_late_leaves_one_job(
    clusters: Clusters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suspended with all its processes right before the submission; the retry has submitted when it goes on."""
    killing = Killing(clusters, "yarn", tmp_path, monkeypatch)
    staging = clusters.yarn.directory / "staging"
    before = set(staging.rglob("*.jar"))
    task = killing.task()
    wait_until(lambda: set(staging.rglob("*.jar")) - before, 60, "the upload, which is its last step", interval=0.002)
    old = [task.pid, *spark_submits(killing.mark)]
    for pid in old:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(SETTLED)
    task.begin()
    assert task.wait(120) == "deferred", task.log()
    for pid in reversed(old):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert "Superseded" in task.wait(60, number=1), task.log()
    wait_until(
        lambda: len([job for job in killing.jobs() if job.state == "running"]) == 1,
        30,
        "one job to be left",
        interval=0.2,
    )
    (running,) = (job for job in killing.jobs() if job.state == "running")
    assert task.store()["spark_job_id"] == running.id
    killing.clusters.kill("yarn", running)


def _stratified(slices: range, *, seed: str) -> list[int]:
    """Return a few slices, one from each part of the whole."""
    rng = random.Random(seed)
    edges = [len(slices) * part // A_FEW for part in range(A_FEW + 1)]
    return [rng.choice(slices[low:high]) for low, high in itertools.pairwise(edges)]
