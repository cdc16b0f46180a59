"""
The buttons on a task's page in Airflow: the job, its log, its own pages.

A link is kept in XCom under :attr:`durable_spark.jobs.Link.xcom_key`. The operator pushes what is known
before it defers, and the trigger what becomes known later (a driver has no log before it has a worker);
Airflow's UI reads the same key, so the button is up to date while the task is deferred.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from airflow.sdk import BaseOperatorLink

from durable_spark.jobs import Link

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey

__all__ = ["JobHistoryLink", "JobLink", "JobLogLink", "JobTrackingLink", "StoredLink"]


class StoredLink(BaseOperatorLink):
    """A link that the operator and the trigger push themselves."""

    link: ClassVar[Link]

    @property
    def xcom_key(self) -> str:
        """The key that the operator and the trigger write to."""
        return self.link.xcom_key

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the link that was stored last, or ``""``."""
        from airflow.sdk.execution_time.xcom import XCom

        return XCom.get_value(ti_key=ti_key, key=self.xcom_key) or ""


class JobLink(StoredLink):
    """The job on the cluster's own page."""

    name = "Job"
    link = Link.JOB


class JobLogLink(StoredLink):
    """The log of the job's driver."""

    name = "Driver log"
    link = Link.LOG


class JobTrackingLink(StoredLink):
    """The application's own page while it runs."""

    name = "Spark UI"
    link = Link.TRACKING


class JobHistoryLink(StoredLink):
    """The application in the Spark history server."""

    name = "Spark history"
    link = Link.HISTORY
