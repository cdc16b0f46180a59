"""
Tries of one task, each in a process of its own that can be killed: the operator's real code, Airflow in a file.

A case costs as long as ``spark-submit`` does. The store fences as Airflow's does (``set`` of an older try is refused
with 404, ``get`` answers as if the store were empty), and outlives every process. The real Airflow is in
``tests/airflow``.

The trap: a process is forked from this one, so that it does not import Airflow anew. What it is to find in its
environment must be set before.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import signal
import sys
import traceback
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk.bases.operator import ExecutorSafeguard
from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType, TaskDeferred
from airflow.sdk.execution_time.comms import ErrorResponse

from dev.processes import wait_until

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from airflow.sdk import BaseOperator

__all__ = ["Task"]

_fork = multiprocessing.get_context("fork")


class Task:
    """
    A task instance, its store and its tries.

    :param directory: where it keeps its store and its logs.
    :param build: returns the operator, anew for each try.
    """

    def __init__(self, directory: Path, build: Callable[[], BaseOperator]) -> None:
        self.directory = directory
        self._build = build
        self._tries: list[BaseProcess] = []
        self.current = 0

    def begin(self) -> None:
        """Begin the first try, or the next."""
        self.current += 1
        (self.directory / "current").write_text(str(self.current))
        process = _fork.Process(target=self._execute, args=(self.current,), name=f"try-{self.current}")
        process.start()
        self._tries.append(process)

    def kill(self) -> None:
        """Kill -9 the process of the current try, and it alone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._tries[-1].join()

    @property
    def pid(self) -> int:
        """The process of the current try."""
        pid = self._tries[-1].pid
        assert pid is not None
        return pid

    def wait(self, deadline: float, *, number: int | None = None) -> str:
        """Return how a try ended, the current one: ``deferred``, ``returned …`` or ``raised …``."""
        number = number or self.current
        process = self._tries[number - 1]
        process.join(deadline)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"try {number} has not ended in {deadline} s\n{self.log()}")
        return (self.directory / f"end-{number}").read_text()

    def wait_for_intent(self, deadline: float = 60) -> None:
        """Wait until the record has an intent."""
        wait_until(lambda: "durable_spark" in self.store(), deadline, "the intent", interval=0.01)

    def store(self) -> dict[str, Any]:
        """Return what is in the task state store."""
        return _stored(self.directory)

    def log(self) -> str:
        """Return what all tries have written."""
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.directory.glob("log-*")))

    def _execute(self, number: int) -> None:
        log = os.open(self.directory / f"log-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        end = self._ended(number)
        (self.directory / f"end-{number}").write_text(end)
        sys.stderr.write(f"{end}\n")
        sys.stderr.flush()
        os._exit(0)  # nothing of the parent's is to be torn down here

    def _ended(self, number: int) -> str:
        operator = self._build()
        token = ExecutorSafeguard.tracker.set(operator)
        try:
            return f"returned {operator.execute(_Try(self.directory, number, operator).context)}"
        except TaskDeferred:
            return "deferred"
        except BaseException as error:
            traceback.print_exc()
            return f"raised {type(error).__name__}: {error}"
        finally:
            ExecutorSafeguard.tracker.reset(token)


def _stored(directory: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads((directory / "store").read_text())
    except FileNotFoundError:
        return {}
    return value


class _Try:
    """What ``context["ti"]`` and the task state store are to the operator."""

    dag_id, run_id, task_id, map_index = "dag", "run", "task", -1
    max_tries = 2
    context_carrier: Mapping[str, str] = {"traceparent": "00-one"}
    stats_tags: Mapping[str, str] = {}

    def __init__(self, directory: Path, number: int, operator: BaseOperator) -> None:
        self._directory = directory
        self._operator = operator
        self._xcoms: dict[str, Any] = {}
        self.id = uuid.uuid4()
        self.try_number = number
        self.start_date = datetime.datetime.now(datetime.timezone.utc)

    @property
    def context(self) -> Any:
        dag = self._operator.dag
        return {"ti": self, "task_instance": self, "task": self._operator, "dag": dag, "task_state_store": self}

    @property
    def _fenced(self) -> bool:
        return int((self._directory / "current").read_text()) != self.try_number

    def _write(self, store: Mapping[str, Any]) -> None:
        new = self._directory / f"store-{self.try_number}"
        new.write_text(json.dumps(store))
        new.rename(self._directory / "store")  # whole or not at all, whenever this process is killed

    def get(self, key: str, default: Any = None) -> Any:
        return default if self._fenced else _stored(self._directory).get(key, default)

    def set(self, key: str, value: Any, *, retention: Any = None) -> None:
        if self._fenced:
            raise AirflowRuntimeError(ErrorResponse(error=ErrorType.API_SERVER_ERROR, detail={"status_code": 404}))
        self._write({**_stored(self._directory), key: value})

    def delete(self, key: str) -> None:
        if not self._fenced:
            self._write({name: value for name, value in _stored(self._directory).items() if name != key})

    def xcom_push(self, key: str, value: Any) -> None:
        self._xcoms[key] = value

    def xcom_pull(self, *, key: str, **_: Any) -> Any:
        return self._xcoms.get(key)
