"""The standalone hook against masters and workers that misbehave."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from durable_spark.hooks import _http, standalone
from durable_spark.hooks._standalone_masters import PAGE_LIMIT
from durable_spark.hooks._standalone_pages import PageReader, View, labels_of, listed_drivers, log_text
from durable_spark.jobs import (
    Absent,
    AuthenticationFailed,
    BadArguments,
    BadConfiguration,
    ClusterUnreachable,
    Found,
    InvalidAnswer,
    JobRef,
    JobState,
    Link,
    RequestRefused,
    SparkJob,
    Submission,
    SubmissionRefused,
    SubmissionUncertain,
    new_token,
)
from tests.unit.hooks.fake import (
    NOW,
    WORKER,
    FakeCluster,
    QuickHook,
    driver,
    fixed,
    hang,
    hang_up,
    launch_command,
    recorded,
    recorded_json,
)

if TYPE_CHECKING:
    from aiohttp import web

JOB = SparkJob(application="/apps/job.py")
UNKNOWN = JobRef("driver-20200101000000-0000")
Connect = Callable[[dict[str, Any]], QuickHook]


def new() -> Submission:
    return Submission(token=new_token(), owner="0" * 32, deployment="prod")


async def prepared(hook: QuickHook) -> Submission:
    """Return an intent whose worker died: the hook does not remember it."""
    submission = await hook.prepare(JOB, new())
    hook._unsent.clear()
    return submission


# --- the connection


@pytest.mark.parametrize(
    ("host", "port", "addresses"),
    [
        ("spark://Host", None, ["spark://host:7077"]),
        ("spark://host", 7000, ["spark://host:7000"]),
        ("host", 7000, ["spark://host:7000"]),
        ("my_host", None, ["spark://my_host:7077"]),
        ("spark://H1:7077,h2:7078,h3", None, ["spark://h1:7077", "spark://h2:7078", "spark://h3:7077"]),
        ("spark://[::1]:7077", None, ["spark://[::1]:7077"]),
    ],
)
async def test_cluster(connect: Connect, host: str, port: int | None, addresses: list[str]) -> None:
    hook = connect({"conn_type": "spark", "host": host, "port": port})
    assert await hook.cluster() == addresses
    settings = await hook._masters.settings()
    assert settings.masters[0].rest == addresses[0].replace("spark", "http").rpartition(":")[0] + ":6066"
    assert await hook.poll_interval() == 5.0


@pytest.mark.parametrize(
    ("connection", "message"),
    [
        ({"host": ""}, "has no host.*spark://host:7077"),
        ({"host": "spark://"}, "not a master's address"),
        ({"host": "spark://user:secret@h"}, "not a master's address"),
        ({"host": "spark://h:port"}, "not a master's address"),
        ({"host": "spark://h:7077/x?y"}, "not a master's address"),
        ({"host": "spark://h,"}, "not a master's address"),
        ({"host": "http://h:7077"}, "not the URL of a standalone master"),
        ({"extra": {"rest-port": "x"}}, "'rest-port'.*'x'.*6066"),
        ({"extra": {"rest-port": 0}}, "'rest-port'"),
        ({"extra": {"ui-port": "8080,8081"}}, "'ui-port'.*one port"),
        ({"extra": {"rest-scheme": "ftp"}}, "'rest-scheme'.*http, https"),
        ({"extra": {"ui-scheme": 3}}, "'ui-scheme'.*string"),
        ({"extra": {"poll-interval": "often"}}, "'poll-interval'.*seconds"),
        ({"extra": {"poll-interval": 0}}, "'poll-interval'"),
        ({"extra": {"poll-interval": 10**400}}, "'poll-interval'"),
        ({"host": "spark://h:1,h:2"}, "same web address.*'ui-port'"),
        ({"conn_type": "postgres"}, "'postgres'.*'durable_spark'"),
    ],
)
async def test_bad_connections(connect: Connect, connection: dict[str, Any], message: str) -> None:
    hook = connect({"conn_type": "durable_spark", "host": "spark://h"} | connection)
    with pytest.raises(BadConfiguration, match=message):
        await hook.cluster()


async def test_an_authority_that_is_not_there(cluster: FakeCluster, connect: Connect) -> None:
    with pytest.raises(BadConfiguration, match=r"'ca'.*No such file"):
        await connect(cluster.connection(ca="/no/such.pem")).check()


async def test_unknown_extras_are_ignored(connect: Connect) -> None:
    hook = connect({"conn_type": "spark", "host": "spark://h", "extra": {"queue": "q", "deploy-mode": "cluster"}})
    assert await hook.cluster() == ["spark://h:7077"]


async def test_check(cluster: FakeCluster, hook: QuickHook) -> None:
    assert await hook.check() == "Spark 4.3.0: spark://127.0.0.1:7077 leads, 1 workers are alive"


async def test_the_token_goes_to_the_masters_alone(cluster: FakeCluster, connect: Connect) -> None:
    hook = connect(cluster.connection() | {"password": "the-token"})
    submission = await prepared(hook)
    cluster.ran(driver(1, "RUNNING"), launch_command(submission.token))
    assert isinstance(await hook.find(submission), Found)
    assert cluster.master.headers
    assert {headers.get("Authorization") for headers in cluster.master.headers} == {"Bearer the-token"}
    assert cluster.worker.headers
    assert not any("Authorization" in headers for headers in cluster.worker.headers)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("part", ["ui", "rest"])
async def test_a_wrong_token(cluster: FakeCluster, hook: QuickHook, part: str, status: int) -> None:
    setattr(cluster.master, part, fixed(status))
    with pytest.raises(AuthenticationFailed):
        await hook.prepare(JOB, new())
    if part == "rest":
        for call in (hook.kill(UNKNOWN), hook.check()):
            with pytest.raises(AuthenticationFailed):
                await call


# --- what is wrong with the ports


async def test_wrong_host(connect: Connect) -> None:
    hook = connect({"conn_type": "spark", "host": "spark://no-such-host.invalid"})
    with pytest.raises(ClusterUnreachable, match=r"no-such-host\.invalid"):
        await hook.prepare(JOB, new())


async def test_the_rpc_port_as_rest_port(cluster: FakeCluster, connect: Connect) -> None:
    """A real RPC port hangs up without an answer (tried on 4.3.0)."""
    cluster.master.rest = hang_up
    port = cluster.master.rest_url.rpartition(":")[2]
    hook = connect(cluster.connection() | {"host": "spark://127.0.0.1", "port": int(port)})
    with pytest.raises(BadConfiguration, match=rf"{port} is the master's RPC port.*'rest-port'.*6066"):
        await hook.prepare(JOB, new())


async def test_rest_server_off(cluster: FakeCluster, connect: Connect, unused_tcp_port: int) -> None:
    hook = connect(cluster.connection(**{"rest-port": unused_tcp_port}))
    with pytest.raises(BadConfiguration, match=r"spark\.master\.rest\.enabled=true.*'rest-port'"):
        await hook.check()


async def test_wrong_ui_port(cluster: FakeCluster, connect: Connect, unused_tcp_port: int) -> None:
    hook = connect(cluster.connection(**{"ui-port": unused_tcp_port}))
    with pytest.raises(BadConfiguration, match=r"REST server .* answers, but not the master's page.*'ui-port'"):
        await hook.prepare(JOB, new())


async def test_a_page_that_does_not_answer_is_asked_for_once_more(
    cluster: FakeCluster, hook: QuickHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is to those who do not find room in the queue of a master's port, of fifty."""
    monkeypatch.setattr(_http, "READ_TIMEOUT", 0.3)
    asked = []

    async def let_nobody_in(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        cluster.master.ui = None
        return await hang(request)

    cluster.master.ui = let_nobody_in
    submission = await hook.prepare(JOB, new())
    await hook.submit(JOB, submission)
    assert asked == ["/json/"]
    assert len(cluster.master.created) == 1


async def test_a_page_that_never_answers(
    cluster: FakeCluster, hook: QuickHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http, "READ_TIMEOUT", 0.2)
    cluster.master.ui = hang
    with pytest.raises(BadConfiguration, match=r"did not answer within 0\.2 s.*'ui-port'"):
        await hook.prepare(JOB, new())


async def test_ports_exchanged(cluster: FakeCluster, connect: Connect) -> None:
    extra = cluster.connection()["extra"]
    cluster.master.rest = fixed(468, json.dumps({"message": "Unknown protocol version 'json'."}))
    hook = connect(cluster.connection(**{"rest-port": extra["ui-port"], "ui-port": extra["rest-port"]}))
    with pytest.raises(ClusterUnreachable, match="468"):
        await hook.prepare(JOB, new())


async def test_something_else_as_rest_server(cluster: FakeCluster, hook: QuickHook) -> None:
    cluster.master.rest = fixed(200, "<html>hello</html>")
    with pytest.raises(BadConfiguration, match=r"JSON.*'rest-port'"):
        await hook.prepare(JOB, new())


@pytest.mark.parametrize(
    "body",
    [
        "",
        "<html>",
        "[]",
        "{}",
        '{"status": "ALIVE"}',
        json.dumps(recorded_json("page.json") | {"activedrivers": [{"id": "driver-1/../x"}]}),
        json.dumps(recorded_json("page.json") | {"workers": 3}),
    ],
)
async def test_a_page_that_is_not_one(cluster: FakeCluster, hook: QuickHook, body: str) -> None:
    cluster.master.ui = fixed(200, body, Date="Mon, 23 Nov 2026 03:20:15 GMT")
    cluster.master.rest = fixed(503)
    with pytest.raises(InvalidAnswer):
        await hook.poll([UNKNOWN])


# --- submit


async def test_submit(cluster: FakeCluster, hook: QuickHook) -> None:
    submission = await hook.prepare(JOB, new())
    assert submission.cluster_time == NOW
    assert sum(len(k) + len(v) for k, v in submission.evidence.items()) < 200
    job = await hook.submit(JOB, submission)
    assert [job.id] == [entry["id"] for entry in cluster.master.drivers]
    (body,) = cluster.master.created
    assert body["sparkProperties"]["spark.airflow.submission"] == submission.token
    assert body["clientSparkVersion"] == "4.3.0"


async def test_submitted_twice_is_one_driver(cluster: FakeCluster, hook: QuickHook) -> None:
    submission = await hook.prepare(JOB, new())
    job = await hook.submit(JOB, submission)
    cluster.worker.logs[job.id] = launch_command(submission.token)
    assert await hook.submit(JOB, submission) == job
    assert len(cluster.master.created) == 1


async def test_bad_arguments_ask_nothing(cluster: FakeCluster, hook: QuickHook) -> None:
    with pytest.raises(BadArguments):
        await hook.prepare(SparkJob(application="job.py"), new())
    with pytest.raises(BadArguments, match="properties_file '/no/such' cannot be read"):
        await hook.prepare(SparkJob(application="/job.py", properties_file="/no/such"), new())
    assert cluster.master.requests == []


async def test_properties_file(cluster: FakeCluster, hook: QuickHook, tmp_path: Any) -> None:
    (tmp_path / "my.conf").write_text("spark.eventLog.enabled true\n")
    job = SparkJob(application="/job.py", properties_file=str(tmp_path / "my.conf"))
    await hook.submit(job, await hook.prepare(job, new()))
    assert cluster.master.created[0]["sparkProperties"]["spark.eventLog.enabled"] == "true"


def loses_answers(cluster: FakeCluster, how: Any, token: str = "") -> None:
    """Let submissions be taken and their answers be lost."""
    master = cluster.master

    async def rest(request: web.Request) -> web.StreamResponse:
        if not request.path.endswith("/create"):
            return await master.answer(request)
        if token:
            answer = master.create(await request.json())
            cluster.worker.logs[answer["submissionId"]] = launch_command(token)
        response: web.StreamResponse = await how(request)
        return response

    master.rest = rest


LOST = [
    (hang, "hang"),
    (hang_up, "hang up"),
    (fixed(502, "bad"), "5xx"),
    (fixed(200, "<html>"), "garbage"),
    (fixed(200, "{}"), "nothing"),
]


@pytest.mark.parametrize("how", [how for how, _ in LOST], ids=[name for _, name in LOST])
async def test_a_lost_answer_is_looked_for(
    cluster: FakeCluster, hook: QuickHook, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http, "READ_TIMEOUT", 0.3)
    submission = await hook.prepare(JOB, new())
    loses_answers(cluster, how, submission.token)
    job = await hook.submit(JOB, submission)
    assert [job.id] == [entry["id"] for entry in cluster.master.drivers]
    assert len(cluster.master.created) == 1


@pytest.mark.parametrize("how", [how for how, _ in LOST[1:]], ids=[name for _, name in LOST[1:]])
async def test_a_lost_request_is_said_to_be_lost(cluster: FakeCluster, hook: QuickHook, how: Any) -> None:
    cluster.ran(driver(1, "FINISHED", start=NOW - 900), launch_command())
    submission = await hook.prepare(JOB, new())
    loses_answers(cluster, how)
    with pytest.raises(ClusterUnreachable):
        await hook.submit(JOB, submission)
    assert cluster.master.drivers == [cluster.master.drivers[0]]
    cluster.master.rest = None
    await hook.submit(JOB, submission)
    assert len(cluster.master.created) == 1


async def test_a_request_that_may_still_be_served(
    cluster: FakeCluster, hook: QuickHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http, "READ_TIMEOUT", 0.3)
    cluster.ran(driver(1, "FINISHED", start=NOW - 900), launch_command())
    submission = await hook.prepare(JOB, new())
    loses_answers(cluster, hang)
    with pytest.raises(SubmissionUncertain, match="one still may") as caught:
        await hook.submit(JOB, submission)
    assert not caught.value.permanent


async def test_a_lost_answer_and_a_master_that_is_gone(cluster: FakeCluster, hook: QuickHook) -> None:
    submission = await hook.prepare(JOB, new())
    cluster.master.rest = hang_up
    cluster.master.ui = hang_up
    with pytest.raises(SubmissionUncertain) as caught:
        await hook.submit(JOB, submission)
    assert not caught.value.permanent


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (fixed(400, recorded("create-malformed.json")), r"\(400\): Malformed request: .* failed!$"),
        (fixed(413, "<h1>Too Large</h1>"), "413.*Too Large"),
        (fixed(200, '{"success": false, "message": "no more drivers"}'), "no more drivers"),
    ],
)
async def test_refused(cluster: FakeCluster, hook: QuickHook, how: Any, message: str) -> None:
    submission = await hook.prepare(JOB, new())
    loses_answers(cluster, how)
    with pytest.raises(SubmissionRefused, match=message):
        await hook.submit(JOB, submission)


async def test_an_id_that_is_none(cluster: FakeCluster, hook: QuickHook) -> None:
    submission = await hook.prepare(JOB, new())
    loses_answers(cluster, fixed(200, '{"success": true, "submissionId": "../../x"}'))
    with pytest.raises(SubmissionUncertain, match="driverIdPattern"):
        await hook.submit(JOB, submission)


async def test_failover_between_intent_and_request(two_masters: FakeCluster, connect: Connect) -> None:
    hook = connect(two_masters.connection())
    submission = await hook.prepare(JOB, new())
    old, leader = two_masters.masters
    old.page["status"], leader.page["status"] = "STANDBY", "ALIVE"
    await hook.submit(JOB, submission)
    assert (old.created, len(leader.created)) == ([], 1)


async def test_never_sent_to_a_second_master_without_proof(two_masters: FakeCluster, connect: Connect) -> None:
    hook = connect(two_masters.connection())
    submission = await hook.prepare(JOB, new())
    old, leader = two_masters.masters
    loses_answers(two_masters, hang_up)
    old.page["status"], leader.page["status"] = "STANDBY", "ALIVE"
    with pytest.raises(SubmissionUncertain):
        await hook.submit(JOB, submission)
    assert leader.created == []


async def test_no_leader(two_masters: FakeCluster, connect: Connect) -> None:
    hook = connect(two_masters.connection())
    two_masters.master.page["status"] = "RECOVERING"
    with pytest.raises(ClusterUnreachable, match=r"no master leads now: .*RECOVERING.*STANDBY"):
        await hook.prepare(JOB, new())
    with pytest.raises(ClusterUnreachable, match="no master leads"):
        await hook.poll([UNKNOWN])
    with pytest.raises(ClusterUnreachable, match="no master leads"):
        await hook.kill(UNKNOWN)


async def test_two_leaders(two_masters: FakeCluster, connect: Connect) -> None:
    hook = connect(two_masters.connection())
    two_masters.masters[1].page["status"] = "ALIVE"
    with pytest.raises(ClusterUnreachable, match="more than one master leads"):
        await hook.prepare(JOB, new())


# --- find


@pytest.fixture
async def intent(cluster: FakeCluster, hook: QuickHook) -> Submission:
    """An intent with a witness: a driver that had completed before it."""
    cluster.ran(driver(7, "FINISHED", start=NOW - 900), launch_command())
    return await prepared(hook)


async def test_found(cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
    cluster.ran(driver(8, "RUNNING"), launch_command(new_token()))
    ours = cluster.ran(driver(9, "FAILED"), launch_command(intent.token))
    found = await hook.find(intent)
    assert isinstance(found, Found)
    assert (found.status.job.id, found.status.state, found.younger) == (ours["id"], JobState.FAILED, [])


async def test_absent(cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
    cluster.ran(driver(8, "RUNNING"), launch_command(new_token()))
    assert await hook.find(intent) == Absent()


async def test_an_absence_is_not_believed_at_once(cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
    """Its sender may have been killed with the request on its way."""
    hook.settle_time = 0.3

    async def arrive() -> None:
        await first_look.wait()
        cluster.ran(driver(9, "RUNNING"), launch_command(intent.token))

    first_look = cluster.master.event("GET", "/json/")
    arriving = asyncio.ensure_future(arrive())
    assert isinstance(await hook.find(intent), Found)
    await arriving


async def test_the_oldest_is_the_job(cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
    relaunched = driver(8, "RELAUNCHING")
    ours, younger, ended = driver(9, "RUNNING"), driver(10, "RUNNING"), driver(11, "KILLED")
    for entry in (relaunched, ended, younger, ours):
        cluster.ran(entry, launch_command(intent.token))
    found = await hook.find(intent)
    assert isinstance(found, Found)
    assert found.status.job.id == ours["id"]
    assert found.younger == [JobRef(younger["id"])]


async def test_a_queued_driver_is_waited_for(cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
    hook.queue_patience = 30.0
    queued = driver(8, "SUBMITTED", worker="None")
    cluster.master.add(queued)

    async def launch() -> None:
        await first_look.wait()
        cluster.worker.logs[queued["id"]] = launch_command(intent.token)
        queued.update(state="RUNNING", worker=WORKER)

    first_look = cluster.master.event("GET", "/json/")
    launching = asyncio.ensure_future(launch())
    assert isinstance(await hook.find(intent), Found)
    await launching


async def test_a_driver_that_stays_queued(cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
    queued = driver(8, "SUBMITTED", worker="None")
    cluster.master.add(queued)
    with pytest.raises(SubmissionUncertain, match=f"{queued['id']} is queued") as caught:
        await hook.find(intent)
    assert not caught.value.permanent


async def test_a_driver_queued_before_the_intent_is_none_of_ours(cluster: FakeCluster, hook: QuickHook) -> None:
    cluster.ran(driver(7, "FINISHED", start=NOW - 900), launch_command())
    cluster.master.add(driver(8, "SUBMITTED", start=NOW - 5, worker="None"))
    assert await hook.find(await prepared(hook)) == Absent()


async def test_clocks_set_back(cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
    cluster.ran(driver(8, "RUNNING", start=NOW - 3600), launch_command(intent.token))
    assert isinstance(await hook.find(intent), Found)


@pytest.mark.parametrize("state", ["ERROR", "KILLED"])
async def test_a_driver_that_never_was_launched(
    cluster: FakeCluster, hook: QuickHook, intent: Submission, state: str
) -> None:
    cluster.ran(driver(8, state), "")
    if state == "KILLED":
        cluster.master.add(driver(9, state, worker="None"))
    assert await hook.find(intent) == Absent()


UNTOLD: list[tuple[str, dict[str, Any], str | None, str, bool]] = [
    ("being launched", {"state": "RUNNING"}, "", "is being launched", False),
    ("half a command", {"state": "RUNNING"}, "Launch Command: ", "is being launched", False),
    ("directory not made yet", {"state": "RUNNING"}, None, "is being launched", False),
    ("log emptied", {"state": "FAILED"}, "", "does not show its launch command", True),
    ("log removed", {"state": "FINISHED"}, None, "has been removed", True),
    ("worker gone", {"state": "ERROR", "worker": "worker-1"}, "", "worker-1, which ran .*, is gone", True),
    ("redacted", {"state": "RUNNING"}, launch_command("*********(redacted)"), r"spark\.redaction\.regex", True),
    ("endless command", {"state": "RUNNING"}, "x" * (2 << 20), "too long", True),
]


@pytest.mark.parametrize(("entry", "log", "message", "permanent"), [u[1:] for u in UNTOLD], ids=[u[0] for u in UNTOLD])
async def test_cannot_tell(
    cluster: FakeCluster,
    hook: QuickHook,
    intent: Submission,
    entry: dict[str, Any],
    log: str | None,
    message: str,
    permanent: bool,
) -> None:
    cluster.ran(driver(8, **entry), log)
    with pytest.raises(SubmissionUncertain, match=message) as caught:
        await hook.find(intent)
    assert caught.value.permanent is permanent
    assert ("state-store/durable_spark" in str(caught.value)) is permanent


async def test_what_may_be_told_later_is_waited_for_beside_what_never_can(
    cluster: FakeCluster, hook: QuickHook, intent: Submission
) -> None:
    """Whoever takes the one for dead that never can be told of must not pass over the other, which may run."""
    cluster.ran(driver(8, "FINISHED"), None)
    cluster.master.add(driver(9, "SUBMITTED", worker="None"))
    with pytest.raises(SubmissionUncertain, match=r"has been removed.*is queued|is queued.*has been removed") as caught:
        await hook.find(intent)
    assert not caught.value.permanent


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1", "file:///etc/passwd", "http://x@127.0.0.1", "http://h/p?q", 3]
)
async def test_a_worker_out_of_reach(cluster: FakeCluster, hook: QuickHook, intent: Submission, address: Any) -> None:
    cluster.ran(driver(8, "RUNNING"), launch_command(intent.token))
    cluster.master.page["workers"][0]["webuiaddress"] = address
    with pytest.raises(SubmissionUncertain) as caught:
        await hook.find(intent)
    assert not caught.value.permanent


@pytest.mark.parametrize("how", [fixed(500), fixed(200, "<html>"), fixed(302, Location="http://127.0.0.1:1/"), hang_up])
async def test_a_worker_that_misbehaves(cluster: FakeCluster, hook: QuickHook, intent: Submission, how: Any) -> None:
    cluster.ran(driver(8, "RUNNING"), launch_command(intent.token))
    cluster.worker.handler = how
    with pytest.raises(SubmissionUncertain) as caught:
        await hook.find(intent)
    assert not caught.value.permanent
    assert await hook.log_tail(JobRef(driver(8, "RUNNING")["id"]), 10) == ()


async def test_ours_is_found_beside_one_that_cannot_be_told(
    cluster: FakeCluster, hook: QuickHook, intent: Submission
) -> None:
    cluster.ran(driver(8, "SUBMITTED", worker="None"), None)
    cluster.ran(driver(9, "RUNNING"), launch_command(intent.token))
    assert isinstance(await hook.find(intent), Found)


async def test_a_long_launch_command(cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
    jars = "/opt/a.jar:" * 20_000
    log = launch_command(intent.token).replace('"-cp" "', f'"-cp" "{jars}')
    cluster.ran(driver(8, "RUNNING"), log)
    assert isinstance(await hook.find(intent), Found)


async def test_other_text_in_a_log_is_no_label(cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
    log = launch_command(new_token()) + f'"-Dspark.airflow.submission={intent.token}"\n'
    cluster.ran(driver(8, "RUNNING"), log)
    assert await hook.find(intent) == Absent()


# --- find, when the master has forgotten


async def test_evicted(cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
    """The witness is gone, so ours may be; the worker that ran it tells."""
    ours = driver(8, "FINISHED")
    cluster.worker.logs[ours["id"]] = launch_command(intent.token)
    cluster.master.page["completeddrivers"] = [driver(300, "FINISHED", start=NOW + 60)]
    cluster.worker.logs[cluster.master.drivers[0]["id"]] = launch_command()
    found = await hook.find(intent)
    assert isinstance(found, Found)
    assert (found.status.job.id, found.status.state) == (ours["id"], JobState.ABSENT)


async def test_a_master_that_restarted(cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
    cluster.master.page["completeddrivers"] = []
    assert await hook.find(intent) == Absent()


async def test_a_fresh_master(cluster: FakeCluster, hook: QuickHook) -> None:
    assert await hook.find(await prepared(hook)) == Absent()


async def test_ended_by_a_new_leader_and_run_by_nobody(
    cluster: FakeCluster, hook: QuickHook, intent: Submission
) -> None:
    cluster.master.page["completeddrivers"] = [driver(8, "ERROR", worker="None")]
    assert await hook.find(intent) == Absent()


async def test_ended_by_a_new_leader_and_run_by_somebody(
    cluster: FakeCluster, hook: QuickHook, intent: Submission
) -> None:
    ours = driver(8, "ERROR", worker="None")
    cluster.master.page["completeddrivers"] = [ours]
    cluster.worker.logs[ours["id"]] = launch_command(intent.token)
    found = await hook.find(intent)
    assert isinstance(found, Found)
    assert (found.status.job.id, found.status.state) == (ours["id"], JobState.FAILED)


@pytest.mark.parametrize(
    ("change", "message", "permanent"),
    [
        ({"id": "worker-20261123040000-127.0.0.1-28435"}, "workers are not those", True),
        ({"id": "worker-a"}, "workers are not those", True),
        ({"state": "DEAD"}, "workers are not those", False),
        ({"state": "UNKNOWN"}, "is not alive", False),
        ({"webuiaddress": "http://127.0.0.1:1"}, "cannot be read", False),
        ({"webuiaddress": "nonsense"}, "is not alive", False),
    ],
)
async def test_no_proof_from_the_workers(
    cluster: FakeCluster, hook: QuickHook, intent: Submission, change: dict[str, Any], message: str, permanent: bool
) -> None:
    cluster.master.page["completeddrivers"] = []
    cluster.master.page["workers"][0].update(change)
    with pytest.raises(SubmissionUncertain, match=message) as caught:
        await hook.find(intent)
    assert caught.value.permanent is permanent


async def test_a_master_that_has_just_started_is_asked_again(
    cluster: FakeCluster, hook: QuickHook, intent: Submission
) -> None:
    """One without a memory knows neither drivers nor workers, until these have come back."""
    workers, cluster.master.page["workers"] = cluster.master.page["workers"], []
    cluster.master.page["completeddrivers"] = []
    with pytest.raises(SubmissionUncertain, match="its workers are not those that it had") as caught:
        await hook.find(intent)
    assert not caught.value.permanent
    cluster.master.page["workers"] = workers
    assert await hook.find(intent) == Absent()


async def test_workers_whose_ids_tell_no_time_prove_nothing(cluster: FakeCluster, hook: QuickHook) -> None:
    cluster.master.page["workers"][0]["id"] = "worker-a"
    with pytest.raises(SubmissionUncertain) as caught:
        await hook.find(await prepared(hook))
    assert caught.value.permanent


async def test_a_worker_that_forgets(cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
    cluster.master.page["completeddrivers"] = []
    cluster.worker.listed = [driver(n, "FINISHED", start=NOW - 9e5)["id"] for n in range(950)]
    with pytest.raises(SubmissionUncertain, match="may have forgotten") as caught:
        await hook.find(intent)
    assert caught.value.permanent


async def test_no_evidence_proves_nothing(cluster: FakeCluster, hook: QuickHook) -> None:
    cluster.ran(driver(7, "FINISHED"), launch_command())
    with pytest.raises(SubmissionUncertain) as caught:
        await hook.find(new())
    assert caught.value.permanent


def test_what_is_no_launch_command_has_no_labels() -> None:
    log = launch_command("ab" * 16)
    assert (labels_of(log) or {})["spark.airflow.submission"] == "ab" * 16
    assert labels_of(log[1:]) is None
    assert labels_of("<title>Sign in</title>\n" + "=" * 40) is None


@pytest.mark.parametrize("page", ["<html>Sign in</html>", recorded("worker.html")[:5000]])
async def test_what_is_no_whole_page_of_a_worker_proves_nothing(
    cluster: FakeCluster, hook: QuickHook, intent: Submission, page: str
) -> None:
    cluster.master.page["completeddrivers"] = []
    cluster.worker.handler = fixed(200, page)
    with pytest.raises(SubmissionUncertain, match="does not show its page"):
        await hook.find(intent)


async def test_a_recorded_worker_page_lists_its_drivers() -> None:
    assert listed_drivers(recorded("worker.html")) == {
        "driver-20261123035342-0000",
        "driver-20261123035358-0001",
        "driver-20261123035359-0002",
    }


async def test_find_owned(cluster: FakeCluster, hook: QuickHook) -> None:
    mine = cluster.ran(driver(1, "RUNNING"), launch_command("ab" * 16, deployment="prod", owner="o1"))
    other = cluster.ran(driver(2, "RUNNING"), launch_command("cd" * 16, deployment="prod", owner="o2"))
    cluster.ran(driver(3, "RUNNING"), launch_command("ef" * 16, deployment="test", owner="o1"))
    cluster.ran(driver(4, "FINISHED"), launch_command("ef" * 16, deployment="prod", owner="o1"))
    cluster.ran(driver(5, "SUBMITTED", worker="None"), None)
    assert [job.status.job.id for job in await hook.find_owned("prod")] == [mine["id"], other["id"]]
    (job,) = await hook.find_owned("prod", "o1")
    assert (job.token, job.owner, job.status.job.id) == ("ab" * 16, "o1", mine["id"])


# --- poll


@pytest.mark.parametrize(
    ("raw", "state"),
    [
        ("SUBMITTED", JobState.PENDING),
        ("RUNNING", JobState.RUNNING),
        ("FINISHED", JobState.SUCCEEDED),
        ("FAILED", JobState.FAILED),
        ("ERROR", JobState.FAILED),
        ("KILLED", JobState.KILLED),
        ("RELAUNCHING", JobState.RELAUNCHED),
        ("UNKNOWN", JobState.UNKNOWN),
        ("SOMETHING", JobState.UNKNOWN),
    ],
)
@pytest.mark.parametrize("page", [True, False])
async def test_states(cluster: FakeCluster, hook: QuickHook, raw: str, state: JobState, page: bool) -> None:
    cluster.master.add(driver(1, raw))
    if not page:
        cluster.master.ui = fixed(500)
    job = JobRef(driver(1, raw)["id"], uid="x")
    status = (await hook.poll([job]))[job]
    assert (status.job, status.state, status.raw) == (job, state, raw)


async def test_recorded_page(cluster: FakeCluster, hook: QuickHook) -> None:
    cluster.master.page = recorded_json("page.json")
    ran, error, queued = (JobRef(f"driver-20261123{end}") for end in ("035342-0000", "035358-0001", "035359-0003"))
    cluster.master.messages[error.id] = recorded_json("status-error.json")["message"]
    statuses = await hook.poll([ran, error, queued])
    assert statuses[ran].state is JobState.SUCCEEDED
    ui = cluster.master.ui_url
    assert statuses[ran].links == {
        Link.JOB: f"{ui}/#aggregated-completedDrivers",
        Link.LOG: f"http://127.0.0.1:8081/logPage/?driverId={ran.id}&logType=stderr",
    }
    assert statuses[error].message.startswith(
        "Exception from the cluster:\njava.nio.file.NoSuchFileException: /missing/app.jar\n"
    )
    assert "\tjava" not in statuses[error].message
    assert statuses[queued].links == {Link.JOB: f"{ui}/#aggregated-activeDrivers"}


async def test_one_request_for_all(cluster: FakeCluster, hook: QuickHook) -> None:
    jobs = [JobRef(cluster.ran(driver(n, "RUNNING"), None)["id"]) for n in range(50)]
    await hook.poll(jobs)
    assert cluster.master.requests == [("GET", "/json/")]


async def test_ids_that_are_none_are_never_sent(cluster: FakeCluster, hook: QuickHook) -> None:
    jobs = [
        JobRef(text)
        for text in (
            "",
            "../x",
            "driver-1/../../x",
            "driver-20261123035342-0000\n",
            "application_1_2",
            "driver-2026-1?x",
        )
    ]
    statuses = await hook.poll(jobs)
    assert {status.state for status in statuses.values()} == {JobState.ABSENT}
    for job in jobs:
        await hook.kill(job)
        assert await hook.log_tail(job, 10) == ()
    assert cluster.master.requests == []


async def test_absent_by_the_leader(cluster: FakeCluster, hook: QuickHook) -> None:
    assert (await hook.poll([UNKNOWN]))[UNKNOWN].state is JobState.ABSENT


@pytest.mark.parametrize(
    "how",
    [
        fixed(200, '{"success": false, "submissionId": "driver-20200101000000-0000", "message": "?"}'),
        fixed(200, '{"submissionId": "driver-20200101000000-0000"}'),
        fixed(200, '{"success": false, "submissionId": "driver-20200101000000-0001"}'),
        fixed(200, "garbage"),
        fixed(500),
        hang_up,
    ],
)
async def test_nothing_else_is_an_absence(cluster: FakeCluster, hook: QuickHook, how: Any) -> None:
    cluster.master.rest = how
    running = JobRef(cluster.ran(driver(1, "RUNNING"), None)["id"])
    failed = JobRef(cluster.ran(driver(2, "FAILED"), None)["id"])
    statuses = await hook.poll([UNKNOWN, running, failed])
    assert [statuses[job].state for job in (UNKNOWN, running, failed)] == [
        JobState.UNKNOWN,
        JobState.RUNNING,
        JobState.FAILED,
    ]


async def test_only_the_leaders_word_counts(two_masters: FakeCluster, connect: Connect) -> None:
    """A standby knows no driver; its page and its REST server must not be believed."""
    hook = connect(two_masters.connection())
    first, second = two_masters.masters
    entry = driver(1, "RUNNING")
    job = JobRef(entry["id"])
    first.add(entry)
    assert (await hook.poll([job]))[job].state is JobState.RUNNING
    second.add(entry)
    first.page |= {"status": "STANDBY", "activedrivers": []}
    second.page["status"] = "ALIVE"
    assert (await hook.poll([job]))[job].state is JobState.RUNNING
    for master in two_masters.masters:
        master.ui = fixed(500)
    assert (await hook.poll([job]))[job].state is JobState.RUNNING
    await hook.kill(job)
    assert (first.asked("POST", "/v1/submissions/kill"), second.asked("POST", "/v1/submissions/kill")) == (0, 1)


async def test_the_fallback_is_said_once(
    cluster: FakeCluster, hook: QuickHook, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "_log", logging.getLogger("hook"))
    jobs = [JobRef(cluster.ran(driver(n, "RUNNING"), None)["id"]) for n in range(40)]
    cluster.master.ui = fixed(502)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            statuses = await hook.poll(jobs)
        cluster.master.ui = None
        await hook.poll(jobs)
        await hook.poll(jobs)
    assert {status.state for status in statuses.values()} == {JobState.RUNNING}
    said = [record.message for record in caplog.records if "page" in record.message]
    assert [("cannot be read" in line, "again" in line) for line in said] == [(True, False), (False, True)]


async def test_the_fallback_is_bounded(cluster: FakeCluster, hook: QuickHook) -> None:
    jobs = [JobRef(cluster.ran(driver(n, "RUNNING"), None)["id"]) for n in range(100)]
    cluster.master.ui = fixed(502)
    at_once = most = 0

    async def rest(request: web.Request) -> web.StreamResponse:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.005)
        at_once -= 1
        return await cluster.master.answer(request)

    cluster.master.rest = rest
    await hook.poll(jobs)
    assert 1 < most <= standalone.CONCURRENCY


async def test_neither_page_nor_rest(cluster: FakeCluster, hook: QuickHook) -> None:
    cluster.master.ui = fixed(503, Retry_After="30")
    cluster.master.rest = fixed(503)
    with pytest.raises(ClusterUnreachable, match="/json/ answered 503") as caught:
        await hook.poll([UNKNOWN])
    assert caught.value.retry_after == 30.0


async def test_a_page_that_is_to_be_left_alone_is_not_asked_twice(cluster: FakeCluster, hook: QuickHook) -> None:
    """A master that does not answer well is asked once more, among all masters; not one that says when to come back."""
    await hook.poll([UNKNOWN])
    asked = cluster.master.asked("GET", "/json/")
    cluster.master.ui = fixed(429, Retry_After="12")
    cluster.master.rest = fixed(503)
    with pytest.raises(ClusterUnreachable, match="/json/ answered 429") as caught:
        await hook.poll([UNKNOWN])
    assert caught.value.retry_after == 12.0
    assert cluster.master.asked("GET", "/json/") == asked + 1


async def test_10_000_drivers(cluster: FakeCluster, hook: QuickHook) -> None:
    jobs = [JobRef(cluster.ran(driver(n, "RUNNING"), None)["id"]) for n in range(10_000)]
    app = {"id": "app-20261123031302-0000", "name": "x" * 40, "state": "RUNNING", "submitdate": "x" * 28}
    body = json.dumps(cluster.master.page | {"activeapps": [app | {"filler": "y" * 250}] * 10_000}, indent=2)
    assert len(body) < PAGE_LIMIT / 4
    cluster.master.ui = fixed(200, body, Date="Mon, 23 Nov 2026 03:20:15 GMT")
    statuses = await hook.poll(jobs)
    assert {status.state for status in statuses.values()} == {JobState.RUNNING}
    assert cluster.master.requests == [("GET", "/json/")]


# --- kill and log


async def test_kill(cluster: FakeCluster, hook: QuickHook) -> None:
    job = JobRef(cluster.ran(driver(1, "RUNNING"), None)["id"])
    await hook.kill(job)
    await hook.kill(UNKNOWN)
    assert cluster.master.asked("POST", f"/v1/submissions/kill/{job.id}") == 1


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        (fixed(400, '{"message": "no"}'), RequestRefused),
        (fixed(403), AuthenticationFailed),
        (fixed(500), ClusterUnreachable),
        (fixed(200, "{}"), InvalidAnswer),
        (hang_up, ClusterUnreachable),
    ],
)
async def test_a_kill_that_is_not_accepted(cluster: FakeCluster, hook: QuickHook, how: Any, kind: Any) -> None:
    async def rest(request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return await cluster.master.answer(request)
        answer: web.StreamResponse = await how(request)
        return answer

    cluster.master.rest = rest
    with pytest.raises(kind):
        await hook.kill(UNKNOWN)


async def test_log_tail(cluster: FakeCluster, hook: QuickHook) -> None:
    log = launch_command() + "".join(f"line {n}\n" for n in range(100_000)) + "\n\n"
    job = JobRef(cluster.ran(driver(1, "FAILED"), log)["id"])
    assert await hook.log_tail(job, 2) == ["line 99998", "line 99999"]
    assert len(await hook.log_tail(job, 10**6)) < 10_000
    assert await hook.log_tail(job, 0) == []
    assert await hook.log_tail(UNKNOWN, 2) == ()


async def test_closed_and_used_again(cluster: FakeCluster, hook: QuickHook, stack: AsyncExitStack) -> None:
    await hook.check()
    await hook.aclose()
    await hook.aclose()
    await hook.check()


async def test_log_tail_shows_a_pyspark_traceback(cluster: FakeCluster, hook: QuickHook) -> None:
    job = JobRef(cluster.ran(driver(1, "FAILED"), launch_command() + "shutting down\n")["id"])
    cluster.worker.outputs[job.id] = "working\nTraceback (most recent call last):\nValueError: why\n"
    assert (await hook.log_tail(job, 6))[-3:] == ["working", "Traceback (most recent call last):", "ValueError: why"]
    assert "shutting down" in await hook.log_tail(job, 6)
    assert len(await hook.log_tail(job, 6)) <= 6


async def test_log_tail_of_a_short_log(cluster: FakeCluster, hook: QuickHook) -> None:
    job = JobRef(cluster.ran(driver(1, "FAILED"), launch_command() + "Traceback\n")["id"])
    tail = await hook.log_tail(job, 1000)
    assert (tail[0], tail[-1]) == ("WARNING: Using incubator modules: jdk.incubator.vector", "Traceback")


async def test_a_new_leader_whose_clock_is_behind(cluster: FakeCluster, hook: QuickHook, intent: Submission) -> None:
    """It must not take the difference between the clocks for the time to settle."""
    hook.settle_time = 0.2
    cluster.master.now = NOW - 250
    assert await asyncio.wait_for(hook.find(intent), 5) == Absent()


async def test_dead_workers_are_no_part_of_the_evidence(cluster: FakeCluster, hook: QuickHook) -> None:
    alive = cluster.master.page["workers"][0]
    dead = {**alive, "id": "worker-20261101000000-127.0.0.1-1", "state": "DEAD", "webuiaddress": "http://127.0.0.1:1"}
    cluster.master.page["workers"].append(dead)
    intent = await prepared(hook)
    cluster.master.page["workers"].remove(dead)
    assert await hook.find(intent) == Absent()


# --- spark-submit

WAIT = "spark.standalone.submit.waitAppCompletion"


async def test_properties_for_spark_submit(cluster: FakeCluster, hook: QuickHook) -> None:
    submission = new()
    plan = await hook.prepare_cli({"spark.executor.memory": "1g"}, submission)
    assert plan.conf == {
        WAIT: "false",
        "spark.airflow.submission": submission.token,
        "spark.airflow.owner": submission.owner,
        "spark.airflow.deployment": "prod",
    }
    assert plan.submission == await hook.prepare(JOB, submission), "what find() needs is the same"
    assert not plan.environment_stays, "it becomes the driver's"
    assert not cluster.master.created
    bare = await hook.prepare_cli({}, Submission(token=submission.token))
    assert bare.conf == {WAIT: "false", "spark.airflow.submission": submission.token}


@pytest.mark.parametrize("name", ["submission", "owner", "deployment"])
async def test_our_properties_are_not_the_users(cluster: FakeCluster, hook: QuickHook, name: str) -> None:
    with pytest.raises(BadArguments, match=rf"conf must not set spark\.airflow\.{name}"):
        await hook.prepare_cli({f"spark.airflow.{name}": "x"}, new())
    assert not cluster.master.requests


@pytest.mark.parametrize(("value", "told"), [("true", True), (" True ", True), ("false", False)])
async def test_spark_submit_does_not_wait(
    hook: QuickHook, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, value: str, told: bool
) -> None:
    monkeypatch.setattr(hook, "_log", logging.getLogger("hook"))
    caplog.set_level(logging.INFO)
    assert (await hook.prepare_cli({WAIT: value}, new())).conf[WAIT] == "false"
    assert (f"{WAIT} is set to false" in caplog.text) == told


async def test_spark_submit_needs_a_cluster_that_can_be_followed(cluster: FakeCluster, hook: QuickHook) -> None:
    cluster.master.rest = fixed(404)
    with pytest.raises(BadConfiguration, match="rest-port"):
        await hook.prepare_cli({}, new())


@pytest.mark.parametrize(
    ("line", "driver_id"),
    [
        ("26/11/26 INFO ClientEndpoint: Driver successfully submitted as {id}", True),
        ("Driver successfully submitted as {id}\r", True),
        ("INFO RestSubmissionClient: Submission successfully created as {id}. Polling submission state...", True),
        ('  "message" : "Driver successfully submitted as {id}",', True),
        ("INFO ClientEndpoint: State of {id} is RUNNING", False),
        ("INFO RestSubmissionClient: Submitting a request for the status of submission {id} in spark://h", False),
        ('  "submissionId" : "{id}",', False),
        ("ERROR: Cluster master did not recognize {id}", False),
        ("Driver successfully submitted as {id}-1", False),
        ("Driver successfully submitted as {id}1234567890", False),
        ("Driver successfully submitted as driver-../../x", False),
        ("Current state is not alive: STANDBY. Can only accept driver submissions in ALIVE state.", False),
        ("", False),
    ],
)
def test_driver_in_a_line_of_spark_submit(line: str, driver_id: bool) -> None:
    expected = JobRef("driver-20261126031028-0000") if driver_id else None
    assert QuickHook("c").job_in(line.format(id="driver-20261126031028-0000"), new()) == expected


async def test_glimpse(cluster: FakeCluster, hook: QuickHook) -> None:
    submission = (await hook.prepare_cli({}, new())).submission
    assert await glimpse(hook, submission) is None
    cluster.ran(driver(1, "RUNNING"), launch_command(new_token()))
    cluster.ran(driver(2, "SUBMITTED", worker="None"), None)
    cluster.ran(driver(3, "RUNNING"), launch_command(submission.token).partition("=====")[0])
    assert await glimpse(hook, submission) is None, "none of them shows our token"
    before = cluster.worker.asked
    assert await glimpse(hook, submission) is None
    assert cluster.worker.asked == before + 1, "the first one's command is known"
    cluster.worker.logs[driver(3, "RUNNING")["id"]] = launch_command(submission.token)
    assert await glimpse(hook, submission) == JobRef(driver(3, "RUNNING")["id"])


async def test_glimpse_reads_few_logs(cluster: FakeCluster, hook: QuickHook) -> None:
    submission = (await hook.prepare_cli({}, new())).submission
    for number in range(10):
        cluster.ran(driver(number, "RUNNING"), launch_command(submission.token if number == 9 else new_token()))
    for _ in range(2):
        before = cluster.worker.asked
        assert await glimpse(hook, submission) is None
        assert cluster.worker.asked == before + standalone.GLIMPSED
    assert await glimpse(hook, submission) == JobRef(driver(9, "RUNNING")["id"])


async def test_glimpse_is_seldom_where_it_is_dear(
    cluster: FakeCluster, hook: QuickHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    submission = (await hook.prepare_cli({}, new())).submission
    cluster.ran(driver(1, "RUNNING"), launch_command(submission.token))
    monkeypatch.setattr(standalone, "GLIMPSE_PAUSE", 1000)
    assert await hook.glimpse(submission) is not None
    asked = len(cluster.master.requests)
    assert await hook.glimpse(submission) is None
    assert len(cluster.master.requests) == asked


async def test_glimpse_of_a_driver_that_was_there_before(cluster: FakeCluster, hook: QuickHook) -> None:
    cluster.ran(driver(5, "RUNNING", start=NOW - 100), launch_command("ab" * 16))
    submission = (await hook.prepare_cli({}, Submission(token="ab" * 16))).submission
    assert await glimpse(hook, submission) is None


async def glimpse(hook: QuickHook, submission: Submission) -> JobRef | None:
    """Look at once, however long the last look took."""
    hook._glimpse_again = 0.0
    return await hook.glimpse(submission)


def read(page: dict[str, Any]) -> View:
    reader = PageReader("http://m:8080")
    parsed = {
        name: [reader.element(entry, name) for entry in value] if isinstance(value, list) else value
        for name, value in page.items()
    }
    return reader.view(parsed, time=NOW)


def test_a_driver_begun_at_no_time_is_on_no_page() -> None:
    page = recorded_json("page.json") | {"activedrivers": [driver(1, "RUNNING") | {"starttime": float("inf")}]}
    with pytest.raises(InvalidAnswer, match="not the page"):
        read(page)


@pytest.mark.parametrize("name", ["activedrivers", "completeddrivers", "workers"])
@pytest.mark.parametrize("value", ["", {}, None])
def test_what_is_no_list_is_not_an_empty_one(name: str, value: Any) -> None:
    with pytest.raises(InvalidAnswer, match="not the page"):
        read(recorded_json("page.json") | {name: value})


async def test_no_log_is_asked_for_without_an_address(cluster: FakeCluster, hook: QuickHook) -> None:
    cluster.master.add(driver(1, "FAILED"))
    cluster.master.page["workers"][0]["webuiaddress"] = "http://u:p@worker"
    hook._masters.log_page = None  # type: ignore[assignment,method-assign]  # whoever calls it fails
    assert await hook.log_tail(JobRef(driver(1, "FAILED")["id"]), 5) == ()


def test_a_log_without_end_is_no_log() -> None:
    with pytest.raises(InvalidAnswer, match="not a worker's log page"):
        log_text(f"==== Bytes 0-0 of {'9' * 5000} of /stderr ====\n")
