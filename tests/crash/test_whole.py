"""
Processes of a whole Airflow die where the day's seed chooses, with lives side by side: workers, tasks and triggerers.

All boundaries that such an Airflow shows, one by one, with ``scripts/crash-test --series whole``.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import os
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dev.processes import wait_until
from tests.airflow.backdoor import miss_heartbeat
from tests.clusters import spark_submits
from tests.crash.boundaries import Case, Harness, backend, usual
from tests.crash.inprocess import TASK
from tests.crash.interposer import Interposer, Kill, Way
from tests.crash.whole import WholeAirflow

if TYPE_CHECKING:
    from tests.clusters import Clusters

PLACES = ("kubernetes", "standalone", "kubernetes", "standalone")
YARN = "submit_yarn"


@dataclasses.dataclass
class Stage:
    whole: WholeAirflow
    harnesses: list[Harness]
    clusters: Clusters


@pytest.fixture(scope="module")
def stage(submit_clusters: Clusters | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    if submit_clusters is None:
        pytest.skip("there is no Kubernetes or no YARN cluster")
    with ExitStack() as stack:
        places = []
        for number, name in enumerate((*PLACES, YARN)):
            interposer = Interposer()
            interposer.repeats = False
            place = stack.enter_context(backend(name, submit_clusters, interposer, number=number))
            places.append((place, interposer))
        environment = {**submit_clusters.environment(), **usual("whole", whole=True)}
        whole = stack.enter_context(WholeAirflow(places, tmp_path_factory.mktemp("whole"), environment))
        yield Stage(whole, [Harness(place, interposer, whole) for place, interposer in places], submit_clusters)


def test_one_job_whichever_process_dies(stage: Stage) -> None:
    harnesses = stage.harnesses[: len(PLACES)]
    seed = os.environ.get("CRASH_SEED", datetime.date.today().isoformat())

    def lives(harness: Harness) -> list[Case]:
        rng = random.Random(f"{seed} {harness.backend.place}")
        undisturbed = harness.live([])
        (length,) = undisturbed.crossed
        deferral = next(n for n, what in enumerate(harness.interposer.crossed[0], 1) if what.endswith("/state"))
        on_worker = Kill(rng.randint(1, deferral), rng.choice(list(Way)))
        in_triggerer = Kill(rng.randint(deferral + 1, length), rng.choice(list(Way)))
        return [undisturbed, harness.live([on_worker]), harness.live([in_triggerer])]

    with concurrent.futures.ThreadPoolExecutor(len(harnesses)) as pool:
        cases = [case for each in pool.map(lives, harnesses) for case in each]
    for case in cases:
        print(f"\n{case}")
        assert not case.broken, f"{case}\n{case.log}"
    assert sum(len(case.killed) for case in cases) >= len(harnesses), "nobody dies where it was planned"


def test_a_spark_submit_that_wakes_up_late_leaves_one_job(stage: Stage) -> None:
    """Suspended with its worker right before it submits; the retry has submitted when it goes on."""
    harness, airflow = stage.harnesses[-1], stage.whole.airflow
    key = harness.backend.place, f"{harness.backend.place}-late-{os.getpid()}", TASK
    staging = stage.clusters.yarn.directory / "staging"
    before = set(staging.rglob("*.jar"))
    airflow.trigger(key[0], run=key[1], conf={"seconds": "600", "code": "0"})
    process, old = airflow.task_process(*key), airflow.task(*key)
    wait_until(lambda: set(staging.rglob("*.jar")) - before, 60, "the upload, which is its last step", interval=0.002)
    submits = spark_submits(key[1])
    for pid in submits:
        os.kill(pid, signal.SIGSTOP)
    process.freeze()

    def retried() -> bool:
        miss_heartbeat(stage.whole.postgres, old.id)
        return airflow.task(*key).try_number > old.try_number

    wait_until(retried, 60, "the retry", interval=0.5)
    airflow.wait_for_state(*key, "deferred", try_number=2, deadline=120)
    (wanted,) = harness.backend.jobs(key[1])
    for pid in reversed(submits):
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: len(harness.backend.jobs(key[1])) == 2, 60, "the late application", interval=0.2)
    process.thaw()
    wait_until(lambda: not Path(f"/proc/{process.runner}").exists(), 90, "the old try to end", interval=0.2)
    wait_until(
        lambda: [job.id for job in harness.backend.jobs(key[1]) if job.state == "running"] == [wanted.id],
        90,
        "the younger application to be killed",
        interval=0.2,
    )
    assert airflow.store(*key)["spark_job_id"] == wanted.id
    airflow.set_state(*key, "failed")
    wait_until(lambda: not any(job.state == "running" for job in harness.backend.jobs(key[1])), 60, "its end")
