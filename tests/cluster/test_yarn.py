"""
The YARN hook on real ResourceManagers: restarted under it, taken over, forgetful, guarded by ACLs and by Kerberos.

The witness is the ResourceManager itself, asked without the hook.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from dev.kerberos import KeyDistributionCenter, ensure_gssapi
from dev.processes import wait_until, wait_until_async
from dev.yarn import YarnCluster
from durable_spark.hooks.yarn import YarnHook
from durable_spark.jobs import (
    Absent,
    AuthenticationFailed,
    ClusterUnreachable,
    Found,
    JobRef,
    JobState,
    Link,
    RequestRefused,
    Submission,
    SubmissionUncertain,
)
from tests.conftest import require
from tests.standalone import keystore
from tests.submitting import new_submission, states_during, until
from tests.yarn import YarnJob, submit_app

if TYPE_CHECKING:
    from tests.cluster.conftest import Connect

LONG = YarnJob(seconds=600)
UNKNOWN = JobRef("application_1111111111111_0001")


class EagerHook(YarnHook):
    """Waits for nothing, so that what it says stands on the ResourceManager's word alone."""

    settle_time = 0.0
    recovery_time = 0.0
    patience = 0.0


@pytest.fixture
def hook(yarn_cluster: YarnCluster, connect: Connect) -> EagerHook:
    hook: EagerHook = connect(yarn_cluster.connection(yarn_user="airflow"), EagerHook)
    return hook


@pytest.fixture(scope="module")
def pair() -> Iterator[YarnCluster]:
    with require(lambda: YarnCluster(managers=2)) as cluster:
        yield cluster


async def send(hook: YarnHook, cluster: YarnCluster, app: YarnJob = LONG) -> tuple[Submission, JobRef]:
    """Submit as the operator does, but over REST."""
    ready = await hook.prepare_cli({}, new_submission())
    app_id = await asyncio.to_thread(submit_app, cluster, app, ready.conf["spark.yarn.tags"].split(","))
    return ready.submission, JobRef(app_id)


@contextlib.asynccontextmanager
async def over_and_over(ask: Callable[[], Awaitable[object]]) -> AsyncIterator[list[object]]:
    """Ask every few milliseconds; collect the answers, and the names of the exceptions."""
    answers: list[object] = []

    async def collect() -> None:
        while True:
            try:
                answer = await ask()
            except ClusterUnreachable as error:
                answer = type(error).__name__
            except SubmissionUncertain as error:
                answer = "forgotten" if error.permanent else type(error).__name__
            if not answers or answers[-1] != answer:
                answers.append(answer)
            await asyncio.sleep(0.005)

    task = asyncio.ensure_future(collect())
    try:
        yield answers
    finally:
        if not task.done():
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_running_job_is_never_absent_over_restarts(
    yarn_cluster: YarnCluster, hook: EagerHook, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap of the recovery: 404 for it, an empty list for its tag. Killed and restarted ten times."""
    submission, job = await send(hook, yarn_cluster)
    await until(hook, job, JobState.RUNNING)
    finder: EagerHook = connect(yarn_cluster.connection(), EagerHook)
    denials = 0
    get = hook._apps.get

    async def counting(app_id: str, ask: Any = None) -> Any:
        nonlocal denials
        app = await get(app_id, ask)
        denials += app is None
        return app

    monkeypatch.setattr(hook._apps, "get", counting)

    async def poll() -> JobState:
        return (await hook.poll([job]))[job].state

    async def find() -> str:
        return type(await finder.find(submission)).__name__

    async def owned() -> int:
        return len(await finder.find_owned(submission.deployment, submission.owner))

    async with over_and_over(poll) as polled, over_and_over(find) as found, over_and_over(owned) as counted:
        for _ in range(10):
            await asyncio.to_thread(yarn_cluster.restart_manager)
    await asyncio.to_thread(yarn_cluster.wait_for_node)
    assert (await until(hook, job, JobState.RUNNING)).job == job
    assert JobState.ABSENT not in polled
    assert not set(polled) & {JobState.FAILED, JobState.KILLED, JobState.SUCCEEDED}
    assert not {"Absent", "forgotten"} & set(found)
    assert 0 not in counted
    assert denials, "the trap never was there"
    await hook.kill(job)
    await until(hook, job, JobState.KILLED)
    assert len(yarn_cluster.attempts(job.id)) == 1


async def test_a_kill_in_the_recovery_is_not_lost(yarn_cluster: YarnCluster, hook: EagerHook) -> None:
    """Either it is accepted, or it raises: a 404 is not taken for the job's end."""
    _, job = await send(hook, yarn_cluster)
    await until(hook, job, JobState.RUNNING)
    accepted = asyncio.Event()

    async def kill() -> None:
        while not accepted.is_set():
            try:
                await hook.kill(job)
                accepted.set()
            except ClusterUnreachable:
                await asyncio.sleep(0)

    await asyncio.to_thread(yarn_cluster.kill_manager)
    killing = asyncio.ensure_future(kill())
    await asyncio.to_thread(yarn_cluster.start_manager)
    await asyncio.wait_for(killing, 60)
    await asyncio.to_thread(yarn_cluster.wait_for_state, "ACTIVE")
    await asyncio.to_thread(yarn_cluster.wait_for_node)
    assert (await until(hook, job, JobState.KILLED)).raw == "KILLED"


async def test_spark_submit_is_recognised(yarn_cluster: YarnCluster, hook: EagerHook) -> None:
    """The real tool's output, and our tags beside the user's."""
    ready = await hook.prepare_cli({"spark.yarn.tags": "Nightly,team:data"}, new_submission())
    properties = {**yarn_cluster.spark_conf(), **ready.conf}
    options = [part for name, value in properties.items() for part in ("--conf", f"{name}={value}")]
    source = str(Path(__file__).parents[1] / "apps" / "SparkDriver.java")
    main = ["--class", "org.codehaus.janino.SimpleCompiler", source, source, "SparkDriver", "0", "3"]
    command = [f"{yarn_cluster.spark.home}/bin/spark-submit", "--master", "yarn", "--deploy-mode", "cluster", *options]
    ended = await asyncio.to_thread(
        subprocess.run, [*command, *main], env=yarn_cluster.environment(), capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    vouching = [job for line in ended.stderr.splitlines() if (job := hook.job_in(line, ready.submission))]
    job = await hook.glimpse(ready.submission)
    assert job is not None
    assert vouching == [job]
    naming = [line for line in ended.stderr.splitlines() if job.id in line]
    assert len(naming) > 1, "lines that vouch for nothing"
    tags = yarn_cluster.app(job.id).tags
    assert {"nightly", "team:data", "durable-spark", f"durable-spark.submission={ready.submission.token}"} <= set(tags)
    found = await hook.find(ready.submission)
    assert isinstance(found, Found)
    assert (found.status.job, list(found.younger)) == (job, [])
    status = await until(hook, job, JobState.FAILED, deadline=120)
    assert status.raw == "FINISHED/FAILED"
    assert "exiting with 3" in status.message
    assert any("exiting with 3" in line for line in await hook.log_tail(job, 200))
    assert len(yarn_cluster.attempts(job.id)) == 1, "user code ran once"


async def test_how_it_ends(yarn_cluster: YarnCluster, hook: EagerHook) -> None:
    """Words that only a real ApplicationMaster, or its death, makes a ResourceManager say."""
    expected: dict[str | int, tuple[JobState, str]] = {
        "KILLED": (JobState.KILLED, "FINISHED/KILLED"),
        "FAILED": (JobState.FAILED, "FINISHED/FAILED"),
        9: (JobState.FAILED, "FAILED"),
    }
    for end, (state, raw) in expected.items():
        _, job = await send(hook, yarn_cluster, YarnJob(end=end, diagnostics="because"))
        status = await until(hook, job, state)
        assert status.raw == raw
        assert "because" in status.message or "exitCode: 9" in status.message


async def test_failover(pair: YarnCluster, connect: Connect) -> None:
    hook: EagerHook = connect(pair.connection(), EagerHook)
    submission, job = await send(hook, pair)
    await until(hook, job, JobState.RUNNING)
    with states_during(hook, job) as states:
        await asyncio.to_thread(pair.fail_over)
        await until(hook, job, JobState.RUNNING)
        await asyncio.to_thread(pair.kill_manager, 0)
        await until(hook, job, JobState.RUNNING)
    assert states <= {JobState.RUNNING, JobState.PENDING, JobState.UNKNOWN, None}
    assert isinstance(await hook.find(submission), Found)
    assert (await hook.poll([UNKNOWN]))[UNKNOWN].state is JobState.ABSENT, "one of the pair is down"
    assert f"{pair.web(1)} is active, one of 2" in await hook.check()
    await asyncio.to_thread(pair.restart_manager, 0)
    await hook.kill(job)
    await until(hook, job, JobState.KILLED)


async def test_nobody_is_active_and_two_are(pair: YarnCluster, connect: Connect) -> None:
    hook: EagerHook = connect(pair.connection(), EagerHook)
    active = pair.managers.index(pair.active())
    await asyncio.to_thread(pair.transition_to_standby, active)
    with pytest.raises(ClusterUnreachable, match="no ResourceManager is active"):
        await hook.poll([UNKNOWN])
    with pytest.raises(ClusterUnreachable, match="no ResourceManager is active"):
        await hook.check()
    await asyncio.to_thread(pair.transition_to_active, active)
    submission = (await hook.prepare_cli({}, new_submission())).submission
    pair.managers[active].server.suspend()
    try:
        await asyncio.to_thread(pair.transition_to_active, 1 - active)
    finally:
        pair.managers[active].server.resume()
    assert [pair.state(number) for number in (0, 1)] == ["ACTIVE", "ACTIVE"]
    status = (await hook.poll([UNKNOWN]))[UNKNOWN]
    assert (status.state, "more than one" in status.message) == (JobState.UNKNOWN, True)
    with pytest.raises(SubmissionUncertain) as caught:
        await hook.find(submission)
    assert not caught.value.permanent
    await asyncio.to_thread(pair.restart_manager, active)
    assert (await hook.poll([UNKNOWN]))[UNKNOWN].state is JobState.ABSENT


async def test_forgotten_and_found_in_the_timeline(connect: Connect) -> None:
    few = {f"yarn.resourcemanager.{store}max-completed-applications": "3" for store in ("", "state-store.")}
    with require(lambda: YarnCluster(timeline=True, yarn_site=few)) as cluster:
        hook: EagerHook = connect(cluster.connection(yarn_timeline_address=cluster.timeline_web), EagerHook)
        alone: EagerHook = connect(cluster.connection(), EagerHook)
        first, witness = await send(hook, cluster, YarnJob())  # nothing had ended before: no witness
        await until(hook, witness, JobState.SUCCEEDED)  # what ends first is forgotten first
        submission, job = await send(hook, cluster, YarnJob(end="FAILED", diagnostics="one\ntwo"))
        ended = await until(hook, job, JobState.FAILED)
        assert await alone.find(await _never_sent(alone)) == Absent()

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: submit_app(cluster, YarnJob(command="exit 0")), range(4)))
        wait_until(lambda: job.id not in [app.id for app in cluster.apps()], 60, f"{job} to be forgotten")
        assert (await alone.poll([job]))[job].state is JobState.ABSENT
        for forgotten in (first, submission):
            with pytest.raises(SubmissionUncertain) as caught:
                await alone.find(forgotten)
            assert caught.value.permanent
        status = await until(hook, job, JobState.FAILED)
        assert (status.raw, status.message) == (ended.raw, "one\ntwo")
        assert (await hook.poll([UNKNOWN]))[UNKNOWN].state is JobState.ABSENT
        found = await hook.find(submission)
        assert isinstance(found, Found)
        assert found.status.state is JobState.FAILED
        assert await alone.find(await _never_sent(alone)) == Absent(), "what ended last is still known"
        assert cluster.timeline
        cluster.timeline.kill()
        assert (await hook.poll([job]))[job].state is JobState.UNKNOWN


async def _never_sent(hook: YarnHook) -> Submission:
    return (await hook.prepare_cli({}, new_submission())).submission


async def test_acls(connect: Connect) -> None:
    site = {"yarn.acl.enable": "true", "yarn.admin.acl": " "}
    queues = {"yarn.scheduler.capacity.root.acl_administer_queue": " "}
    with require(lambda: YarnCluster(node=False, yarn_site=site, capacity_scheduler=queues)) as cluster:
        job = JobRef(submit_app(cluster, LONG))
        stranger: EagerHook = connect(cluster.connection(yarn_user="alice"), EagerHook)
        with pytest.raises(RequestRefused, match=rf"{job} in queue root\.default.*as alice.*by remote user alice"):
            await stranger.kill(job)
        anonymous: EagerHook = connect(cluster.connection(), EagerHook)
        with pytest.raises(RequestRefused, match=r"anonymously.*'yarn-user'"):
            await anonymous.kill(job)
        assert (await anonymous.poll([job]))[job].state is JobState.PENDING
        owner: EagerHook = connect(cluster.connection(yarn_user=cluster.user), EagerHook)
        await owner.kill(job)
        await until(owner, job, JobState.KILLED)


async def test_tls(connect: Connect, tmp_path: Path) -> None:
    authority = trustme.CA()
    with require(lambda: YarnCluster(node=False, keystore=keystore(authority, tmp_path / "keystore.p12"))) as cluster:
        ca = authority.cert_pem.bytes().decode()
        hook: EagerHook = connect(cluster.connection(ca=ca), EagerHook)
        assert f"{cluster.web()} is active" in await hook.check()
        untrusting: EagerHook = connect(cluster.connection(), EagerHook)
        well, message = await asyncio.to_thread(untrusting.test_connection)
        assert (well, "not trusted" in message, "'ca'" in message) == (False, True, True)


async def test_the_hadoop_configuration_names_it(
    yarn_cluster: YarnCluster, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HADOOP_CONF_DIR", str(yarn_cluster.conf_dir))
    hook: EagerHook = connect({"conn_type": "spark", "host": "yarn"}, EagerHook)
    assert await hook.cluster() == [yarn_cluster.web()]
    assert "is active" in await hook.check()


# --- Kerberos


@pytest.fixture(scope="module")
def realm() -> Iterator[KeyDistributionCenter]:
    require(ensure_gssapi)
    with require(KeyDistributionCenter) as center:
        yield center


@pytest.fixture(scope="module")
def guarded(realm: KeyDistributionCenter) -> Iterator[YarnCluster]:
    with require(lambda: YarnCluster(kerberos=realm)) as cluster:
        yield cluster


@pytest.fixture
def no_ticket(realm: KeyDistributionCenter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KRB5_CONFIG", str(realm.krb5_conf))
    monkeypatch.setenv("KRB5CCNAME", f"FILE:{tmp_path / 'none'}")


async def whole_life(hook: YarnHook, cluster: YarnCluster) -> None:
    assert f"{cluster.web()} is active" in await hook.check()
    submission, job = await send(hook, cluster)
    await until(hook, job, JobState.RUNNING)
    assert isinstance(await hook.find(submission), Found)

    async def sleeps() -> bool:
        return "sleeping 600 s" in await hook.log_tail(job, 20)

    await wait_until_async(sleeps, 30, "the log, from a NodeManager that asks for a ticket of its own")
    status = (await hook.poll([job, UNKNOWN]))[job]
    assert status.links[Link.JOB] == f"{cluster.web()}/cluster/app/{job}"
    await hook.kill(job)
    await until(hook, job, JobState.KILLED)


@pytest.mark.usefixtures("no_ticket")
async def test_a_ticket_cache(
    guarded: YarnCluster, realm: KeyDistributionCenter, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook: EagerHook = connect(guarded.connection(), EagerHook)
    with pytest.raises(AuthenticationFailed, match=r"HTTP@localhost.*'keytab'"):
        await hook.poll([UNKNOWN])
    monkeypatch.setenv("KRB5CCNAME", f"FILE:{realm.ticket('airflow')}")
    await whole_life(hook, guarded)


@pytest.mark.usefixtures("no_ticket")
@pytest.mark.parametrize("form", ["path", "content"])
@pytest.mark.parametrize("principal", [True, False])
async def test_a_keytab(
    guarded: YarnCluster, realm: KeyDistributionCenter, connect: Connect, form: str, principal: bool
) -> None:
    file = realm.keytab("airflow")
    keytab = str(file) if form == "path" else base64.b64encode(file.read_bytes()).decode()
    extras = {"keytab": keytab, **({"principal": realm.principal("airflow")} if principal else {})}
    hook: EagerHook = connect(guarded.connection(**extras), EagerHook)
    await whole_life(hook, guarded)


@pytest.mark.usefixtures("no_ticket")
async def test_the_button_with_a_keytab(guarded: YarnCluster, realm: KeyDistributionCenter, connect: Connect) -> None:
    extras = {"keytab": str(realm.keytab("airflow")), "principal": realm.principal("airflow")}
    hook: EagerHook = connect(guarded.connection(**extras), EagerHook)
    well, message = await asyncio.to_thread(hook.test_connection)
    assert well, message
    assert "asked as airflow@" in message


@pytest.mark.usefixtures("no_ticket")
async def test_tickets_that_are_none(
    guarded: YarnCluster, realm: KeyDistributionCenter, connect: Connect, tmp_path: Path
) -> None:
    keytab = str(realm.keytab("airflow"))
    wrong: EagerHook = connect(guarded.connection(keytab=keytab, principal=realm.principal("nobody")), EagerHook)
    with pytest.raises(AuthenticationFailed, match=r"HTTP@localhost"):
        await wrong.check()
    address = guarded.connection(keytab=keytab)
    address["extra"]["yarn_resourcemanager_webapp_address"] = guarded.web().replace("localhost", "127.0.0.1")
    by_number: EagerHook = connect(address, EagerHook)
    with pytest.raises(AuthenticationFailed, match=r"HTTP@127\.0\.0\.1.*named as its principal is"):
        await by_number.check()
    simple: EagerHook = connect(guarded.connection(keytab=keytab, yarn_auth="simple"), EagerHook)
    with pytest.raises(AuthenticationFailed, match="yarn-auth is simple"):
        await simple.check()


@pytest.mark.usefixtures("no_ticket")
async def test_a_cookie_that_no_server_knows_any_more(
    guarded: YarnCluster, realm: KeyDistributionCenter, connect: Connect
) -> None:
    """The ResourceManager is restarted with another secret: what it gave for the ticket is worth nothing."""
    hook: EagerHook = connect(guarded.connection(keytab=str(realm.keytab("airflow"))), EagerHook)
    await hook.check()
    before = dict(hook._managers._cookies)
    assert before
    secret = guarded.directory / "http-auth-secret"
    secret.write_text("another")
    await asyncio.to_thread(guarded.kill_manager)
    await asyncio.to_thread(guarded.start_manager)

    async def answers() -> bool:
        with contextlib.suppress(ClusterUnreachable):
            return "is active" in await hook.check()
        return False

    for _ in range(300):
        if await answers():
            break
        await asyncio.sleep(0.1)
    assert hook._managers._cookies != before


@pytest.mark.usefixtures("no_ticket")
async def test_a_kdc_that_is_gone(guarded: YarnCluster, realm: KeyDistributionCenter, connect: Connect) -> None:
    """Of a principal that has no ticket yet. The last test with this realm."""
    hook: EagerHook = connect(guarded.connection(keytab=str(realm.keytab("other"))), EagerHook)
    realm.server.kill()
    with pytest.raises(ClusterUnreachable, match="KDC"):
        await hook.check()
