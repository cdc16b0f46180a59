"""
What a try tells those who look from outside: which decision it took, and a span for each submission.

In: decisions and their reasons. Out: an XCom, a counter, a span under the task's own trace. What fails here fails
no task.

The trap: an exception's cause may quote a URL with a password. Of an error, a span gets the message only if it is
ours, else the type.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from airflow.sdk.log import redact  # type: ignore[attr-defined]
from airflow.sdk.observability import trace

from durable_spark import _metrics
from durable_spark.jobs import (
    BadArguments,
    ClusterError,
    DurableJobError,
    SubmissionRefused,
    SubmissionUncertain,
)
from durable_spark.operators._store import Superseded

if TYPE_CHECKING:
    from airflow.sdk import Context

    from durable_spark.jobs import JobRef, Submission

__all__ = ["DECISION_XCOM_KEY", "count", "push_decision", "submission_span"]

DECISION_XCOM_KEY = "durable_spark_decision"
"""XCom in which each try says what it has decided: ``{"decision": …, "job_id": …, "submission": …, "why": …, …}``."""

_OUTCOMES: tuple[tuple[type[BaseException], str], ...] = (
    (SubmissionRefused, "refused"),
    (BadArguments, "refused"),
    (SubmissionUncertain, "uncertain"),
    (ClusterError, "unreachable"),
    (Superseded, "superseded"),
)

log = logging.getLogger(__name__)
tracer = trace.get_tracer("durable_spark")


def push_decision(
    context: Context, decision: str, *, why: str, job: JobRef | None, submission: Submission | None
) -> None:
    """Say in XCom what this try has decided. The last one of a try stays."""
    ti = context["ti"]
    value = {
        "decision": decision,
        "why": str(redact(why))[:500],  # as in the log: a command line may hold what Airflow masks
        "try_number": ti.try_number,
        "job_id": job.id if job else None,
        "submission": submission.ordinal if submission else None,
        "token": submission.token if submission else None,
    }
    try:
        ti.xcom_push(key=DECISION_XCOM_KEY, value=value)
    except Exception as error:
        log.warning("The decision %r could not be pushed: %r", decision, error)


def count(context: Context, what: str, *, operator: str, conn_id: str) -> None:
    """Count a decision, with the tags of the mixin's own metrics and the connection."""
    tags = {"operator": operator, "conn_id": conn_id}
    if team := getattr(context["ti"], "stats_tags", {}).get("team_name"):
        tags["team_name"] = team
    _metrics.count(what, tags)


@contextlib.contextmanager
def submission_span(submission: Submission, *, conn_id: str) -> Iterator[Any]:
    """Trace a submission: from its preparation until its job is in the record."""
    attributes: dict[str, str | int] = {
        "durable_spark.conn_id": conn_id,
        "durable_spark.token": submission.token,
        "durable_spark.ordinal": submission.ordinal,
    }
    with tracer.start_as_current_span(
        "durable_spark.submission", attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield span
        except BaseException as error:
            outcome = next((name for kind, name in _OUTCOMES if isinstance(error, kind)), "failed")
            span.set_attributes({"durable_spark.outcome": outcome, "error.type": type(error).__name__})
            said = (
                f"{type(error).__name__}: {redact(str(error))}"[:1000]
                if isinstance(error, DurableJobError)
                else type(error).__name__
            )
            span.set_status(trace.Status(trace.StatusCode.ERROR, said))
            raise
        span.set_attribute("durable_spark.outcome", "submitted")
