"""Whoever starts servers for tests relies on this: nothing is left behind, and no two get the same port."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dev.processes import Server, ServerDied, free_ports, in_session, wait_until, wait_until_async

ROOT = Path(__file__).resolve().parents[2]

Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    servers: list[Server] = []

    def start(command: str) -> Server:
        server = Server("server", ["sh", "-c", command], log=tmp_path / "server.log")
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.kill()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def lives(pid: int) -> bool:
    try:
        return state(pid) not in "ZX"
    except FileNotFoundError:
        return False


def printed_pid(server: Server) -> int:
    return wait_until(lambda: int(server.tail().split()[-1]) if server.log.stat().st_size else None, 10, "a pid")


def test_stop_is_polite_first(start: Start) -> None:
    server = start("trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.05; done")
    wait_until(lambda: "up" in server.tail(), 10, "the server")
    server.suspend()
    server.stop()
    assert server.returncode == 7
    assert server.tail() == "up\nbye"


def test_stop_ends_the_stubborn_and_its_children(start: Start) -> None:
    server = start("trap '' TERM; sh -c 'trap \"\" TERM; while :; do sleep 0.05; done' & echo $!; wait; sleep 600")
    child = printed_pid(server)
    server.stop(deadline=0.2)
    assert server.returncode == -signal.SIGKILL
    assert not lives(child)


def test_kill_reaches_what_outlived_the_server(start: Start) -> None:
    server = start("sleep 600 & echo $!")
    child = printed_pid(server)
    wait_until(lambda: not server.alive, 10, "the server's end")
    assert lives(child)
    server.kill()
    assert not lives(child)


def test_server_can_be_started_again(start: Start) -> None:
    server = start("sleep 600")
    first = server.pid
    server.kill()
    server.start()
    assert server.alive
    assert server.pid != first


def test_server_dies_with_its_parent_but_not_with_the_thread_that_started_it(tmp_path: Path) -> None:
    script = """
        import sys, threading, time
        from pathlib import Path
        from dev.processes import Server
        server = Server("server", ["sleep", "600"], log=Path(sys.argv[1]))
        thread = threading.Thread(target=server.start)
        thread.start()
        thread.join()
        time.sleep(0.2)
        print(server.pid, server.alive, flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "log")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None
        pid, alive = parent.stdout.readline().split()
        assert alive == "True"
        assert lives(int(pid))
    finally:
        parent.kill()
        parent.communicate()
    wait_until(lambda: not lives(int(pid)), 10, "the server's death")


def test_no_port_is_given_twice() -> None:
    command = [sys.executable, "-c", "from dev.processes import *; print(*free_ports(50), flush=True); input()"]
    others = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    try:
        ports = free_ports(50)
        for other in others:
            assert other.stdout is not None
            ports += map(int, other.stdout.readline().split())
    finally:
        for other in others:
            other.communicate("\n")
    assert len(ports) == 250
    assert len(set(ports)) == 250


def test_wait_until_quotes_the_log_of_a_server_that_died(start: Start) -> None:
    server = start("echo no such file; exit 3")
    with pytest.raises(ServerDied, match=r"(?s)the door.*ended with 3.*no such file"):
        wait_until(lambda: False, 10, "the door", servers=[server])


async def test_wait_until_gives_up(start: Start) -> None:
    server = start("echo still waking up; sleep 600")
    wait_until(lambda: "waking" in server.tail(), 10, "the server")

    def refused() -> bool:
        raise ConnectionRefusedError("refused")

    async def refused_async() -> bool:
        return refused()

    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"(?s)the door.*refused.*still waking up"):
        wait_until(refused, 0.2, "the door", servers=[server])
    with pytest.raises(TimeoutError, match=r"(?s)the door.*refused.*still waking up"):
        await wait_until_async(refused_async, 0.2, "the door", servers=[server])
    assert time.monotonic() - began < 5


def test_frozen_with_all_its_children(start: Start) -> None:
    server = start("sh -c 'while :; do sleep 0.05; done' & echo $!; wait")
    child = printed_pid(server)

    server.freeze()
    wait_until(lambda: state(server.pid) == state(child) == "T", 10, "both to stand still")
    server.thaw()
    wait_until(lambda: "T" not in (state(server.pid), state(child)), 10, "both to go on")


def test_frozen_while_it_forks(start: Start) -> None:
    """A process that is born while the others are listed stands still, too."""
    server = start("while :; do sleep 600 & echo $!; sleep 0.001; done")
    wait_until(lambda: len(server.tail().split()) >= 20, 10, "some children")
    server.freeze()
    living = in_session(server.pid)
    assert len(living) > 20
    wait_until(lambda: {state(pid) for pid in living} == {"T"}, 2, "all of them to stand still")
    assert in_session(server.pid) == living
