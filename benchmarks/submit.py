"""
How long a submission takes, ours beside ``spark-submit``: ``scripts/bench submit [standalone|kubernetes] [--runs N]``.

A real cluster, warm: each way submits twice before it is measured. The job is the same for both, a Java main class
that ends at once, in cluster mode; the next one is submitted when it has ended, so that no driver's JVM competes with
a measurement. The target for ours is a median under 100 ms.

Ours is the time of the hook, as the operator uses it: a new hook, its connection read, new sockets, ``prepare`` and
``submit``. ``spark-submit`` is the time of the command, which is told not to wait for the job.
"""

from __future__ import annotations

import abc
import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import publish, row
from dev.kubernetes import KubernetesCluster
from dev.kubernetes_binaries import KUBERNETES_VERSION
from dev.processes import wait_until
from dev.spark import Spark, StandaloneCluster, ensure_spark
from durable_spark.hooks.spark import SparkHook
from durable_spark.jobs import SparkJob, Submission, new_token
from tests.standalone import jvm_job

TARGET = 0.100


class Case(abc.ABC):
    """One kind of cluster, and how both ways submit to it."""

    part: str
    """Of the page."""
    module: str
    """The hook's."""
    asked: str
    """What ``prepare`` asks."""
    beside: str
    """How ``spark-submit`` submits."""
    versions: Sequence[str] = ()

    spark: Spark
    job: SparkJob

    @abc.abstractmethod
    def connection(self) -> dict[str, Any]:
        """Return the connection."""

    @abc.abstractmethod
    def spark_submit(self) -> list[str]:
        """Return the arguments of ``spark-submit`` that say where."""

    @abc.abstractmethod
    def ended(self) -> Sequence[bool]:
        """Return for each job that there ever was whether it has ended well."""


class OnStandalone(Case):
    part, module = "submit", "standalone"
    asked = "the leader's page, its REST server"
    beside = "through the same REST server"  # by the master's RPC port it takes nothing but a .jar

    def __init__(self, cluster: StandaloneCluster) -> None:
        self.cluster, self.spark, self.job = cluster, cluster.spark, jvm_job(0)

    def connection(self) -> dict[str, Any]:
        return self.cluster.connection()

    def spark_submit(self) -> list[str]:
        rest = f"spark://127.0.0.1:{self.cluster.master.rest_port}"
        return ["--master", rest, "--conf", "spark.master.rest.enabled=true"]

    def ended(self) -> Sequence[bool]:
        return [driver.state == "FINISHED" for driver in self.cluster.drivers()]


class OnKubernetes(Case):
    part, module = "submit-kubernetes", "kubernetes"
    asked = "the API server"
    beside = "not waiting for the application"
    versions = [f"Kubernetes {KUBERNETES_VERSION}"]

    def __init__(self, cluster: KubernetesCluster) -> None:
        self.cluster, self.spark = cluster, ensure_spark()
        job = jvm_job(0)
        self.job = jvm_job(0, application=f"local://{job.application}", conf={**job.conf, **cluster.conf()})

    def connection(self) -> dict[str, Any]:
        return self.cluster.connection()

    def spark_submit(self) -> list[str]:
        conf = {
            "spark.kubernetes.namespace": self.cluster.namespace,
            "spark.kubernetes.submission.waitAppCompletion": "false",
            "spark.kubernetes.authenticate.submission.caCertFile": self.cluster.ca,
            "spark.kubernetes.authenticate.submission.oauthToken": self.cluster.admin_token,
        }
        given = [part for name, value in conf.items() for part in ("--conf", f"{name}={value}")]
        return ["--master", f"k8s://{self.cluster.url}", *given]

    def ended(self) -> Sequence[bool]:
        return [pod["status"]["phase"] == "Succeeded" for pod in self.cluster.pods("spark-role=driver")]


@contextlib.contextmanager
def _case(name: str) -> Iterator[Case]:
    if name == "standalone":
        with StandaloneCluster() as standalone:
            yield OnStandalone(standalone)
    else:
        with KubernetesCluster() as kubernetes:
            yield OnKubernetes(kubernetes)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench submit", description=__doc__)
    parser.add_argument("clusters", nargs="*", choices=["standalone", "kubernetes"], metavar="cluster", default=None)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--spark-submit-runs", type=int, default=5)
    options = parser.parse_args()
    medians = [_measure(name, options) for name in options.clusters or ["standalone", "kubernetes"]]
    return 0 if max(medians) < TARGET else 1


def _measure(name: str, options: argparse.Namespace) -> float:
    with _case(name) as case:
        os.environ["AIRFLOW_CONN_BENCHMARK"] = json.dumps(case.connection())
        ours = [_ours(case) for _ in range(options.runs + 2)][2:]
        theirs = [_spark_submit(case) for _ in range(options.spark_submit_runs + 2)][2:]
    client = [_importing_the_client(case) for _ in range(6)][1:]
    connect, prepare, submit, whole = (list(column) for column in zip(*ours, strict=True))
    publish(
        case.part,
        [
            "| submission | median | 95 % | runs |",
            "|---|---:|---:|---:|",
            row("ours: a new hook, its connection read", connect),
            row(f"ours: `prepare` ({case.asked})", prepare),
            row("ours: `submit` (one `POST`)", submit),
            row("**ours, all of it**", whole),
            row(f"**`spark-submit`**, {case.beside}", theirs),
            row("ours, once per process: importing aiohttp and the hook", client),
        ],
        versions=[*case.versions, f"Spark {case.spark.version}"],
    )
    return float(statistics.median(whole))


def _ours(case: Case) -> tuple[float, ...]:
    async def submit() -> tuple[float, ...]:
        began = time.perf_counter()
        async with SparkHook("benchmark") as hook:
            await hook.cluster()
            connected = time.perf_counter()
            submission = await hook.prepare(case.job, Submission(token=new_token(), name="bench.submit"))
            prepared = time.perf_counter()
            await hook.submit(case.job, submission)
            submitted = time.perf_counter()
        return connected - began, prepared - connected, submitted - prepared, time.perf_counter() - began

    before = len(case.ended())
    times = asyncio.run(submit())
    _wait_for_the_end(case, before + 1)
    return times


def _spark_submit(case: Case) -> float:
    before, job = len(case.ended()), case.job
    command = [f"{case.spark.home}/bin/spark-submit", *case.spark_submit(), "--deploy-mode", "cluster"]
    command += ["--class", str(job.java_class), "--driver-memory", str(job.driver_memory)]
    for key, value in job.conf.items():
        command += ["--conf", f"{key}={value}"]
    began = time.perf_counter()
    subprocess.run(
        [*command, job.application, *job.application_args],
        env=case.spark.environment(),
        cwd=Path(__file__).parent,
        capture_output=True,
        timeout=300,
        check=True,
    )
    took = time.perf_counter() - began
    _wait_for_the_end(case, before + 1)
    return took


def _wait_for_the_end(case: Case, count: int) -> None:
    def ended() -> bool:
        jobs = case.ended()
        return len(jobs) == count and all(jobs)

    wait_until(ended, 180, f"{count} jobs to have succeeded", interval=0.2)


def _importing_the_client(case: Case) -> float:
    code = f"""
import time
from airflow.sdk import DAG, BaseOperator
import durable_spark.operators.spark
began = time.perf_counter()
import aiohttp, durable_spark.hooks.{case.module}
print(time.perf_counter() - began)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
