"""
What Airflow's metadata database says of the task instances whose labels jobs carry.

What flows in: owner labels. What flows out: :class:`Task`, what is known of each one's task instance.

The traps: an owner label is a hash, so it is found by hashing the candidates: the task instances that have a record,
and those that are not finished. Only their keys are read for that, the newest first, until all labels are found. And a
state store of a site's own keeps no readable record here: what is not known is ``None``, never a guess.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow.models.task_state_store import TaskStateStoreModel
from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XComModel
from airflow.utils.session import create_session
from airflow.utils.state import State
from sqlalchemy import or_, select, tuple_, update

from durable_spark.jobs import RECORD_KEY, TRY_XCOM_KEY, Record, owner_of

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from durable_spark.jobs import JobRef

__all__ = ["Task", "TaskKey", "keys_of", "note_job", "read"]

ROWS_AT_ONCE = 10_000
KEYS_AT_ONCE = 200
UNFINISHED = [state for state in State.unfinished if state is not None]


class TaskKey(NamedTuple):
    """Names a task instance."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int

    def __str__(self) -> str:
        index = f"[{self.map_index}]" if self.map_index >= 0 else ""
        return f"{self.dag_id}.{self.task_id}{index} in {self.run_id}"


class StoredRecord(NamedTuple):
    """A record and the row that holds it."""

    row: int
    text: str
    record: Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """
    What is known of a task instance.

    :param key: its name.
    :param exists: whether it is there; its record may outlive it.
    :param state: Airflow's; ``None`` before it is scheduled.
    :param stored: its record, if there is one that can be read.
    :param pushed: the token that its current try has pushed, the word of a task without a record; ``""`` if it has not.
    """

    key: TaskKey
    exists: bool
    state: str | None
    stored: StoredRecord | None = None
    pushed: str = ""

    @property
    def finished(self) -> bool:
        """Whether it runs no more, unless somebody clears it."""
        return not self.exists or self.state in State.finished

    @property
    def token(self) -> str:
        """The token of the submission that it follows, ``""`` if that is not known."""
        return self.stored.record.submission.token if self.stored else self.pushed


def keys_of(owners: Collection[str], *, deployment: str) -> Mapping[str, TaskKey]:
    """Return the task instances of owner labels. Missing: those without a record that are finished, or are gone."""
    wanted, found = set(owners), dict[str, TaskKey]()
    recorded = select(*_key_of(TaskStateStoreModel)).where(TaskStateStoreModel.key == RECORD_KEY)
    unfinished = select(*_key_of(TaskInstance)).where(
        or_(TaskInstance.state.is_(None), TaskInstance.state.in_(UNFINISHED))
    )
    with create_session() as session:
        for query in (recorded.order_by(TaskStateStoreModel.id.desc()), unfinished):
            if not wanted:
                break
            with session.execute(query, execution_options={"yield_per": ROWS_AT_ONCE}) as rows:
                for row in rows:
                    key = TaskKey(*row)
                    owner = owner_of(deployment=deployment, **key._asdict())
                    if owner in wanted:
                        found[owner] = key
                        wanted.remove(owner)
                        if not wanted:
                            break
    return found


def read(keys: Collection[TaskKey]) -> Mapping[TaskKey, Task]:
    """Return what is known of task instances now."""
    tasks: dict[TaskKey, Task] = {}
    rest = iter(keys)
    with create_session() as session:
        while some := list(islice(rest, KEYS_AT_ONCE)):
            instances = _rows(session, some, TaskInstance, TaskInstance.id, TaskInstance.state)
            records = _rows(
                session, some, TaskStateStoreModel, TaskStateStoreModel.id, TaskStateStoreModel.value, key=RECORD_KEY
            )
            tries = _rows(session, some, XComModel, XComModel.value, key=TRY_XCOM_KEY)
            for key in some:
                ti_id, state = instances.get(key, (None, None))
                tasks[key] = Task(
                    key=key,
                    exists=ti_id is not None,
                    state=None if state is None else str(state),
                    stored=_stored(*records[key]) if key in records else None,
                    pushed=_pushed(*tries[key], ti_id=str(ti_id)) if key in tries else "",
                )
    return tasks


def note_job(stored: StoredRecord, job: JobRef) -> bool:
    """
    Write into a mere intent which job came of it, before that is ended.

    Else the next try would look for a job that is gone, and could not tell that somebody had ended it.

    :return: ``False`` if the record has changed since it was read; nothing is written then.
    """
    text = json.dumps(dataclasses.replace(stored.record, job=job, killing=True).to_json())
    noted = update(TaskStateStoreModel).where(
        TaskStateStoreModel.id == stored.row, TaskStateStoreModel.value == stored.text
    )
    with create_session() as session:
        result: Any = session.execute(noted.values(value=text), execution_options={"synchronize_session": False})
        return bool(result.rowcount)


def _key_of(model: Any) -> tuple[Any, ...]:
    return model.dag_id, model.run_id, model.task_id, model.map_index


def _rows(
    session: Session, keys: Sequence[TaskKey], model: Any, *columns: Any, key: str | None = None
) -> Mapping[TaskKey, tuple[Any, ...]]:
    """Return columns of the rows of task instances, by their keys; of a store, under one key."""
    query = select(*_key_of(model), *columns).where(tuple_(*_key_of(model)).in_(keys))
    if key is not None:
        query = query.where(model.key == key)
    return {TaskKey(*row[:4]): tuple(row[4:]) for row in session.execute(query)}


def _stored(row: int, text: str) -> StoredRecord | None:
    try:
        return StoredRecord(row, text, Record.from_json(json.loads(text)))
    except (ValueError, TypeError):  # a later version's, or a reference into a site's own store
        return None


def _pushed(value: Any, *, ti_id: str) -> str:
    """Return the token in the XCom of a try, if it is the current one's: an older try may push late."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, Mapping) or value.get("ti_id") != ti_id:
        return ""
    return str(value.get("token") or "")
