"""
What a ResourceManager says of applications, parsed and checked; and the tags by which ours are known.

What flows in: elements of the answers of its REST server, a :class:`~durable_spark.jobs.Submission`, a user's tags.
What flows out: :class:`App`, :class:`~durable_spark.jobs.JobStatus`, tags. No I/O.

The trap: a job whose user code failed has not ``FAILED``. YARN says ``FINISHED`` of every application that signed off,
and what became of it is its ``finalStatus``, which may be ``UNDEFINED`` even then. Only ``SUCCEEDED`` is a success.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from durable_spark.jobs import BadArguments, InvalidAnswer, JobRef, JobState, JobStatus, Link, Submission

__all__ = [
    "ACTIVE_STATES",
    "COMMON_TAG",
    "ENDED_STATES",
    "TAGS_KEY",
    "App",
    "Labels",
    "deployment_tag",
    "is_application_id",
    "is_history_template",
    "is_web_address",
    "our_tags",
    "owner_tag",
    "parse_app",
    "parse_past_app",
    "tag_value",
    "tags_with_ours",
    "token_tag",
]

COMMON_TAG = "durable-spark"
"""What every application of ours carries, so that one request asks for all of them."""
TAGS_KEY = "spark.yarn.tags"

ENDED_STATES = ("FINISHED", "FAILED", "KILLED")
ACTIVE_STATES = ("NEW", "NEW_SAVING", "SUBMITTED", "ACCEPTED", "RUNNING")

_APPLICATION_ID = re.compile(r"application_([0-9]{10,20})_([0-9]{4,9})", re.ASCII)
_CONTAINER_LOGS = re.compile(r"(https?://[^/?#]+)/node/containerlogs/(container_(?:e[0-9]+_)?[0-9_]{10,80})/[^/?#]*")
_TAG_LIMIT, _TAGS_LIMIT = 100, 10
"""``YarnConfiguration.APPLICATION_MAX_TAG_LENGTH`` and ``APPLICATION_MAX_TAGS``; more are refused (tried on 3.5.0)."""
_MESSAGE_LIMIT = 2000
_RECOVERED = "Attempt recovered after RM restart"
"""What stands before an application's own diagnostics, without a blank, once its ResourceManager was restarted."""
_URL_LIMIT = 2000

_STATES = {
    "NEW": JobState.PENDING,
    "NEW_SAVING": JobState.PENDING,
    "SUBMITTED": JobState.PENDING,
    "ACCEPTED": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "FINISHING": JobState.RUNNING,
    "FINAL_SAVING": JobState.RUNNING,
    "KILLING": JobState.RUNNING,
    "FAILED": JobState.FAILED,
    "KILLED": JobState.KILLED,
}
"""``YarnApplicationState``, and what ``/state`` shows of ``RMAppState`` besides. A word that is not known: UNKNOWN."""
_ENDS = {"SUCCEEDED": JobState.SUCCEEDED, "FAILED": JobState.FAILED, "KILLED": JobState.KILLED}
_UNSAID = ("UNDEFINED", "ENDED")
"""``FinalApplicationStatus`` of an application that is ``FINISHED``. A word that is not known: UNKNOWN."""


def is_application_id(text: str) -> bool:
    """Whether it is an ID as a ResourceManager makes them, safe to stand in a URL."""
    return _APPLICATION_ID.fullmatch(text) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """What our tags on an application say."""

    token: str = ""
    owner: str = ""
    deployment: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class App:
    """
    An application as a ResourceManager, or a timeline server, reports it.

    :param status: in our words.
    :param tags: in lower case, as YARN keeps them.
    :param started: when it was submitted, in milliseconds since the epoch; 0 to a user who may not view it.
    :param finished: when it ended, in the same way; 0 while it has not.
    :param logs: origin of the NodeManager that ran its ApplicationMaster, and the container; ``None`` if neither is
        told, or not in a form that a URL is made from.
    """

    status: JobStatus
    tags: frozenset[str]
    started: int
    finished: int
    queue: str
    logs: tuple[str, str] | None

    @property
    def id(self) -> str:
        """The application's ID."""
        return self.status.job.id

    @property
    def age(self) -> tuple[int, int, int]:
        """What sorts applications by the time of their submission; for those of the same instant, by number."""
        match = _APPLICATION_ID.fullmatch(self.id)
        return (self.started, *map(int, match.groups())) if match else (self.started, 0, 0)  # type: ignore[return-value]

    @property
    def ours(self) -> bool:
        """Whether it carries the tag that all of ours carry."""
        return COMMON_TAG in self.tags

    @property
    def labels(self) -> Labels:
        """What our tags say."""
        return Labels(token=self._label("submission"), owner=self._label("owner"), deployment=self._label("deployment"))

    def _label(self, name: str) -> str:
        start = f"{COMMON_TAG}.{name}="
        return next((tag.removeprefix(start) for tag in self.tags if tag.startswith(start)), "")


# --- tags


def token_tag(token: str) -> str:
    """Return the tag that names a submission."""
    return f"{COMMON_TAG}.submission={token}"


def owner_tag(owner: str) -> str:
    """Return the tag that names an owner."""
    return f"{COMMON_TAG}.owner={tag_value(owner)}"


def deployment_tag(deployment: str) -> str:
    """
    Return the tag that names a deployment: by its name, or by a hash of one that a tag would not keep as it is.

    YARN lowers the case of tags, and Spark splits them at commas.
    """
    return f"{COMMON_TAG}.deployment={tag_value(deployment)}"


def tag_value(text: str) -> str:
    """Return what stands for a name in a tag; nothing for nothing."""
    if not text:
        return ""
    if re.fullmatch(r"[a-z0-9]([a-z0-9 ._:/@+-]{0,58}[a-z0-9])?", text, re.ASCII):
        return text
    return f"sha256={hashlib.sha256(text.encode()).hexdigest()[:32]}"


def our_tags(submission: Submission) -> Sequence[str]:
    """Return the tags of a submission's application."""
    tags = [COMMON_TAG, token_tag(submission.token)]
    if submission.owner:
        tags.append(owner_tag(submission.owner))
    if submission.deployment:
        tags.append(deployment_tag(submission.deployment))
    return tags


def tags_with_ours(users: str, submission: Submission) -> str:
    """
    Return the value of ``spark.yarn.tags``: the user's tags, and ours.

    :raises BadArguments: for a tag that YARN would refuse once everything has been uploaded, or one that says that it
        is ours.
    """
    theirs = list(dict.fromkeys(tag for part in users.split(",") if (tag := part.strip())))
    ours = our_tags(submission)
    for tag in theirs:
        if len(tag) > _TAG_LIMIT or not tag.isascii():
            raise BadArguments(
                f"{TAGS_KEY}: YARN takes tags of at most {_TAG_LIMIT} ASCII characters, not {tag[:120]!r}"
            )
        if tag.lower() == COMMON_TAG or tag.lower().startswith(f"{COMMON_TAG}."):
            raise BadArguments(f"{TAGS_KEY}: {tag!r} is a tag of this package's own; it is set for you")
    if len(theirs) + len(ours) > _TAGS_LIMIT:
        raise BadArguments(
            f"{TAGS_KEY}: YARN takes at most {_TAGS_LIMIT} tags; {len(ours)} mark the job as ours, "
            f"so {_TAGS_LIMIT - len(ours)} are left for yours, not {len(theirs)}"
        )
    return ",".join([*theirs, *ours])


# --- reports


def parse_app(entry: Any, *, page: str, history: str | None) -> App:
    """
    Return an application from an element of a ResourceManager's answer.

    :param page: what the application's own page on the ResourceManager begins with; its ID follows.
    :param history: template for its page on the Spark history server, with ``{app_id}``.
    :raises InvalidAnswer: when it is not such an element.
    """
    try:
        app_id, state, final = _text(entry["id"]), _text(entry["state"]), _text(entry.get("finalStatus") or "")
        logs = _container(entry.get("amContainerLogs"))
        ended = state in ENDED_STATES
        links = _links(app_id, page=page, history=history, logs=logs, tracking=entry.get("trackingUrl"), ended=ended)
        return _app(
            app_id,
            _status(app_id, state, final, _text(entry.get("diagnostics") or ""), links),
            tags=_text(entry["applicationTags"]),  # what lacks them would be none of ours
            started=entry.get("startedTime"),
            finished=entry.get("finishedTime") if ended else 0,
            queue=entry.get("queue"),
            logs=logs,
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InvalidAnswer(f"not the report of an application ({type(error).__name__}: {str(error)[:80]})") from error


def parse_past_app(entry: Any, *, history: str | None) -> App:
    """
    Return an application from an element of a timeline server's answer, which names the same things differently.

    :raises InvalidAnswer: when it is not such an element.
    """
    try:
        app_id = _text(entry["appId"])
        final = _text(entry.get("finalAppStatus") or "")
        links = {} if history is None else {Link.HISTORY: history.format(app_id=app_id)}
        return _app(
            app_id,
            _status(app_id, _text(entry["appState"]), final, _text(entry.get("diagnosticsInfo") or ""), links),
            tags=entry.get("applicationTags"),
            started=entry.get("startedTime"),
            finished=entry.get("finishedTime"),
            queue=entry.get("queue"),
            logs=None,
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InvalidAnswer(f"not the report of an application ({type(error).__name__}: {str(error)[:80]})") from error


def _app(
    app_id: str, status: JobStatus, *, tags: Any, started: Any, finished: Any, queue: Any, logs: tuple[str, str] | None
) -> App:
    if not is_application_id(app_id):
        raise ValueError(f"application ID {app_id[:60]!r}")
    return App(
        status=status,
        tags=frozenset(tag.strip().lower() for tag in _text(tags or "").split(",") if tag.strip()),
        started=int(started or 0),
        finished=int(finished or 0),
        queue=_text(queue or "")[:200],
        logs=logs,
    )


def _status(app_id: str, state: str, final: str, diagnostics: str, links: Mapping[Link, str]) -> JobStatus:
    message = diagnostics.strip().removeprefix(_RECOVERED).strip()[:_MESSAGE_LIMIT]
    raw = state[:40]
    if state == "FINISHED":
        raw = f"{raw}/{final[:40]}"
        ours = _ENDS.get(final, JobState.UNKNOWN)
        if final in _UNSAID:  # spark-submit takes it for a failure, too (Client.run in Spark's yarn module)
            ours = JobState.FAILED
            message = f"the application ended without saying how ({final})\n{message}".strip()
    else:
        ours = _STATES.get(state, JobState.UNKNOWN)
    return JobStatus(job=JobRef(app_id), state=ours, raw=raw, message=message, links=links)


def _links(
    app_id: str, *, page: str, history: str | None, logs: tuple[str, str] | None, tracking: Any, ended: bool
) -> Mapping[Link, str]:
    links = {Link.JOB: f"{page}{app_id}"}
    if logs is not None:
        origin, container = logs
        links[Link.LOG] = f"{origin}/node/containerlogs/{container}"
    own = is_web_address(tracking) and "/cluster/app/" not in tracking  # else it is the link JOB over again
    if own and not ended:
        links[Link.TRACKING] = tracking
    if history is not None:
        links[Link.HISTORY] = history.format(app_id=app_id)
    elif own and ended:  # Spark leaves its history server's page there (spark.yarn.historyServer.address)
        links[Link.HISTORY] = tracking
    return links


def _container(url: Any) -> tuple[str, str] | None:
    if not isinstance(url, str) or not is_web_address(url):
        return None
    match = _CONTAINER_LOGS.fullmatch(url)
    return (match[1], match[2]) if match else None


def is_web_address(url: Any) -> bool:
    """Whether it is an ``http`` or ``https`` URL of a plain host, without credentials: to be shown, or asked."""
    if (
        not isinstance(url, str)
        or len(url) > _URL_LIMIT
        or not re.fullmatch(r"[!-~]+", url)
        or re.search(r'["\'<>\\]', url)
    ):
        return False
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    plain = re.fullmatch(r"[\w.:-]+", parts.hostname or "", re.ASCII) is not None
    return plain and parts.scheme in ("http", "https") and parts.username is None and "@" not in parts.netloc


def is_history_template(template: str) -> bool:
    """Whether it is an ``http`` or ``https`` URL, in which ``{app_id}`` may stand and no other placeholder."""
    try:
        fields = {name for _, name, spec, how in string.Formatter().parse(template) if name is not None or spec or how}
        return fields <= {"app_id"} and is_web_address(template.format(app_id="application_1_0001"))
    except (ValueError, KeyError, IndexError, AttributeError):
        return False


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} for a text")
    return value
