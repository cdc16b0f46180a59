"""
What importing the operators costs a Dag file, on top of Airflow's own: ``scripts/bench imports [--runs N]``.

Every run is a fresh interpreter that imports ``DAG`` and ``BaseOperator`` from ``airflow.sdk`` first, and
then, on the clock, our modules. The first run warms the caches and is not counted. The target is a median under 50 ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from benchmarks.report import publish, row

TARGET = 0.050

_PROBE = """
import json, time
began = time.perf_counter()
from airflow.sdk import DAG, BaseOperator
times = [time.perf_counter()]
import durable_spark.operators.job
times.append(time.perf_counter())
import durable_spark.operators.spark
times.append(time.perf_counter())
print(json.dumps([after - before for before, after in zip([began, *times], times)]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench imports", description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    _once()
    times = [_once() for _ in range(runs)]
    airflow, job, spark = (list(column) for column in zip(*times, strict=True))
    ours = [a + b for a, b in zip(job, spark, strict=True)]
    publish(
        "imports",
        [
            "| import | median | 95 % | runs |",
            "|---|---:|---:|---:|",
            row("Airflow's own: `DAG`, `BaseOperator`", airflow),
            row("`durable_spark.operators.job`, in addition", job),
            row("`durable_spark.operators.spark`, in addition", spark),
            row("both, in addition", ours),
        ],
    )
    return 0 if statistics.median(ours) < TARGET else 1


def _once() -> list[float]:
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=300, check=True)
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times


if __name__ == "__main__":
    sys.exit(main())
