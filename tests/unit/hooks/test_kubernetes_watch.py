"""What watches tell when streams break off, go silent, expire and lie."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
from aiohttp import web

from durable_spark.hooks import _kubernetes_api, _kubernetes_watch
from durable_spark.hooks._http import AnswerTimeout
from durable_spark.hooks._kubernetes_api import Gone
from durable_spark.hooks._kubernetes_watch import Watches
from durable_spark.jobs import (
    AuthenticationFailed,
    ClusterUnreachable,
    DurableJobError,
    InvalidAnswer,
    JobState,
    JobStatus,
    RequestRefused,
)
from tests.unit.hooks.fake import Handler, fixed, hang_up, recorded_json
from tests.unit.hooks.fake_kubernetes import (
    NAMESPACE,
    PROXY_404,
    FakeApi,
    bookmark,
    event,
    pod,
    ref,
    refused,
    status,
    until,
    watch_lines,
)

if TYPE_CHECKING:
    from durable_spark.hooks.kubernetes import KubernetesHook

    Watch = Callable[..., Watches]

TOKEN = "ab" * 16


@pytest.fixture(autouse=True)
def streams_may_be_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kubernetes_watch, "SHORTEST_STREAM", 0.0)


@pytest.fixture
def watch(kubernetes_hook: KubernetesHook, stack: AsyncExitStack) -> Watch:
    """Return watches of which nothing is left at the end."""

    def make(**options: Any) -> Watches:
        watches = Watches(kubernetes_hook._api, **options)
        stack.push_async_exit(watches)
        return watches

    return make


@pytest.fixture
def running(api: FakeApi) -> dict[str, Any]:
    """A pod that runs."""
    return api.put(pod(TOKEN))


@pytest.fixture
async def watches(api: FakeApi, running: dict[str, Any], watch: Watch) -> Watches:
    """Watches that know of a pod that runs, and have their stream."""
    watches = watch()
    await watches.open([NAMESPACE])
    await until(lambda: api.streams)
    watches.take_changes()
    return watches


@contextlib.asynccontextmanager
async def listening(watches: Watches) -> AsyncIterator[list[str]]:
    """Gather the IDs of jobs that change; what a watch raises is raised."""
    changed: list[str] = []

    async def listen() -> None:
        async for ids in watches.changes(until=asyncio.Event().wait()):
            changed.extend(ids)

    listener = asyncio.ensure_future(listen())
    try:
        yield changed
        if listener.done():
            listener.result()
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)


async def failure(watches: Watches) -> DurableJobError:
    """Return what ends the watches."""
    with pytest.raises(DurableJobError) as caught:
        async for _ in watches.changes(until=asyncio.sleep(10)):
            pass
    return caught.value


def told(watches: Watches, value: dict[str, Any]) -> JobStatus | None:
    return watches.status(ref(value))


async def until_told(watches: Watches, value: dict[str, Any], state: JobState) -> JobStatus:
    """Wait until a pod is in a state, by what the watches tell."""

    def is_in_it() -> bool:
        seen = told(watches, value)
        return seen is not None and seen.state is state

    await until(is_in_it, f"{state}")
    seen = told(watches, value)
    assert seen is not None
    return seen


def watched_from(api: FakeApi) -> list[str]:
    """Return the resource versions from which was watched."""
    return [query["resourceVersion"][0] for query in queries(api, "watch pods")]


def queries(api: FakeApi, name: str) -> list[dict[str, list[str]]]:
    return [
        parse_qs(urlsplit(path).query) for request, path in zip(api.requests, api.paths, strict=True) if request == name
    ]


def streaming(*lines: bytes, cut: bool = False) -> Handler:
    """A watch that sends this and ends, or breaks."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for line in lines:
            await response.write(line)
        return await hang_up(request) if cut else response

    return answer


# --- all is well


async def test_what_is_there_is_known_at_once(api: FakeApi, watch: Watch) -> None:
    running, failed = api.put(pod(TOKEN)), api.put(pod("cd" * 16, "Failed"))
    watches = watch()
    await watches.open([NAMESPACE])
    states = [seen and (seen.job, seen.state) for seen in (told(watches, running), told(watches, failed))]
    assert states == [(ref(running), JobState.RUNNING), (ref(failed), JobState.FAILED)]


async def test_recorded_life_of_a_pod(api: FakeApi, watch: Watch) -> None:
    lines = watch_lines()[:-1]
    value = json.loads(lines[0])["object"]
    api.once["watch pods"] = [streaming(*lines)]
    watches = watch()
    await watches.open([NAMESPACE])
    killed = await until_told(watches, value, JobState.KILLED)
    assert (
        killed.message == "the pod was deleted while it ran; container spark-kubernetes-driver ended with exit code 143"
    )
    await until(lambda: api.asked("watch pods") == 2)
    assert watched_from(api) == ["1000", json.loads(lines[-1])["object"]["metadata"]["resourceVersion"]]


async def test_changes_are_told_as_they_come(api: FakeApi, watch: Watch) -> None:
    value = api.put(pod(TOKEN, "Pending"))
    watches = watch()
    await watches.open([NAMESPACE])
    watches.take_changes()
    async with listening(watches) as changed:
        new = api.put(pod("cd" * 16))
        await until_told(watches, new, JobState.RUNNING)
        api.becomes(value, "Succeeded")
        await until_told(watches, value, JobState.SUCCEEDED)
        await until(lambda: len(changed) == 2)
    assert changed == [ref(new).id, ref(value).id]


async def test_what_has_not_changed_is_not_told(api: FakeApi, watch: Watch) -> None:
    value = api.put(pod(TOKEN))
    watches = watch()
    await watches.open([NAMESPACE])
    watches.take_changes()
    async with listening(watches) as changed:
        api.put({**value, "metadata": value["metadata"] | {"annotations": {"a": "b"}}})
        last = api.put(pod("cd" * 16))
        await until(lambda: changed)
    assert changed == [ref(last).id]


async def test_what_is_asked(api: FakeApi, watch: Watch) -> None:
    await watch(relist_seconds=600).open([NAMESPACE])
    await until(lambda: api.streams)
    (listed,), (watched,) = queries(api, "list pods"), queries(api, "watch pods")
    assert listed == {"labelSelector": ["durable-spark/token"], "limit": ["250"]}
    assert 240 <= int(watched.pop("timeoutSeconds")[0]) <= 300
    assert watched == {
        "watch": ["1"],
        "labelSelector": ["durable-spark/token"],
        "resourceVersion": ["1000"],
        "allowWatchBookmarks": ["true"],
    }


async def test_one_list_and_one_watch_for_all(api: FakeApi, watch: Watch) -> None:
    for number in range(100):
        api.put(pod(f"{number:032x}"))
    watches = watch()
    for _ in range(3):
        await watches.open([NAMESPACE])
    await until(lambda: api.streams)
    assert api.requests == ["list pods", "watch pods"]


async def test_a_namespace_more(api: FakeApi, watch: Watch) -> None:
    other = api.put(pod(TOKEN, namespace="other"))
    watches = watch()
    await watches.open([NAMESPACE])
    assert told(watches, other) is None
    await watches.open([NAMESPACE, "other"])
    assert told(watches, other) is not None
    assert api.asked("list pods") == 2


async def test_a_burst(api: FakeApi, watch: Watch) -> None:
    watches = watch()
    await watches.open([NAMESPACE])
    values = [api.put(pod(f"{number:032x}", "Pending")) for number in range(300)]
    for phase in ("Running", "Succeeded"):
        for value in values:
            api.becomes(value, phase)
    for value in values:
        await until_told(watches, value, JobState.SUCCEEDED)


async def test_leaving_ends_the_streams(api: FakeApi, watch: Watch) -> None:
    async with watch() as watches:
        await watches.open([NAMESPACE])
        await until(lambda: api.streams)

    def is_cut() -> bool:
        api.say(bookmark(2000))
        return not api.streams

    await until(is_cut)


# --- streams end


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "ended"])
async def test_half_a_line_is_no_event(api: FakeApi, watch: Watch, cut: bool) -> None:
    value = api.put(pod(TOKEN))
    complete = event("MODIFIED", {**pod("cd" * 16), "metadata": value["metadata"] | {"resourceVersion": "2000"}})
    succeeded = {**pod(TOKEN, "Succeeded", uid=ref(value).uid)}
    succeeded["metadata"]["resourceVersion"] = "2001"
    api.once["watch pods"] = [streaming(complete, event("MODIFIED", succeeded)[:-1], cut=cut)]
    watches = watch()
    await watches.open([NAMESPACE])
    await until(lambda: api.asked("watch pods") == 2)
    seen = told(watches, value)
    assert seen is not None
    assert seen.state is JobState.RUNNING
    assert watched_from(api) == ["1001", "2000"]
    assert api.asked("list pods") == 1


async def test_an_event_in_pieces_is_one(api: FakeApi, watches: Watches) -> None:
    value = pod("cd" * 16)
    line = event("ADDED", value)
    for begin in range(0, len(line), 1000):
        api.say(line[begin : begin + 1000])
    await until_told(watches, value, JobState.RUNNING)


async def test_nothing_is_lost_between_two_streams(api: FakeApi, watches: Watches, running: dict[str, Any]) -> None:
    api.end_streams()
    api.becomes(running, "Failed")
    await until_told(watches, running, JobState.FAILED)
    assert api.asked("list pods") == 1


async def test_bookmarks_move_the_watch_on(api: FakeApi, watch: Watch) -> None:
    api.once["watch pods"] = [streaming(bookmark(5000))]
    await watch().open([NAMESPACE])
    await until(lambda: api.asked("watch pods") == 2)
    assert watched_from(api) == ["1000", "5000"]


async def test_a_server_that_ends_each_stream_is_not_hammered(
    api: FakeApi, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_kubernetes_watch, "SHORTEST_STREAM", 0.2)
    api.instead["watch pods"] = streaming()
    began = time.monotonic()
    await watch().open([NAMESPACE])
    await until(lambda: api.asked("watch pods") == 3)
    assert time.monotonic() - began > 0.35


# --- histories end


@pytest.mark.parametrize(
    "how",
    [streaming(watch_lines()[-1]), refused(410, reason="Expired")],
    ids=["inside a 200", "as a status"],
)
async def test_too_old_is_listed_anew(api: FakeApi, watch: Watch, how: Handler) -> None:
    value = api.put(pod(TOKEN))

    async def ends_meanwhile(request: web.Request) -> web.StreamResponse:
        api.becomes(value, "Succeeded")
        api.oldest = api.version
        return await how(request)

    api.once["watch pods"] = [ends_meanwhile]
    watches = watch()
    await watches.open([NAMESPACE])
    await until_told(watches, value, JobState.SUCCEEDED)
    assert api.asked("list pods") == 2


async def test_listed_anew_from_time_to_time(api: FakeApi, watch: Watch) -> None:
    """A deletion that was missed is not a verdict: the pod is not known any more, and will be asked for by name."""
    value = api.put(pod(TOKEN))
    watches = watch(relist_seconds=0.1)
    await watches.open([NAMESPACE])
    api.remove(value, told=False)
    await until(lambda: told(watches, value) is None)
    assert api.asked("list pods") == 2


async def test_what_a_list_shows_again_is_not_told(api: FakeApi, watch: Watch) -> None:
    api.put(pod(TOKEN))
    api.once["watch pods"] = [streaming(watch_lines()[-1])]
    watches = watch()
    await watches.open([NAMESPACE])
    watches.take_changes()
    async with listening(watches) as changed:
        await until(lambda: api.asked("list pods") == 2 and api.streams)
        value = api.put(pod("cd" * 16))
        await until(lambda: changed)
    assert changed == [ref(value).id]


# --- pages


async def test_pages(api: FakeApi, watch: Watch) -> None:
    values = [api.put(pod(f"{number:032x}")) for number in range(600)]
    watches = watch()
    await watches.open([NAMESPACE])
    assert all(told(watches, value) for value in values)
    assert [query.get("continue") for query in queries(api, "list pods")] == [None, ["250"], ["500"]]
    assert {query["limit"][0] for query in queries(api, "list pods")} == {"250"}


async def test_a_continue_token_expires(api: FakeApi, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a list is none: all is listed anew."""
    monkeypatch.setattr(_kubernetes_api, "PAGE", 2)
    values = [api.put(pod(f"{number:032x}")) for number in range(5)]
    api.once["list pods"] = [api.answer, refused(410, reason="Expired")]
    watches = watch()
    await watches.open([NAMESPACE])
    assert all(told(watches, value) for value in values)
    assert [query.get("continue") for query in queries(api, "list pods")] == [None, ["2"], None, ["2"], ["4"]]


async def test_continue_tokens_that_always_expire(api: FakeApi, watch: Watch) -> None:
    api.instead["list pods"] = refused(410, reason="Expired")
    with pytest.raises(Gone):
        await watch().open([NAMESPACE])
    assert api.asked("list pods") == 2


async def test_a_list_without_end(api: FakeApi, watch: Watch) -> None:
    page = {"kind": "PodList", "metadata": {"resourceVersion": "1", "continue": "x"}, "items": []}
    api.instead["list pods"] = fixed(200, json.dumps(page))
    with pytest.raises(InvalidAnswer, match="goes on and on"):
        await watch().open([NAMESPACE])
    assert api.asked("list pods") == 2


# --- what is no watch


async def test_silence_is_an_outage(api: FakeApi, watch: Watch) -> None:
    watches = watch(bookmark_seconds=0.2)
    await watches.open([NAMESPACE])
    assert isinstance(await failure(watches), AnswerTimeout)


async def test_a_watch_that_is_not_answered_is_an_outage(api: FakeApi, watch: Watch) -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    api.instead["watch pods"] = silent
    watches = watch(bookmark_seconds=0.2)
    await watches.open([NAMESPACE])
    assert isinstance(await failure(watches), AnswerTimeout)


ERROR = json.loads(watch_lines()[-1])["object"]


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        (streaming(b"<html>sorry</html>\n"), InvalidAnswer, "what is no event: b'<html>"),
        (streaming(b"\n"), InvalidAnswer, "no event"),
        (streaming(b"[]\n"), InvalidAnswer, "no event"),
        (streaming(b'{"type": "ADDED"}\n'), InvalidAnswer, "no event"),
        (streaming(b"\xff\xfe\n"), InvalidAnswer, "no event"),
        (streaming(b"[" * 100_000 + b"\n"), InvalidAnswer, "no event"),
        (streaming(event("ADDED", [])), InvalidAnswer, "without an object"),  # type: ignore[arg-type]
        (streaming(event("ADDED", {})), InvalidAnswer, "no pod of spark"),
        (streaming(event("ADDED", pod(TOKEN, name="../x"))), InvalidAnswer, "no pod of spark"),
        (streaming(event("ADDED", pod(TOKEN, namespace="other"))), InvalidAnswer, "no pod of spark"),
        (streaming(event("SOMETHING", pod(TOKEN))), InvalidAnswer, "of the kind 'SOMETHING'"),
        (streaming(b" " * (9 << 20)), InvalidAnswer, "longer than 8388608 bytes"),
        (streaming(event("ERROR", ERROR | {"code": 500, "message": "oh"})), ClusterUnreachable, r"\(500\): oh"),
        (streaming(event("ERROR", {})), ClusterUnreachable, "None"),
        (streaming(b"{}\n"), InvalidAnswer, "no event"),
        (fixed(200, "<html>Please log in</html>"), InvalidAnswer, "'text/plain; charset=utf-8' in place of JSON"),
        (fixed(404, PROXY_404), InvalidAnswer, "404 Not Found"),
        (fixed(302, Location="https://login/"), InvalidAnswer, "302"),
        (refused(401), AuthenticationFailed, "Unauthorized"),
        (refused(403), RequestRefused, "forbidden"),
        (fixed(429, "Too many requests, please try again later."), ClusterUnreachable, "429"),
        (fixed(503), ClusterUnreachable, "503"),
        (hang_up, ClusterUnreachable, "closed the connection"),
    ],
)
async def test_not_a_watch(api: FakeApi, watch: Watch, how: Handler, kind: type[DurableJobError], message: str) -> None:
    value = api.put(pod(TOKEN))
    api.instead["watch pods"] = how
    watches = watch()
    await watches.open([NAMESPACE])
    with pytest.raises(kind, match=message):
        raise await failure(watches)
    seen = told(watches, value)
    assert seen is not None
    assert seen.state is JobState.RUNNING


@pytest.mark.parametrize(
    ("seconds", "pause"), [(7, 7.0), (10**400, None), (-1, None), (True, None)], ids=["7", "huge", "negative", "flag"]
)
async def test_an_error_says_when_to_come_again(api: FakeApi, watch: Watch, seconds: int, pause: float | None) -> None:
    error = ERROR | {"code": 429, "details": {"retryAfterSeconds": seconds}}
    api.instead["watch pods"] = streaming(event("ERROR", error))
    watches = watch()
    await watches.open([NAMESPACE])
    caught = await failure(watches)
    assert isinstance(caught, ClusterUnreachable)
    assert caught.retry_after == pause


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        (fixed(200, "{"), InvalidAnswer),
        (fixed(200, "{}"), InvalidAnswer),
        (fixed(200, json.dumps(recorded_json("k8s-page.json"))[:-10]), InvalidAnswer),
        (fixed(200, json.dumps(recorded_json("k8s-page.json") | {"metadata": {}})), InvalidAnswer),
        (fixed(200, json.dumps(recorded_json("k8s-status-404.json"))), InvalidAnswer),
        (fixed(404, PROXY_404), InvalidAnswer),
        (refused(403), RequestRefused),
        (refused(401), AuthenticationFailed),
        (fixed(500), ClusterUnreachable),
    ],
)
async def test_not_a_list(api: FakeApi, watch: Watch, how: Handler, kind: type[DurableJobError]) -> None:
    api.instead["list pods"] = how
    with pytest.raises(kind):
        await watch().open([NAMESPACE])


async def test_one_namespace_that_fails_fails_all(api: FakeApi, watch: Watch) -> None:
    async def one_only(request: web.Request) -> web.StreamResponse:
        return status(403) if "/other/" in request.path else await api.answer(request)

    api.instead["list pods"] = one_only
    watches = watch()
    with pytest.raises(RequestRefused):
        await watches.open([NAMESPACE, "other"])


# --- what a deletion means


async def test_deleted_while_it_ran(api: FakeApi, watches: Watches, running: dict[str, Any]) -> None:
    api.remove(running)
    assert (await until_told(watches, running, JobState.KILLED)).raw == "Running, deleted"


@pytest.mark.parametrize(("phase", "state"), [("Succeeded", JobState.SUCCEEDED), ("Failed", JobState.FAILED)])
async def test_the_last_word_of_a_pod_that_had_ended(
    api: FakeApi, watches: Watches, running: dict[str, Any], phase: str, state: JobState
) -> None:
    """Its end is told with its deletion, if the stream broke before; and nothing more is asked."""
    api.say(event("DELETED", pod(TOKEN, phase, uid=ref(running).uid)))
    await until_told(watches, running, state)
    assert api.asked("get pods") == 0


async def test_a_label_that_is_taken_away_is_no_deletion(api: FakeApi, watches: Watches) -> None:
    """Recorded: the API server says DELETED of a pod that runs on, when it no longer matches the selector."""
    line = recorded_json("k8s-unlabelled.json")
    value = api.put(line["object"])
    await until_told(watches, value, JobState.RUNNING)
    api.say(event(line["type"], value))
    await until(lambda: told(watches, value) is None)


async def test_a_deletion_is_not_forgotten_when_it_cannot_be_confirmed(
    api: FakeApi, watches: Watches, running: dict[str, Any]
) -> None:
    api.once["get pods"] = [hang_up, hang_up]  # aiohttp asks again by itself on a connection that it has used before
    api.remove(running)
    await until_told(watches, running, JobState.KILLED)


async def test_another_pod_of_that_name(api: FakeApi, watches: Watches, running: dict[str, Any]) -> None:
    api.remove(running)
    new = api.put(pod(TOKEN, "Pending"))
    await until_told(watches, new, JobState.PENDING)
    seen = told(watches, new)
    assert seen is not None
    assert seen.job == ref(new)


# --- explanations


async def test_explained_as_long_as_it_is_so(api: FakeApi, watch: Watch) -> None:
    value = api.put(pod(TOKEN, "Pending"))
    watches = watch()
    await watches.open([NAMESPACE])
    before = told(watches, value)
    assert before is not None
    better = watches.explain(before, "a volume is missing")
    assert better is not None
    assert told(watches, value) == better
    assert (better.state, better.message) == (JobState.PENDING, "a volume is missing")
    assert watches.explain(before, "too late") is None
