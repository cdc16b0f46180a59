"""The soak's plan, its timeline and its verdicts: what can be told without a cluster."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from dev.soak_chaos import ACTS, draw
from dev.soak_jobs import (
    ALONE,
    ERROR,
    FOR_GOOD,
    HALF,
    KINDS,
    LOST,
    TWIN,
    UNCERTAIN,
    Ended,
    Job,
    Planned,
    judge,
    plan,
)

ONE, TWO, THREE = "1" * 32, "2" * 32, "3" * 32


def planned(kind: str = "pod", failures: int = 0) -> Planned:
    return Planned(KINDS[kind], "key", "key", -1, 10.0, failures)


def ended(state: str | None = "success", *tokens: str, error: str = "") -> Ended:
    return Ended(state, 1, tokens, len(tokens), error)


def job(token: str, state: str = "succeeded", raw: str | None = None, name: str = "") -> Job:
    return Job("key", token, name or f"job-{token[:2]}", state, raw or state)


class TestPlan:
    def test_a_seed_draws_the_same_again(self) -> None:
        first, again, other = (list(itertools.islice(plan(seed, 300), 100)) for seed in ("a", "a", "b"))
        assert first == again
        assert first != other

    def test_each_deck_has_every_kind(self) -> None:
        deck = sum(kind.runs for kind in KINDS.values())
        runs = itertools.islice(plan("a", 300), deck)
        assert Counter(run.kind.name for run in runs) == {kind.name: kind.runs for kind in KINDS.values()}

    def test_keys_are_unique_and_no_job_is_too_long(self) -> None:
        jobs = [job for run in itertools.islice(plan("a", 300), 200) for job in run.within(120).jobs]
        assert len({job.key for job in jobs}) == len(jobs)
        assert max(job.seconds * job.jobs for job in jobs) <= 120
        assert {job.failures for job in jobs} == {0, 1, 2, FOR_GOOD}


class TestTimeline:
    def test_a_seed_draws_the_same_again(self) -> None:
        assert draw("a", 600) == draw("a", 600) != draw("b", 600)

    def test_nothing_is_hit_twice_at_once_and_all_is_over_in_time(self) -> None:
        acts = draw("a", 3600)
        for target in {act.target for act in acts}:
            mine = [act for act in acts if act.target == target]
            assert all(one.at + one.seconds < next_.at for one, next_ in itertools.pairwise(mine))
        assert max(act.at + act.seconds for act in acts) < 3600

    def test_every_act_comes(self) -> None:
        assert {act.name for act in draw("a", 36000)} == set(ACTS)


class TestJudgement:
    @pytest.mark.parametrize(
        ("plan_", "end", "jobs"),
        [
            (planned(), ended("success", ONE), [job(ONE)]),
            (planned(failures=1), ended("success", TWO, ONE), [job(ONE, "failed"), job(TWO)]),
            (planned(failures=FOR_GOOD), ended("failed", ONE), [job(ONE, "failed")]),
            (planned(failures=FOR_GOOD), ended("failed", TWO, ONE), [job(ONE, "failed"), job(TWO, "failed")]),
        ],
        ids=["success", "success after a failure", "failure", "failure, submitted again"],
    )
    def test_as_it_should_be(self, plan_: Planned, end: Ended, jobs: list[Job]) -> None:
        said = judge(plan_, end, jobs)
        assert (said.broken, said.limits) == ([], [])

    @pytest.mark.parametrize(
        ("plan_", "end", "jobs", "broken"),
        [
            (planned(), ended("deferred", ONE), [job(ONE)], "has not ended: it is deferred"),
            (planned(), ended(None, ONE), [job(ONE)], "has not ended"),
            (planned(), ended("success", ONE), [job(ONE, "running")], "still running, with nobody to follow"),
            (planned(), ended("success", ONE), [job(ONE), job(TWO)], "no submission of the task tells of job-22"),
            (planned(), ended("success", ONE), [job(ONE), job(ONE)], "2 jobs for the submission"),
            (planned("driver"), ended("success", ONE), [job(ONE), job(ONE)], "2 jobs for the submission"),
            (planned(), ended("success", ONE), [job(ONE), job(ONE, "killed")], "2 jobs for the submission"),
            (planned("driver"), ended("success", ONE), [job(ONE, "killed"), job(ONE)], "2 jobs for the submission"),
            (planned(), ended("success", TWO, ONE), [job(ONE), job(TWO)], "submitted again, although job-11"),
            (planned(), ended("success", TWO, ONE), [job(ONE, "killed"), job(TWO)], "submitted again, although"),
            (planned(), ended("success", TWO, ONE), [job(ONE, "failed"), job(TWO)], "2 jobs, 1 were meant"),
            (planned(failures=1), ended("success", ONE), [job(ONE)], "1 jobs, 2 were meant"),
            (planned(), ended("success"), [], "without a job"),
            (planned(), ended("success", ONE), [job(ONE, "failed")], "the task is success, its job job-11 failed"),
            (planned(), ended("failed", ONE), [job(ONE)], "the task is failed, its job job-11 succeeded"),
            (planned(), ended("failed", ONE), [job(ONE, "failed")], "which its job was not to be"),
            (planned(), ended("failed", ONE, error="JobLost"), [job(ONE)], "the task is failed, its job"),
            (planned("submit_yarn"), ended("failed", ONE, error="JobLost"), [job(ONE)], "the task is failed, its job"),
            (planned("submit_yarn"), ended("failed", ONE, error="SubmissionUncertain"), [job(ONE)], "failed, its job"),
            (planned(), ended("failed", ONE, error="SubmissionUncertain"), [], "without a job"),
            (planned(failures=FOR_GOOD), ended("success", ONE), [job(ONE, "failed")], "the task is success, its job"),
        ],
    )
    def test_broken(self, plan_: Planned, end: Ended, jobs: list[Job], broken: str) -> None:
        said = judge(plan_, end, jobs)
        assert any(broken in text for text in said.broken), said

    @pytest.mark.parametrize(
        ("plan_", "end", "jobs", "limit"),
        [
            (planned("driver"), ended("success", ONE), [job(ONE), job(ONE, "killed")], TWIN),
            (planned("submit_yarn"), ended("success", ONE), [job(ONE), job(ONE, "killed")], TWIN),
            (planned("submit_kubernetes"), ended("success", ONE), [job(ONE, "gone"), job(ONE)], HALF),
            (planned("driver"), ended("success", TWO, ONE), [job(ONE, "failed", "ERROR"), job(TWO)], ERROR),
            (planned("driver", FOR_GOOD), ended("failed", ONE), [job(ONE, "failed", "ERROR")], ERROR),
            (planned("spark"), ended("success", TWO, ONE), [job(ONE, "failed"), job(TWO)], ALONE),
            (planned("driver"), ended("failed", ONE, error="JobLost: …"), [job(ONE)], LOST),
            (planned("driver"), ended("failed", ONE, error="SubmissionUncertain: …"), [], UNCERTAIN),
            (planned("submit_yarn"), ended("failed", ONE, error="SubmissionUncertain: …"), [], UNCERTAIN),
        ],
    )
    def test_limits_that_are_documented(self, plan_: Planned, end: Ended, jobs: list[Job], limit: str) -> None:
        said = judge(plan_, end, jobs)
        assert (said.broken, said.limits) == ([], [limit])

    def test_a_record_that_has_forgotten_its_first_submissions(self) -> None:
        many = Ended("success", 20, (THREE, TWO), 3)
        said = judge(planned(failures=2), many, [job(ONE, "failed"), job(TWO, "failed"), job(THREE)])
        assert said.broken == []
