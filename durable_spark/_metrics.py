"""
What this package counts, in Airflow's own metrics.

In: a name and its tags. Out: what ``[metrics]`` of the Airflow configuration asks for (statsd, Datadog,
OpenTelemetry), or nothing. Names say what happened, tags where (``conn_id``, ``operator``), as in Airflow's own;
statsd without tags sees the sum.

The trap: Airflow makes its client when it is first used, and that may ask the resolver. In an event loop, the first
use is made in a thread.
"""

from __future__ import annotations

import functools
import logging

from airflow.sdk.configuration import conf
from airflow.sdk.observability import stats

__all__ = ["count", "followed_jobs"]

_PREFIX = "durable_spark"

log = logging.getLogger(__name__)


def count(what: str, tags: dict[str, str]) -> None:
    """
    Count one of something.

    :param what: the metric's name without the package's prefix.
    :param tags: few values each; no job, Dag or run.
    """
    try:
        stats.incr(f"{_PREFIX}.{what}", tags=tags)
    except Exception as error:  # no task fails for a metric
        log.debug("%s was not counted: %r", what, error)


def followed_jobs(number: int, *, conn_id: str) -> None:
    """Say how many jobs this triggerer process follows on the cluster of a connection."""
    try:
        tags = {"conn_id": conn_id, "hostname": _hostname()}
        if conf.getboolean("metrics", "legacy_names_on", fallback=True):
            # As Airflow itself does: where there are no tags, the name tells one gauge from another.
            where = ".".join(_part(tags[tag]) for tag in ("hostname", "conn_id"))
            stats.gauge(f"{_PREFIX}.followed_jobs.{where}", number)
        stats.gauge(f"{_PREFIX}.followed_jobs", number, tags=tags)
    except Exception as error:
        log.debug("followed_jobs was not told: %r", error)


def _part(value: str) -> str:
    """Return a value as one part of a metric's name."""
    return stats.normalize_name_for_stats(value.replace(".", "__"), log_warning=False)


@functools.cache
def _hostname() -> str:
    """Return the name by which Airflow's own gauges of a triggerer name its machine."""
    from airflow.utils.net import get_hostname

    return str(get_hostname())  # type: ignore[no-untyped-call]
