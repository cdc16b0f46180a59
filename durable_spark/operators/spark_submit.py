"""
The Spark provider's ``SparkSubmitOperator``, durable and deferrable: change the import, and nothing else.

It is upstream's class underneath, so arguments, templates, the connection and the command line are upstream's own. In
cluster mode ``spark-submit`` only submits and leaves; finding, following, verifying and killing the job are
the cluster's hook's. What flows in: upstream's arguments. What flows out: the job's ID, or an exception.

Which half is in charge is settled once, in :meth:`SparkSubmitOperator.execute`: upstream's, to the letter, with
``deferrable=False`` and in the modes in which the driver dies with the worker; ours everywhere else. The trap: both
halves override the same methods of Airflow's mixin, so each of them asks which half it is.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

try:
    from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator as UpstreamOperator
except ImportError as error:
    raise ImportError(
        "the drop-in is built on the Spark provider: pip install 'airflow-provider-durable-spark[spark-submit]'"
    ) from error
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowTaskTimeout

from durable_spark.hooks.cli import SparkCliHook
from durable_spark.hooks.spark import SparkHook
from durable_spark.jobs import (
    BadArguments,
    BadConfiguration,
    ClusterError,
    DurableJobError,
    Found,
    SubmissionRefused,
    SubmissionUncertain,
)
from durable_spark.operators._lineage import with_lineage
from durable_spark.operators._spark_submit import SparkSubmitRun, check_command, read_spark_defaults, short_lived_jvm
from durable_spark.operators._store import way_out
from durable_spark.operators.job import DurableJobOperator, translated

if TYPE_CHECKING:
    from airflow.providers.apache.spark.hooks.spark_submit import SparkSubmitHook
    from airflow.sdk import Context
    from pydantic import JsonValue

    from durable_spark.hooks.cli import CliSubmission
    from durable_spark.jobs import JobRef, Record, Submission

__all__ = ["SparkSubmitOperator"]

_LAST_LOOKS = 3.0
"""Seconds in which a job is looked for after the run was interrupted; Airflow sends SIGKILL 5 s after SIGTERM."""
_UNTEMPLATED = (
    "_archives",
    "_java_class",
    "_repositories",
    "_total_executor_cores",
    "_executor_cores",
    "_executor_memory",
    "_driver_memory",
    "_num_executors",
    "_yarn_queue",
    "_use_krb5ccache",
)


class SparkSubmitOperator(DurableJobOperator, UpstreamOperator):
    """
    Runs ``spark-submit`` as the Spark provider's operator does, once, and follows the job from the triggerer.

    In cluster mode on standalone, YARN and Kubernetes the job outlives the worker: ``spark-submit`` leaves as soon as
    the cluster has the job, and whatever dies in between, the retry finds the job and follows it on. In client and
    local mode the driver lives and dies with the worker: the operator does what upstream's does, and says so.

    :param application: the application, a jar or a ``.py`` file. (templated)
    :param deferrable: ``True`` (the default): durable, and followed from the triggerer. ``False``: upstream's
        operator to the letter, its window for duplicates included; except that a driver pod that vanishes is a
        failure here, while upstream takes it for a success.
    :param durable: keep the record that makes a retry find the job. ``False`` submits anew on each try.
    :param reconnect_on_retry: deprecated by upstream: use ``durable``.
    :param status_poll_interval: seconds between two looks at the cluster; the same as ``poll_interval``.

    All other arguments are upstream's (templates included), and those of
    :class:`~durable_spark.operators.job.DurableJobOperator`. ``track_driver_via_k8s_api``, ``yarn_track_via_rm_api``
    and ``yarn_rm_auth`` choose how upstream polls, and are not needed here: the connection says how the cluster is
    reached.
    """

    template_fields = UpstreamOperator.template_fields
    ui_color = UpstreamOperator.ui_color
    external_id_key = UpstreamOperator.external_id_key

    def __init__(
        self,
        *,
        conn_id: str = "spark_default",
        deferrable: bool = True,
        durable: bool | None = None,
        reconnect_on_retry: bool | None = None,
        status_poll_interval: int | None = None,
        poll_interval: float | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("hook", f"{SparkHook.__module__}.{SparkHook.__qualname__}")
        if status_poll_interval is not None:
            kwargs["status_poll_interval"] = status_poll_interval
            poll_interval = status_poll_interval if poll_interval is None else poll_interval
        if reconnect_on_retry is not None:
            kwargs["reconnect_on_retry"] = reconnect_on_retry  # upstream warns
            durable = reconnect_on_retry if durable is None else durable
        super().__init__(
            conn_id=conn_id,
            deferrable=deferrable,
            durable=True if durable is None else durable,
            poll_interval=poll_interval,
            **kwargs,
        )
        self._conn_id = conn_id
        self._half: type[DurableJobOperator] | type[UpstreamOperator] = (
            DurableJobOperator if deferrable else UpstreamOperator
        )
        self._plan: CliSubmission | None = None
        self._command: list[str] = []
        self._run: SparkSubmitRun | None = None
        self._anothers_name = False

    # What Airflow calls

    def execute(self, context: Context) -> Any:
        """Submit the job, or take up the one that an earlier try has submitted, and wait for its end."""
        with translated():
            if self.deferrable and not self._outlives_the_worker(context):
                self._expect_no_job_on_a_cluster(context)
                self._half = UpstreamOperator
                self._hook = None  # upstream's half has yet to put OpenLineage's properties into it
                self.log.warning(
                    "The driver runs on this worker (deploy mode 'client') and dies with it: the task is neither "
                    "durable nor deferrable. With deploy_mode='cluster' it is both"
                )
        return self._half.execute(self, context)

    def on_kill(self) -> None:
        """Kill ``spark-submit`` if it runs; what becomes of a job is decided as the operator's base class says."""
        if self._half is UpstreamOperator:
            UpstreamOperator.on_kill(self)
            return
        super().on_kill()
        if self._run is not None:
            self._run.kill()

    # What the mixin calls

    def submit_job(self, context: Context) -> Any:
        """Write the intent, run ``spark-submit``, write the ID. Returns the job's ID."""
        return self._half.submit_job(self, context)

    def get_job_status(self, external_id: JsonValue, context: Context) -> str:
        """Return the state of the job, in the words of the half in charge."""
        return self._half.get_job_status(self, external_id, context)

    def is_job_active(self, status: str) -> bool:
        """Return whether the job may still run."""
        return self._half.is_job_active(self, status)

    def is_job_succeeded(self, status: str) -> bool:
        """Return whether the cluster vouched for a success."""
        return self._half.is_job_succeeded(self, status)

    def poll_until_complete(self, external_id: JsonValue, context: Context) -> Any:
        """Wait for the job's end."""
        return self._half.poll_until_complete(self, external_id, context)

    def get_job_result(self, external_id: JsonValue, context: Context) -> Any:
        """Return the job's ID; upstream's half returns nothing."""
        return self._half.get_job_result(self, external_id, context)

    # What upstream's class calls

    def _get_hook(self) -> SparkSubmitHook:
        hook = super()._get_hook()
        _understand_our_connections(hook)
        self._distrust_vanished_pods(hook)
        return hook

    def _distrust_vanished_pods(self, hook: SparkSubmitHook) -> None:
        """Let upstream's polling fail where a pod vanishes: it returns nothing then, and the task succeeds."""
        poll = hook._poll_k8s_driver_via_api

        def polled() -> str | None:
            if (phase := poll()) is None:
                raise AirflowFailException(
                    f"JobLost: the driver pod {hook._kubernetes_driver_pod} is not known to the cluster any more, and "
                    "its end was not seen: it may have succeeded or failed. Clear the task to run it again, or mark "
                    "it as succeeded"
                )
            return phase

        hook._poll_k8s_driver_via_api = polled  # type: ignore[method-assign]

    # What our base class calls

    def build_job(self, context: Context) -> SparkSubmitHook:
        """Return upstream's hook, which composes the command line, with OpenLineage's properties if so asked."""
        hook = self._upstream_hook()
        hook._conf = with_lineage(
            self.conf or {},
            context,
            parent=self._openlineage_inject_parent_job_info,
            transport=self._openlineage_inject_transport_info,
        )
        return hook

    def describe_job(self) -> Any:
        """Return the arguments that say what the job is."""
        names = (*(name for name in self.template_fields if name != "post_submit_commands"), *_UNTEMPLATED)
        return {name.lstrip("_"): getattr(self, name, None) for name in names}

    def after_end(self) -> None:
        """Run ``post_submit_commands``, once in this process."""
        if not self.post_submit_commands:
            return
        try:
            self._upstream_hook()._run_post_submit_commands()
        except Exception as error:  # what fails here must not hide how the job ended
            self.log.warning("post_submit_commands were not run: %r", error)

    def _prepare(self, job: SparkSubmitHook, submission: Submission) -> Submission:
        talk = self._conversing
        if self._yarn_rm_auth is not None:
            self.log.warning("yarn_rm_auth is not used here: the connection says how to authenticate")
        job._connection["deploy_mode"] = "cluster"
        env = self._environment(job)
        binary = str(job._connection["spark_binary"])
        check_command([binary], env)
        properties = self._properties(job, env)
        self._plan = plan = talk.run(self._cli_hook.prepare_cli(properties, submission))
        job._conf = {**job._conf, **plan.conf}
        self._command = [str(part) for part in job._build_spark_submit_command(self.application)]
        return plan.submission

    def _send(self, context: Context, job: SparkSubmitHook, intent: Record) -> JobRef:
        talk, plan = self._conversing, self._plan
        assert plan is not None  # noqa: S101 prepared before
        env = dict(self._environment(job))
        if plan.environment_stays:
            env.update(short_lived_jvm(env))

        def note(ref: JobRef) -> None:
            self.log.info("The cluster has the job: %s", ref)
            if not _is_whole(ref, intent.submission):
                return
            try:
                self._save(context, dataclasses.replace(intent, job=ref))
            except Exception as error:  # written again when spark-submit has left, which must not be kept from it
                self.log.warning("The job could not be noted yet: %s", error)

        self._run = run = SparkSubmitRun(
            self._command,
            env=env,
            hook=self._cli_hook,
            submission=intent.submission,
            on_line=lambda line: job._process_spark_submit_log(iter([line])),
            on_job=note,
            output_is_proof=plan.output_is_proof,
        )
        began = time.monotonic()
        try:
            code = talk.run(talk.until_interrupted(run.wait(), timeout=self._left(context)))
        except AirflowTaskTimeout:
            run.kill()  # Airflow's own timer interrupts the loop, and the run goes on in it
            if (ref := self._last_looks(run, intent.submission)) is None:
                if self.on_timeout == "kill":
                    self._kill_half(intent.submission)
                raise
            return self._end_at_deadline(context, ref).job
        finally:
            self._run = None
        self.log.info("spark-submit took %.1f s", time.monotonic() - began)
        if code is None or self._kill_requested:
            return self._stopped(context, run, intent)
        return self._settled(context, run, intent, code=code, job=job)

    def _settled(
        self,
        context: Context,
        run: SparkSubmitRun,
        intent: Record,
        *,
        code: int,
        job: SparkSubmitHook,
    ) -> JobRef:
        """Return the job that came of a run of ``spark-submit`` that has ended by itself."""
        how = f"spark-submit ended with exit code {code}"
        ref = self._conversing.run(run.look()) or run.job
        if ref is not None and not _is_whole(ref, intent.submission):
            ref = None
        if ref is None and (found := self._find(context, intent)) is not None:
            ref = found.status.job
        if ref is not None:
            if code != 0:
                self.log.warning("%s, but the cluster has the job: following %s", how, ref)
            return ref
        if code == 0:
            raise SubmissionUncertain(
                f"{how}, so it submitted the job, but the cluster that connection {self.conn_id!r} names does not know "
                f"it: spark-submit may submit to another one. {way_out(context)}",
                permanent=True,
            )
        self.after_end()
        raise SubmissionRefused(f"{how}: {job._mask_cmd(self._command)}{job._submit_log_tail}")

    def _stopped(self, context: Context, run: SparkSubmitRun, intent: Record) -> JobRef:
        """Return the job of a run that was killed because this process is told to stop, if there is one."""
        if (ref := self._last_looks(run, intent.submission)) is not None:
            return ref
        if self.kill_jobs and self._state_that_ends_it(context):
            self._kill_half(intent.submission)
        raise AirflowException("Told to stop while spark-submit ran: the next try sees what has come of it")

    def _kill_half(self, submission: Submission) -> None:
        """Kill what is only half submitted: no job yet, but it may become one. Where names are another's, nothing."""
        if submission.job is None or self._anothers_name:
            return
        try:
            self._kill(submission.job)
        except ClusterError as error:
            self.log.warning("What spark-submit may have left of %s could not be removed: %s", submission.job, error)

    def _last_looks(self, run: SparkSubmitRun, submission: Submission) -> JobRef | None:
        """Return the job of a run that was killed: a request that it has sent may still arrive."""
        talk, until = self._conversing, time.monotonic() + _LAST_LOOKS
        if run.job is not None and _is_whole(run.job, submission):
            return run.job
        while time.monotonic() < until - _LAST_LOOKS / 2:
            if (ref := talk.run(run.look())) is not None:
                return ref
            talk.run(asyncio.sleep(0.1))
        try:  # not every cluster shows it in a cheap look
            found = talk.run(asyncio.wait_for(talk.hook.find(submission), until - time.monotonic()))
        except SubmissionRefused:  # there is a job of that name, and it is another's
            self._anothers_name = True
            return None
        except (DurableJobError, asyncio.TimeoutError):
            return None
        return found.status.job if isinstance(found, Found) else None

    # Settings

    @property
    def _cli_hook(self) -> SparkCliHook:
        hook = self._conversing.hook
        if not isinstance(hook, SparkCliHook):
            raise BadConfiguration(f"hook: {self.hook_path} does not follow what spark-submit submits")
        return hook

    def _upstream_hook(self) -> SparkSubmitHook:
        if self._hook is None:
            self._hook = self._get_hook()
        return self._hook

    def _outlives_the_worker(self, context: Context) -> bool:
        """Whether the driver runs on the cluster, by the argument, the connection or Spark's own property."""
        hook = self._upstream_hook()
        mode = hook._connection["deploy_mode"] or self._deploy_mode
        if not mode:  # in the order of SparkSubmitArguments.loadEnvironmentArguments
            env = self._environment(hook)
            try:
                mode = self._properties(hook, env).get("spark.submit.deployMode") or env.get("DEPLOY_MODE")
            except BadArguments:
                if self._has_job_on_a_cluster(context):
                    return True  # which runs with the old arguments
                raise
        return str(mode).strip().lower() == "cluster"

    def _expect_no_job_on_a_cluster(self, context: Context) -> None:
        """
        See that no earlier try has a job that may still run. Upstream's half would run a second one beside it.

        Upstream takes a connection that cannot be read for one to YARN without a deploy mode.
        """
        if self._has_job_on_a_cluster(context):
            record = self._recorded
            raise BadConfiguration(
                f"an earlier try submitted {record.job or record.submission.token} in cluster mode, and "
                f"its end was not seen, but connection {self._conn_id!r}, if it can be read, and the arguments name no "
                f"cluster mode now; nothing was submitted. {way_out(context)}"
            )

    def _has_job_on_a_cluster(self, context: Context) -> bool:
        """Whether an earlier try has submitted a job whose end was not seen."""
        if context.get("task_state_store") is not None:
            self._load(context)
        return self._record is not None and self._record.verdict is None

    def _environment(self, hook: SparkSubmitHook) -> Mapping[str, str]:
        own: Mapping[str, Any] = (
            (self.env_vars or {}) if hook._is_yarn else {}
        )  # as upstream gives them to spark-submit
        return {**os.environ, **{str(key): str(value) for key, value in own.items()}}

    def _properties(self, hook: SparkSubmitHook, env: Mapping[str, str]) -> dict[str, str]:
        """Return the properties as ``spark-submit`` will see them."""
        binary = str(hook._connection["spark_binary"])
        properties = dict(read_spark_defaults(self.properties_file, binary=binary, env=env))
        properties.update({str(key): str(value) for key, value in hook._conf.items()})
        if hook._is_kubernetes and (namespace := hook._connection["namespace"]):
            properties["spark.kubernetes.namespace"] = str(namespace)
        return properties


def _is_whole(job: JobRef, submission: Submission) -> bool:
    """Whether it names one job and no other: where the name was known beforehand, it takes the uid as well."""
    return bool(job.uid) or submission.job is None


def _understand_our_connections(hook: SparkSubmitHook) -> None:
    """Have upstream's hook treat a connection of our type as one of its own: it takes the type for a URL's scheme."""
    connection = hook._connection
    scheme, _, master = str(connection["master"]).partition("://")
    if scheme != SparkHook.conn_type:
        return
    if "://" not in master and master.split("[")[0] not in ("yarn", "local"):
        master = f"spark://{master}"
    connection["master"] = master
    hook._should_track_driver_status = hook._resolve_should_track_driver_status()
    if hook._should_track_driver_status and "," not in master:
        host = master.removeprefix("spark://").rsplit(":", 1)[0]
        connection["rest_endpoint"] = f"{connection['rest_scheme']}://{host}:{connection['rest_port']}"
