"""What a ResourceManager says of applications, and the tags by which ours are known."""

from __future__ import annotations

from typing import Any

import pytest

from durable_spark.hooks._yarn_apps import (
    App,
    deployment_tag,
    is_application_id,
    is_history_template,
    is_web_address,
    our_tags,
    parse_app,
    parse_past_app,
    tag_value,
    tags_with_ours,
)
from durable_spark.hooks._yarn_logs import contents_of
from durable_spark.jobs import BadArguments, InvalidAnswer, JobState, Link, Submission, new_token
from tests.unit.hooks.fake import recorded, recorded_json
from tests.unit.hooks.fake_yarn import app_id, ours, row

PAGE = "http://rm:8088/cluster/app/"


def parse(entry: Any, history: str | None = None) -> App:
    return parse_app(entry, page=PAGE, history=history)


@pytest.mark.parametrize(
    ("state", "final", "ours", "raw"),
    [
        ("NEW", "UNDEFINED", JobState.PENDING, "NEW"),
        ("NEW_SAVING", "UNDEFINED", JobState.PENDING, "NEW_SAVING"),
        ("SUBMITTED", "UNDEFINED", JobState.PENDING, "SUBMITTED"),
        ("ACCEPTED", "UNDEFINED", JobState.PENDING, "ACCEPTED"),
        ("RUNNING", "UNDEFINED", JobState.RUNNING, "RUNNING"),
        ("RUNNING", "SUCCEEDED", JobState.RUNNING, "RUNNING"),
        ("FINISHING", "SUCCEEDED", JobState.RUNNING, "FINISHING"),
        ("FINAL_SAVING", "FAILED", JobState.RUNNING, "FINAL_SAVING"),
        ("KILLING", "UNDEFINED", JobState.RUNNING, "KILLING"),
        ("FINISHED", "SUCCEEDED", JobState.SUCCEEDED, "FINISHED/SUCCEEDED"),
        ("FINISHED", "FAILED", JobState.FAILED, "FINISHED/FAILED"),
        ("FINISHED", "KILLED", JobState.KILLED, "FINISHED/KILLED"),
        ("FINISHED", "UNDEFINED", JobState.FAILED, "FINISHED/UNDEFINED"),
        ("FINISHED", "ENDED", JobState.FAILED, "FINISHED/ENDED"),
        ("FINISHED", None, JobState.UNKNOWN, "FINISHED/"),
        ("FINISHED", "WHATEVER", JobState.UNKNOWN, "FINISHED/WHATEVER"),
        ("FAILED", "FAILED", JobState.FAILED, "FAILED"),
        ("FAILED", "SUCCEEDED", JobState.FAILED, "FAILED"),
        ("KILLED", "KILLED", JobState.KILLED, "KILLED"),
        ("SUCCEEDED", "SUCCEEDED", JobState.UNKNOWN, "SUCCEEDED"),
        ("SOMETHING", "SUCCEEDED", JobState.UNKNOWN, "SOMETHING"),
        ("finished", "SUCCEEDED", JobState.UNKNOWN, "finished"),
    ],
)
def test_states(state: str, final: str | None, ours: JobState, raw: str) -> None:
    entry = row(1) | {"state": state, "finalStatus": final}
    status = parse(entry).status
    assert (status.state, status.raw) == (ours, raw)
    past = {"appId": app_id(1), "appState": state, "finalAppStatus": final}
    assert parse_past_app(past, history=None).status.state is ours


def test_an_end_that_is_not_told_says_so() -> None:
    entry = row(1, "FINISHED", "UNDEFINED", diagnostics="Shutdown hook called")
    assert parse(entry).status.message == ("the application ended without saying how (UNDEFINED)\nShutdown hook called")


@pytest.mark.parametrize(
    ("diagnostics", "message"),
    [
        ("", ""),
        (None, ""),
        ("User application exited with status 1", "User application exited with status 1"),
        ("User class threw: boom\n\tat Main.main\n", "User class threw: boom\n\tat Main.main"),
        (
            "Attempt recovered after RM restartUser application exited with status 1",
            "User application exited with status 1",
        ),
        ("Attempt recovered after RM restart", ""),
        ("x" * 5000, "x" * 2000),
    ],
)
def test_diagnostics(diagnostics: str | None, message: str) -> None:
    assert parse(row(1, "FINISHED", "FAILED") | {"diagnostics": diagnostics}).status.message == message


def test_recorded() -> None:
    app = parse(recorded_json("yarn-app-running.json")["app"])
    assert app.status.state is JobState.RUNNING
    assert app.ours
    assert (app.labels.token, app.labels.owner, app.labels.deployment) == ("a1" * 16, "b2" * 16, "prod")
    assert (app.queue, app.started, app.finished) == ("root.default", 1795663824515, 0)
    assert dict(app.status.links) == {
        Link.JOB: f"{PAGE}{app.id}",
        Link.LOG: "http://localhost:20245/node/containerlogs/container_1795663815040_0003_01_000001",
        Link.TRACKING: f"http://localhost:26321/proxy/{app.id}/",
    }
    failed = parse(recorded_json("yarn-app-failed.json")["app"])
    assert (failed.status.raw, failed.status.message) == ("FINISHED/FAILED", "User application exited with status 3")
    assert failed.finished == 1795663835651


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "soon", [1]])
def test_times_that_are_none(value: Any) -> None:
    with pytest.raises(InvalidAnswer):
        parse(row(1, startedTime=value))


def test_the_tracking_url_is_the_spark_ui_while_it_runs_and_its_history_afterwards() -> None:
    url, template = "http://rm/proxy/x/", "https://history/history/{app_id}/jobs"
    running, ended = row(1, trackingUrl=url), row(1, "FINISHED", "SUCCEEDED", trackingUrl=url)
    page = template.format(app_id=app_id(1))
    assert {link: parse(running).status.links.get(link) for link in (Link.TRACKING, Link.HISTORY)} == {
        Link.TRACKING: url,
        Link.HISTORY: None,
    }
    assert Link.TRACKING not in parse(ended).status.links
    assert parse(ended).status.links[Link.HISTORY] == url
    assert parse(running, history=template).status.links[Link.HISTORY] == page
    assert parse(ended, history=template).status.links[Link.HISTORY] == page


@pytest.mark.parametrize(
    "url",
    [
        None,
        3,
        "",
        "UNASSIGNED",
        "javascript:alert(1)",
        "ftp://h/x",
        "http://user:secret@h/x",
        "http://@h/x",
        "http:///x",
        "http://h:port/x",
        'http://h/"onclick=',
        "http://h/a b",
        "http://h/\n",
        "http://h\\@evil/",
        "http://h/" + "x" * 3000,
    ],
)
def test_what_is_no_address_makes_no_link(url: Any) -> None:
    assert not is_web_address(url)
    links = parse(row(1, trackingUrl=url, amContainerLogs=url)).status.links
    assert set(links) == {Link.JOB}


@pytest.mark.parametrize(
    "url",
    [
        "http://h:8042/node/containerlogs/container_1_x/user",
        "http://h:8042/node/containerlogs/../../jmx/user",
        "http://h:8042/other/container_1795663815040_0003_01_000001/airflow",
        "http://h:8042/node/containerlogs/container_1795663815040_0003_01_000001/a/b",
        "http://h:8042/node/containerlogs/container_1795663815040_0003_01_000001/a?x",
    ],
)
def test_a_log_is_asked_for_at_a_nodemanager_alone(url: str) -> None:
    assert parse(row(1, amContainerLogs=url)).logs is None


def test_a_container_of_a_later_epoch() -> None:
    url = "https://h:8044/node/containerlogs/container_e03_1795663815040_0003_01_000001/airflow"
    assert parse(row(1, amContainerLogs=url)).logs == (
        "https://h:8044",
        "container_e03_1795663815040_0003_01_000001",
    )


@pytest.mark.parametrize(
    "change",
    [
        {"id": "application_1/../x"},
        {"id": "application_1795663815040_1"},
        {"id": 3},
        {"state": None},
        {"state": 3},
        {"diagnostics": ["x"]},
        {"applicationTags": 3},
        {"startedTime": "soon"},
        {"queue": ["root"]},
    ],
)
def test_what_is_no_report(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidAnswer):
        parse(row(1) | change)


@pytest.mark.parametrize("entry", [None, 3, "x", [], {}])
def test_what_is_not_even_an_object(entry: Any) -> None:
    with pytest.raises(InvalidAnswer):
        parse(entry)
    with pytest.raises(InvalidAnswer):
        parse_past_app(entry, history=None)


@pytest.mark.parametrize(
    ("text", "well"),
    [
        ("application_1795663815040_0001", True),
        ("application_1111111111_123456789", True),
        ("application_1795663815040_001", False),
        ("application_1795663815040_0001\n", False),
        (" application_1795663815040_0001", False),
        ("application_1795663815040_0001/state", False),
        ("application_१७९५६६३८१५_0001", False),
        ("job_1795663815040_0001", False),
    ],
)
def test_application_ids(text: str, well: bool) -> None:
    assert is_application_id(text) is well


def test_applications_are_sorted_by_their_submission() -> None:
    apps = [parse(row(number, startedTime=started)) for number, started in ((10000, 5), (9, 5), (3, 9), (11, 5))]
    assert [app.id for app in sorted(apps, key=lambda app: app.age)] == [app_id(n) for n in (9, 11, 10000, 3)]


# --- tags


SUBMISSION = Submission(token="ab" * 16, owner="cd" * 16, deployment="prod")
OURS = ",".join(our_tags(SUBMISSION))


def test_our_tags() -> None:
    whose = f"durable-spark.owner={'cd' * 16},durable-spark.deployment=prod"
    assert f"durable-spark,durable-spark.submission={'ab' * 16},{whose}" == OURS
    assert our_tags(Submission(token="ab" * 16)) == ["durable-spark", f"durable-spark.submission={'ab' * 16}"]


@pytest.mark.parametrize(
    ("users", "all_of_them"),
    [
        ("", OURS),
        (" , ", OURS),
        ("a", f"a,{OURS}"),
        (" a ,b b,a", f"a,b b,{OURS}"),
        ("A,b,c,d,e,f", f"A,b,c,d,e,f,{OURS}"),
    ],
)
def test_the_users_tags_are_kept(users: str, all_of_them: str) -> None:
    assert tags_with_ours(users, SUBMISSION) == all_of_them


@pytest.mark.parametrize(
    ("users", "message"),
    [
        ("a,b,c,d,e,f,g", "at most 10 tags; 4 mark the job as ours, so 6 are left for yours, not 7"),
        ("x" * 101, "at most 100 ASCII characters"),
        ("été", "ASCII"),
        ("durable-spark", "own"),
        ("Durable-Spark.submission=1", "own"),
    ],
)
def test_tags_that_yarn_would_refuse(users: str, message: str) -> None:
    with pytest.raises(BadArguments, match=rf"spark\.yarn\.tags: .*{message}"):
        tags_with_ours(users, SUBMISSION)


@pytest.mark.parametrize("name", ["Prod", "été", "a,b", "x" * 61, " a", "a\n", "%", "日本", "-"])
def test_a_deployment_that_a_tag_would_not_keep_is_hashed(name: str) -> None:
    """YARN lowers the case of tags: two deployments that differ in it are two."""
    tag = deployment_tag(name)
    assert len(tag) <= 100
    assert tag.startswith("durable-spark.deployment=sha256=")
    assert tag == tag.lower()
    assert deployment_tag(name) != deployment_tag(name.lower() + "x")


def test_what_a_tag_keeps() -> None:
    assert [tag_value(name) for name in ("prod", "eu-1/a.b_c", "x" * 60, "")] == ["prod", "eu-1/a.b_c", "x" * 60, ""]


def test_labels_of_others_are_not_ours() -> None:
    app = parse(row(1, tags="mine,durable-sparkle"))
    assert not app.ours
    assert app.labels.token == ""
    assert parse(row(1, tags=ours("ab" * 16).upper())).labels.token == "ab" * 16


@pytest.mark.parametrize(
    ("template", "well"),
    [
        ("https://h/history/{app_id}", True),
        ("https://h/", True),
        ("h/{app_id}", False),
        ("https://h/{pod}", False),
        ("https://h/{app_id", False),
        ("https://h/{}", False),
        ("https://h/{app_id!r}", False),
        ("https://h/{app_id.x}", False),
        ("https://h/{0}", False),
    ],
)
def test_history_templates(template: str, well: bool) -> None:
    assert is_history_template(template) is well


# --- logs


def test_a_log_without_what_the_nodemanager_puts_around_it() -> None:
    assert contents_of(recorded("yarn-log-running.txt")).strip() == "sleeping 600 s"
    ended = contents_of(recorded("yarn-log-ended.txt")).strip().splitlines()
    assert ended[-2:][0] == "ending with FAILED"
    assert not any("LogType" in line or line.startswith("*") for line in ended)
    assert contents_of("as it is\n") == "as it is\n"


def test_tokens_stay_tokens() -> None:
    token = new_token()
    assert parse(row(1, tags=ours(token))).labels.token == token


def test_blanks_in_a_log_take_no_time() -> None:
    log = "End of LogType:" + " " * 200_000 + "\nstill the log"
    assert contents_of(f"LogType:stderr\nLogContents:\n{log}") == log
