"""The YARN hook against ResourceManagers that misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import web

from durable_spark.hooks import _http
from durable_spark.hooks._http import Answer
from durable_spark.jobs import (
    Absent,
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
    SubmissionUncertain,
)
from tests.unit.hooks.fake import fixed, hang, hang_up
from tests.unit.hooks.fake_yarn import (
    NOW,
    STARTED,
    FakeNode,
    FakeTimeline,
    FakeYarn,
    QuickYarnHook,
    app_id,
    ours,
    row,
)

Connect = Callable[[dict[str, Any]], QuickYarnHook]
UNKNOWN = JobRef("application_1111111111111_0001")
TOKEN = "ab" * 16


def new(**given: Any) -> Submission:
    return Submission(token=TOKEN, owner="cd" * 16, deployment="prod", **given)


async def prepared(hook: QuickYarnHook) -> Submission:
    return (await hook.prepare_cli({}, new())).submission


def job(number: int) -> JobRef:
    return JobRef(app_id(number))


async def state_of(hook: QuickYarnHook, ref: JobRef) -> JobState:
    return (await hook.poll([ref]))[ref].state


# --- submit


async def test_not_natively(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    for call in (
        yarn_hook.prepare(SparkJob(application="x"), new()),
        yarn_hook.submit(SparkJob(application="x"), new()),
    ):
        with pytest.raises(BadArguments, match=r"durable_spark\.operators\.spark_submit\.SparkSubmitOperator"):
            await call
    assert yarn.manager.requests == []


async def test_prepare(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    for number, seconds in ((1, 500), (2, 20), (3, 300)):
        yarn.manager.add(row(number, "FINISHED", finishedTime=int(NOW - seconds) * 1000))
    yarn.manager.add(row(4))
    ready = await yarn_hook.prepare_cli({"spark.yarn.tags": "mine", "spark.app.name": "x"}, new(name="dag.task"))
    tags = f"mine,durable-spark,durable-spark.submission={TOKEN},durable-spark.owner={'cd' * 16}"
    assert ready.conf == {
        "spark.yarn.tags": f"{tags},durable-spark.deployment=prod",
        "spark.yarn.submit.waitAppCompletion": "false",
        "spark.yarn.maxAppAttempts": "1",
    }
    assert ready.environment_stays
    assert ready.submission.cluster_time == NOW
    assert ready.submission.name == "dag.task"
    assert ready.submission.evidence == {
        "manager": yarn.manager.url,
        "started": str(STARTED),
        "last_ended": app_id(2),
    }
    assert len(json.dumps(dict(ready.submission.evidence))) < 512
    assert not yarn.manager.asked("apps", "POST")


@pytest.mark.parametrize("seconds", [3600, 86400])
async def test_what_ended_long_ago_is_evidence_too(yarn: FakeYarn, yarn_hook: QuickYarnHook, seconds: int) -> None:
    yarn.manager.add(row(1, "KILLED", finishedTime=int(NOW - seconds) * 1000))
    assert (await prepared(yarn_hook)).evidence["last_ended"] == app_id(1)


async def test_the_user_has_a_say(yarn_hook: QuickYarnHook, capsys: pytest.CaptureFixture[str]) -> None:
    ready = await yarn_hook.prepare_cli({"spark.yarn.maxAppAttempts": "3"}, new())
    assert "spark.yarn.maxAppAttempts" not in ready.conf
    assert "waitAppCompletion" not in capsys.readouterr().out
    ready = await yarn_hook.prepare_cli({"spark.yarn.submit.waitAppCompletion": "TRUE"}, new())
    assert ready.conf["spark.yarn.submit.waitAppCompletion"] == "false"
    assert capsys.readouterr().out.count("waitAppCompletion=true is not heeded") == 1


async def test_wrong_tags_ask_nothing(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    with pytest.raises(BadArguments, match=r"spark\.yarn\.tags"):
        await yarn_hook.prepare_cli({"spark.yarn.tags": "é"}, new())
    assert yarn.manager.requests == []


LINES = [
    ("25/11/23 03:53:42 INFO YarnClientImpl: Submitted application application_1795663815040_0003", True),
    ("Submitted application application_1795663815040_0003\n", True),
    ('{"level":"INFO","msg":"Submitted application application_1795663815040_0003","logger":"YarnClientImpl"}', True),
    ("INFO Client: Submitting application application_1795663815040_0003 to ResourceManager", False),
    ("INFO Client: Application report for application_1795663815040_0003 (state: ACCEPTED)", False),
    ("Application submission is not finished, submitted application application_1795663815040_0003 is still", False),
    ("INFO YarnClientImpl: Submitted application application_1795663815040_0003/../x", False),
    ("INFO YarnClientImpl: Submitted application application_1795663815040_0003_01", False),
    ("INFO YarnClientImpl: Submitted application job_1795663815040_0003", False),
    ("INFO X: NotSubmitted application application_1795663815040_0003", False),
    ("Failed to re-submit application application_1795663815040_0003", False),
]


@pytest.mark.parametrize(("line", "vouches"), LINES)
def test_lines_of_spark_submit(line: str, vouches: bool) -> None:
    found = QuickYarnHook("c").job_in(line, new())
    assert found == (JobRef("application_1795663815040_0003") if vouches else None)


async def test_glimpse(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    assert await yarn_hook.glimpse(new()) is None
    yarn.manager.add(row(3, "NEW_SAVING", tags=ours(TOKEN)))
    assert await yarn_hook.glimpse(new()) is None, "it would be forgotten if the ResourceManager died now"
    yarn.manager.add(row(3, "ACCEPTED", tags=ours(TOKEN)), row(4, "ACCEPTED", tags=ours(TOKEN)), row(1, tags=ours()))
    before = len(yarn.manager.requests)
    assert await yarn_hook.glimpse(new()) == job(3)
    assert len(yarn.manager.requests) == before + 1
    yarn.manager.handler = fixed(503)
    assert await yarn_hook.glimpse(new()) is None


# --- find


async def test_found(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    intent = await prepared(yarn_hook)
    yarn.manager.add(row(8, tags=ours()), row(9, "FINISHED", "FAILED", tags=ours(TOKEN)))
    found = await yarn_hook.find(intent)
    assert isinstance(found, Found)
    assert (found.status.job, found.status.state, list(found.younger)) == (job(9), JobState.FAILED, [])


async def test_the_oldest_is_the_job(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    intent = await prepared(yarn_hook)
    yarn.manager.add(*(row(n, s, tags=ours(TOKEN)) for n, s in ((9, "RUNNING"), (8, "ACCEPTED"), (10, "KILLED"))))
    found = await yarn_hook.find(intent)
    assert isinstance(found, Found)
    assert (found.status.job, list(found.younger)) == (job(8), [job(9)])


async def test_what_does_not_carry_the_tag_is_not_found(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    """Whoever stands in between drops the question for it: strangers' applications must not be followed, nor killed."""
    intent = await prepared(yarn_hook)
    yarn.manager.ignores_tags = True
    yarn.manager.add(row(1, tags="nightly"), row(2, tags=ours()))
    assert await yarn_hook.glimpse(intent) is None
    assert await yarn_hook.find(intent) == Absent()
    yarn.manager.add(row(3, tags=ours(TOKEN)))
    found = await yarn_hook.find(intent)
    assert isinstance(found, Found)
    assert (found.status.job, list(found.younger)) == (job(3), [])


async def test_absent(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    yarn.manager.add(row(1, "FINISHED"), row(2, tags=ours()))
    assert await yarn_hook.find(await prepared(yarn_hook)) == Absent()


async def test_absent_on_a_fresh_cluster(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    assert await yarn_hook.find(await prepared(yarn_hook)) == Absent()


async def test_an_absence_is_not_believed_at_once(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    intent = await prepared(yarn_hook)
    yarn_hook.settle_time = 0.3

    async def arrive() -> None:
        await yarn.manager.tag_asked.wait()
        yarn.manager.add(row(5, "SUBMITTED", tags=ours(TOKEN)))

    arriving = asyncio.ensure_future(arrive())
    assert isinstance(await yarn_hook.find(intent), Found)
    await arriving


async def test_an_intent_of_long_ago_need_not_settle(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    intent = await prepared(yarn_hook)
    yarn_hook.settle_time = 30.0
    yarn.manager.now += 31
    assert await asyncio.wait_for(yarn_hook.find(intent), 5) == Absent()


async def test_a_resourcemanager_in_its_recovery_proves_nothing(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    intent = await prepared(yarn_hook)
    yarn.manager.add(row(5, tags=ours(TOKEN)))
    yarn.manager.state = "INITIALIZING"
    with pytest.raises(SubmissionUncertain, match="INITIALIZING") as caught:
        await yarn_hook.find(intent)
    assert not caught.value.permanent
    with pytest.raises(ClusterUnreachable, match="INITIALIZING"):
        await yarn_hook.find_owned("prod")


async def test_a_recovery_is_waited_for(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    intent = await prepared(yarn_hook)
    yarn_hook.patience = 20.0
    yarn.manager.add(row(5, tags=ours(TOKEN)))
    yarn.manager.state = "INITIALIZING"

    async def recover() -> None:
        await yarn.manager.tag_asked.wait()
        yarn.manager.state = "ACTIVE"

    recovering = asyncio.ensure_future(recover())
    assert isinstance(await yarn_hook.find(intent), Found)
    await recovering


@pytest.mark.parametrize("afterwards", ["INITIALIZING", "ACTIVE"])
async def test_restarted_between_the_questions(yarn: FakeYarn, yarn_hook: QuickYarnHook, afterwards: str) -> None:
    """It was ACTIVE before, and died: what answered 404 was its successor, in its recovery."""
    intent = await prepared(yarn_hook)
    yarn.manager.add(row(5, tags=ours(TOKEN)))

    async def die(request: web.Request) -> web.StreamResponse:
        yarn.manager.state = "INITIALIZING"
        yarn.manager.started += 1
        answer = await yarn.manager.answer(request)
        yarn.manager.state = afterwards
        return answer

    async def just_before(request: web.Request) -> web.StreamResponse:
        answer = yarn.manager.info()
        yarn.manager.state = "ACTIVE"
        return answer

    yarn.manager.handler, yarn.manager.on_info = die, just_before
    for _ in range(3):
        yarn.manager.state = "ACTIVE"
        assert await state_of(yarn_hook, job(5)) is JobState.UNKNOWN
        yarn.manager.state = "ACTIVE"
        with pytest.raises(SubmissionUncertain) as caught:
            await yarn_hook.find(intent)
        assert not caught.value.permanent
        with pytest.raises(ClusterUnreachable):
            await yarn_hook.find_owned("prod")


async def test_deposed_between_the_questions(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    """The same process, but what it knew when it was asked is not what its successor knows."""

    async def hand_over(request: web.Request) -> web.StreamResponse:
        answer = yarn.manager.info()
        yarn.manager.state = "STANDBY"
        return answer

    yarn.manager.handler, yarn.manager.on_info = yarn.manager.answer, hand_over
    assert await state_of(yarn_hook, UNKNOWN) is JobState.UNKNOWN


async def test_just_started(yarn: FakeYarn, connect_yarn: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """ACTIVE, and started a moment ago: not believed either."""
    monkeypatch.setattr(QuickYarnHook, "recovery_time", 10.0)
    hook = connect_yarn(yarn.connection())
    yarn.manager.started = int((NOW - 9) * 1000)
    status = (await hook.poll([UNKNOWN]))[UNKNOWN]
    assert (status.state, "was started 9 s ago" in status.message) == (JobState.UNKNOWN, True)
    yarn.manager.now += 2
    assert await state_of(hook, UNKNOWN) is JobState.ABSENT


# --- find, when the ResourceManager may have forgotten


def evict(yarn: FakeYarn, *numbers: int) -> None:
    for number in numbers:
        del yarn.manager.apps[app_id(number)]


async def test_evicted(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    """A thousand others have ended since: ours may have, too, and be forgotten."""
    yarn.manager.add(row(1, "FINISHED"))
    intent = await prepared(yarn_hook)
    yarn.manager.conf["yarn.resourcemanager.max-completed-applications"] = "3"
    yarn.manager.add(*(row(n, "FINISHED") for n in range(10, 13)))
    evict(yarn, 1)
    with pytest.raises(SubmissionUncertain, match=f"{app_id(1)}, which had ended before the intent") as caught:
        await yarn_hook.find(intent)
    assert caught.value.permanent
    for part in ("state-store/durable_spark", f"durable-spark.submission={TOKEN}", yarn.manager.url):
        assert part in str(caught.value)


async def test_the_witness_is_still_known_after_a_restart(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    yarn.manager.add(row(1, "FINISHED"))
    intent = await prepared(yarn_hook)
    yarn.manager.started += 1
    yarn.manager.conf.clear()
    assert await yarn_hook.find(intent) == Absent()


async def test_a_resourcemanager_that_forgot_all(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    """Without recovery (YARN's default), a restart forgets every application."""
    yarn.manager.add(row(1, "FINISHED"))
    intent = await prepared(yarn_hook)
    yarn.manager.apps.clear()
    yarn.manager.started += 1
    with pytest.raises(SubmissionUncertain) as caught:
        await yarn_hook.find(intent)
    assert caught.value.permanent


@pytest.mark.parametrize(
    ("kept", "ended", "proven"), [("5", 4, True), ("5", 5, False), ("5", 6, False), ("0", 0, False), ("x", 0, False)]
)
async def test_without_a_witness(yarn: FakeYarn, yarn_hook: QuickYarnHook, kept: str, ended: int, proven: bool) -> None:
    """Nothing had ended before: only a ResourceManager that has not been full can be believed."""
    intent = await prepared(yarn_hook)
    assert intent.evidence["last_ended"] == ""
    yarn.manager.conf["yarn.resourcemanager.max-completed-applications"] = kept
    yarn.manager.add(*(row(n, "FINISHED") for n in range(10, 10 + ended)))
    if proven:
        assert await yarn_hook.find(intent) == Absent()
        return
    with pytest.raises(SubmissionUncertain) as caught:
        await yarn_hook.find(intent)
    assert caught.value.permanent


async def test_without_a_witness_and_restarted(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    intent = await prepared(yarn_hook)
    yarn.manager.started += 1
    with pytest.raises(SubmissionUncertain) as caught:
        await yarn_hook.find(intent)
    assert caught.value.permanent


async def test_without_a_witness_and_without_the_configuration(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    """Not every ResourceManager shows it, nor every proxy."""
    intent = await prepared(yarn_hook)
    yarn.manager.conf.clear()
    with pytest.raises(SubmissionUncertain) as caught:
        await yarn_hook.find(intent)
    assert caught.value.permanent


async def test_no_evidence_proves_nothing(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    yarn.manager.add(row(1, "FINISHED"))
    with pytest.raises(SubmissionUncertain) as caught:
        await yarn_hook.find(new())
    assert caught.value.permanent


async def test_lists_that_hide_others_prove_nothing(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    yarn.manager.add(row(1, "FINISHED"))
    intent = await prepared(yarn_hook)
    yarn.manager.conf["yarn.webapp.filter-entity-list-by-user"] = "true"
    with pytest.raises(SubmissionUncertain, match="filter-entity-list-by-user") as caught:
        await yarn_hook.find(intent)
    assert caught.value.permanent


async def test_the_witness_is_asked_for_after_the_tag(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    """The other way round, ours could be forgotten in between."""
    yarn.manager.add(row(1, "FINISHED"))
    intent = await prepared(yarn_hook)
    yarn.manager.requests.clear()
    await yarn_hook.find(intent)
    kinds = [
        "info" if "/info" in path else "tag" if "applicationTags" in path else "witness" if app_id(1) in path else ""
        for _, path in yarn.manager.requests
    ]
    assert [kind for kind in kinds if kind] == ["tag", "info", "tag", "witness", "info"]


# --- the timeline server


@pytest.fixture
async def timeline(stack: AsyncExitStack) -> FakeTimeline:
    return await FakeTimeline().start(stack)


@pytest.fixture
def hook_with_timeline(yarn: FakeYarn, timeline: FakeTimeline, connect_yarn: Connect) -> QuickYarnHook:
    return connect_yarn(yarn.connection(**{"yarn-timeline-address": timeline.url}))


async def test_what_the_resourcemanager_forgot_the_timeline_server_knows(
    timeline: FakeTimeline, hook_with_timeline: QuickYarnHook
) -> None:
    timeline.remember(row(1, "FINISHED", "SUCCEEDED"))
    timeline.remember(row(2, "FINISHED", "FAILED", diagnostics="User application exited with status 1"))
    timeline.remember(row(3, "RUNNING"))
    answer = await hook_with_timeline.poll([job(1), job(2), job(3), UNKNOWN])
    assert {ref: (status.state, status.raw) for ref, status in answer.items()} == {
        job(1): (JobState.SUCCEEDED, "FINISHED/SUCCEEDED"),
        job(2): (JobState.FAILED, "FINISHED/FAILED"),
        job(3): (JobState.ABSENT, "NotFound"),
        UNKNOWN: (JobState.ABSENT, "NotFound"),
    }
    assert answer[job(2)].message == "User application exited with status 1"
    assert "saw it last as RUNNING" in answer[job(3)].message


@pytest.mark.parametrize(
    "how", [fixed(500), fixed(200, "<html>"), fixed(404, "<html>"), hang_up, fixed(401), fixed(403)]
)
async def test_a_timeline_server_that_cannot_be_asked_leaves_it_untold(
    yarn: FakeYarn, timeline: FakeTimeline, hook_with_timeline: QuickYarnHook, how: Any
) -> None:
    """Its answer may be an end."""
    timeline.handler = how
    yarn.manager.add(row(1))
    answer = await hook_with_timeline.poll([job(1), UNKNOWN])
    assert (answer[job(1)].state, answer[UNKNOWN].state) == (JobState.RUNNING, JobState.UNKNOWN)
    assert timeline.url in answer[UNKNOWN].message


async def test_an_evicted_job_is_found_in_the_timeline(
    yarn: FakeYarn, timeline: FakeTimeline, hook_with_timeline: QuickYarnHook
) -> None:
    yarn.manager.add(row(1, "FINISHED"))
    intent = await prepared(hook_with_timeline)
    evict(yarn, 1)
    yarn.manager.conf.clear()
    timeline.remember(row(1, "FINISHED"))
    with pytest.raises(SubmissionUncertain, match="timeline server does not know it, either") as caught:
        await hook_with_timeline.find(intent)
    assert caught.value.permanent
    timeline.remember(row(5, "FINISHED", "SUCCEEDED", tags=ours(TOKEN)))
    found = await hook_with_timeline.find(intent)
    assert isinstance(found, Found)
    assert (found.status.job, found.status.state) == (job(5), JobState.SUCCEEDED)
    timeline.handler = fixed(500)
    with pytest.raises(SubmissionUncertain) as caught:
        await hook_with_timeline.find(intent)
    assert not caught.value.permanent


# --- find_owned


async def test_find_owned(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    yarn.manager.add(
        row(1, tags=ours("11" * 16, deployment="prod", owner="01")),
        row(2, "ACCEPTED", tags=ours("22" * 16, deployment="prod", owner="02")),
        row(3, tags=ours("33" * 16, deployment="test", owner="01")),
        row(4, "FINISHED", tags=ours("44" * 16, deployment="prod", owner="01")),
        row(5, tags="durable-spark,durable-spark.deployment=prod"),
        row(6, tags=ours("66" * 16, owner="01")),
        row(7, tags="other"),
    )

    async def owned(deployment: str, owner: str | None = None) -> list[tuple[JobRef, str, str]]:
        return [(each.status.job, each.token, each.owner) for each in await yarn_hook.find_owned(deployment, owner)]

    assert await owned("prod") == [(job(1), "11" * 16, "01"), (job(2), "22" * 16, "02")]
    assert await owned("prod", "01") == [(job(1), "11" * 16, "01")]
    assert await owned("Prod") == []
    assert await owned("prod", "0") == []
    assert await owned("") == [(job(6), "66" * 16, "01")]
    assert await owned("", "01") == [(job(6), "66" * 16, "01")]


# --- poll


async def test_few_are_asked_for_by_id(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    yarn.manager.add(row(1), row(2, "FINISHED", "FAILED"))
    twin = JobRef(app_id(1), uid="x")
    answer = await yarn_hook.poll([job(1), job(2), twin, job(1)])
    assert {ref: status.state for ref, status in answer.items()} == {
        job(1): JobState.RUNNING,
        job(2): JobState.FAILED,
        twin: JobState.RUNNING,
    }
    assert all(status.job == ref for ref, status in answer.items())
    assert not yarn.manager.asked("apps?")
    assert await yarn_hook.poll([]) == {}


async def test_many_are_asked_for_in_one_request(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    yarn.manager.add(*(row(n, tags=ours()) for n in range(1, 301)), row(301), row(302))
    answer = await yarn_hook.poll([job(n) for n in range(1, 303)] + [UNKNOWN])
    assert sum(status.state is JobState.RUNNING for status in answer.values()) == 302
    assert answer[UNKNOWN].state is JobState.ABSENT
    assert len(yarn.manager.asked("apps?")) == 1
    assert len(yarn.manager.asked("apps/")) == 4, "two without our tag, and one that is asked for twice"


async def test_a_list_that_is_too_long(
    yarn: FakeYarn, yarn_hook: QuickYarnHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_spark.hooks._yarn_api.LIST_LIMIT", 10_000)
    yarn.manager.add(*(row(n, tags=ours()) for n in range(1, 31)))
    answer = await yarn_hook.poll([job(n) for n in range(1, 31)])
    assert {status.state for status in answer.values()} == {JobState.RUNNING}


@pytest.mark.parametrize("job_id", ["", "application_1_1", "../x", "application_1111111111111_0001/state", "driver-1"])
async def test_what_is_not_ours_is_never_sent(yarn: FakeYarn, yarn_hook: QuickYarnHook, job_id: str) -> None:
    ref = JobRef(job_id)
    assert await state_of(yarn_hook, ref) is JobState.ABSENT
    await yarn_hook.kill(ref)
    assert list(await yarn_hook.log_tail(ref, 5)) == []
    assert yarn.manager.requests == []


GARBAGE = [
    "",
    "<html>",
    "[]",
    "{}",
    '{"app": null}',
    '{"app": []}',
    json.dumps({"app": row(2)}),
    "There is no active RM right now.\n",
]


@pytest.mark.parametrize("body", GARBAGE)
async def test_garbage(yarn: FakeYarn, yarn_hook: QuickYarnHook, body: str) -> None:
    yarn.manager.handler = fixed(200, body)
    with pytest.raises(InvalidAnswer):
        await yarn_hook.poll([job(1)])


@pytest.mark.parametrize(
    "body", ["", "{}", '{"apps": 3}', '{"apps": {"app": 3}}', '{"apps": {"app": [3]}}', '{"apps": {"x": 1}}']
)
async def test_lists_of_garbage(yarn: FakeYarn, yarn_hook: QuickYarnHook, body: str) -> None:
    yarn.manager.handler = fixed(200, body)
    with pytest.raises(InvalidAnswer):
        await yarn_hook.find(new())


@pytest.mark.parametrize("body", ['{"apps": null}', '{"apps": {}}'])
async def test_an_empty_list_in_either_form(yarn: FakeYarn, yarn_hook: QuickYarnHook, body: str) -> None:
    yarn.manager.handler = fixed(200, body)
    assert await yarn_hook.find_owned("prod") == []


async def test_a_proxys_404_is_no_absence(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    yarn.manager.handler = fixed(404, "<html>no such page</html>")
    with pytest.raises(InvalidAnswer, match="404"):
        await yarn_hook.poll([job(1)])


@pytest.mark.parametrize(("status", "header", "seconds"), [(503, "7", 7.0), (500, "", None), (429, "3", 3.0)])
async def test_overloaded(
    yarn: FakeYarn, yarn_hook: QuickYarnHook, status: int, header: str, seconds: float | None
) -> None:
    yarn.manager.handler = fixed(status, "busy", **({"Retry_After": header} if header else {}))
    with pytest.raises(ClusterUnreachable, match=f"{status}.*busy") as caught:
        await yarn_hook.poll([job(1)])
    assert caught.value.retry_after == seconds


async def test_a_hung_resourcemanager(
    yarn: FakeYarn, yarn_hook: QuickYarnHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http, "READ_TIMEOUT", 0.2)
    yarn.manager.handler = yarn.manager.on_info = hang
    for call in (
        yarn_hook.poll([job(1)]),
        yarn_hook.find(new()),
        yarn_hook.find_owned("prod"),
        yarn_hook.kill(job(1)),
        yarn_hook.check(),
        yarn_hook.prepare_cli({}, new()),
    ):
        with pytest.raises(ClusterUnreachable, match="did not answer within"):
            await asyncio.wait_for(call, 10)
    assert list(await asyncio.wait_for(yarn_hook.log_tail(job(1), 5), 10)) == []


async def test_an_older_resourcemanager_that_does_not_know_all_that_is_deselected(
    yarn: FakeYarn, yarn_hook: QuickYarnHook
) -> None:
    async def old(request: web.Request) -> web.StreamResponse:
        if "timeouts" in request.query.get("deSelects", ""):
            told = {"exception": "BadRequestException", "message": "Invalid deSelects string timeouts specified."}
            return web.json_response({"RemoteException": told}, status=400)
        return await yarn.manager.answer(request)

    yarn.manager.handler = old
    yarn.manager.add(row(1))
    for _ in range(2):
        assert await state_of(yarn_hook, job(1)) is JobState.RUNNING
    assert len(yarn.manager.asked("apps/")) == 3, "it is remembered"


# --- a pair


async def test_failover(yarn_pair: FakeYarn, connect_yarn: Connect) -> None:
    hook = connect_yarn(yarn_pair.connection())
    yarn_pair.manager.add(row(1, tags=ours(TOKEN)))
    yarn_pair.managers[0].redirect = "http://rm2.invalid:8088/ws/v1/cluster"
    assert await state_of(hook, job(1)) is JobState.RUNNING
    yarn_pair.fail_over()
    assert await state_of(hook, job(1)) is JobState.RUNNING
    second = len(yarn_pair.managers[1].asked("apps/"))
    old = len(yarn_pair.managers[0].requests)
    assert await state_of(hook, job(1)) is JobState.RUNNING
    assert len(yarn_pair.managers[1].asked("apps/")) == second + 1
    assert len(yarn_pair.managers[0].requests) == old, "the active one is remembered"
    await hook.kill(job(1))
    assert await state_of(hook, job(1)) is JobState.KILLED


async def test_no_redirect_is_followed(yarn_pair: FakeYarn, stack: AsyncExitStack, connect_yarn: Connect) -> None:
    """Where a standby points to is its own view of the other's name, and may be anybody's."""
    stranger = await FakeYarn().start(stack)
    stranger.manager.add(row(1, "FINISHED", "SUCCEEDED"))
    hook = connect_yarn(yarn_pair.connection() | {"login": "me", "password": "hush"})
    for manager in yarn_pair.managers:
        manager.state, manager.redirect = "STANDBY", f"{stranger.manager.url}/ws/v1/cluster"
    with pytest.raises(ClusterUnreachable, match="is a standby"):
        await hook.poll([job(1)])
    assert stranger.manager.requests == []


@pytest.mark.parametrize("redirect", [None, "itself"])
async def test_nobody_leads(yarn_pair: FakeYarn, connect_yarn: Connect, redirect: str | None) -> None:
    hook = connect_yarn(yarn_pair.connection())
    for manager in yarn_pair.managers:
        manager.state, manager.redirect = "STANDBY", manager.url if redirect else None
    plain: list[Awaitable[Any]] = [hook.poll([job(1)]), hook.kill(job(1)), hook.find(new())]
    for call in plain:
        with pytest.raises(ClusterUnreachable, match=r"no ResourceManager is active: .*is a standby.*is a standby"):
            await call
    vouched: list[Awaitable[Any]] = [hook.check(), hook.prepare_cli({}, new()), hook.find_owned("prod")]
    for call in vouched:
        with pytest.raises(ClusterUnreachable, match=r"no ResourceManager is active: .*is STANDBY.*is STANDBY"):
            await call


async def test_two_that_lead(yarn_pair: FakeYarn, connect_yarn: Connect, caplog: pytest.LogCaptureFixture) -> None:
    """Without fencing, the one that does not know it may be the wrong one."""
    hook = connect_yarn(yarn_pair.connection())
    yarn_pair.managers[1].state = "ACTIVE"
    yarn_pair.managers[1].add(row(1))
    for _ in range(3):
        status = (await hook.poll([job(1)]))[job(1)]
        assert status.state is JobState.UNKNOWN
        assert "more than one ResourceManager is active" in status.message
    assert caplog.text.count("more than one ResourceManager is active") == 1


async def test_one_of_the_pair_is_down(yarn_pair: FakeYarn, connect_yarn: Connect, unused_tcp_port: int) -> None:
    active = yarn_pair.manager.url
    addresses = f"http://127.0.0.1:{unused_tcp_port},{active}"
    hook = connect_yarn(yarn_pair.connection(yarn_resourcemanager_webapp_address=addresses))
    yarn_pair.manager.add(row(1))
    answer = await hook.poll([job(1), UNKNOWN])
    assert [status.state for status in answer.values()] == [JobState.RUNNING, JobState.ABSENT]
    assert "one of 2" in await hook.check()


async def test_an_absence_is_asked_of_the_one_that_leads(yarn_pair: FakeYarn, connect_yarn: Connect) -> None:
    """The one that was asked first has become a standby, and an old proxy answers 404 for it."""
    hook = connect_yarn(yarn_pair.connection())
    yarn_pair.manager.add(row(1))
    assert await state_of(hook, job(1)) is JobState.RUNNING
    yarn_pair.fail_over()
    yarn_pair.managers[0].handler = fixed(
        404, json.dumps({"RemoteException": {"exception": "NotFoundException", "message": f"{job(1)} not found"}})
    )
    assert await state_of(hook, job(1)) is JobState.RUNNING


# --- kill


async def test_kill(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    yarn.manager.add(row(1), row(2, "FINISHED"))
    for number in (1, 1, 2):
        await yarn_hook.kill(job(number))
    assert await state_of(yarn_hook, job(1)) is JobState.KILLED
    assert await state_of(yarn_hook, job(2)) is JobState.SUCCEEDED
    put = next(i for i, (method, _) in enumerate(yarn.manager.requests) if method == "PUT")
    assert json.loads(yarn.manager.bodies[put]) == {"state": "KILLED"}
    assert yarn.manager.headers[put]["Content-Type"] == "application/json"  # 415, wrapped as a 503, without it


async def test_kill_of_what_is_not_known(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    await yarn_hook.kill(UNKNOWN)


async def test_a_kill_in_the_recovery_is_none(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    """A 404 would leave the job running."""
    yarn.manager.add(row(1))
    yarn.manager.state = "INITIALIZING"
    with pytest.raises(ClusterUnreachable, match="INITIALIZING"):
        await yarn_hook.kill(job(1))
    yarn.manager.state = "ACTIVE"
    await yarn_hook.kill(job(1))
    assert await state_of(yarn_hook, job(1)) is JobState.KILLED


async def test_a_kill_at_the_end_of_the_recovery_is_asked_again(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    yarn.manager.add(row(1))

    async def not_yet(request: web.Request) -> web.StreamResponse:
        if request.method != "PUT":
            return await yarn.manager.answer(request)
        return web.json_response({"RemoteException": {"exception": "NotFoundException"}}, status=404)

    yarn.manager.handler = not_yet
    with pytest.raises(ClusterUnreachable, match="is now: try again"):
        await yarn_hook.kill(job(1))


@pytest.mark.parametrize(("user", "who"), [("alice", "as alice"), ("", "anonymously.*'yarn-user'")])
async def test_kill_refused(yarn: FakeYarn, connect_yarn: Connect, user: str, who: str) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        if request.method != "PUT":
            return await yarn.manager.answer(request)
        return web.Response(status=403, text=f"Unauthorized attempt to kill appid {app_id(1)} by remote user alice")

    yarn.manager.handler = refuse
    yarn.manager.add(row(1, queue="root.etl"))
    hook = connect_yarn(yarn.connection(**({"yarn-user": user} if user else {})))
    with pytest.raises(RequestRefused, match=rf"{app_id(1)} in queue root\.etl.*{who}.*Unauthorized attempt"):
        await hook.kill(job(1))


@pytest.mark.parametrize("how", [fixed(503, "HTTP 415 Unsupported Media Type"), fixed(400, "no"), fixed(302), hang_up])
async def test_kill_not_accepted(yarn: FakeYarn, yarn_hook: QuickYarnHook, how: Any) -> None:
    yarn.manager.add(row(1))
    yarn.manager.handler = how
    with pytest.raises(ClusterUnreachable):
        await yarn_hook.kill(job(1))


# --- log


@pytest.fixture
async def node(stack: AsyncExitStack) -> FakeNode:
    return await FakeNode().start(stack)


async def test_log_tail(yarn: FakeYarn, yarn_hook: QuickYarnHook, node: FakeNode) -> None:
    yarn.manager.add(row(1, amContainerLogs=node.container(1)))
    node.logs = {"stdout": _log([f"out {n}" for n in range(100)]), "stderr": _log([f"err {n}" for n in range(100)])}
    assert list(await yarn_hook.log_tail(job(1), 5)) == ["err 98", "err 99", "--- stdout:", "out 98", "out 99"]
    assert list(await yarn_hook.log_tail(job(1), 2)) == ["--- stdout:", "out 99"]
    assert list(await yarn_hook.log_tail(job(1), 1)) == ["err 99"]
    assert list(await yarn_hook.log_tail(job(1), 0)) == []
    assert all("size=-65536" in path for path in node.requests)
    del node.logs["stdout"]
    assert list(await yarn_hook.log_tail(job(1), 2)) == ["err 98", "err 99"]


def _log(lines: list[str]) -> str:
    head = "Container: c on h\nLogAggregationType: LOCAL\n====\nLogType:x\nLogLength:9\nLogContents:\n"
    return head + "\n".join(lines) + "\nEnd of LogType:x.\n******\n\n"


async def test_no_secret_goes_to_a_nodemanager(yarn: FakeYarn, node: FakeNode, connect_yarn: Connect) -> None:
    hook = connect_yarn(yarn.connection() | {"login": "me", "password": "hush"})
    yarn.manager.ask = "Basic bWU6aHVzaA=="
    yarn.manager.add(row(1, amContainerLogs=node.container(1)))
    assert await hook.log_tail(job(1), 5)
    assert node.headers
    assert not any({"Authorization", "Cookie"} & set(headers) for headers in node.headers)


@pytest.mark.parametrize(
    "how", [fixed(500), fixed(401), fixed(307, Location="http://x/"), hang_up, fixed(200, "x" * 2_000_000)]
)
async def test_a_log_that_cannot_be_read(yarn: FakeYarn, yarn_hook: QuickYarnHook, node: FakeNode, how: Any) -> None:
    yarn.manager.add(row(1, amContainerLogs=node.container(1)), row(2))
    node.handler = how
    assert list(await yarn_hook.log_tail(job(1), 5)) == []
    assert list(await yarn_hook.log_tail(job(2), 5)) == []
    assert list(await yarn_hook.log_tail(UNKNOWN, 5)) == []


async def test_aggregated_logs(
    yarn: FakeYarn, timeline: FakeTimeline, hook_with_timeline: QuickYarnHook, node: FakeNode
) -> None:
    yarn.manager.add(row(1, "FINISHED", amContainerLogs=node.container(1)))
    node.handler = fixed(307, Location="http://logs.invalid/")
    timeline.logs["stderr"] = _log(["a", "b"])
    assert list(await hook_with_timeline.log_tail(job(1), 5)) == ["a", "b"]


# --- check


async def test_check(yarn: FakeYarn, yarn_hook: QuickYarnHook, connect_yarn: Connect) -> None:
    line = await yarn_hook.check()
    assert line.startswith(f"YARN 3.5.0: {yarn.manager.url} is active; asked anonymously")
    assert len(line.splitlines()) == 1
    assert yarn.manager.asked("apps/new-application", "POST")
    assert "asked as alice" in await connect_yarn(yarn.connection(**{"yarn-user": "alice"})).check()


async def test_check_says_who_may_not_submit(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    text = "The default static user cannot carry out this operation."
    yarn.manager.handler = fixed(403, text)
    with pytest.raises(BadConfiguration, match=f"{text}.*'yarn-user'.*'principal'"):
        await yarn_hook.check()


async def test_something_else_at_the_address(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    yarn.manager.on_info = fixed(404, "<html>")
    with pytest.raises(InvalidAnswer, match="'yarn_resourcemanager_webapp_address'"):
        await yarn_hook.check()


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{}",
        '{"clusterInfo": 3}',
        '{"clusterInfo": {"haState": 3, "startedOn": 1, "resourceManagerVersion": "x"}}',
        '{"clusterInfo": {"haState": "ACTIVE", "startedOn": "x", "resourceManagerVersion": "x"}}',
        '{"clusterInfo": {"haState": "ACTIVE", "startedOn": true, "resourceManagerVersion": "x"}}',
        '{"clusterInfo": {"haState": "ACTIVE", "startedOn": 1%s, "resourceManagerVersion": "x"}}' % ("0" * 400),
    ],
)
async def test_who_it_is_cannot_be_told(yarn: FakeYarn, yarn_hook: QuickYarnHook, body: str) -> None:
    yarn.manager.on_info = fixed(200, body)
    with pytest.raises(InvalidAnswer):
        await yarn_hook.check()


async def test_a_version_is_shown_as_text_alone(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    told = {"haState": "ACTIVE", "startedOn": STARTED, "resourceManagerVersion": "3.5\n<b>" + "9" * 100}
    yarn.manager.on_info = fixed(200, json.dumps({"clusterInfo": told}))
    line = await yarn_hook.check()
    assert len(line.splitlines()) == 1
    assert len(line) < 200


async def test_links(yarn: FakeYarn, yarn_hook: QuickYarnHook) -> None:
    yarn.manager.add(row(1))
    links = (await yarn_hook.poll([job(1)]))[job(1)].links
    assert links[Link.JOB] == f"{yarn.manager.url}/cluster/app/{app_id(1)}"


@pytest.mark.parametrize("number", ["1e999", "-1", "null", '"1"', None])
async def test_what_is_no_number_is_no_count(yarn: FakeYarn, yarn_hook: QuickYarnHook, number: str | None) -> None:
    items = [f'{{"state": "{state}", "count": {number or 0}}}' for state in ("FINISHED", "FAILED", "KILLED")]
    counts = f'{{"appStatInfo": {{"statItem": [{",".join(items[number is None :])}]}}}}'
    manager = yarn.manager

    async def count(path: str, *, limit: int) -> Any:
        return manager, Answer(url="http://rm/", status=200, headers={}, body=counts.encode())

    with pytest.raises(InvalidAnswer, match="does not count"):
        await yarn_hook._apps.count_of_ended(count)
