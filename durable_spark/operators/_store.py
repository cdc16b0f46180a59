"""
The record's way into Airflow's task state store, and what of a task instance goes into it.

The trap: the store is keyed by Dag run, task and map index, not by try. It survives retries and clears, so
the record itself must tell one generation and one mapped item from the next.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowException, AirflowRuntimeError

from durable_spark import jobs
from durable_spark.jobs import RECORD_KEY, BadConfiguration, Generation

if TYPE_CHECKING:
    from airflow.sdk import Context
    from pydantic import JsonValue

__all__ = [
    "Superseded",
    "deployment",
    "digest_of",
    "fingerprint_of",
    "generation_of",
    "is_last",
    "map_index",
    "owner_of",
    "pull",
    "store_of",
    "way_out",
    "write",
]


class Superseded(AirflowException):
    """Another try of this task instance has begun: this process must not change anything any more."""


def store_of(context: Context) -> Any:
    store = context.get("task_state_store")
    if store is None:
        raise BadConfiguration("durable=True needs the task state store of Airflow 3.3 or newer; set durable=False")
    return store


def write(context: Context, key: str, value: JsonValue, *, for_ever: bool) -> None:
    from airflow.sdk.execution_time.context import NEVER_EXPIRE

    try:
        store_of(context).set(key, value, retention=NEVER_EXPIRE if for_ever else None)
    except AirflowRuntimeError as error:
        detail = error.error.detail
        if isinstance(detail, Mapping) and detail.get("status_code") == 404:
            raise Superseded(
                "Another try of this task has begun, so this one stops: it must not change anything any more"
            ) from error
        raise


def generation_of(context: Context) -> Generation:
    """Return what tells a clear from a retry: Airflow changes one of the two on every kind of clear."""
    ti: Any = context["ti"]
    carrier = ti.context_carrier or {}
    return Generation(max_tries=ti.max_tries, traceparent=str(carrier.get("traceparent", "")))


def fingerprint_of(context: Context) -> str:
    """
    Return a digest of the mapped arguments as they were expanded, before templating; ``""`` if not mapped.

    A list that is expanded in another order after a clear gives a map index another item (and the
    store is keyed by map index). Resolved as ``MappedOperator`` itself does it (3.3.2), or as the mapped
    task group that the task is in.
    """
    ti = context["ti"]
    if map_index(ti) < 0:
        return ""
    mapped: Any = context["dag"].get_task(ti.task_id)
    expanded: list[Any] = []
    if hasattr(mapped, "_expand_mapped_kwargs"):
        expanded.append(mapped._expand_mapped_kwargs(context)[0])
    if (group := mapped.get_closest_mapped_task_group()) is not None:
        expanded.append(group._expand_input.resolve(context)[0])
    return hashlib.sha256(_canonical(expanded).encode()).hexdigest()[:32]


def digest_of(token: str, job: Any) -> str:
    """Return a digest of a job's description. Keyed, because a description may hold secrets that could be guessed."""
    value = dataclasses.asdict(job) if dataclasses.is_dataclass(job) and not isinstance(job, type) else job
    return hmac.new(token.encode(), _canonical(value).encode(), hashlib.sha256).hexdigest()[:32]


def _canonical(value: Any) -> str:
    return json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    """Return a value as JSON that is the same for equal values, in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {"{}": sorted(([_canonical(key), _plain(part)] for key, part in value.items()), key=str)}
    if isinstance(value, (set, frozenset)):
        return sorted(map(_canonical, value))
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(part) for part in value]
    kind = type(value).__qualname__
    # The default repr of an object names its address.
    has_repr = "__repr__" in {name for base in type(value).__mro__[:-1] for name in vars(base)}
    return f"<{kind} {value!r}>" if has_repr else f"<{kind}>"


def map_index(ti: Any) -> int:
    """Return the map index of a task instance, -1 if it is not mapped."""
    return -1 if ti.map_index is None else int(ti.map_index)


def is_last(context: Context) -> bool:
    """Whether no retry follows this try."""
    return bool(context["ti"].try_number > context["ti"].max_tries)


def pull(context: Context, key: str) -> Any:
    """Return what this task instance has pushed. Without its map index Airflow answers with those of all items."""
    ti = context["ti"]
    return ti.xcom_pull(task_ids=ti.task_id, key=key, map_indexes=map_index(ti))


def deployment() -> str:
    """Return the name that this Airflow deployment gives itself, ``""`` if none is configured."""
    return conf.get("durable_spark", "deployment", fallback="") or ""


def owner_of(context: Context) -> str:
    """Return the label that says which task instance a job belongs to."""
    ti = context["ti"]
    return jobs.owner_of(
        deployment=deployment(), dag_id=ti.dag_id, run_id=ti.run_id, task_id=ti.task_id, map_index=map_index(ti)
    )


def way_out(context: Context) -> str:
    """Return the sentence that tells a person what to do when only a person can tell."""
    ti = context["ti"]
    index = f"?map_index={ti.map_index}" if map_index(ti) >= 0 else ""
    return (
        "The way out: see on the cluster whether the job runs; when you know that it does not, delete this task's "
        f"record (DELETE /api/v2/dags/{ti.dag_id}/dagRuns/{ti.run_id}/taskInstances/{ti.task_id}/state-store/"
        f"{RECORD_KEY}{index}) and clear the task"
    )
