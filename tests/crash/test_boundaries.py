"""
A task dies at boundaries with the outside that the day's seed chooses, once and twice in its life, on each backend; and
at any instant of the life of ``spark-submit``.

After each life the cluster's own record has one job for the submission, the task has ended as it did, and its record
says so. Upstream's operator, killed in the window that its documentation names, is what shows that a duplicate would be
seen. All boundaries, and each 50 ms, with ``scripts/crash-test``.
"""

from __future__ import annotations

import datetime
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.crash.boundaries import BACKENDS, RETRIES, WINDOW, Case, Harness, backend, in_process, usual
from tests.crash.interposer import Interposer, Kill, Way

if TYPE_CHECKING:
    from tests.clusters import Clusters

FEW = {"kubernetes": 6, "standalone": 2, "submit_kubernetes": 2, "submit_standalone": 1, "submit_yarn": 1}
"""Lives with one death. On each backend there is one more, with two, whose jobs fail."""
A_FEW_INSTANTS = 3
OURS = [name for name in BACKENDS if name in FEW]


@pytest.fixture
def harness(
    request: pytest.FixtureRequest, submit_clusters: Clusters | None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Harness]:
    if submit_clusters is None:
        pytest.skip("there is no Kubernetes or no YARN cluster")
    name = request.param
    for variable, value in {**submit_clusters.environment(), **usual(name), "_AIRFLOW_PROCESS_CONTEXT": ""}.items():
        monkeypatch.setenv(variable, value)
    with ExitStack() as stack:
        interposer = Interposer()
        place = stack.enter_context(backend(name, submit_clusters, interposer))
        yield stack.enter_context(in_process(place, interposer))


def sound(case: Case, *, deaths: int) -> None:
    print(f"\n{case}")
    assert not case.broken, f"{case}\n{case.log}"
    assert len(case.killed) <= deaths


def rng_of_the_day(name: str) -> random.Random:
    seed = os.environ.get("CRASH_SEED", datetime.date.today().isoformat())
    print(f"CRASH_SEED={seed}")
    return random.Random(f"{seed} {name}")


@pytest.mark.parametrize("harness", OURS, indirect=True)
def test_one_job_wherever_the_task_dies(harness: Harness) -> None:
    name = harness.backend.name
    rng = rng_of_the_day(name)
    undisturbed = harness.live([])
    sound(undisturbed, deaths=0)
    (length,) = undisturbed.crossed
    assert length > 20, "what flows past the interposer is not numbered"
    deaths = 0
    for part in range(FEW[name]):
        numbers = range(length * part // FEW[name] + 1, length * (part + 1) // FEW[name] + 1)
        once = harness.live([Kill(rng.choice(numbers), rng.choice(list(Way)))])
        sound(once, deaths=1)
        deaths += len(once.killed)
    twice = harness.live([Kill(rng.randint(1, length), rng.choice(list(Way))) for _ in range(2)], code=1)
    sound(twice, deaths=2)
    assert deaths + len(twice.killed) > FEW[name] // 2, "nobody dies where it was planned"


@pytest.mark.parametrize("harness", [name for name in OURS if name.startswith("submit")], indirect=True)
def test_one_job_whenever_spark_submit_dies_with_its_task(harness: Harness) -> None:
    rng = rng_of_the_day(harness.backend.name)
    seconds = harness.life_of_spark_submit()
    for part in range(A_FEW_INSTANTS):
        later = seconds * (part + rng.random()) / A_FEW_INSTANTS
        sound(harness.live([harness.after_start(later)]), deaths=1)


@pytest.mark.parametrize("harness", OURS[:2], indirect=True)
def test_each_way_of_dying_in_the_submission(harness: Harness) -> None:
    """The one exchange that matters most: the request that makes the job."""
    harness.live([])
    submission = _number(harness, "cluster: POST")
    left = {}
    for way in Way:
        case = harness.live([Kill(submission, way)])
        sound(case, deaths=1)
        assert case.reached
        left[way] = case.left
    assert left == {Way.BEFORE: [0], Way.ACTED: [1], Way.AFTER: [1]}


@pytest.mark.parametrize("harness", OURS[:1], indirect=True)
def test_a_death_on_the_last_try_is_the_named_limit(harness: Harness) -> None:
    early = [Kill(2, Way.AFTER)]
    sound(harness.live(early * RETRIES), deaths=RETRIES)
    for way, jobs in ((Way.BEFORE, 0), (Way.ACTED, 1)):
        case = harness.live([*early * RETRIES, Kill(_number(harness, "cluster: POST"), way)])
        sound(case, deaths=RETRIES + 1)
        assert (case.state, case.limits, case.left) == ("failed", ["killed on its last try"], [0] * RETRIES + [jobs])


@pytest.mark.parametrize("harness", ["upstream_kubernetes"], indirect=True)
def test_upstreams_window_shows_as_a_duplicate(harness: Harness) -> None:
    assert not harness.live([]).broken
    case = harness.live([Kill(_number(harness, WINDOW), Way.BEFORE)])
    assert case.reached
    assert case.duplicates, case


def _number(harness: Harness, what: str) -> int:
    """Return which exchange of the latest life it is, since its last death."""
    crossed: Sequence[str] = next(crossed for crossed in reversed(harness.interposer.crossed) if crossed)
    return next(number for number, each in enumerate(crossed, 1) if each.startswith(what))
