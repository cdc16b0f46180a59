"""
What a run of ``spark-submit`` costs the worker, by upstream's operator and by ours: ``scripts/bench jvm [--runs N]``.

The same job on the same warm clusters, by turns: upstream's hook runs the command, and our operator's run does, with
its guard, its look at the cluster and its options for a JVM that lives for seconds. On a standalone cluster ours sets
no options, because that environment becomes the driver's, but it need not wait for as long as the command does. The
memory is the largest of any one process at its peak (``ru_maxrss``), the time that of the whole run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from airflow.sdk import DAG

from benchmarks.report import ALL_CLUSTERS, publish, row
from dev.kubernetes import KubernetesCluster
from dev.spark import StandaloneCluster
from dev.yarn import YarnCluster
from durable_spark.hooks.spark import SparkHook
from durable_spark.jobs import Submission, new_token
from durable_spark.operators._spark_submit import SparkSubmitRun, short_lived_jvm
from durable_spark.operators.spark_submit import SparkSubmitOperator
from tests.clusters import CLUSTERS, Clusters

_LABELS = {"standalone": "standalone", "kubernetes": "Kubernetes", "yarn": "YARN"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench jvm", description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    lines = ["| run of `spark-submit` | median | 95 % | runs | peak memory |", "|---|---:|---:|---:|---:|"]
    with _clusters() as clusters:
        for cluster in CLUSTERS:
            ways = {"upstream's": _upstreams, "**ours**": _ours}
            measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in range(runs + 1):
                for name, way in ways.items():
                    measured[name].append(_measure(clusters, cluster, way))
            lines += [_line(f"{_LABELS[cluster]}: {name}", results[1:]) for name, results in measured.items()]
    publish("jvm", lines, versions=ALL_CLUSTERS)
    return 0


@contextmanager
def _clusters() -> Iterator[Clusters]:
    with (
        tempfile.TemporaryDirectory() as directory,
        StandaloneCluster() as standalone,
        KubernetesCluster() as kubernetes,
        YarnCluster() as yarn,
    ):
        clusters = Clusters(standalone, kubernetes, yarn, Path(directory))
        os.environ.update(clusters.environment())
        for name, connection in clusters.connections().items():
            os.environ[f"AIRFLOW_CONN_{name.upper()}"] = json.dumps(connection)
        yield clusters


def _line(name: str, results: Sequence[tuple[float, float]]) -> str:
    times, peaks = zip(*results, strict=True)
    return f"{row(name, list(times))} {statistics.median(peaks):.0f} MiB |"


def _measure(clusters: Clusters, cluster: str, way: Callable[[SparkSubmitOperator, Any], float]) -> tuple[float, float]:
    """Return seconds and MiB of one run, which has a process of its own, so that its children's peak is the run's."""
    before = {job.id for job in clusters.jobs(cluster)}
    arguments = clusters.arguments()[cluster]
    arguments["application_args"] = [*arguments.get("application_args", ()), "600", "0"]

    def work(result: Connection) -> None:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        with DAG("dag", schedule=None):
            operator = SparkSubmitOperator(task_id="task", conn_id=f"submit_{cluster}", **arguments)
        took = way(operator, operator._get_hook())
        result.send((took, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024))

    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(send,))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"a run on {cluster} ended with {process.exitcode}")
    measured: tuple[float, float] = receive.recv()
    (job,) = (job for job in clusters.jobs(cluster) if job.id not in before)
    clusters.kill(cluster, job)
    return measured


def _upstreams(operator: SparkSubmitOperator, hook: Any) -> float:
    for name in ("yarn", "kubernetes"):
        hook._conf[f"spark.{name}.{'submit' if name == 'yarn' else 'submission'}.waitAppCompletion"] = "false"
    began = time.perf_counter()
    hook.submit(operator.application)
    return time.perf_counter() - began


def _ours(operator: SparkSubmitOperator, hook: Any) -> float:
    async def run() -> float:
        async with SparkHook(operator.conn_id) as followed:
            env = dict(operator._environment(hook))
            submission = Submission(token=new_token(), name="bench.jvm")
            plan = await followed.prepare_cli(operator._properties(hook, env), submission)
            hook._conf = {**hook._conf, **plan.conf}
            if plan.environment_stays:
                env.update(short_lived_jvm(env))
            one = SparkSubmitRun(
                hook._build_spark_submit_command(operator.application),
                env=env,
                hook=followed,
                submission=plan.submission,
                on_line=lambda line: hook._process_spark_submit_log(iter([line])),
                on_job=lambda _: None,
                output_is_proof=plan.output_is_proof,
            )
            began = time.perf_counter()
            if await one.wait() != 0 or one.job is None:
                raise RuntimeError("spark-submit failed")
            return time.perf_counter() - began

    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
