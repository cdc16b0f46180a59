"""
What a cluster's answers spell out, read as strictly as its protocol has it; the oracle of the fuzzing.

In: all that a hook was answered. Out: the ends and the absences of a job that an answer spells out, and why the answers
do not prove that a submission has no job. Written without the product's parsers: what those make of an answer that is
not whole must not be an end, nor an absence.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from durable_spark.jobs import JobRef, JobState, Submission

if TYPE_CHECKING:
    from tests.model.wire import Said

__all__ = [
    "no_proof_by_kubernetes",
    "no_proof_by_spark",
    "no_proof_by_yarn",
    "spelt_by_kubernetes",
    "spelt_by_spark",
    "spelt_by_yarn",
]

_DRIVER = re.compile(r"driver-[0-9]{14}-[0-9]{4,12}", re.ASCII)
_APP = re.compile(r"application_[0-9]{10,20}_[0-9]{4,9}", re.ASCII)
_OF_SPARK = {"FINISHED": "succeeded", "FAILED": "failed", "ERROR": "failed", "KILLED": "killed"}
_FINAL = {"SUCCEEDED": "succeeded", "FAILED": "failed", "KILLED": "killed", "UNDEFINED": "failed", "ENDED": "failed"}


def _is_ok(said: Said) -> bool:
    return said.answer.status == 200


def _dict(value: Any, *names: str) -> dict[str, Any]:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _word(words: dict[str, str], word: Any) -> Iterator[JobState]:
    if isinstance(word, str) and word in words:
        yield JobState(words[word])


# --- standalone


def spelt_by_spark(told: Sequence[Said], job: JobRef) -> Iterator[JobState]:
    """Yield the ends of a driver, and ABSENT, as the leader's page or a REST server spells them out."""
    if not _DRIVER.fullmatch(job.id):
        yield JobState.ABSENT
    for said in filter(_is_ok, told):
        if said.path == "/" and job.id in said.answer.text:
            yield JobState.ABSENT  # a worker ran it, and the master has forgotten it
        for value in said.values:
            if said.path == "/json/" and value.get("status") == "ALIVE":
                for entry in [*_list(value.get("activedrivers")), *_list(value.get("completeddrivers"))]:
                    if isinstance(entry, dict) and entry.get("id") == job.id:
                        yield from _word(_OF_SPARK, entry.get("state"))
            elif "/status/" in said.path and value.get("submissionId") == job.id:
                if value.get("success") is True:
                    yield from _word(_OF_SPARK, value.get("driverState"))
                elif value.get("success") is False and value.get("driverState") is value.get("message") is None:
                    yield JobState.ABSENT


def no_proof_by_spark(told: Sequence[Said], submission: Submission) -> str:
    """Return what keeps a driver's absence from being proven; ``""`` if nothing does."""
    pages = [value for said in told if said.path == "/json/" and _is_ok(said) for value in said.values]
    page = pages[-1] if pages else {}
    if page.get("status") != "ALIVE" or not all(isinstance(page.get(name), list) for name in _LISTS):
        return "no page of a leader"
    drivers = {}
    for entry in (*page["completeddrivers"], *page["activedrivers"]):
        if not (isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in _MEMBERS)):
            return f"not a driver: {entry!r}"
        if not _DRIVER.fullmatch(entry["id"]) or not re.fullmatch("[0-9]{13}", entry["starttime"], re.ASCII):
            return f"not a driver: {entry!r}"
        drivers[entry["id"]] = entry
    evidence, intent = submission.evidence, submission.cluster_time or 0.0
    candidates = [each for each in drivers.values() if each["state"] != "RELAUNCHING"]
    if evidence.get("last_completed") in drivers:
        newest = int(evidence["newest"])
        candidates = [each for each in candidates if int(each["id"][22:]) > newest or _start(each) >= intent]
        return "; ".join(filter(None, (_not_read(told, each, submission) for each in candidates)))
    workers = [each["id"] for each in page["workers"] if each["state"] != "DEAD"]
    if hashlib.sha256("\n".join(sorted(set(workers))).encode()).hexdigest()[:32] != evidence.get("workers"):
        return "other workers"
    ran = set()
    for said in told:
        if said.path == "/" and _is_ok(said):
            ran |= set(_DRIVER.findall(said.answer.text))
            workers = [each for each in workers if each not in said.answer.text or not _is_whole_page(said)]
    if workers:
        return f"the page of {workers} was not read, or not to its end"
    candidates = [each for each in candidates if _start(each) >= intent - 300]
    candidates = [each for each in candidates if each["worker"] != "None" or each["id"] in ran or _is_live(page, each)]
    forgotten = [each for each in ran - drivers.keys() if each[7:15] >= "20261123"]
    candidates += [{"id": each, "state": "", "worker": "one"} for each in forgotten]
    return "; ".join(filter(None, (_not_read(told, each, submission) for each in candidates)))


_LISTS = ("activedrivers", "completeddrivers", "workers")
_MEMBERS = ("id", "state", "starttime", "worker")


def _start(entry: dict[str, Any]) -> float:
    return int(entry["starttime"]) / 1000


def _is_live(page: dict[str, Any], entry: dict[str, Any]) -> bool:
    return any(each is entry for each in page["activedrivers"])


def _is_whole_page(said: Said) -> bool:
    return said.answer.text.rstrip().endswith("</html>")


def _not_read(told: Sequence[Said], entry: dict[str, Any], submission: Submission) -> str:
    """Return why a driver may be the submission's; ``""`` if its launch command was read, or it never had one."""
    if entry["state"] == "KILLED" and entry["worker"] == "None":
        return ""
    text = None
    for said in told:
        query = parse_qs(urlsplit(said.answer.url).query)
        if said.path != "/log/" or query.get("driverId") != [entry["id"]] or not _is_ok(said):
            continue
        header = re.match(r"==== Bytes [0-9]+-[0-9]+ of ([0-9]+) of [^\n]*\n", said.answer.text)
        if header is None:
            return f"no log of {entry['id']}"
        part = said.answer.text[header.end() :]
        text = part if query.get("offset") == ["0"] else f"{text or ''}{part}"
        if entry["state"] in ("ERROR", "KILLED") and not text and header[1] == "0":
            return ""  # it was not launched
    command, end, _ = (text or "").partition("\n" + "=" * 40 + "\n")
    if not end or not command.startswith("Launch Command: "):
        return f"no launch command of {entry['id']}: {command[:80]!r}"
    label = f'"-Dspark.airflow.submission={submission.token}"'
    return f"the submission's token on {entry['id']}" if label in command else ""


# --- YARN


def _apps(said: Said) -> Iterator[dict[str, Any]]:
    for value in said.values if _is_ok(said) else ():
        if said.path.endswith("/apps"):
            yield from (each for each in _list(_dict(value, "apps").get("app")) if isinstance(each, dict))
        elif "/apps/" in said.path:
            yield _dict(value, "app")


def spelt_by_yarn(told: Sequence[Said], job: JobRef) -> Iterator[JobState]:
    """Yield the ends of an application, and ABSENT, as an active ResourceManager spells them out."""
    if not _APP.fullmatch(job.id):
        yield JobState.ABSENT
    for said in told:
        for app in _apps(said):
            if app.get("id") == job.id and app.get("state") == "FINISHED":
                yield from _word(_FINAL, app.get("finalStatus"))
            elif app.get("id") == job.id:
                yield from _word({"FAILED": "failed", "KILLED": "killed"}, app.get("state"))
        if said.answer.status in (404, 500) and said.path.endswith(f"/apps/{job.id}") and any(_actives(told)):
            for value in said.values:
                exception = _dict(value, "RemoteException")
                known = exception.get("exception") in ("NotFoundException", "ApplicationNotFoundException")
                if known and job.id in str(exception.get("message")):
                    yield JobState.ABSENT


def _actives(told: Sequence[Said]) -> Iterator[Any]:
    """Yield what names the processes that said that they were active."""
    for said in told:
        for value in said.values if said.path.endswith("/info") and _is_ok(said) else ():
            info = _dict(value, "clusterInfo")
            if info.get("haState") == "ACTIVE":
                yield (info.get("startedOn"),)


def no_proof_by_yarn(told: Sequence[Said], submission: Submission) -> str:
    """Return what keeps an application's absence from being proven; ``""`` if nothing does."""
    tag = f"durable-spark.submission={submission.token}"
    lists = [said for said in told if said.path.endswith("/apps") and "applicationTags=" in said.answer.url]
    actives = list(_actives(told))
    if not lists or len(actives) < 2 or actives[-1] != actives[-2]:
        return "nobody vouches"
    if any(tag in str(app.get("applicationTags")).split(",") for said in lists for app in _apps(said)):
        return "the submission's tag"
    for value in lists[-1].values if _is_ok(lists[-1]) else [{}]:
        apps = value.get("apps", "none")
        if apps not in (None, {}) and not isinstance(_dict(apps).get("app"), list):
            return f"no list: {value!r}"
        for app in _dict(apps).get("app", ()):
            if not isinstance(app, dict) or not isinstance(app.get("applicationTags"), str):
                return f"not an application: {app!r}"
    if "true" in _conf(told, "yarn.webapp.filter-entity-list-by-user"):
        return "lists are filtered"
    last, evidence = submission.evidence.get("last_ended"), submission.evidence
    if any(app.get("id") == last for said in told if said.path.endswith(f"/apps/{last}") for app in _apps(said)):
        return ""
    if (evidence.get("manager"), evidence.get("started")) != ("http://rm:8088", str(actives[-1][0])):
        return "another process, and its last application is gone"
    kept = list(_conf(told, "yarn.resourcemanager.max-completed-applications"))
    for said in told:
        for value in said.values if said.path.endswith("/appstatistics") and _is_ok(said) else ():
            items = _list(_dict(value, "appStatInfo").get("statItem"))
            counted = {each.get("state"): each.get("count") for each in items if isinstance(each, dict)}
            counts = [count for state in _FINISHED if type(count := counted.get(state)) is int and count >= 0]
            if len(counts) < len(_FINISHED):
                return f"not counted: {value!r}"
            if kept and re.fullmatch("[0-9]+", kept[-1]) and sum(counts) < int(kept[-1]):
                return ""
    return "some may have been forgotten"


_FINISHED = ("FINISHED", "FAILED", "KILLED")


def _conf(told: Sequence[Said], name: str) -> Iterator[str]:
    for said in told:
        for value in said.values if said.path.endswith("/conf") and _is_ok(said) else ():
            if _dict(value, "property").get("key") == name:
                yield str(_dict(value, "property").get("value"))


# --- Kubernetes


def _is_there(said: Said) -> bool:
    return said.answer.status in (200, 201, 202)


def _pods(said: Said) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the pods of an answer, each with the kind of its event, if it is one."""
    for value in said.values if _is_there(said) else ():
        if "watch=1" in said.answer.url:
            yield str(value.get("type")), _dict(value, "object")
        elif said.path.endswith("/pods") and said.method == "GET":
            yield from (("", each) for each in _list(value.get("items")) if isinstance(each, dict))
        elif "/pods" in said.path:
            yield "", value


def _is_gone(said: Said, name: str) -> bool:
    if said.answer.status != 404 or said.method != "GET" or not said.path.endswith(f"/pods/{name}"):
        return False
    wanted = ("Status", "NotFound", name)
    return any((v.get("kind"), v.get("reason"), _dict(v, "details").get("name")) == wanted for v in said.values)


def spelt_by_kubernetes(told: Sequence[Said], job: JobRef) -> Iterator[JobState]:
    """Yield the ends of a pod, and ABSENT, as an API server spells them out."""
    namespace, _, name = job.id.partition(":")
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", name, re.ASCII):
        yield JobState.ABSENT
    gone = any(_is_gone(said, name) for said in told)
    deleted = False
    for kind, pod in (each for said in told for each in _pods(said)):
        metadata = _dict(pod, "metadata")
        if (metadata.get("namespace"), metadata.get("name")) != (namespace, name):
            continue
        if not isinstance(uid := metadata.get("uid"), str):
            continue
        if job.uid not in ("", uid):
            gone = True
            continue
        phase, deleting = _dict(pod, "status").get("phase"), _time(metadata.get("deletionTimestamp")) is not None
        if phase in ("Succeeded", "Failed"):
            yield JobState(phase.lower())
        if phase == "Failed" and deleting:
            yield JobState.KILLED
        if phase == "Pending" and deleting and isinstance(pod.get("spec"), dict) and "nodeName" not in pod["spec"]:
            yield JobState.KILLED
        deleted = deleted or kind == "DELETED"
    if gone:
        yield JobState.ABSENT
    if deleted and (gone or not job.uid):
        yield JobState.KILLED


def _time(value: Any) -> float | None:
    try:
        return datetime.fromisoformat(str(value).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None


def no_proof_by_kubernetes(told: Sequence[Said], submission: Submission) -> str:
    """Return what keeps a pod's absence from being proven; ``""`` if nothing does."""
    name = submission.job.id.partition(":")[2] if submission.job else ""
    looks = [said for said in told if said.method == "GET" and said.path.endswith(f"/pods/{name}")]
    if not looks or not _is_gone(looks[-1], name):
        return "the pod is not said to be gone"
    asked = [said for said in told if said.path.endswith("/events")]
    if not asked:
        return "no events were read"
    value, status = next(iter(asked[-1].values), {}), asked[-1].answer.status
    if 400 <= status < 500 and status not in (401, 429):
        return "" if value.get("kind") == "Status" else "not refused by the API server"
    items = value.get("items") or []
    if not _is_there(asked[-1]) or value.get("kind") not in ("EventList", "List") or not isinstance(items, list):
        return f"no list of events: {json.dumps(value)[:200]}"
    now, intent = asked[-1].answer.date, submission.cluster_time or 0.0
    if now is None or now - intent > 3000:
        return "events may have expired"
    for event in items:
        if not isinstance(event, dict):
            return f"not an event: {event!r}"
        created = _time(_dict(event, "metadata").get("creationTimestamp"))
        old = created is not None and created < intent - 60
        if not submission.evidence or not (old or event.get("reason") in _BEFORE_START):
            return f"an event: {event.get('reason')}"
    return ""


_BEFORE_START = (
    *("Scheduled", "FailedScheduling", "FailedMount", "FailedAttachVolume", "SuccessfulAttachVolume"),
    *("TriggeredScaleUp", "NotTriggerScaleUp"),
)
