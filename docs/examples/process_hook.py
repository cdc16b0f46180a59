"""The hook of the job service: all that Airflow has to know of it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout
from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from durable_spark import jobs
from durable_spark.hooks.job import JobHook
from durable_spark.jobs import JobRef, JobState, JobStatus, Submission

_NAME = re.compile(r"airflow-[0-9a-f]{32}")
_LIMIT = 16 << 20  # bytes of an answer
_TIMEOUT = ClientTimeout(total=30, connect=5)
_STATES = {
    "running": JobState.RUNNING,
    "succeeded": JobState.SUCCEEDED,
    "failed": JobState.FAILED,
    "killed": JobState.KILLED,
    "absent": JobState.ABSENT,
}


class ProcessHook(JobHook):
    """One job service. Its connection has a host and a port."""

    async def cluster(self) -> Sequence[str]:
        try:
            connection = await BaseHook.aget_connection(self.conn_id)
        except AirflowNotFoundException as error:
            raise jobs.BadConfiguration(f"there is no connection {self.conn_id!r}") from error
        return [f"http://{connection.host}:{connection.port}"]

    async def prepare(self, job: Any, submission: Submission) -> Submission:
        if not isinstance(job, Mapping) or not _is_command(job.get("command")):
            raise jobs.BadArguments('job: give {"command": ["program", "argument", …]}')
        instance, _ = await self._list()
        ref = JobRef(f"airflow-{submission.token}")
        return dataclasses.replace(submission, job=ref, evidence={"instance": instance})

    async def submit(self, job: Any, submission: Submission) -> JobRef:
        ref = submission.job or JobRef("")
        body = {"command": job["command"]}
        code, answer = await self._ask("PUT", f"/jobs/{ref}", json=body)
        if code not in (201, 409):  # 409: an earlier request has come through
            raise jobs.SubmissionRefused(f"the service answered {code}: {answer}")
        return ref

    async def find(self, submission: Submission) -> jobs.Found | jobs.Absent:
        ref = submission.job or JobRef("")
        instance, states = await self._list()
        if ref.id in states:
            return jobs.Found(status=_status(ref, states))
        if instance == submission.evidence.get("instance"):
            return jobs.Absent()
        why = f"the service was restarted, {ref} may have run before"
        raise jobs.SubmissionUncertain(why, permanent=True)

    async def poll(self, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
        _, states = await self._list() if jobs else ("", {})
        return {job: _status(job, states) for job in jobs}

    async def kill(self, job: JobRef) -> None:
        if _NAME.fullmatch(job.id):
            await self._ask("DELETE", f"/jobs/{job}")

    async def log_tail(self, job: JobRef, lines: int) -> Sequence[str]:
        if not _NAME.fullmatch(job.id):
            return ()
        try:
            _, answer = await self._ask("GET", f"/jobs/{job}/log")
        except jobs.ClusterError:
            return ()
        return [str(line) for line in answer.get("lines", ())][-lines:]

    async def check(self) -> str:
        _, states = await self._list()
        return f"{(await self.cluster())[0]} answers and has {len(states)} jobs"

    async def _list(self) -> tuple[str, Mapping[str, Any]]:
        _, answer = await self._ask("GET", "/jobs")
        instance, states = answer.get("instance"), answer.get("jobs")
        if not isinstance(instance, str) or not isinstance(states, dict):
            raise jobs.InvalidAnswer("GET /jobs: no instance, or no jobs, in the answer")
        return instance, states

    async def _ask(self, method: str, path: str, **more: Any) -> tuple[int, Mapping[str, Any]]:
        url = (await self.cluster())[0] + path
        body = b""
        try:
            http = ClientSession(timeout=_TIMEOUT)
            async with http, http.request(method, url, **more) as response:
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > _LIMIT:
                        raise jobs.InvalidAnswer(f"{url} answered with too many bytes")
            answer = json.loads(body or b"{}")
        except (ClientError, asyncio.TimeoutError) as error:
            why = str(error) or type(error).__name__
            raise jobs.ClusterUnreachable(f"{method} {url}: {why}") from error
        except ValueError as error:
            raise jobs.InvalidAnswer(f"{url}: {response.status}, not JSON") from error
        if response.status >= 500 or not isinstance(answer, dict):
            raise jobs.InvalidAnswer(f"{url}: {response.status}, {answer!r:.200}")
        return response.status, answer


def _is_command(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(part, str) for part in value)


def _status(job: JobRef, states: Mapping[str, Any]) -> JobStatus:
    raw = str(states.get(job.id, "absent"))[:40]
    return JobStatus(job=job, state=_STATES.get(raw, JobState.UNKNOWN), raw=raw)
