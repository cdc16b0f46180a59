"""Airflow's database and its broker: what a bad day does to them, and that nothing of them is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sqlalchemy import create_engine, text

from dev.postgres import Postgres
from dev.processes import wait_until
from dev.redis import Redis
from tests.conftest import require

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_written_survives_a_kill() -> None:
    with require(Postgres) as postgres:
        with create_engine(postgres.url).begin() as connection:
            connection.execute(text("create table kept (value int)"))
            connection.execute(text("insert into kept values (7)"))
        postgres.kill()
        assert not postgres.server.alive
        postgres.start()
        with create_engine(postgres.url).connect() as connection:
            assert connection.execute(text("select value from kept")).scalar() == 7
    assert not postgres.home.exists()


def test_dies_with_its_parent() -> None:
    """The kernel forgets whose death is to be told when a process enters a namespace."""
    script = (
        "from dev.postgres import Postgres\nwith Postgres() as it: print(it.server.pid, it.home, flush=True); input()"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, home = parent.stdout.readline().split()
        parent.kill()
    try:
        wait_until(lambda: not Path("/proc", pid).exists(), 20, "the server to be gone")
    finally:
        subprocess.run(["rm", "-r", home], check=True)


def test_redis_answers() -> None:
    with require(Redis) as redis:
        assert redis.server.alive
    assert not redis.server.alive
    assert not redis.home.exists()
