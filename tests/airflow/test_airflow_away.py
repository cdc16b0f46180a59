"""Airflow itself is away for a while, or does not keep what it keeps by default."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from tests.airflow.conftest import ENDED, LAST_LOOK, Run, Stage
from tests.airflow.gates import open_gate
from tests.airflow.lives import one_after_the_other
from tests.airflow.test_outages import after
from tests.airflow.together import last_of_all

STORE = r"/execution/store/"


@last_of_all
def test_a_minute_without_airflow(stage: Stage, run: Callable[..., Run]) -> None:
    """First without its database, for a while without both, then without its API server. What dies is started again."""
    airflow = stage.airflow
    deferred, failing, running = (
        run("away_deferred"),
        run("away_failing", exit_code="3"),
        run("away_running"),
    )
    resuming = run("away_resuming")
    early = [deferred, failing, running, resuming]
    for job in early:
        job.wait_for_followed_pod()
    with contextlib.ExitStack() as stack:
        held = [
            stack.enter_context(stage.execution_api.holding(method, path, body=body))
            for method, path, body in (
                ("PUT", STORE, '"name": ?"away_intent'),
                ("PUT", STORE, r'"job": ?\["spark:away-sent-job-[^"]+", ?"[0-9a-f-]{36}"'),
                ("PUT", STORE, r'"job": ?\["spark:away-resuming-[^}]*"verdict": ?\{'),
                ("GET", LAST_LOOK + r".*dag_id=away_last&", ""),
            )
        ]
        open_gate(resuming)
        intent, sent, last = (run(f"away_{instant}") for instant in ("intent", "sent", "last"))
        for hold in held:
            hold.wait(90)
        jobs = [*early, intent, sent, last]
        before = {job.dag: job.pods() for job in jobs}
        assert {dag: len(pods) for dag, pods in before.items()} == {job.dag: int(job is not intent) for job in jobs}
        stage.postgres.kill()
        began = time.monotonic()
        for hold in held:
            hold.drop()
    for job in jobs:
        if job is not running:
            open_gate(job)
    after(began, 20)
    airflow.api_server.kill()
    after(began, 40)
    stage.postgres.start()
    for server in airflow.servers:
        if server is not airflow.api_server and not server.alive:
            server.start()
    after(began, 60)
    for scheduler in airflow.schedulers:  # LocalExecutor's was seen with none but dead workers, and never gets others
        scheduler.kill()
    airflow.revive()
    assert running.ti.state == "deferred"
    open_gate(running)
    for job in jobs:
        ended = job.wait(*ENDED, deadline=180)
        assert ended.state == ("failed" if job is failing else "success"), job.logs()
        pods = job.pods()
        assert pods[: len(before[job.dag])] == before[job.dag]
        if job is failing:
            assert len(pods) <= ended.try_number, "a try that went down with Airflow has none, or the one before it"
            one_after_the_other(job, len(pods))
        else:
            assert len(pods) == 1, job.logs()
            assert job.xcoms()["return_value"] == f"spark:{pods[0].name}"
        assert job.store()["durable_spark"]["verdict"] is not None


@last_of_all
def test_a_store_that_is_cleared_on_success(stage: Stage, run: Callable[..., Run]) -> None:
    """The record is there as long as it is needed, and a task that succeeded runs again without."""
    with api_server_with(stage, AIRFLOW__STATE_STORE__CLEAR_ON_SUCCESS="True"):
        with stage.killed_before_it_defers(run, "long_killed") as killed:
            done, marked = run("long_done"), run("long_marked")
            killed.wait_for_pod("Running")
        jobs = [done, marked, killed]
        pods = [job.wait_for_followed_pod() for job in jobs]
        for job in jobs:
            assert job.store()["durable_spark"]["job"]
        stage.airflow.set_state(*marked.key, "success")
        for job in (done, killed):
            open_gate(job)
            assert job.wait(*ENDED).state == "success"
            assert job.xcoms()["return_value"].startswith("spark:")
        assert killed.ti.try_number == 2
        marked.wait_for_pod(None)
        for job in jobs:
            assert job.store() == {}
            assert job.pods() == [pods[jobs.index(job)]]
        stage.airflow.clear(done.dag, done.id, ["job"])
        done.wait("success", try_number=2)
        assert len(done.pods()) == 2


@contextlib.contextmanager
def api_server_with(stage: Stage, **env: str) -> Iterator[None]:
    """Start the API server with other settings for the length of the block."""
    server = stage.airflow.api_server
    before = server.env or {}

    def restart(env: dict[str, str]) -> None:
        server.kill()
        server.env = env
        stage.airflow.revive()

    restart({**before, **env})
    try:
        yield
    finally:
        restart({**before})
