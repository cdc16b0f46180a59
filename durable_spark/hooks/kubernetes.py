"""
Spark on Kubernetes: one ``POST`` of a driver pod submits, one watch follows all of them.

What flows in: an Airflow connection (``k8s://https://host:port``) and the arguments of
:class:`~durable_spark.hooks.job.JobHook`'s methods. What flows out: its answers.

The pod's name holds the submission's token, so the job is known before it exists, and the API server itself refuses a
second one (409). A job's ID is ``namespace:pod``, as upstream's operator stores it; its uid tells it from another
pod of the same name.

The trap: a pod that is not there may have been there. It never was if nobody has deleted it, so :meth:`find` reads the
namespace's events, too: scheduler and kubelet leave some for every pod that they had to do with.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import getpass
import re
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from durable_spark.hooks._http import Answer, ConnectFailed, for_each
from durable_spark.hooks._kubernetes_api import Api, Right, is_status, said
from durable_spark.hooks._kubernetes_cli import (
    BEFORE,
    BY_CLI,
    GONE_WITHIN,
    WAIT,
    Place,
    delete_half,
    deployed_job,
    is_by_cli,
    is_whole,
    make_room,
    marked_conf,
    place_in,
    traces_of,
)
from durable_spark.hooks._kubernetes_pod import (
    DEPLOYMENT,
    FINALIZER,
    OWNER,
    TOKEN,
    Driver,
    build_driver,
    deployment_label,
    is_label_value,
    is_namespace,
    is_pod_name,
    owner_reference,
    template_path,
)
from durable_spark.hooks._kubernetes_status import place_of
from durable_spark.hooks._kubernetes_watch import Watches
from durable_spark.hooks._worker_files import read_pod_template, read_properties_file
from durable_spark.hooks.cli import CliSubmission, SparkCliHook
from durable_spark.jobs import (
    Absent,
    BadConfiguration,
    ClusterError,
    ClusterUnreachable,
    DurableJobError,
    Found,
    InvalidAnswer,
    JobRef,
    JobState,
    JobStatus,
    OwnedJob,
    RequestRefused,
    SparkJob,
    Submission,
    SubmissionRefused,
    SubmissionUncertain,
)

if TYPE_CHECKING:
    from durable_spark.hooks._kubernetes_status import Pod
    from durable_spark.hooks.job import Followed

__all__ = ["KubernetesHook"]

ONE_BY_ONE = 8
"""As many pods of a namespace are asked for by name, all at once; for more, the namespace is listed."""
LOG_BYTES = 256 << 10
"""Bytes that the end of a log may have."""
EVENTS_LAST = 3000.0
"""Seconds for which events are sure to be kept (``--event-ttl`` of the API server, an hour)."""
CONFLICTS = 10
"""Times that a pod is read again because it changed before it could be deleted or patched."""
CREATED = (200, 201, 202)
CREATING = "Pending: ContainerCreating"
EXPLAIN_AFTER = 15.0
"""Seconds that a container may take to be created before the pod's events are asked why."""
EXPLAIN_EVERY = 60.0
LOOK_EVERY = 1.0
"""Seconds between two looks at a pod that may be half-made."""

NEEDED = (
    Right("create", "pods"),
    Right("get", "pods"),
    Right("list", "pods"),
    Right("watch", "pods"),
    Right("delete", "pods"),
    Right("get", "pods", "log"),
)
"""What :meth:`KubernetesHook.check` insists on."""
USEFUL = {
    "holding pods": [Right("patch", "pods")],
    "secret settings": [Right(verb, "secrets") for verb in ("create", "get", "patch", "delete")],
    "telling a deleted pod from one that never was": [Right("list", "events")],
    "telling pods that spark-submit left half-made": [Right("get", "configmaps")],
}

_OURS = re.compile(r"-[0-9a-f]{32}\Z")
"""How the names of pods end that hold a token."""


class KubernetesHook(SparkCliHook):
    """
    A namespace of a Kubernetes cluster in which Spark drivers run.

    :param conn_id: an Airflow connection of the type ``durable_spark`` or ``spark``. Host: the master URL
        (``k8s://https://host:port``, or ``k8s://`` alone with a kubeconfig or in a pod). Password: a bearer
        token. Extras: ``namespace``, ``token-file``, ``kubeconfig``, ``context``, ``in-cluster``, ``ca``,
        ``dashboard-url``, ``log-url``, ``history-url``, ``poll-interval``.
    """

    bookmark_seconds: float = 90.0
    """Seconds without a word on a watch after which the API server is taken for hung; bookmarks come every minute."""
    half_submitted_after: float = 10.0
    """Age in seconds from which a pod of ``spark-submit`` without its config map is not believed to get it any more."""
    untold_patience: float = 45.0
    """Age in seconds up to which :meth:`find` waits for a sign whether such a pod is whole, if it may not ask."""

    def __init__(self, conn_id: str) -> None:
        super().__init__(conn_id)
        self._api = Api(conn_id, poll_interval=self.default_poll_interval)
        self._prepared: Mapping[str, Driver] = {}
        self._deleted: dict[JobRef, JobStatus] = {}
        self._explain_again: dict[JobRef, float] = {}

    async def aclose(self) -> None:
        """Close the HTTP session."""
        await self._api.aclose()

    async def cluster(self) -> Sequence[str]:
        """Return the API server's address, as a master URL."""
        settings = await self._api.settings()
        server = settings.server or (await self._api.access()).server
        return [f"k8s://{server}"]

    async def poll_interval(self) -> float:
        """Return the connection's extra ``poll-interval``, or the default. A watch needs none to tell of a change."""
        return (await self._api.settings()).poll_interval

    # --- submit

    async def prepare(self, job: SparkJob, submission: Submission) -> Submission:
        """Check the job and reach the API server. The pod's name is known from here on."""
        driver = await self._driver(job, submission)
        namespace, name = _place(driver)
        _, cluster_time = await self._api.look(namespace, name)
        self._prepared = {submission.token: driver}
        return dataclasses.replace(submission, job=JobRef(f"{namespace}:{name}"), cluster_time=cluster_time)

    async def submit(self, job: SparkJob, submission: Submission) -> JobRef:
        """
        Send the pod. However often it is sent, there is one: its name holds the token.

        A Secret of the same name goes first if there are secret settings, and belongs to the pod afterwards.
        """
        driver = self._prepared.get(submission.token) or await self._driver(job, submission)
        reached = False  # whether a request that was not answered may have been served
        try:
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(3),
                wait=wait_random_exponential(multiplier=0.5, max=5),
                retry=retry_if_exception_type(ClusterUnreachable),
                reraise=True,
            ):
                with attempt:
                    try:
                        return await self._send(driver, submission)
                    except ClusterUnreachable as error:
                        reached = reached or not isinstance(error, ConnectFailed)
                        raise
        except DurableJobError as error:
            if not reached or isinstance(error, SubmissionUncertain):
                raise
            raise SubmissionUncertain(
                f"{error}; whether the pod {_place(driver)[1]} was created cannot be told now. "
                "The next try looks for it"
            ) from error
        raise AssertionError("tenacity returns or raises")

    async def _driver(self, job: SparkJob, submission: Submission) -> Driver:
        defaults = await read_properties_file(job)
        access = await self._api.access()
        return build_driver(
            job,
            submission,
            master=f"k8s://{access.server}",
            namespace=access.namespace,
            defaults=defaults,
            template=await read_pod_template(template_path(job, defaults=defaults)),
            user=await asyncio.to_thread(_user),
        )

    async def _send(self, driver: Driver, submission: Submission) -> JobRef:
        namespace, name = _place(driver)
        if driver.secret is not None and (pod := await self._send_secret(driver, submission)) is not None:
            return pod.status.job
        answer = await self._api.create("pods", namespace, driver.pod)
        if answer.status in CREATED:
            pod = await self._api.read(answer, namespace, name)
        else:
            pod = await self._made_before(driver, submission, answer)
        await self._give_secret_away(pod)
        return pod.status.job

    async def _made_before(self, driver: Driver, submission: Submission, answer: Answer) -> Pod:
        """
        Return the pod that an earlier request has made, if that is why the API server refuses this one.

        Not only a 409 may tell of it: admission comes first, and the pod that is there may have used up a quota.
        """
        namespace, name = _place(driver)
        pod = await self._api.pod(namespace, name)
        if pod is not None:
            return _expect_ours(pod, submission, await said(answer))
        if answer.status == 409:
            raise SubmissionUncertain(
                f"the pod {name} existed a moment ago ({await said(answer)}) and is gone: somebody has deleted it",
                permanent=True,
            )
        if driver.secret is not None:
            await self._drop_secret(namespace, name)
        raise await _refusal(answer)

    async def _send_secret(self, driver: Driver, submission: Submission) -> Pod | None:
        """
        Create the Secret, or take up the one of a try that died before it could send the pod.

        :return: the pod, if that try has sent it after all.
        """
        namespace, name = _place(driver)
        answer = await self._api.create("secrets", namespace, driver.secret or {})
        if answer.status in CREATED:
            return None
        ours = await self._api.secret_token(namespace, name) == submission.token
        # Looked for second: once there is a pod, it owns the Secret, which is then nobody's to take up.
        if (pod := await self._api.pod(namespace, name)) is not None:
            pod = _expect_ours(pod, submission, await said(answer))
            await self._give_secret_away(pod)
            return pod
        if ours:
            await self._api.patch("secrets", namespace, name, driver.secret or {})
            return None
        if answer.status == 409:
            raise SubmissionRefused(f"there is a Secret {name} in {namespace} that is none of this submission's")
        raise await _refusal(answer)

    async def _give_secret_away(self, pod: Pod) -> None:
        """Let the pod own its Secret, so that it is collected with it. Harmless when it does already."""
        namespace, name = place_of(pod.status.job)
        if not pod.has_secret:
            return
        owner = owner_reference({"metadata": {"name": name, "uid": pod.status.job.uid}})
        try:
            await self._api.patch("secrets", namespace, name, {"metadata": {"ownerReferences": [owner]}})
        except RequestRefused as error:  # the pod is there, whatever becomes of its Secret
            self.log.warning("The Secret %s in %s stays when its pod is deleted: %s", name, namespace, error)

    async def _drop_secret(self, namespace: str, name: str) -> None:
        """Delete the Secret of a submission that has no pod."""
        try:
            await self._api.delete("secrets", namespace, name)
        except DurableJobError as error:
            self.log.warning("The Secret %s in %s could not be deleted: %s", name, namespace, error)

    # --- submit by spark-submit

    async def prepare_cli(self, conf: Mapping[str, str], submission: Submission) -> CliSubmission:
        """
        Choose the pod's name, see that it is free and that pods can be read, and set labels by which it is found.

        Where the user gives the name (``spark.kubernetes.driver.pod.name``), an ended pod of the same task that has it
        is deleted. The properties of ``spark-submit`` for its own access (``spark.kubernetes.authenticate.*``,
        ``spark.kubernetes.context``) are its own: the job is followed with what the connection has.
        """
        access = await self._api.access()
        place = place_in(conf, submission, namespace=access.namespace)
        if submission.job is not None and (before := _parse(submission.job)) is not None:
            place = Place(*before)  # it was sent before, perhaps: only under this name is a second pod refused
        marked = marked_conf(conf, submission, place)
        if conf.get(WAIT, "").strip().lower() == "true":
            self.log.info("%s is set to false: the task waits for the end, not spark-submit", WAIT)
        try:
            pod, cluster_time = await self._api.look(*place)
        except RequestRefused as error:
            raise BadConfiguration(
                f"the job could not be followed: the credentials of connection {self.conn_id!r} do not let pods be "
                f"read in namespace {place.namespace!r} ({error}). Grant them the rights on the documentation's page "
                "on Kubernetes, or give others: a token as the password, or one of the extras 'kubeconfig', "
                "'token-file' and 'in-cluster'. What spark-submit uses for itself is not used here"
            ) from error
        evidence, job = dict(BY_CLI), JobRef(f"{place.namespace}:{place.name}")
        if pod is not None and pod.token != submission.token:
            evidence[BEFORE] = await make_room(self._api, pod, submission)
        elif submission.job == job and BEFORE in submission.evidence:  # an earlier try has made room
            evidence[BEFORE] = submission.evidence[BEFORE]
        prepared = dataclasses.replace(submission, job=job, cluster_time=cluster_time, evidence=evidence)
        return CliSubmission(submission=prepared, conf=marked)

    def job_in(self, line: str, submission: Submission) -> JobRef | None:
        """Return the job if ``spark-submit`` says that it has made all of it."""
        return deployed_job(line, submission)

    async def glimpse(self, submission: Submission) -> JobRef | None:
        """Return the pod of the submission's name, if it is there and whole."""
        if submission.job is None or (parsed := _parse(submission.job)) is None:
            return None
        pod = await self._api.pod(*parsed)
        if pod is None or pod.token != submission.token or pod.deleting:
            return None
        whole = await is_whole(self._api, pod, settled_after=self.half_submitted_after)
        return pod.status.job if whole else None

    # --- find

    async def find(self, submission: Submission) -> Found | Absent:
        """
        Look at the pod whose name the submission knows.

        A pod that is not there now never was, unless the namespace's events tell of it: then somebody has deleted it.
        Events last an hour (``--event-ttl``), and reading them is a right that the connection may lack; without it,
        a pod that was deleted in the moment between two tries cannot be told from one that never was.

        A pod that ``spark-submit`` left half-made (it died between pod and config map) is deleted, and seen gone:
        the submission can be sent again. That takes the right to get config maps; without it, the kubelet's word
        that a config map is missing, and with neither the pod is taken for whole.
        """
        if submission.job is None:
            return Absent()  # prepare() did not come that far
        parsed = _parse(submission.job)
        if parsed is None:
            raise InvalidAnswer(f"the submission names {submission.job.id[:80]!r}, which is no pod")
        namespace, name = parsed
        look = self._whole_pod(namespace, name, submission) if is_by_cli(submission) else self._api.pod(namespace, name)
        pod = await look
        if pod is not None:
            pod = _expect_ours(pod, submission, "found by its name")
            await self._give_secret_away(pod)
            return Found(status=pod.status)
        await self._expect_no_trace(namespace, name, submission)
        return Absent()

    async def _whole_pod(self, namespace: str, name: str, submission: Submission) -> Pod | None:
        """Return the pod that spark-submit has made, ``None`` if there is none; a half-made one is deleted first."""
        clock = asyncio.get_running_loop().time
        began = clock()
        while True:
            pod, now = await self._api.look(namespace, name)
            if pod is None or pod.token != submission.token:
                return pod
            waited = clock() - began
            age = waited if now is None or pod.created is None else max(waited, now - pod.created)
            whole = await is_whole(self._api, pod, settled_after=self.half_submitted_after)
            if whole is None and age >= self.untold_patience:
                self.log.warning(
                    "Whether spark-submit made all of %s cannot be told: grant the right to get config maps", name
                )
                whole = True
            if whole:
                return pod
            if waited > max(self.half_submitted_after, self.untold_patience) + GONE_WITHIN:
                raise SubmissionUncertain(
                    f"the pod {name} in {namespace} was left half-made by a spark-submit that died, and its deletion "
                    "does not come to an end. The next try looks again"
                )
            if whole is False and age >= self.half_submitted_after and not pod.deleting:
                await delete_half(self._api, pod)
            await asyncio.sleep(LOOK_EVERY)

    async def _expect_no_trace(self, namespace: str, name: str, submission: Submission) -> None:
        what = f"the pod {name} is not in {namespace}"
        try:
            events, now = await self._api.events(namespace, name)
        except RequestRefused as error:
            self.log.warning("Whether %s was deleted or never was is not looked up: %s", name, error)
            return
        if is_by_cli(submission):
            events = traces_of(events, submission)
        if events:
            raise SubmissionUncertain(
                f"{what} any more, but it was: {events[-1]}. Somebody has deleted it, and its end was not seen",
                permanent=True,
            )
        if submission.cluster_time is not None and now is None:
            raise SubmissionUncertain(
                f"{what}, and if it was, its events may have expired: the API server does not tell the time (header "
                "Date). The next try looks again"
            )
        if submission.cluster_time is not None and now is not None and now - submission.cluster_time > EVENTS_LAST:
            raise SubmissionUncertain(
                f"{what}, and if it was, its events have expired by now: nothing shows that it never was",
                permanent=True,
            )

    async def find_owned(self, deployment: str, owner: str | None = None) -> Sequence[OwnedJob]:
        """Return the pods with these labels in the connection's namespace that live, or are held for their end."""
        terms = [f"{DEPLOYMENT}={deployment_label(deployment)}" if deployment else f"!{DEPLOYMENT}", TOKEN]
        if owner is not None:
            if not is_label_value(owner):
                return ()
            terms.append(f"{OWNER}={owner}")
        access = await self._api.access()
        pods, _ = await self._api.pods(access.namespace, selector=",".join(terms), keep=lambda pod: pod)
        return [
            OwnedJob(status=pod.status, token=pod.token, owner=pod.labels.get(OWNER, ""))
            for pod in pods
            if pod.status.state.active or pod.held
        ]

    # --- follow

    async def poll(self, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
        """Ask for a few pods by name, for many by one list of the namespace's drivers."""
        statuses: dict[JobRef, JobStatus] = {}
        by_namespace: dict[str, dict[str, list[JobRef]]] = {}
        for job in dict.fromkeys(jobs):
            if (parsed := _parse(job)) is None:
                statuses[job] = _absent(job)
            else:
                by_namespace.setdefault(parsed[0], {}).setdefault(parsed[1], []).append(job)
        for namespace, wanted in by_namespace.items():
            pods = await self._look(namespace, wanted.keys())
            for name, refs in wanted.items():
                statuses.update({ref: self._status(ref, pods.get(name)) for ref in refs})
        return statuses

    async def _look(self, namespace: str, names: Collection[str]) -> Mapping[str, JobStatus]:
        found: dict[str, JobStatus] = {}
        if len(names) > ONE_BY_ONE:
            statuses, _ = await self._api.pods(namespace, selector="spark-role=driver", keep=lambda pod: pod.status)
            found = {place_of(status.job)[1]: status for status in statuses}

        async def get(name: str) -> None:
            if (pod := await self._api.pod(namespace, name)) is not None:
                found[name] = pod.status

        await for_each(get, [name for name in names if name not in found], at_once=ONE_BY_ONE)
        return found

    def _status(self, job: JobRef, seen: JobStatus | None) -> JobStatus:
        """Return what is known of a job from the pod of its name, which may be another one."""
        if seen is None or (job.uid and seen.job.uid != job.uid):
            return self._deleted.get(job) or _absent(job)
        return seen if seen.job == job else dataclasses.replace(seen, job=job)

    async def follow(self, followed: Followed) -> AsyncGenerator[Mapping[JobRef, JobStatus], None]:
        """
        Yield what the watches tell, as soon as they do; and on the interval what they cannot tell.

        A pod without our label (adopted from another operator) is in no watch, and one that is missing there may
        only have been missed: both are asked for by name.
        """
        async with Watches(self._api, bookmark_seconds=self.bookmark_seconds) as watches:
            shown: dict[JobRef, JobStatus] = {}
            while True:
                jobs = followed.jobs()
                shown = {job: shown[job] for job in jobs if job in shown}
                new = [job for job in jobs if job not in shown]
                await watches.open({parsed[0] for job in new if (parsed := _parse(job)) is not None})
                by_id: dict[str, list[JobRef]] = {}
                for job in jobs:
                    by_id.setdefault(job.id, []).append(job)
                changed = [job for job_id in watches.take_changes() for job in by_id.get(job_id, ())]
                news = self._take_up(watches, [*new, *changed], shown)
                news.update(await self.poll([job for job in jobs if job not in shown]))
                news.update(await self._explained(watches, shown))
                if news:
                    yield news
                async with contextlib.aclosing(watches.changes(until=followed.pause())) as changes:
                    async for ids in changes:
                        changed = [job for job_id in ids for job in by_id.get(job_id, ())]
                        if news := self._take_up(watches, changed, shown):
                            yield news

    def _take_up(
        self, watches: Watches, jobs: Collection[JobRef], shown: dict[JobRef, JobStatus]
    ) -> dict[JobRef, JobStatus]:
        """Return what the watches show of some jobs, and take it up in what they show of all."""
        news = {}
        for job in jobs:
            if (status := self._watched(watches, job)) is not None:
                news[job] = shown[job] = status
            else:
                shown.pop(job, None)
        return news

    def _watched(self, watches: Watches, job: JobRef) -> JobStatus | None:
        """Return what the watches know of a job; nothing if the pod of its name is another one."""
        seen = watches.status(job)
        if seen is None or job.uid not in ("", seen.job.uid):
            return None
        return seen if seen.job == job else dataclasses.replace(seen, job=job)

    async def _explained(self, watches: Watches, shown: Mapping[JobRef, JobStatus]) -> Mapping[JobRef, JobStatus]:
        """
        Return the statuses of a few pods that wait for something only their events name, such as a missing volume.

        Best effort: a container that is being created says no more than that.
        """
        explained: dict[JobRef, JobStatus] = {}
        now = time.time()
        waiting = [job for job, status in shown.items() if status.raw == CREATING]
        for job in waiting:
            status = watches.status(job)
            if status is None or status.raw != CREATING or now < self._explain_again.get(job, 0.0):
                continue
            if status.held_up_since is None or now - status.held_up_since < EXPLAIN_AFTER:
                continue
            if len(explained) == ONE_BY_ONE:
                break
            self._explain_again[job] = now + EXPLAIN_EVERY
            try:
                events, _ = await self._api.events(*place_of(job), warnings=True)
            except ClusterError as error:
                self.log.debug("The events of %s cannot be read: %s", job, error)
                break
            if events and (better := watches.explain(status, str(events[-1]))) is not None:
                explained[job] = dataclasses.replace(better, job=job)
        return explained

    # --- end

    async def kill(self, job: JobRef) -> None:
        """
        Delete the pod, with its own grace period, if it is there and has not ended.

        It is deleted as it was read (uid and resource version), so that an end that comes in between is kept.
        """
        if (parsed := _parse(job)) is None:
            return
        namespace, name = parsed
        for _ in range(CONFLICTS):
            pod = await self._api.pod(namespace, name)
            if pod is None or job.uid not in ("", pod.status.job.uid) or pod.status.state.final or pod.deleting:
                return
            if await self._api.delete_pod(pod):
                self._deleted[job] = JobStatus(
                    job=job, state=JobState.KILLED, raw="Deleted", message="the pod was deleted while it ran"
                )
                return
        raise ClusterUnreachable(f"the pod {name} in {namespace} changes faster than it can be deleted")

    async def release(self, job: JobRef) -> None:
        """
        Let go of the pod: take our finalizer from it, and delete it if that is to be done at its end.

        Of a submission that has no pod, a Secret that was left is deleted.
        """
        if (parsed := _parse(job)) is None:
            return
        namespace, name = parsed
        for _ in range(CONFLICTS):
            pod = await self._api.pod(namespace, name)
            if pod is None:
                if _OURS.search(name) and await self._api.secret_token(namespace, name):
                    await self._drop_secret(namespace, name)
                return
            if job.uid not in ("", pod.status.job.uid):
                return
            if pod.held:
                kept = [finalizer for finalizer in pod.finalizers if finalizer != FINALIZER]
                patch = {"metadata": {"finalizers": kept, "resourceVersion": pod.version}}
                await self._api.patch("pods", namespace, name, patch)
                continue
            to_delete = pod.at_end == "delete" and pod.status.state.final and not pod.deleting
            if not to_delete or await self._api.delete_pod(pod):
                return
        raise ClusterUnreachable(f"the pod {name} in {namespace} changes faster than it can be let go of")

    async def log_tail(self, job: JobRef, lines: int) -> Sequence[str]:
        """Return the end of the driver's log; nothing once the pod is gone."""
        if (parsed := _parse(job)) is None or lines < 1:
            return ()
        try:
            pod = await self._api.pod(*parsed)
            if pod is None or job.uid not in ("", pod.status.job.uid):
                return ()
            text = await self._api.log(pod, lines=lines, limit=LOG_BYTES)
            while len(text.encode()) >= LOG_BYTES and lines > 1:  # the limit cuts the last lines off, not the first
                lines = max(1, lines // 4)
                text = await self._api.log(pod, lines=lines, limit=LOG_BYTES)
        except DurableJobError as error:
            self.log.info("The log of %s cannot be read: %s", job, error)
            return ()
        return text.splitlines()[-lines:]

    # --- check

    async def check(self) -> str:
        """
        Reach the API server and ask what the credentials may do in the namespace.

        :raises BadConfiguration: naming the rights that are missing.
        """
        version = await self._api.version()
        access = await self._api.access()
        await self._api.expect_namespace(access.namespace)
        missing = [right for right in NEEDED if not await self._api.may(access.namespace, right)]
        if missing:
            raise BadConfiguration(
                f"Kubernetes {version} at {access.server} is reached, but the connection's credentials may not "
                f"{', '.join(map(str, missing))} in namespace {access.namespace!r}: grant it with a Role, as on the "
                "documentation's page on Kubernetes"
            )
        lacking = []
        for use, needed in USEFUL.items():  # Python 3.10 cannot await in a comprehension's comprehension
            rights = [right for right in needed if not await self._api.may(access.namespace, right)]
            if rights:
                lacking.append(f"{use} ({', '.join(map(str, rights))})")
        without = f"; without {', '.join(lacking)}" if lacking else ""
        return f"Kubernetes {version} at {access.server}: drivers may run in namespace {access.namespace!r}{without}"


def _place(driver: Driver) -> tuple[str, str]:
    metadata = driver.pod["metadata"]
    return metadata["namespace"], metadata["name"]


def _parse(job: JobRef) -> tuple[str, str] | None:
    """Return namespace and name of a job ID, ``None`` if it is none of Kubernetes'."""
    namespace, name = place_of(job)
    return (namespace, name) if is_namespace(namespace) and is_pod_name(name) else None


def _absent(job: JobRef) -> JobStatus:
    return JobStatus(job=job, state=JobState.ABSENT, raw="NotFound", message="the API server has no such pod")


def _expect_ours(pod: Pod, submission: Submission, message: str) -> Pod:
    """
    Return a pod that has the submission's name, if it is the submission's.

    :param message: how it was met.
    """
    if pod.token != submission.token:
        namespace, name = place_of(pod.status.job)
        raise SubmissionRefused(f"there is a pod {name} in {namespace} that is none of this submission's: {message}")
    return pod


async def _refusal(answer: Answer) -> DurableJobError:
    """Return what a refused creation means. Nothing was created."""
    text = f"the API server refused the submission ({answer.status}): {await said(answer)}"
    if not await is_status(answer):
        return InvalidAnswer(f"{answer.url} does not answer as an API server: {text}")
    if answer.status == 403 and "quota" not in text:
        text += ". The Test button of the connection says which rights are missing"
    return SubmissionRefused(text)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in /etc/passwd
        return "airflow"
