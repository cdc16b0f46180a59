"""Which jobs are orphans, by a real database of Airflow's; the clusters are in ``tests/cluster/test_orphans.py``."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import pytest
from airflow.sdk.exceptions import TaskDeferred

from durable_spark.cli import orphans as command
from durable_spark.cli._tasks import TaskKey, note_job
from durable_spark.jobs import (
    ClusterUnreachable,
    JobRef,
    JobState,
    JobStatus,
    OwnedJob,
    RequestRefused,
    new_token,
)
from tests.orphans import DEPLOYMENT, Metadata, Said, empty_metadata, run_orphans
from tests.unit.tries import MemoryHook, TaskInstance

A, B = "a" * 32, "b" * 32
UNFINISHED = (
    None,
    "scheduled",
    "queued",
    "running",
    "restarting",
    "up_for_retry",
    "up_for_reschedule",
    "deferred",
    "awaiting_input",
)
FINISHED = ("failed", "success", "skipped", "removed", "upstream_failed")


@dataclasses.dataclass
class Cluster:
    """Jobs with labels, and what a test has done to them."""

    jobs: dict[JobRef, OwnedJob] = dataclasses.field(default_factory=dict)
    done: list[str] = dataclasses.field(default_factory=list)
    added: int = 0
    looks: int = 0
    after_look: Callable[[int], None] = lambda look: None
    refuses: Exception | None = None
    outlives_kills: bool = False

    def add(self, owner: str, token: str, state: JobState = JobState.RUNNING) -> JobRef:
        self.added += 1
        ref = JobRef(f"job-{self.added}")
        self.jobs[ref] = OwnedJob(status=JobStatus(job=ref, state=state, raw=state.name), token=token, owner=owner)
        return ref

    def end(self, ref: JobRef) -> None:
        del self.jobs[ref]


clusters: dict[str, Cluster] = {}


class LabelHook(MemoryHook):
    """A hook on one of :data:`clusters`."""

    @property
    def on(self) -> Cluster:
        return clusters[self.conn_id]

    async def find_owned(self, deployment: str, owner: str | None = None) -> Sequence[OwnedJob]:
        assert (deployment, owner) == (DEPLOYMENT, None)
        if self.conn_id not in clusters:
            raise ClusterUnreachable("the cluster does not answer")
        self.log.warning("whose one of them is cannot be told")
        seen = list(self.on.jobs.values())
        self.on.looks += 1
        self.on.after_look(self.on.looks)
        return seen

    async def poll(self, jobs: Collection[JobRef]) -> Mapping[JobRef, JobStatus]:
        return {
            job: self.on.jobs[job].status if job in self.on.jobs else JobStatus(job=job, state=JobState.ABSENT)
            for job in jobs
        }

    async def kill(self, job: JobRef) -> None:
        if self.on.refuses:
            raise self.on.refuses
        self.on.done.append(f"kill {job}")
        if not self.on.outlives_kills:
            self.on.end(job)

    async def release(self, job: JobRef) -> None:
        self.on.done.append(f"release {job}")


class KeepingHook(MemoryHook):
    async def find_owned(self, deployment: str, owner: str | None = None) -> Sequence[OwnedJob]:
        status = JobStatus(job=JobRef("job-0"), state=JobState.FAILED)
        return [OwnedJob(status=status, token=A, owner=owner or "")]


class MuteHook(MemoryHook):
    async def find_owned(self, deployment: str, owner: str | None = None) -> Sequence[OwnedJob]:
        raise NotImplementedError("MuteHook cannot look jobs up by their labels")


Call = Callable[..., Said]


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with empty_metadata() as metadata:
        yield metadata


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    clusters["one"] = Cluster()
    yield clusters["one"]
    clusters.clear()


@pytest.fixture
def call() -> Call:
    """Return a function that calls the command."""

    def call(*arguments: str, hook: str = f"{__name__}.LabelHook", conn_ids: Sequence[str] = ("one",)) -> Said:
        return run_orphans(*conn_ids, "--hook", hook, *arguments)

    return call


# --- followed or not


@pytest.mark.parametrize("state", UNFINISHED)
def test_a_task_that_is_not_finished_follows_its_job(
    metadata: Metadata, cluster: Cluster, call: Call, state: str | None
) -> None:
    key = metadata.task(state)
    job = cluster.add(metadata.owner(key), A)
    metadata.record(key, A, job=job)
    assert call().rows == []
    (row,) = call("--all").rows
    assert row == {
        "conn_id": "one",
        "job_id": job.id,
        "state": "RUNNING",
        "dag_id": "dag",
        "run_id": "run1",
        "task_id": "job",
        "map_index": "-1",
        "verdict": "followed",
        "reason": f"its task instance is {state or 'not scheduled yet'}",
    }


@pytest.mark.parametrize("state", FINISHED)
def test_the_job_of_a_finished_task_is_an_orphan(metadata: Metadata, cluster: Cluster, call: Call, state: str) -> None:
    key = metadata.task(state)
    job = cluster.add(metadata.owner(key), A)
    metadata.record(key, A, job=job)
    said = call()
    assert (said.orphans, said.code) == ([job.id], 0)
    assert said.rows[0]["reason"].startswith(f"its task instance is {state}; a clear would")


def test_a_job_that_is_being_submitted_is_followed(metadata: Metadata, cluster: Cluster, call: Call) -> None:
    """The intent is there, the job's ID is not written yet."""
    key = metadata.task("running")
    cluster.add(metadata.owner(key), A)
    metadata.record(key, A, job=None)
    assert call().orphans == []


@pytest.mark.parametrize("state", ["running", "deferred", "failed"])
def test_a_job_of_an_earlier_submission_is_an_orphan(
    metadata: Metadata, cluster: Cluster, call: Call, state: str
) -> None:
    key = metadata.task(state)
    old, new = cluster.add(metadata.owner(key), A), cluster.add(metadata.owner(key), B)
    metadata.record(key, B, job=new)
    said = call("--all")
    assert said.orphans == ([old.id] if state != "failed" else [old.id, new.id])
    reasons = {row["job_id"]: row["reason"] for row in said.rows}
    assert reasons[old.id] == f"its task instance is {state}" + (", with another submission" * (state != "failed"))


def test_a_task_instance_that_is_gone_leaves_an_orphan(metadata: Metadata, cluster: Cluster, call: Call) -> None:
    """Its record is not: that goes with the run."""
    key = metadata.task("deferred")
    job = cluster.add(metadata.owner(key), A)
    metadata.record(key, A, job=job)
    metadata.execute("DELETE FROM task_instance")
    (row,) = call().rows
    assert (row["job_id"], row["reason"]) == (job.id, "its task instance is gone")
    metadata.delete_run("run1")
    (row,) = call().rows
    assert (row["job_id"], row["dag_id"]) == (job.id, "")
    assert "its run or its record is gone" in row["reason"]


def test_mapped_task_instances_are_told_apart(metadata: Metadata, cluster: Cluster, call: Call) -> None:
    jobs = []
    for index, state in enumerate(["deferred", "failed"]):
        key = metadata.task(state, map_index=index)
        jobs.append(cluster.add(metadata.owner(key), f"{index}" * 32))
        metadata.record(key, f"{index}" * 32, job=jobs[-1])
    (row,) = call().rows
    assert (row["job_id"], row["map_index"]) == (jobs[1].id, "1")


# --- without a record that can be read


@pytest.mark.parametrize("value", ['{"__airflow_state_ref__": "elsewhere"}', '{"version": 2}', "nonsense"])
def test_a_record_that_cannot_be_read_makes_no_orphan(
    metadata: Metadata, cluster: Cluster, call: Call, value: str
) -> None:
    alive, dead = metadata.task("deferred"), metadata.task("failed", run_id="run2")
    for key in (alive, dead):
        metadata.store(key, value)
    cluster.add(metadata.owner(alive), A)
    orphan = cluster.add(metadata.owner(dead), B)
    assert call().orphans == [orphan.id]


def test_a_task_without_a_record_is_believed_by_its_current_try(
    metadata: Metadata, cluster: Cluster, call: Call
) -> None:
    """``durable=False`` keeps none, and submits anew on each try."""
    key = metadata.task("deferred")
    old, new = cluster.add(metadata.owner(key), A), cluster.add(metadata.owner(key), B)
    assert call().orphans == [], "nothing is known"
    metadata.push_try(key, "")
    assert call().orphans == [], "it has not submitted yet"
    metadata.push_try(key, A, ti_id="00000000-0000-4000-8000-000000000000")
    assert call().orphans == [], "an older try pushes late"
    metadata.push_try(key, B)
    assert call().orphans == [old.id]
    metadata.set_state(key, "failed")
    assert call().orphans == [old.id, new.id]


def test_a_record_outranks_what_a_try_has_pushed(metadata: Metadata, cluster: Cluster, call: Call) -> None:
    key = metadata.task("running")
    job = cluster.add(metadata.owner(key), A)
    metadata.record(key, A, job=job)
    metadata.push_try(key, B)
    assert call().orphans == []


# --- races


def test_a_job_that_is_submitted_between_the_two_looks(metadata: Metadata, cluster: Cluster, call: Call) -> None:
    """The cluster is read first. What is written to the database until then is seen, what is submitted later is not."""
    key = metadata.task("deferred")
    old = cluster.add(metadata.owner(key), A)
    metadata.record(key, A, job=old)

    def fail_and_submit_again(look: int) -> None:
        if look == 1:
            cluster.end(old)
            metadata.record(key, B, job=None)
            cluster.add(metadata.owner(key), B)

    cluster.after_look = fail_and_submit_again
    said = call("--all")
    assert said.orphans == []
    assert cluster.looks == 2, "what seems an orphan is looked at again"


def test_a_job_that_ends_with_its_task_meanwhile(metadata: Metadata, cluster: Cluster, call: Call) -> None:
    key = metadata.task("deferred")
    job = cluster.add(metadata.owner(key), A)
    metadata.record(key, A, job=job)

    def succeed(look: int) -> None:
        cluster.jobs.pop(job, None)
        metadata.set_state(key, "success")

    cluster.after_look = succeed
    assert call("--kill", "--yes").rows == []
    assert cluster.done == []


def test_a_task_that_is_cleared_while_the_question_is_asked(
    metadata: Metadata, cluster: Cluster, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []
    for run_id in ("run1", "run2"):
        key = metadata.task("failed", run_id=run_id)
        jobs.append(cluster.add(metadata.owner(key), A))
        metadata.record(key, A, job=jobs[-1])

    def think() -> str:
        metadata.set_state(key, None)
        return "y"

    monkeypatch.setattr("builtins.input", think)
    said = call("--kill")
    assert said.orphans == [job.id for job in jobs]
    assert "End 2 orphans? [y/n]" in said.errors
    assert f"one: {jobs[1]} is left alone: its task instance is not scheduled yet" in said.errors
    assert cluster.done == [f"kill {jobs[0]}", f"release {jobs[0]}"]
    assert said.code == 0


def test_a_run_that_is_made_anew_while_the_question_is_asked(
    metadata: Metadata, cluster: Cluster, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = metadata.owner(TaskKey("dag", "run1", "job", -1))
    job = cluster.add(owner, A)

    def think() -> str:
        metadata.task("running")
        return "yes"

    monkeypatch.setattr("builtins.input", think)
    assert "is left alone" in call("--kill").errors
    assert (list(cluster.jobs), cluster.done) == ([job], [])


def test_an_intent_that_changes_just_then_is_not_overwritten(
    metadata: Metadata, cluster: Cluster, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = metadata.task("failed")
    job = cluster.add(metadata.owner(key), A)
    metadata.record(key, A, job=None)

    def too_late(*arguments: Any) -> bool:
        metadata.record(key, B, job=None)
        return note_job(*arguments)

    monkeypatch.setattr(command, "note_job", too_late)
    said = call("--kill", "--yes")
    assert said.code == 1
    assert f"{job} could not be ended: its record has just been changed" in said.errors
    assert (metadata.stored(key).submission.token, cluster.done) == (B, [])


# --- --kill


def test_orphans_are_ended_and_nothing_else(metadata: Metadata, cluster: Cluster, call: Call) -> None:
    followed, failed = metadata.task("deferred"), metadata.task("failed", run_id="run2")
    for key, token in ((followed, A), (failed, B)):
        metadata.record(key, token, job=cluster.add(metadata.owner(key), token))
    gone = cluster.add(new_token(), new_token())
    said = call("--kill", "--yes", "--all")
    assert said.orphans == ["job-2", gone.id]
    assert cluster.done == ["kill job-2", "release job-2", f"kill {gone}", f"release {gone}"]
    assert (list(cluster.jobs), said.code) == ([JobRef("job-1")], 0)
    assert "one: job-2 was killed" in said.errors
    assert "left alone" not in said.errors
    assert metadata.stored(failed).killing is False, "the record of a job that is known is left alone"
    assert call("--kill", "--yes").rows == []


def test_an_intent_learns_which_job_was_ended(metadata: Metadata, cluster: Cluster, call: Call) -> None:
    """A task that is cleared later would look for it, and could not tell who has ended it."""
    key = metadata.task("failed")
    job = cluster.add(metadata.owner(key), A)
    metadata.record(key, A, job=None)
    assert call("--kill", "--yes").code == 0
    record = metadata.stored(key)
    assert (record.job, record.killing, record.verdict, record.submission.token) == (job, True, None, A)


def test_what_is_kept_of_an_ended_job_is_let_go_of(metadata: Metadata, cluster: Cluster, call: Call) -> None:
    """A pod that is held although its task is over; one whose end is not written yet is not touched."""
    over, not_over = metadata.task("failed"), metadata.task("deferred", run_id="run2")
    for key in (over, not_over):
        metadata.record(key, A, job=cluster.add(metadata.owner(key), A, JobState.SUCCEEDED))
    said = call("--kill", "--yes")
    (row,) = said.rows
    assert (row["job_id"], row["state"]) == ("job-1", "SUCCEEDED, kept")
    assert row["reason"] == "its task instance is failed"
    assert cluster.done == ["release job-1"]
    assert "one: job-1 was let go of" in said.errors


def test_a_kill_that_is_refused(metadata: Metadata, cluster: Cluster, call: Call) -> None:
    cluster.refuses = RequestRefused("it is another user's")
    jobs = [cluster.add(new_token(), new_token()) for _ in range(2)]
    said = call("--kill", "--yes")
    assert said.code == 1
    assert all(f"one: {job} could not be ended: it is another user's" in said.errors for job in jobs)


def test_a_job_that_outlives_its_kill(
    metadata: Metadata, cluster: Cluster, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SEEN_DEAD_WITHIN", 0.3)
    monkeypatch.setattr(command, "LOOK_EVERY", 0.1)
    cluster.outlives_kills = True
    job = cluster.add(new_token(), new_token())
    said = call("--kill", "--yes")
    assert said.code == 1
    assert f"one: {job} is not seen dead within 0 s: it is RUNNING" in said.errors


@pytest.mark.parametrize(("answer", "last_words"), [("n\n", "Nothing was ended"), ("", "There is nobody to ask")])
def test_without_consent_nothing_is_ended(
    metadata: Metadata,
    cluster: Cluster,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    last_words: str,
) -> None:
    job = cluster.add(new_token(), new_token())
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    said = call("--kill")
    assert said.orphans == [job.id], "the list comes before the question"
    assert str(said.code).startswith(last_words)
    assert cluster.done == []


def test_nothing_is_asked_where_there_is_nothing_to_end(
    metadata: Metadata, cluster: Cluster, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert call("--kill").code == 0


# --- errors


def test_without_a_deployment_name(
    metadata: Metadata, cluster: Cluster, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AIRFLOW__DURABLE_SPARK__DEPLOYMENT")
    said = call()
    assert str(said.code).startswith("[durable_spark] deployment is not set (AIRFLOW__DURABLE_SPARK__DEPLOYMENT)")
    assert cluster.looks == 0


@pytest.mark.parametrize("hook", ["tests.nowhere.Hook", "tests.orphans.Metadata"])
def test_a_hook_that_is_none(metadata: Metadata, call: Call, hook: str) -> None:
    assert f"hook: '{hook}'" in str(call(hook=hook).code)


def test_one_connection_that_fails_does_not_hide_the_others(metadata: Metadata, cluster: Cluster, call: Call) -> None:
    job = cluster.add(new_token(), new_token())
    said = call("--kill", "--yes", conn_ids=["dead", "one", "one"])
    assert said.orphans == [job.id]
    assert "dead: the cluster does not answer" in said.errors
    assert "Traceback" not in said.errors
    assert (said.code, list(cluster.jobs)) == (1, [])


def test_a_hook_that_knows_no_labels(metadata: Metadata, call: Call) -> None:
    said = call(hook=f"{__name__}.MuteHook")
    assert (said.code, said.printed) == (1, ""), "an empty list would say that there are none"
    assert "one: MuteHook cannot look jobs up by their labels" in said.errors


@pytest.mark.parametrize(
    ("connection", "message"),
    [
        (None, "there is no Airflow connection 'one'"),
        ({"conn_type": "postgres", "host": "db"}, "connection 'one' is of the type 'postgres'"),
        ({"conn_type": "spark", "host": "local"}, "the master URL 'local' of connection 'one' cannot be used"),
    ],
)
def test_a_connection_that_is_none_of_a_cluster(
    metadata: Metadata, call: Call, monkeypatch: pytest.MonkeyPatch, connection: dict[str, Any] | None, message: str
) -> None:
    if connection:
        monkeypatch.setenv("AIRFLOW_CONN_ONE", json.dumps(connection))
    said = call(hook="durable_spark.hooks.spark.SparkHook")
    assert said.code == 1
    assert f"one: {message}" in said.errors
    assert "Traceback" not in said.errors


# --- the form


def test_other_commands_of_airflow_do_not_pay_for_it() -> None:
    probe = """
import sys
import airflow.cli.cli_config
before = set(sys.modules)
import durable_spark.cli.definition
durable_spark.cli.definition.get_commands()
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True)
    added = done.stdout.splitlines()[-1].split()
    assert set(added) <= {"durable_spark", "durable_spark.cli", "durable_spark.cli.definition"}


def test_what_a_hook_warns_of_is_seen_and_leaves_the_list_alone(
    metadata: Metadata, cluster: Cluster, call: Call
) -> None:
    job = cluster.add(new_token(), new_token())
    said = call("--kill", "--yes")
    assert said.orphans == [job.id]
    assert "whose one of them is cannot be told" in said.errors


@pytest.mark.parametrize("output", ["table", "plain", "yaml"])
def test_other_forms(
    metadata: Metadata, cluster: Cluster, call: Call, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    from airflow.cli.cli_parser import get_parser

    cluster.add(new_token(), new_token())
    hook = f"{__name__}.LabelHook"
    parsed = get_parser().parse_args(["durable-spark", "orphans", "one", "--hook", hook, "-o", output])
    parsed.func(parsed)
    assert "job-1" in capsys.readouterr().out


def test_a_later_try_without_a_record_minds_no_job_that_is_only_kept() -> None:
    """What :meth:`JobHook.find_owned` tells of those, it tells for this command."""
    ti = TaskInstance(hook=KeepingHook, conn_id="memory", job="good", retries=2)
    ti.begin()
    assert isinstance(ti.begin().execute(), TaskDeferred)


def test_many_task_instances_do_not_make_it_slow(metadata: Metadata, cluster: Cluster, call: Call) -> None:
    """A hundred thousand that are over, ten thousand records; the orphan's is the oldest, and one has none at all."""
    key = metadata.task("failed")
    old = cluster.add(metadata.owner(key), A)
    metadata.record(key, A, job=old)
    metadata.execute("UPDATE dag_run SET state = 'failed'")
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {})"
    metadata.execute(
        "INSERT INTO task_instance (id, dag_id, run_id, task_id, map_index, state, try_number, pool, pool_slots) "
        + numbers.format(100_000)
        + " SELECT printf('%032d', i), 'dag', 'run1', 'job', i, 'success', 1, 'default_pool', 1 FROM n"
    )
    metadata.execute(
        "INSERT INTO task_state_store (dag_run_id, dag_id, run_id, task_id, map_index, key, value, updated_at) "
        + numbers.format(10_000)
        + " SELECT 1, 'dag', 'run1', 'job', i, key, value, updated_at FROM n, task_state_store"
    )
    nobodys = cluster.add(new_token(), new_token())
    began = time.monotonic()
    assert call().orphans == [old.id, nobodys.id]
    assert time.monotonic() - began < 10
