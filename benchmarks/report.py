"""
Where benchmarks say what they found: on standard output, and in the generated parts of ``docs/performance.md``.

Each benchmark has a part there, between two comments that name it. The rest of the page is written by hand.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import durable_spark
from dev.hadoop import HADOOP_VERSION
from dev.kubernetes_binaries import KUBERNETES_VERSION
from dev.spark import SPARK_VERSION

__all__ = ["ALL_CLUSTERS", "STATIC", "conclude", "milliseconds", "publish", "row"]

_PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
STATIC = _PAGE.parent / "_static"
"""Where pictures go."""
ALL_CLUSTERS = (f"Spark {SPARK_VERSION}", f"Kubernetes {KUBERNETES_VERSION}", f"Hadoop {HADOOP_VERSION}")
"""Versions, where all kinds of clusters took part."""


def row(name: str, seconds: Sequence[float]) -> str:
    """Return a row of a Markdown table: name, median, 95th percentile (the slowest of few), number of runs."""
    slow = statistics.quantiles(seconds, n=20, method="inclusive")[-1] if len(seconds) >= 20 else max(seconds)
    median = statistics.median(seconds)
    return f"| {name} | {milliseconds(median)} | {milliseconds(slow)} | {len(seconds)} |"


def milliseconds(seconds: float) -> str:
    """Return a time for a person: ``8.4 ms``, ``3,214 ms``."""
    value = seconds * 1000
    return f"{value:.1f} ms" if value < 10 else f"{value:,.0f} ms"


def publish(part: str, table: Sequence[str], *, versions: Sequence[str] = (), page: Path = _PAGE) -> None:
    """
    Print a table and put it into the page, with the machine, the date and the versions.

    :param part: name of the page's part.
    :param versions: what took part besides Python, Airflow and this package.
    :param page: ``docs/performance.md``, or another one.
    """
    text = "\n".join([*table, "", f"{_today()}; {_machine()}; {', '.join([*_versions(), *versions])}."])
    print(text)
    written = page.read_text()
    begin, end = f"<!-- generated: {part} -->", f"<!-- end: {part} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(written):
        raise RuntimeError(f"{page} has no part {begin} … {end}")
    page.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", written))


def conclude(part: str, table: Sequence[str], *, whole: bool) -> None:
    """Publish a table of all clusters; or only print it, if less was measured than the page shows."""
    if whole:
        publish(part, table, versions=ALL_CLUSTERS)
    else:
        print("\n".join(table))


def _today() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")


def _machine() -> str:
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    name = cpu[1].strip() if cpu else platform.machine()
    return f"{os.cpu_count()} cores ({name}), {memory:.0f} GiB, load {load:.1f} at the end"


def _versions() -> list[str]:
    return [
        f"durable-spark {durable_spark.__version__}{_commit()}",
        f"Airflow {importlib.metadata.version('apache-airflow-core')}",
        f"Python {platform.python_version()}",
    ]


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=_PAGE.parent, capture_output=True, text=True, check=False
    )
    return f" ({done.stdout.strip()})" if done.returncode == 0 else ""
