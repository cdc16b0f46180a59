"""
What happens to a hook when real standalone clusters fail: each promise beside the witness's account.

The witness is what the master lists and what the workers have on disk, read without the hook.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dev.processes import free_port, wait_until, wait_until_async
from dev.proxy import Proxy
from dev.spark import HighlyAvailableCluster, StandaloneCluster, ensure_spark
from durable_spark.hooks import _http
from durable_spark.hooks.standalone import StandaloneHook
from durable_spark.jobs import (
    Absent,
    AuthenticationFailed,
    BadConfiguration,
    ClusterUnreachable,
    DurableJobError,
    Found,
    JobRef,
    JobState,
    Submission,
    SubmissionRefused,
    SubmissionUncertain,
)
from tests.conftest import require
from tests.standalone import jvm_job, jws, pyspark_job
from tests.submitting import new_submission, states_during, submit, until

if TYPE_CHECKING:
    from tests.cluster.conftest import Connect, Guarded

TOO_BIG = {"driver_cores": 10_000}  # such a driver is queued for ever


def ids(cluster: StandaloneCluster) -> set[str]:
    return {driver.id for driver in cluster.drivers()}


def processes_of(driver: str) -> list[Path]:
    def of_driver(path: Path) -> bool:
        try:
            return driver in path.read_text()
        except OSError:
            return False

    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if of_driver(path)]


def log_of(cluster: StandaloneCluster, job: JobRef, name: str) -> str:
    (path,) = [path for worker in cluster.workers for path in worker.directory.glob(f"{job.id}/{name}")]
    return path.read_text()


async def find(hook: StandaloneHook, submission: Submission, *, within: float = 60.0) -> Found | Absent:
    """Find the job, asking again while that may help."""
    give_up = time.monotonic() + within
    while True:
        try:
            return await hook.find(submission)
        except (SubmissionUncertain, ClusterUnreachable) as error:
            if getattr(error, "permanent", False) or time.monotonic() > give_up:
                raise
        await asyncio.sleep(0.2)


# --- jobs of all kinds


async def test_pyspark_runs_on_the_cluster_and_its_end_is_told(
    standalone_cluster: StandaloneCluster, connect: Connect
) -> None:
    hook = connect(standalone_cluster.connection())
    jobs = {
        (await submit(hook, pyspark_job(0, end, name=f"count-{end}")))[1]: (end, state)
        for end, state in (("0", JobState.SUCCEEDED), ("raise", JobState.FAILED))
    }
    for job, (end, state) in jobs.items():
        await until(hook, job, state, deadline=120)
        output = log_of(standalone_cluster, job, "stdout")
        assert f"master={standalone_cluster.url}" in output, "it did not run on the cluster"
        assert "total=4950" in output
        assert ("RuntimeError: raised as told" in output) == (end == "raise")
    applications = standalone_cluster.leader().page()["completedapps"]
    assert {f"count-{end}" for end, _ in jobs.values()} <= {application["name"] for application in applications}


@pytest.mark.parametrize("exit_code", [0, 1, 255])
async def test_exit_code_decides(exit_code: int, standalone_cluster: StandaloneCluster, connect: Connect) -> None:
    hook = connect(standalone_cluster.connection())
    _, job = await submit(hook, jvm_job(0, exit_code))
    status = await until(hook, job, JobState.SUCCEEDED, JobState.FAILED)
    assert status.state is (JobState.FAILED if exit_code else JobState.SUCCEEDED)
    assert (await hook.log_tail(job, 1)) == [f"exiting with {exit_code}"]


async def test_application_that_does_not_exist_fails(pair: HighlyAvailableCluster, connect: Connect) -> None:
    hook = connect(pair.connection())
    _, job = await submit(hook, jvm_job(0, application="/nowhere/app.jar"))
    status = await until(hook, job, JobState.FAILED)
    assert status.raw == "ERROR"
    assert "/nowhere/app.jar" in status.message


async def test_killed_driver_leaves_no_process(standalone_cluster: StandaloneCluster, connect: Connect) -> None:
    hook = connect(standalone_cluster.connection())
    _, job = await submit(hook, jvm_job(600))
    await until(hook, job, JobState.RUNNING)
    wait_until(lambda: processes_of(job.id), 30, "the driver's process")
    await hook.kill(job)
    await until(hook, job, JobState.KILLED)
    assert not processes_of(job.id)


async def test_driver_that_is_queued_is_waited_for_and_can_be_killed(
    standalone_cluster: StandaloneCluster, connect: Connect
) -> None:
    hook = connect(standalone_cluster.connection(), StandaloneHook)
    hook.queue_patience = 2.0
    submission, job = await submit(hook, jvm_job(0, **TOO_BIG))
    assert (await hook.poll([job]))[job].state is JobState.PENDING
    with pytest.raises(SubmissionUncertain, match="queued") as uncertain:
        await hook.find(submission)
    assert not uncertain.value.permanent
    await hook.kill(job)
    await until(hook, job, JobState.KILLED)


# --- a worker, or its page, is out of reach


async def test_worker_page_out_of_reach_is_no_absence(standalone_cluster: StandaloneCluster, connect: Connect) -> None:
    hook = connect(standalone_cluster.connection())
    before = ids(standalone_cluster)
    submission, job = await submit(hook, jvm_job(600))
    never = await hook.prepare(jvm_job(600), new_submission())
    await until(hook, job, JobState.RUNNING)
    (worker,) = standalone_cluster.workers
    worker.server.suspend()
    try:
        retry = connect(standalone_cluster.connection(), StandaloneHook)
        with pytest.raises(SubmissionUncertain) as uncertain:
            await retry.find(submission)
        assert not uncertain.value.permanent
        with pytest.raises(SubmissionUncertain):
            await retry.submit(jvm_job(600), submission)
        with pytest.raises(SubmissionUncertain):
            await retry.submit(jvm_job(600), never)
    finally:
        worker.server.resume()
    found = await find(retry, submission)
    assert isinstance(found, Found)
    assert found.status.job == job
    assert await find(retry, never) == Absent()
    assert ids(standalone_cluster) - before == {job.id}
    await hook.kill(job)


async def test_supervised_driver_is_followed_to_another_worker(pair: HighlyAvailableCluster, connect: Connect) -> None:
    hook = connect(pair.connection())
    submission, job = await submit(hook, jvm_job(600, supervise=True))
    _, unsupervised = await submit(hook, jvm_job(600))
    await until(hook, job, JobState.RUNNING)
    await until(hook, unsupervised, JobState.RUNNING)
    home = {driver.id: driver.worker for driver in pair.drivers()}
    for worker in [worker for worker in pair.workers if (worker.directory / job.id).exists()]:
        worker.server.kill()
        await until(hook, job, JobState.RELAUNCHED)
        found = await find(connect(pair.connection(), StandaloneHook), submission)
        assert isinstance(found, Found)
        assert found.status.job != job
        assert not found.younger
        await until(hook, found.status.job, JobState.RUNNING)
        now = {driver.id: driver for driver in pair.drivers()}
        assert now[found.status.job.id].worker != home[job.id]
        if home[unsupervised.id] == home[job.id]:
            assert (await until(hook, unsupervised, JobState.FAILED)).raw == "ERROR"
        await hook.kill(found.status.job)
        worker.server.start()
    await hook.kill(unsupervised)
    pair.wait_for_workers(2)


# --- the master


async def test_master_that_hangs_is_bounded_and_its_late_answer_is_no_second_job(
    standalone_cluster: StandaloneCluster, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http, "READ_TIMEOUT", 0.5)
    hook = connect(standalone_cluster.connection(), StandaloneHook)
    before = ids(standalone_cluster)
    prepared = await hook.prepare(jvm_job(600), new_submission())
    master = standalone_cluster.master.server
    master.suspend()
    try:
        began = time.monotonic()
        with pytest.raises(SubmissionUncertain) as uncertain:
            await hook.submit(jvm_job(600), prepared)  # the kernel takes it, the master reads it later
        assert not uncertain.value.permanent
        with pytest.raises(ClusterUnreachable):
            await hook.poll([JobRef("driver-20200101000000-0000")])
        assert time.monotonic() - began < 20
    finally:
        master.resume()
    wait_until(lambda: ids(standalone_cluster) - before, 30, "the late driver")
    monkeypatch.undo()
    retry = connect(standalone_cluster.connection(), StandaloneHook)
    found = await find(retry, prepared)
    assert isinstance(found, Found)
    assert await retry.submit(jvm_job(600), prepared) == found.status.job
    assert ids(standalone_cluster) - before == {found.status.job.id}
    await retry.kill(found.status.job)


async def test_a_page_that_does_not_answer_is_asked_for_once_more(
    standalone_cluster: StandaloneCluster, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http, "READ_TIMEOUT", 0.5)
    before = ids(standalone_cluster)
    with Proxy(standalone_cluster.master.ui) as page, page.holding("GET", "/json/") as held:
        hook = connect(standalone_cluster.connection(ui_port=str(page.port)), StandaloneHook)
        preparing = asyncio.create_task(hook.prepare(jvm_job(600), new_submission()))

        async def asked_again() -> bool:
            return preparing.done() or page.count("GET", "/json/") == 2

        await wait_until_async(asked_again, 30, "a second request")
        held.release()
        job = await hook.submit(jvm_job(600), await preparing)
    assert ids(standalone_cluster) - before == {job.id}
    await hook.kill(job)


async def test_master_restarted_follows_on_and_never_says_absent(
    standalone_cluster: StandaloneCluster, connect: Connect
) -> None:
    hook = connect(standalone_cluster.connection())
    submission, job = await submit(hook, jvm_job(600))
    ended, gone = await submit(hook, jvm_job(0))
    never = await hook.prepare(jvm_job(600), new_submission())
    await until(hook, gone, JobState.SUCCEEDED)
    await until(hook, job, JobState.RUNNING)
    with states_during(hook, job) as states:
        await asyncio.to_thread(standalone_cluster.restart_master)
        await until(hook, job, JobState.RUNNING)
    assert states <= {JobState.RUNNING, JobState.UNKNOWN, None}
    assert None in states, "the restart was not noticed"

    assert (await hook.poll([gone]))[gone].state is JobState.ABSENT
    retry = connect(standalone_cluster.connection(), StandaloneHook)
    found = await find(retry, submission)
    assert isinstance(found, Found)
    assert found.status.job == job
    forgotten = await find(retry, ended)
    assert isinstance(forgotten, Found), "the worker knows that it ran"
    assert (forgotten.status.job, forgotten.status.state) == (gone, JobState.ABSENT)
    assert await find(retry, never) == Absent()
    await hook.kill(job)
    await until(hook, job, JobState.KILLED)


async def test_failover_in_the_middle_of_everything(pair: HighlyAvailableCluster, connect: Connect) -> None:
    hook = connect(pair.connection(), StandaloneHook)
    before = ids(pair)
    submission, job = await submit(hook, jvm_job(600))
    await until(hook, job, JobState.RUNNING)
    leader = pair.leader()
    prepared = await hook.prepare(jvm_job(600), new_submission())

    with states_during(hook, job) as states:
        await asyncio.to_thread(leader.server.kill)
        second = await _submit_in_the_end(hook, prepared)
        await until(hook, job, JobState.RUNNING)
        successor = await asyncio.to_thread(pair.wait_for_leader)
    assert successor != leader
    assert states <= {JobState.RUNNING, JobState.UNKNOWN, None}
    assert None in states, "the failover was not noticed"

    retry = connect(pair.connection(), StandaloneHook)
    for each, ref in ((submission, job), (prepared, second)):
        found = await find(retry, each)
        assert isinstance(found, Found)
        assert found.status.job == ref
        assert not found.younger
    assert ids(pair) - before == {job.id, second.id}
    assert successor.ui in "".join((await retry.poll([job]))[job].links.values())

    leader.server.start()  # it comes back as the standby, first in the connection's list or not
    wait_until(lambda: leader.page()["status"] == "STANDBY", 60, "the standby", servers=[leader.server])
    for ref in (job, second):
        await retry.kill(ref)
        await until(retry, ref, JobState.KILLED)


async def _submit_in_the_end(hook: StandaloneHook, submission: Submission) -> JobRef:
    give_up = time.monotonic() + 60
    while True:
        try:
            return await hook.submit(jvm_job(600), submission)
        except (ClusterUnreachable, SubmissionUncertain, BadConfiguration) as error:
            if time.monotonic() > give_up or getattr(error, "permanent", False):
                raise
        await asyncio.sleep(0.1)


# --- what a master forgets


async def test_evicted_driver_is_absent_and_is_not_submitted_again(guarded: Guarded, connect: Connect) -> None:
    cluster = guarded.cluster
    hook = connect(guarded.connection(), StandaloneHook)
    never = await hook.prepare(jvm_job(600), new_submission())
    submission, job = await submit(hook, jvm_job(0))
    await until(hook, job, JobState.SUCCEEDED)
    await evict(hook, cluster, job)
    assert (await hook.poll([job]))[job].state is JobState.ABSENT

    launched = cluster.launched()
    retry = connect(guarded.connection(), StandaloneHook)
    found = await find(retry, submission)
    assert isinstance(found, Found)
    assert (found.status.job, found.status.state) == (job, JobState.ABSENT)
    assert await retry.submit(jvm_job(0), submission) == job
    assert await find(retry, never) == Absent(), "the workers vouch for it"

    (worker,) = cluster.workers
    worker.server.kill()
    worker.server.start()
    wait_until(lambda: cluster.leader().page()["aliveworkers"] == 1, 60, "the worker")
    for uncertain in (submission, never):
        with pytest.raises(SubmissionUncertain) as caught:
            await retry.find(uncertain)
        assert caught.value.permanent
        assert "state-store" in str(caught.value), "the way out is missing"
        with pytest.raises(SubmissionUncertain):
            await retry.submit(jvm_job(0), uncertain)
    assert cluster.launched() == launched


async def test_forgotten_driver_that_never_started_is_no_passing_doubt(guarded: Guarded, connect: Connect) -> None:
    hook = connect(guarded.connection(), StandaloneHook)
    never = await hook.prepare(jvm_job(0), new_submission())
    _, broken = await submit(hook, jvm_job(0, application="/nowhere/app.jar"))
    await until(hook, broken, JobState.FAILED)
    await evict(hook, guarded.cluster, broken)
    doubt: SubmissionUncertain | None = None
    try:
        assert await find(hook, never, within=15) == Absent()
    except SubmissionUncertain as uncertain:
        doubt = uncertain
    assert doubt is None or doubt.permanent, "asking again cannot help, and every retry would ask again"


async def evict(hook: StandaloneHook, cluster: StandaloneCluster, job: JobRef) -> None:
    """Have other drivers complete until the master lists the job no longer. Killed in the queue, they cost nothing."""
    for _ in range(5):
        if job.id not in ids(cluster):
            return
        _, other = await submit(hook, jvm_job(0, **TOO_BIG))
        await hook.kill(other)
        await until(hook, other, JobState.KILLED, JobState.ABSENT)
    raise AssertionError(f"{job} is not evicted: {cluster.drivers()}")


# --- credentials, TLS and wrong connections


async def test_token_is_asked_for(guarded: Guarded, connect: Connect) -> None:
    right = guarded.connection()
    assert "4." in await connect(right).check()
    for password in (jws(b"x" * 32), jws(guarded.key, lifetime=-60), "hush-hush-hush", None):
        hook = connect({**right, "password": password})
        with pytest.raises(AuthenticationFailed) as refused:
            await hook.check()
        assert not password or password not in str(refused.value)
        with pytest.raises(AuthenticationFailed):
            await hook.prepare(jvm_job(0), new_submission())
        with pytest.raises(AuthenticationFailed):
            await hook.kill(JobRef("driver-20200101000000-0000"))


async def test_token_that_expires_after_the_intent_submits_nothing(guarded: Guarded, connect: Connect) -> None:
    prepared = await connect(guarded.connection()).prepare(jvm_job(0), new_submission())
    before = guarded.cluster.drivers()
    expired = connect({**guarded.connection(), "password": jws(guarded.key, lifetime=-60)})
    with pytest.raises((AuthenticationFailed, SubmissionRefused)):
        await expired.submit(jvm_job(0), prepared)
    assert guarded.cluster.drivers() == before


async def test_job_behind_token_and_tls(guarded: Guarded, connect: Connect, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text(guarded.ca)
    connection = guarded.connection()
    connection["extra"]["ca"] = str(ca)
    hook = connect(connection)
    submission, job = await submit(hook, jvm_job(0, 3))
    status = await until(hook, job, JobState.FAILED)
    assert all(link.startswith("https://") for link in status.links.values())
    assert "exiting with 3" in await hook.log_tail(job, 3)
    found = await hook.find(submission)
    assert isinstance(found, Found)
    assert found.status.job == job


async def test_unknown_authority_is_named(guarded: Guarded, connect: Connect) -> None:
    connection = guarded.connection()
    del connection["extra"]["ca"]
    with pytest.raises(BadConfiguration, match="'ca'"):
        await connect(connection).check()
    with pytest.raises(BadConfiguration, match="'ca'"):
        await connect(connection).poll([JobRef("driver-20200101000000-0000")])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"extra": {"ui-scheme": "http"}}, "ui-", id="plain http where TLS is spoken"),
        pytest.param({"extra": {"rest-scheme": "https"}}, "http", id="TLS where plain http is spoken"),
        pytest.param({"host": "spark://no-such-host.invalid"}, "no-such-host.invalid", id="wrong host"),
        pytest.param({"extra": {"rest-port": "rpc"}}, "(?i)rpc|rest-port", id="RPC port as REST port"),
        pytest.param({"extra": {"rest-port": "free"}}, "rest-port", id="nothing at the REST port"),
        pytest.param({"extra": {"ui-port": "free"}}, "ui-port", id="nothing at the web UI's port"),
        pytest.param({"extra": {"rest-port": "ui"}}, "rest-port", id="web UI as REST server"),
        pytest.param({"extra": {"ui-port": "rest"}}, "ui-port|/json/", id="REST server as web UI"),
        pytest.param({"extra": {"rest-port": "http"}}, "rest-port", id="no port"),
        pytest.param({"extra": {"ca": "/nowhere/ca.pem"}}, "'ca'", id="no such file"),
    ],
)
async def test_wrong_connection_is_named_before_anything_is_submitted(
    change: dict[str, Any], named: str, guarded: Guarded, connect: Connect
) -> None:
    master, right = guarded.cluster.master, guarded.connection()
    ports = {"rpc": master.port, "ui": master.ui_port, "rest": master.rest_port, "free": free_port()}
    extra = {name: ports.get(value, value) for name, value in change.get("extra", {}).items()}
    hook = connect({**right, **change, "extra": {**right["extra"], **extra}})
    before = guarded.cluster.drivers()
    with pytest.raises(DurableJobError, match=named) as caught:
        await hook.check()
    assert right["password"] not in str(caught.value)
    with pytest.raises(DurableJobError, match=named):
        await hook.prepare(jvm_job(0), new_submission())
    assert guarded.cluster.drivers() == before


async def test_rest_server_that_is_off_is_named(connect: Connect) -> None:
    with StandaloneCluster(rest=False, workers=0, spark=require(ensure_spark)) as cluster:
        hook = connect(cluster.connection())
        with pytest.raises(BadConfiguration, match=r"spark\.master\.rest\.enabled"):
            await hook.check()
        with pytest.raises(BadConfiguration, match=r"spark\.master\.rest\.enabled"):
            await hook.prepare(jvm_job(0), new_submission())
