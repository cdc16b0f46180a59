"""
How long a submission takes, ours beside ``spark-submit``'s: ``scripts/bench submit [--runs N]``.

A real master and worker, warm: each way submits twice before it is measured. The job is the same for both, a
Java main class that ends at once, in cluster mode; the next one is submitted when it has ended, so that no
driver's JVM competes with a measurement. The target for ours is a median under 100 ms.

Ours is the time of the hook, as the operator uses it: a new hook, its connection read, new sockets,
``prepare`` and ``submit``. ``spark-submit`` is the time of the command, which is told to use the REST server,
too: by the master's RPC port it takes nothing but a ``.jar``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time

from benchmarks.report import publish, row
from dev.processes import wait_until
from dev.spark import StandaloneCluster
from durable_spark.hooks.spark import SparkHook
from durable_spark.jobs import SparkJob, Submission, new_token
from tests.standalone import jvm_job

TARGET = 0.100

_CLIENT = """
import time
from airflow.sdk import DAG, BaseOperator
import durable_spark.operators.spark
began = time.perf_counter()
import aiohttp, durable_spark.hooks.standalone
print(time.perf_counter() - began)
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench submit", description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--spark-submit-runs", type=int, default=5)
    options = parser.parse_args()
    with StandaloneCluster() as cluster:
        os.environ["AIRFLOW_CONN_BENCHMARK"] = json.dumps(cluster.connection())
        job = jvm_job(0)
        ours = [_ours(cluster, job) for _ in range(options.runs + 2)][2:]
        theirs = [_spark_submit(cluster, job) for _ in range(options.spark_submit_runs + 2)][2:]
    client = [_importing_the_client() for _ in range(6)][1:]
    connect, prepare, submit, whole = (list(column) for column in zip(*ours, strict=True))
    publish(
        "submit",
        [
            "| submission | median | 95 % | runs |",
            "|---|---:|---:|---:|",
            row("ours: a new hook, its connection read", connect),
            row("ours: `prepare` (the leader's page, its REST server)", prepare),
            row("ours: `submit` (one `POST`)", submit),
            row("**ours, all of it**", whole),
            row("**`spark-submit`**, through the same REST server", theirs),
            row("ours, once per process: importing aiohttp and the hook", client),
        ],
        versions=[f"Spark {cluster.spark.version}"],
    )
    return 0 if statistics.median(whole) < TARGET else 1


def _ours(cluster: StandaloneCluster, job: SparkJob) -> tuple[float, ...]:
    async def submit() -> tuple[float, ...]:
        began = time.perf_counter()
        async with SparkHook("benchmark") as hook:
            await hook.cluster()
            connected = time.perf_counter()
            submission = await hook.prepare(job, Submission(token=new_token()))
            prepared = time.perf_counter()
            await hook.submit(job, submission)
            submitted = time.perf_counter()
        return connected - began, prepared - connected, submitted - prepared, time.perf_counter() - began

    before = len(cluster.drivers())
    times = asyncio.run(submit())
    _wait_for_the_end(cluster, before + 1)
    return times


def _spark_submit(cluster: StandaloneCluster, job: SparkJob) -> float:
    before = len(cluster.drivers())
    rest = f"spark://127.0.0.1:{cluster.master.rest_port}"
    command = [f"{cluster.spark.home}/bin/spark-submit", "--master", rest, "--deploy-mode", "cluster"]
    command += ["--class", str(job.java_class), "--driver-memory", str(job.driver_memory)]
    for key, value in {"spark.master.rest.enabled": "true", **job.conf}.items():
        command += ["--conf", f"{key}={value}"]
    began = time.perf_counter()
    subprocess.run(
        [*command, job.application, *job.application_args],
        env=cluster.spark.environment(),
        capture_output=True,
        timeout=300,
        check=True,
    )
    took = time.perf_counter() - began
    _wait_for_the_end(cluster, before + 1)
    return took


def _wait_for_the_end(cluster: StandaloneCluster, count: int) -> None:
    def ended() -> bool:
        drivers = cluster.drivers()
        return len(drivers) == count and all(driver.state == "FINISHED" for driver in drivers)

    wait_until(ended, 180, f"{count} drivers to have finished", interval=0.2)


def _importing_the_client() -> float:
    done = subprocess.run([sys.executable, "-c", _CLIENT], capture_output=True, text=True, timeout=300, check=True)
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
