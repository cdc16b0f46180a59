"""
What a test does behind Airflow's back: it turns clocks forward that nobody wants to wait for.

All that follows from it is Airflow's own doing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dev.processes import wait_until

if TYPE_CHECKING:
    from dev.airflow import TaskInstance
    from dev.postgres import Postgres
    from tests.airflow.conftest import Run

__all__ = ["let_be_given_up", "miss_heartbeat"]


def let_be_given_up(run: Run, ti: TaskInstance) -> None:
    """Make the last heartbeat of a try so old that Airflow gives it up; return when the next one has begun."""

    def given_up() -> bool:
        miss_heartbeat(run.stage.postgres, ti.id)
        return run.ti.try_number > ti.try_number

    wait_until(given_up, 60, f"the try after the {ti.try_number}. of {run.dag}", interval=0.5)


def miss_heartbeat(postgres: Postgres, ti_id: str) -> None:
    """Make the last heartbeat of a try an hour old; to be done again, for one may still have been on its way."""
    too_old = "UPDATE task_instance SET last_heartbeat_at = now() - interval '1 hour' WHERE id = %(id)s"
    postgres.query(too_old, id=ti_id)
