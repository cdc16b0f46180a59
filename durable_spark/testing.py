"""
The contract of a hook as a test suite, for the authors of hooks.

What :mod:`durable_spark.hooks.job` promises in words, :class:`JobHookContract` checks against a real
service. Its author inherits it, says how to reach the service and what to run there, and writes no
test::

    class TestMyHook(JobHookContract):
        hook_class = MyHook

        @pytest.fixture
        def connection(self):
            return {"conn_type": "my_service", "host": "127.0.0.1", "port": 8000, "password": "hush"}

        @pytest.fixture
        def dead_connection(self):
            return {"conn_type": "my_service", "host": "127.0.0.1", "port": 9, "password": "hush"}

        @pytest.fixture
        def job_that_succeeds(self):
            return {"command": "true"}

        @pytest.fixture
        def job_that_fails(self):
            return {"command": "false"}

        @pytest.fixture
        def job_that_runs(self):
            return {"command": "sleep 600"}

        @pytest.fixture
        def unknown_job(self):
            return JobRef("job-0")

What flows in are those fixtures, which may ask for fixtures of the author's own, of any scope (a
server that is started once, say), and a few attributes that say what the service is able to do.

The trap: pytest explains a failed ``assert`` of this module only if the ``conftest.py`` says
``pytest.register_assert_rewrite("durable_spark.testing")`` before anything imports it.

Needs the extra ``testing`` (pytest and pytest-asyncio).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import pytest
import pytest_asyncio

from durable_spark.jobs import (
    Absent,
    BadArguments,
    BadConfiguration,
    ClusterUnreachable,
    Found,
    JobRef,
    JobState,
    JobStatus,
    Link,
    Submission,
    SubmissionUncertain,
    new_token,
    owner_of,
)

if TYPE_CHECKING:
    from durable_spark.hooks.job import JobHook
    from durable_spark.jobs import OwnedJob

__all__ = ["JobHookContract", "Submit"]

T = TypeVar("T")

Submit = Callable[[Any], Awaitable[tuple[Submission, JobRef]]]
"""Prepares and submits a job, as an operator does, and has it killed when the test ends."""

_MARK = "hostile5f1c"
_HOSTILE = (
    "",
    " ",
    f"../../{_MARK}",
    f"..%2f..%2f{_MARK}",
    f"/{_MARK}",
    f"{_MARK}/../..",
    f"{_MARK} {_MARK}",
    f"{_MARK}?a=b&c=d",
    f"{_MARK}#a",
    f"{_MARK}\n",
    f"{_MARK}\r\nX-Header: {_MARK}",
    f"{_MARK}\0",
    f"http://{_MARK}.invalid/",
    f"$({_MARK})",
    f"{_MARK}\u202e\N{PILE OF POO}",
    _MARK * 1000,
)


class JobHookContract:
    """
    What every hook must pass. Inherit it, name the class ``Test…``, override the fixtures that are asked for.

    Two things to override change what is checked: the attributes below, and the optional fixtures,
    which are ``None`` unless overridden, and whose tests are skipped then.
    """

    hook_class: ClassVar[type[JobHook]]
    """The hook under test."""

    deadline: ClassVar[float] = 60.0
    """Seconds that the service may take for anything: to start a job, to end it, to kill it."""

    interval: ClassVar[float] = 0.2
    """Seconds between two questions while a test waits."""

    refuses_duplicates: ClassVar[bool] = False
    """Whether the service itself refuses a second job of a submission, so that even two submissions of it at the
    same moment make one job. Without it, that is between the hook and the task's record alone, and not checked."""

    proves_absence: ClassVar[bool] = True
    """Whether :meth:`JobHook.find` can prove that a submission was never sent.
    Without it, it must say :class:`~durable_spark.jobs.SubmissionUncertain`."""

    keeps_labels: ClassVar[bool] = False
    """Whether :meth:`JobHook.find_owned` is implemented."""

    # What an author gives

    @pytest.fixture
    def connection(self) -> Mapping[str, Any]:
        """Return the Airflow connection to the service, as its JSON form takes it: ``conn_type``, ``host``, …"""
        raise NotImplementedError("override the fixture 'connection': the Airflow connection to the service, as a dict")

    @pytest.fixture
    def dead_connection(self) -> Mapping[str, Any]:
        """Return a connection like :meth:`connection`, but to an address at which nothing listens; with a password."""
        raise NotImplementedError("override the fixture 'dead_connection': a connection to where nothing listens")

    @pytest.fixture
    def job_that_succeeds(self) -> Any:
        """Return a job, as :meth:`JobHook.prepare` takes it, that ends well within seconds."""
        raise NotImplementedError("override the fixture 'job_that_succeeds': a job that ends well within seconds")

    @pytest.fixture
    def job_that_fails(self) -> Any:
        """Return a job that fails within seconds."""
        raise NotImplementedError("override the fixture 'job_that_fails': a job that fails within seconds")

    @pytest.fixture
    def job_that_runs(self) -> Any:
        """Return a job that runs for longer than any test waits, until it is killed."""
        raise NotImplementedError("override the fixture 'job_that_runs': a job that runs until it is killed")

    @pytest.fixture
    def unknown_job(self) -> JobRef:
        """Return a well-formed name of a job that the service has never had."""
        raise NotImplementedError("override the fixture 'unknown_job': a well-formed JobRef that the service never had")

    # What an author may give

    @pytest.fixture
    def wrong_job(self) -> Any:
        """Return a job that :meth:`JobHook.prepare` must refuse: it asks for what this service cannot do."""
        return None

    @pytest.fixture
    def all_jobs(self) -> Callable[[], Collection[str] | Awaitable[Collection[str]]] | None:
        """
        Return a function that lists the IDs of all the jobs that the service has, ended ones, too.

        It is the witness for "one job per submission", so it does not use the hook.
        """
        return None

    @pytest.fixture
    def restart(self) -> Callable[[], object] | None:
        """Return a function that stops the service and starts it again; its jobs run on."""
        return None

    @pytest.fixture
    def forget(self) -> Callable[[JobRef], object] | None:
        """Return a function that makes the service forget a job that has ended."""
        return None

    # How a job is submitted. Override both for a hook that follows what something else submits

    async def prepare(self, hook: JobHook, job: Any, submission: Submission) -> Submission:
        """Check a job and return the submission as it is written to the store. Nothing may be submitted."""
        return await hook.prepare(job, submission)

    async def send(self, hook: JobHook, job: Any, submission: Submission) -> JobRef:
        """Submit a job, unless its submission was sent before: then return what has become of it."""
        return await hook.submit(job, submission)

    # What the tests use. The functions that an author gives may be asynchronous; others run in a thread

    @pytest.fixture
    def conn_id(self, connection: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
        """Return the ID of the connection, which Airflow finds in the environment."""
        monkeypatch.setenv("AIRFLOW_CONN_CONTRACT", json.dumps(connection))
        return "contract"

    @pytest.fixture
    def dead_conn_id(self, dead_connection: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
        """Return the ID of the dead connection."""
        monkeypatch.setenv("AIRFLOW_CONN_CONTRACT_DEAD", json.dumps(dead_connection))
        return "contract_dead"

    @pytest_asyncio.fixture
    async def hook(self, conn_id: str) -> AsyncIterator[JobHook]:
        """Make the hook under test, in the loop of the test."""
        async with self.hook_class(conn_id) as hook:
            yield hook

    @pytest_asyncio.fixture
    async def another_hook(self, conn_id: str) -> AsyncIterator[JobHook]:
        """Make a second hook, which knows nothing of what the first one did: what a retry has after a crash."""
        async with self.hook_class(conn_id) as hook:
            yield hook

    @pytest_asyncio.fixture
    async def dead_hook(self, dead_conn_id: str) -> AsyncIterator[JobHook]:
        """Make a hook whose service is out of reach."""
        async with self.hook_class(dead_conn_id) as hook:
            yield hook

    @pytest_asyncio.fixture
    async def kill_later(self, hook: JobHook) -> AsyncIterator[Callable[[JobRef], None]]:
        """Return a function that has a job killed when the test ends."""
        jobs: set[JobRef] = set()
        yield jobs.add
        for job in jobs:
            await hook.kill(job)

    @pytest.fixture
    def submit(self, hook: JobHook, kill_later: Callable[[JobRef], None]) -> Submit:
        """Return a function that submits as an operator does: prepare, store, send."""

        async def submit(job: Any) -> tuple[Submission, JobRef]:
            submission = await self.prepare(hook, job, _new_submission())
            ref = await self.send(hook, job, _from_store(submission))
            kill_later(ref)
            return submission, ref

        return submit

    # The connection

    def test_constructor_does_no_io(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Dag files and feeds construct hooks often: the connection is read on first use."""

        def refuse(*_: object, **__: object) -> None:
            pytest.fail("the constructor opened a socket or looked a name up")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        assert self.hook_class("no_such_connection").conn_id == "no_such_connection"

    @pytest.mark.asyncio
    async def test_connection_that_does_not_exist_is_named(self) -> None:
        """A wrong connection ID is BadConfiguration, and the message names it."""
        async with self.hook_class("no_such_connection") as hook:
            with pytest.raises(BadConfiguration, match="no_such_connection"):
                await hook.cluster()
            with pytest.raises(BadConfiguration, match="no_such_connection"):
                await hook.check()

    @pytest.mark.asyncio
    async def test_cluster_has_a_name_that_holds_no_secret(
        self, hook: JobHook, another_hook: JobHook, connection: Mapping[str, Any]
    ) -> None:
        """The names of a cluster are written to the record and shown."""
        names = await hook.cluster()
        assert names, "a cluster must have a name"
        assert all(isinstance(name, str) and name for name in names)
        assert list(names) == list(await hook.cluster()) == list(await another_hook.cluster()), "the names change"
        _assert_no_secret(connection, *names)

    @pytest.mark.asyncio
    async def test_cluster_is_named_by_the_connection_alone(self, hook: JobHook, dead_hook: JobHook) -> None:
        """It is compared when the cluster may be out of reach."""
        dead = await dead_hook.cluster()
        assert dead
        assert not set(dead) & set(await hook.cluster()), "two connections to two services name the same cluster"

    @pytest.mark.asyncio
    async def test_poll_interval_is_positive(self, hook: JobHook) -> None:
        """The feed waits that long."""
        assert await hook.poll_interval() > 0

    @pytest.mark.asyncio
    async def test_check_says_in_one_line_what_was_reached(self, hook: JobHook, connection: Mapping[str, Any]) -> None:
        """The line is what a person reads who pressed Airflow's Test button."""
        line = await hook.check()
        assert line.strip()
        assert len(line.splitlines()) == 1
        _assert_no_secret(connection, line)

    def test_button_of_a_good_connection(self, conn_id: str) -> None:
        """Airflow calls it from a thread that has no event loop."""
        well, message = self.hook_class(conn_id).test_connection()
        assert well, message
        assert message.strip()

    def test_button_of_a_dead_address(
        self, dead_conn_id: str, dead_connection: Mapping[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        """It says what is wrong, and shows no secret, nor does the log."""
        with caplog.at_level("DEBUG"):
            well, message = self.hook_class(dead_conn_id).test_connection()
        assert not well
        assert len(message) > len(ClusterUnreachable.__name__) + 10, f"it says too little: {message!r}"
        _assert_no_secret(dead_connection, message, caplog.text)

    @pytest.mark.asyncio
    async def test_hook_can_be_used_again_after_aclose(self, hook: JobHook, unknown_job: JobRef) -> None:
        """A feed closes its hook when nothing is left to follow."""
        await hook.poll([unknown_job])
        await hook.aclose()
        await hook.aclose()
        assert (await hook.poll([unknown_job]))[unknown_job].state is JobState.ABSENT

    # A cluster out of reach

    @pytest.mark.asyncio
    async def test_cluster_out_of_reach_says_nothing_of_any_job(
        self, hook: JobHook, dead_hook: JobHook, job_that_runs: Any, unknown_job: JobRef
    ) -> None:
        """No answer is never an absence: who takes it for one submits twice."""
        submission = await self.prepare(hook, job_that_runs, _new_submission())
        with pytest.raises(ClusterUnreachable):
            await dead_hook.check()
        with pytest.raises(ClusterUnreachable):
            await dead_hook.poll([unknown_job])
        with pytest.raises((ClusterUnreachable, SubmissionUncertain)):
            await dead_hook.find(submission)
        with pytest.raises(ClusterUnreachable):
            await dead_hook.kill(unknown_job)
        assert list(await dead_hook.log_tail(unknown_job, 10)) == []

    # Submitting

    @pytest.mark.asyncio
    async def test_prepare_submits_nothing(
        self, hook: JobHook, another_hook: JobHook, job_that_runs: Any, all_jobs: Callable[[], Any] | None
    ) -> None:
        """The intent is stored after prepare, so nothing may have been sent."""
        before = await _call(all_jobs)
        bare = _new_submission()
        submission = await self.prepare(hook, job_that_runs, bare)
        for field in ("token", "owner", "deployment", "ordinal", "name"):
            assert getattr(submission, field) == getattr(bare, field), f"prepare changed {field}"
        await self._assert_never_sent(another_hook, submission)
        assert await _call(all_jobs) == before

    @pytest.mark.asyncio
    async def test_submission_survives_the_store(self, hook: JobHook, job_that_runs: Any) -> None:
        """A retry has nothing but what the store gave back."""
        submission = await self.prepare(hook, job_that_runs, _new_submission())
        assert _from_store(submission) == submission
        evidence = json.dumps(dict(submission.evidence))
        assert len(evidence) <= 1024, f"evidence of {len(evidence)} bytes: at most a kilobyte"

    @pytest.mark.asyncio
    async def test_wrong_job_is_refused_before_anything_is_sent(
        self, hook: JobHook, wrong_job: Any, all_jobs: Callable[[], Any] | None
    ) -> None:
        """Bad arguments are told before anything is submitted."""
        _need(wrong_job, "wrong_job")
        before = await _call(all_jobs)
        with pytest.raises(BadArguments) as caught:
            await self.prepare(hook, wrong_job, _new_submission())
        assert str(caught.value).strip()
        assert await _call(all_jobs) == before

    @pytest.mark.asyncio
    async def test_submitted_job_is_known_at_once(self, hook: JobHook, submit: Submit, job_that_runs: Any) -> None:
        """What submit returned is what poll knows."""
        submission, ref = await submit(job_that_runs)
        assert isinstance(ref, JobRef)
        if submission.job is not None:
            assert ref.id == submission.job.id, "prepare foretold another job"
        status = (await hook.poll([ref]))[ref]
        assert status.job == ref
        assert status.state.active, f"just submitted, and {status}"

    @pytest.mark.asyncio
    async def test_submission_sent_twice_makes_one_job(
        self,
        hook: JobHook,
        another_hook: JobHook,
        submit: Submit,
        job_that_runs: Any,
        all_jobs: Callable[[], Any] | None,
    ) -> None:
        """However often a submission is sent, by whomever: one job."""
        before = await _call(all_jobs)
        submission, ref = await submit(job_that_runs)
        stored = _from_store(submission)
        assert await self._certain(lambda: self.send(hook, job_that_runs, stored)) == ref
        assert await self._certain(lambda: self.send(another_hook, job_that_runs, stored)) == ref, (
            "submitted after a crash"
        )
        await self._until(hook, ref, JobState.RUNNING)
        assert await self._certain(lambda: self.send(another_hook, job_that_runs, stored)) == ref
        if before is not None:
            assert set(await _call(all_jobs)) - set(before) == {ref.id}

    @pytest.mark.asyncio
    async def test_submission_sent_twice_at_once_makes_one_job(
        self,
        hook: JobHook,
        another_hook: JobHook,
        kill_later: Callable[[JobRef], None],
        job_that_runs: Any,
        all_jobs: Callable[[], Any] | None,
    ) -> None:
        """The service itself settles a race of two workers."""
        if not self.refuses_duplicates:
            pytest.skip("refuses_duplicates is False")
        before = await _call(all_jobs)
        submission = await self.prepare(hook, job_that_runs, _new_submission())

        async def send(sender: JobHook) -> JobRef:
            return await self._certain(lambda: self.send(sender, job_that_runs, submission))

        refs = await asyncio.gather(*(send(sender) for sender in (hook, another_hook, hook, another_hook)))
        for ref in refs:
            kill_later(ref)
        assert len(set(refs)) == 1
        if before is not None:
            assert set(await _call(all_jobs)) - set(before) == {refs[0].id}

    # Finding what a worker that died had submitted

    @pytest.mark.asyncio
    async def test_find_tells_submissions_apart(
        self, hook: JobHook, another_hook: JobHook, submit: Submit, job_that_runs: Any, job_that_succeeds: Any
    ) -> None:
        """A job is found while it runs and when it has ended; one that was never sent is not."""
        first, running = await submit(job_that_runs)
        second, ending = await submit(job_that_succeeds)
        never = await self.prepare(hook, job_that_runs, _new_submission())

        found = await self._find(another_hook, first)
        assert found.status.job == running
        assert found.status.state.active
        assert not found.younger
        assert (await self._find(another_hook, second)).status.job == ending
        await self._assert_never_sent(another_hook, never)

        await self._until(hook, ending, JobState.SUCCEEDED)
        found = await self._find(another_hook, second)
        assert found.status.job == ending, "a job that has ended is not found"
        assert found.status.state is JobState.SUCCEEDED

    @pytest.mark.asyncio
    async def test_find_owned(self, hook: JobHook, submit: Submit, job_that_runs: Any) -> None:
        """Live jobs are found by the labels of whoever submitted them, and by no other's."""
        if not self.keeps_labels:
            pytest.skip("keeps_labels is False")
        submission, ref = await submit(job_that_runs)
        other, _ = await submit(job_that_runs)
        await self._until(hook, ref, JobState.RUNNING)

        async def live(deployment: str, owner: str | None = None) -> dict[JobRef, OwnedJob]:
            return {each.status.job: each for each in await hook.find_owned(deployment, owner)}

        until = time.monotonic() + self.deadline
        while True:  # a job may be running before its labels show
            owned = await live(submission.deployment)
            if ref in owned or time.monotonic() > until:
                break
            await asyncio.sleep(self.interval)
        assert ref in owned
        assert (owned[ref].token, owned[ref].owner) == (submission.token, submission.owner)
        assert list(await live(submission.deployment, submission.owner)) == [ref]
        assert ref not in await live(submission.deployment, other.owner)
        assert not await live(f"{submission.deployment}-of-somebody-else")

        await hook.kill(ref)
        await self._until(hook, ref, JobState.KILLED)
        assert not await live(submission.deployment, submission.owner), "a job that has ended is not live"

    # Following

    @pytest.mark.asyncio
    async def test_job_that_succeeds(self, hook: JobHook, submit: Submit, job_that_succeeds: Any) -> None:
        """It is active until it has succeeded, and that is final."""
        _, ref = await submit(job_that_succeeds)
        status = await self._until(hook, ref, JobState.SUCCEEDED)
        _assert_presentable(status)
        assert (await hook.poll([ref]))[ref].state is JobState.SUCCEEDED, "a final state changed"

    @pytest.mark.asyncio
    async def test_job_that_fails(self, hook: JobHook, submit: Submit, job_that_fails: Any) -> None:
        """It is active until it has failed; the tail of its log is no longer than was asked for."""
        _, ref = await submit(job_that_fails)
        status = await self._until(hook, ref, JobState.FAILED)
        _assert_presentable(status)
        for lines in (1, 5):
            tail = await hook.log_tail(ref, lines)
            assert len(tail) <= lines
            assert all(isinstance(line, str) for line in tail)

    @pytest.mark.asyncio
    async def test_poll_answers_for_every_job_at_once(
        self, hook: JobHook, submit: Submit, job_that_runs: Any, job_that_fails: Any, unknown_job: JobRef
    ) -> None:
        """Each job gets its own answer, whatever else was asked about."""
        _, failing = await submit(job_that_fails)
        _, running = await submit(job_that_runs)
        await self._until(hook, failing, JobState.FAILED)
        await self._until(hook, running, JobState.RUNNING)
        stranger = JobRef(_HOSTILE[2])
        answer = await hook.poll([running, unknown_job, failing, stranger, running])
        assert {ref: status.state for ref, status in answer.items()} == {
            running: JobState.RUNNING,
            failing: JobState.FAILED,
            unknown_job: JobState.ABSENT,
            stranger: JobState.ABSENT,
        }
        assert all(status.job == ref for ref, status in answer.items())
        assert not await hook.poll([]), "nothing was asked"

    @pytest.mark.asyncio
    async def test_unknown_job_is_absent(self, hook: JobHook, unknown_job: JobRef) -> None:
        """A healthy service says of a job that it does not know it."""
        assert (await hook.poll([unknown_job]))[unknown_job].state is JobState.ABSENT
        assert list(await hook.log_tail(unknown_job, 10)) == []

    @pytest.mark.asyncio
    async def test_follow_tells_of_jobs_old_and_new(
        self, hook: JobHook, submit: Submit, job_that_runs: Any, job_that_succeeds: Any
    ) -> None:
        """A follower is told of a job that joins late, also if its end is long past."""
        _, ended = await submit(job_that_succeeds)
        await self._until(hook, ended, JobState.SUCCEEDED)
        _, first = await submit(job_that_runs)
        followed = _FollowedJobs(self.interval)
        followed.add(first)
        seen: dict[JobRef, JobState] = {}

        async def until(states: Mapping[JobRef, JobState]) -> None:
            async for news in stream:
                seen.update({ref: status.state for ref, status in news.items()})
                if seen.items() >= states.items():
                    return

        async with contextlib.aclosing(hook.follow(followed)) as stream:
            await asyncio.wait_for(until({first: JobState.RUNNING}), self.deadline)
            followed.add(ended)  # a triggerer took it over: its end is not news, and must be told
            await asyncio.wait_for(until({ended: JobState.SUCCEEDED}), self.deadline)
            await hook.kill(first)
            await asyncio.wait_for(until({first: JobState.KILLED}), self.deadline)

    # Killing

    @pytest.mark.asyncio
    async def test_kill_may_be_repeated(self, hook: JobHook, submit: Submit, job_that_runs: Any) -> None:
        """A kill may come again while the job ends, and after."""
        _, ref = await submit(job_that_runs)
        await self._until(hook, ref, JobState.RUNNING)
        await hook.kill(ref)
        await hook.kill(ref)
        status = await self._until(hook, ref, JobState.KILLED)
        _assert_presentable(status)
        await hook.kill(ref)
        assert (await hook.poll([ref]))[ref].state is JobState.KILLED

    @pytest.mark.asyncio
    async def test_kill_at_once(self, hook: JobHook, submit: Submit, job_that_runs: Any) -> None:
        """A job is killed also before it runs."""
        _, ref = await submit(job_that_runs)
        await hook.kill(ref)
        await self._until(hook, ref, JobState.KILLED)

    @pytest.mark.asyncio
    async def test_kill_changes_no_end(self, hook: JobHook, submit: Submit, job_that_succeeds: Any) -> None:
        """A job that has ended stays as it ended."""
        _, ref = await submit(job_that_succeeds)
        await self._until(hook, ref, JobState.SUCCEEDED)
        await hook.kill(ref)
        assert (await hook.poll([ref]))[ref].state is JobState.SUCCEEDED

    @pytest.mark.asyncio
    async def test_kill_of_an_unknown_job_is_quiet(self, hook: JobHook, unknown_job: JobRef) -> None:
        """There is nothing to kill."""
        await hook.kill(unknown_job)

    @pytest.mark.asyncio
    async def test_release_may_be_repeated(
        self, hook: JobHook, another_hook: JobHook, submit: Submit, job_that_succeeds: Any, unknown_job: JobRef
    ) -> None:
        """A task lets go of a job at least once, whether or not an earlier try has, or the job is still known."""
        _, ref = await submit(job_that_succeeds)
        await self._until(hook, ref, JobState.SUCCEEDED)
        await hook.release(ref)
        await another_hook.release(ref)
        await hook.release(unknown_job)

    # What comes from a store or a cluster is not trusted

    @pytest.mark.asyncio
    @pytest.mark.parametrize("job_id", _HOSTILE, ids=lambda job_id: ascii(job_id)[:30])
    async def test_id_that_is_not_ours_is_never_sent(
        self, hook: JobHook, job_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An ID from a store may be anything: it is absent, and stays here."""
        sent = _record_what_is_sent(monkeypatch)
        for ref in (JobRef(job_id), JobRef(job_id, uid=_MARK)):
            assert (await hook.poll([ref]))[ref].state is JobState.ABSENT
            await hook.kill(ref)
            await hook.release(ref)
            assert list(await hook.log_tail(ref, 10)) == []
        assert _MARK.encode() not in sent, f"{job_id!r} was sent to the cluster"

    # What not every service can be made to do

    @pytest.mark.asyncio
    async def test_job_is_followed_over_a_restart(
        self,
        hook: JobHook,
        another_hook: JobHook,
        submit: Submit,
        job_that_runs: Any,
        restart: Callable[[], object] | None,
    ) -> None:
        """The service is stopped and started: the job runs on, is followed, found and killed."""
        _need(restart, "restart")
        submission, ref = await submit(job_that_runs)
        await self._until(hook, ref, JobState.RUNNING)
        await _call(restart)
        await self._until(hook, ref, JobState.RUNNING, tolerant=True)
        assert (await self._find(another_hook, submission)).status.job == ref
        await hook.kill(ref)
        await self._until(hook, ref, JobState.KILLED)

    @pytest.mark.asyncio
    async def test_forgotten_job_is_absent_and_not_submitted_again(
        self,
        hook: JobHook,
        another_hook: JobHook,
        submit: Submit,
        job_that_succeeds: Any,
        forget: Callable[[JobRef], object] | None,
    ) -> None:
        """What the service has forgotten is not known; that it never was cannot be proven."""
        _need(forget, "forget")
        submission, ref = await submit(job_that_succeeds)
        await self._until(hook, ref, JobState.SUCCEEDED)
        await _call(forget, ref)
        assert (await hook.poll([ref]))[ref].state is JobState.ABSENT
        with contextlib.suppress(SubmissionUncertain):
            assert isinstance(await another_hook.find(submission), Found), "it existed, so its absence cannot be proven"

    # Waiting

    async def _until(self, hook: JobHook, job: JobRef, wanted: JobState, *, tolerant: bool = False) -> JobStatus:
        """Poll until the job is in a state. ``tolerant`` of a cluster that is out of reach meanwhile."""
        seen: list[object] = []
        until = time.monotonic() + self.deadline
        while time.monotonic() < until:
            try:
                status = (await hook.poll([job]))[job]
            except ClusterUnreachable as error:
                if not tolerant:
                    raise
                seen.append(str(error))
            else:
                if status.state is wanted:
                    return status
                if not seen or seen[-1] != status:
                    seen.append(status)
                if not status.state.active:
                    break
            await asyncio.sleep(self.interval)
        pytest.fail(f"{job} was to become {wanted.value}; in {self.deadline:g} s it was: {seen}")

    async def _certain(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until the answer is certain. An uncertainty that may pass is an answer, but must pass."""
        until = time.monotonic() + self.deadline
        while True:
            try:
                return await ask()
            except SubmissionUncertain as uncertain:
                if uncertain.permanent or time.monotonic() > until:
                    raise
            await asyncio.sleep(self.interval)

    async def _find(self, hook: JobHook, submission: Submission) -> Found:
        found = await self._certain(lambda: hook.find(_from_store(submission)))
        assert isinstance(found, Found), f"{submission} was submitted"
        return found

    async def _assert_never_sent(self, hook: JobHook, submission: Submission) -> None:
        if self.proves_absence:
            assert await self._certain(lambda: hook.find(_from_store(submission))) == Absent()
            return
        with pytest.raises(SubmissionUncertain) as caught:
            await hook.find(_from_store(submission))
        assert len(str(caught.value)) > 40, "it says too little of the way out"


class _FollowedJobs:
    """The jobs that a feed follows, as :class:`~durable_spark.hooks.job.Followed` shows them to a hook."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._jobs: list[JobRef] = []
        self._added = asyncio.Event()

    def add(self, job: JobRef) -> None:
        self._jobs.append(job)
        self._added.set()

    def jobs(self) -> Collection[JobRef]:
        return tuple(self._jobs)

    async def pause(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._added.wait(), self._interval)
        self._added.clear()


def _new_submission() -> Submission:
    task = f"task_{secrets.token_hex(4)}"
    owner = owner_of(deployment="contract", dag_id="contract", run_id="run", task_id=task, map_index=-1)
    return Submission(token=new_token(), owner=owner, deployment="contract", name=f"contract.{task}")


def _from_store(submission: Submission) -> Submission:
    """Return the submission as a retry reads it."""
    return Submission.from_json(json.loads(json.dumps(submission.to_json())))


def _need(given: object, name: str) -> None:
    if given is None:
        pytest.skip(f"the fixture {name!r} is not overridden")


async def _call(function: Callable[..., Any] | None, *arguments: object) -> Any:
    """Call what an author gave: in this loop if it is asynchronous, else in a thread."""
    if function is None:
        return None
    if inspect.iscoroutinefunction(function):
        return await function(*arguments)
    return await asyncio.to_thread(function, *arguments)


def _assert_no_secret(connection: Mapping[str, Any], *texts: str) -> None:
    password = connection.get("password")
    for text in texts:
        assert not password or password not in text, "the connection's password is shown"


def _assert_presentable(status: JobStatus) -> None:
    """Check what a person will read of a status."""
    assert status.raw, "the cluster's own word for the state is missing"
    assert len(status.message) <= 10_000
    assert all(isinstance(link, Link) for link in status.links)
    assert all(url.startswith(("http://", "https://")) for url in status.links.values()), dict(status.links)


def _record_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> bytearray:
    """Return a buffer that gets a copy of what this process sends through its sockets (TLS: encrypted)."""
    sent = bytearray()

    def record(name: str) -> None:
        send = getattr(socket.socket, name)

        def recording(this: socket.socket, data: Any, *arguments: Any) -> Any:
            for part in cast("Iterable[bytes]", data if name == "sendmsg" else (data,)):
                sent.extend(part)
            return send(this, data, *arguments)

        monkeypatch.setattr(socket.socket, name, recording)

    for name in ("send", "sendall", "sendmsg"):
        record(name)
    return sent
