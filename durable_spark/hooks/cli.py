"""
What a hook must know for jobs that ``spark-submit`` submits: how they are marked, seen and recognised.

:class:`~durable_spark.operators.spark_submit.SparkSubmitOperator` runs the command line tool, which
submits and leaves; all else is the hook's. What flows in: the Spark properties of a submission, lines
of the tool's output. What flows out: properties that make the job recognisable, and the job.

The trap: the tool names a job before it has submitted it (YARN: ``Submitting application …``), and may
have submitted one although it ends with an error. So only a line that vouches for the submission counts,
and after every other end :meth:`JobHook.find` decides.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from durable_spark.hooks.job import JobHook

if TYPE_CHECKING:
    from durable_spark.jobs import JobRef, Submission

__all__ = ["CliSubmission", "SparkCliHook"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CliSubmission:
    """
    A submission as ``spark-submit`` is to be told of it.

    :param submission: with all that :meth:`JobHook.find` will need, for the record.
    :param conf: Spark properties to set on the command line, over those of the same name.
    :param environment_stays: whether the environment of ``spark-submit`` stays on the worker, so that it may be
        given options for its own JVM. On a standalone cluster it becomes the driver's.
    :param output_is_proof: whether :meth:`SparkCliHook.job_in` alone proves whose job it is; ``False`` where something
        else may say the same of another job (a site's ``spark-submit`` that runs ``distcp`` first), and
        :meth:`SparkCliHook.glimpse` can tell.
    """

    submission: Submission
    conf: Mapping[str, str]
    environment_stays: bool = True
    output_is_proof: bool = True


class SparkCliHook(JobHook):
    """A cluster to which ``spark-submit --deploy-mode cluster`` submits jobs that this hook finds and follows."""

    @abc.abstractmethod
    async def prepare_cli(self, conf: Mapping[str, str], submission: Submission) -> CliSubmission:
        """
        Check that the job can be followed, and say how it is to be marked. Submits nothing.

        What :meth:`JobHook.prepare` is to a native submission: called once per submission, before the intent is
        written to the store.

        :param conf: the Spark properties as ``spark-submit`` will see them: the user's, over those of its properties
            file. Values are the user's own and are not checked yet.
        :raises BadArguments: when a property cannot be used; it is named.
        :raises BadConfiguration: when the connection gives no way to follow the job; the field is named.
        """

    def job_in(self, line: str, submission: Submission) -> JobRef | None:
        """Return the job, if this line of the output of ``spark-submit`` vouches that the cluster has one."""
        return None

    async def glimpse(self, submission: Submission) -> JobRef | None:
        """
        Return the job if one cheap look shows that the cluster has it; ``None`` says nothing at all.

        Asked about once a second while ``spark-submit`` runs, so that the job is known the moment it exists.
        """
        return None
