"""
A host name for each process of an Airflow on one machine, so that a test can tell which triggerer has a trigger.

Airflow calls :func:`hostname` (``[core] hostname_callable``). It is imported by each of Airflow's processes: nothing
heavy in here.
"""

from __future__ import annotations

import os
import socket

__all__ = ["hostname"]


def hostname() -> str:
    """Return the name that this process was given, or the machine's."""
    return os.environ.get("DURABLE_SPARK_HOST") or socket.gethostname()
