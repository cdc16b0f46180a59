"""Runs whose jobs are told by their mark, whatever the cluster: those of ``spark-submit``, and on others than pods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from dev.processes import wait_until
from tests.airflow.marks import mark_of

if TYPE_CHECKING:
    from tests.airflow.conftest import Run, Stage
    from tests.clusters import Clusters, Job

__all__ = ["Elsewhere", "clusters_of", "run_elsewhere"]


@dataclasses.dataclass
class Elsewhere:
    """A run of a Dag whose jobs are marked, and all jobs that the cluster has had since it began."""

    clusters: Clusters
    cluster: str
    run: Run
    before: set[str]

    def jobs(self) -> list[Job]:
        """Return the jobs, the oldest first."""
        jobs = self.clusters.jobs(self.cluster, mark_of(self.run.dag))
        return [job for job in jobs if job.id not in self.before]

    def states(self) -> list[str]:
        return [job.state for job in self.jobs()]

    def wait_for_jobs(self, *states: str) -> list[Job]:
        """Wait until the jobs are in these states, the oldest first."""

        def reached() -> list[Job] | None:
            jobs = self.jobs()
            return jobs if [job.state for job in jobs] == list(states) else None

        try:
            return wait_until(reached, 120, f"jobs of {self.run.dag} that are {states}", interval=0.3)
        except TimeoutError as error:
            raise AssertionError(f"{error}: {self.jobs()}\n{self.run.logs()}") from None

    def wait_until_followed(self, try_number: int = 1) -> None:
        self.run.wait("deferred", try_number=try_number)
        latest = self.run.store()["spark_job_id"]
        self.run.wait_until_said(f"\n{latest} is ", try_number=try_number)  # and not that it is deferring

    def open_gate(self) -> None:
        """Let the jobs end that wait for the file of the run's ID."""
        (self.clusters.gates / self.run.id).touch()

    def notes(self) -> list[str]:
        """Return the tries in which ``post_submit_commands`` ran."""
        file = self.clusters.directory / "notes" / self.run.id
        return file.read_text().split() if file.exists() else []


def clusters_of(stage: Stage) -> Clusters:
    """Return all clusters. Skips the test where one of them is missing."""
    if stage.submit is None:
        pytest.skip("there is no Kubernetes or no YARN cluster")
    return stage.submit


def run_elsewhere(stage: Stage, run: Callable[..., Run], dag: str, **conf: str) -> Elsewhere:
    """Trigger a run of a Dag whose name ends with its cluster's."""
    clusters, cluster = clusters_of(stage), dag.rpartition("_")[2]
    before = {job.id for job in clusters.jobs(cluster, mark_of(dag))}
    return Elsewhere(clusters, cluster, run(dag, **conf), before)
