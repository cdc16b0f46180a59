"""One run of ``spark-submit``, with real child processes: what it reports, and that it never outlives its task."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dev.processes import wait_until
from durable_spark.jobs import BadArguments, BadConfiguration, ClusterUnreachable, JobRef, Submission, new_token
from durable_spark.operators import _spark_submit
from durable_spark.operators._spark_submit import SparkSubmitRun, check_command, read_spark_defaults, short_lived_jvm

ROOT = Path(__file__).resolve().parents[2]
GUARD = [sys.executable, "-I", "-S", str(ROOT / "durable_spark/operators/_guard.py")]

Program = Callable[[str], str]


def session_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])


def living(session: int) -> list[int]:
    """Return the processes of a session that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX" and int(its_session) == session:
            found.append(int(path.parent.name))
    return found


def all_dead(session: int) -> None:
    wait_until(lambda: not living(session), 10, f"the end of session {session}")


def number_in(path: Path) -> int:
    """Return the process ID that a program writes."""

    def read() -> int | None:
        text = path.read_text() if path.exists() else ""
        return int(text) if text.endswith("\n") else None

    return wait_until(read, 10, f"a process ID in {path.name}")


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Write a program, a shell script if it names no interpreter, and return its path."""

    def write(body: str) -> str:
        path = tmp_path / "spark-submit"
        path.write_text(body if body.startswith("#!") else f"#!/bin/sh\ncd '{tmp_path}'\n{textwrap.dedent(body)}")
        path.chmod(0o755)
        return str(path)

    return write


STUBBORN = """
    trap '' TERM INT HUP
    ( trap '' TERM INT HUP; sleep 30; true ) &
    echo $$ >> pids
    sleep 30
    wait
"""
"""A wrapper that forks, without an exec, what submits later; both ignore polite signals and outlive the test."""


class TestGuard:
    def run(self, *command: str, parent: int | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*GUARD, str(os.getpid() if parent is None else parent), *command],
            capture_output=True,
            text=True,
            timeout=20,
            start_new_session=True,
        )

    @pytest.mark.parametrize("code", [0, 3, 255])
    def test_passes_the_exit_code_on(self, program: Program, code: int) -> None:
        assert self.run(program(f"exit {code}")).returncode == code

    @pytest.mark.parametrize(("number", "code"), [("KILL", 137), ("TERM", 143), ("SEGV", 139)])
    def test_passes_a_signal_on_as_a_shell_does(self, program: Program, number: str, code: int) -> None:
        assert self.run(program(f"kill -{number} $$")).returncode == code

    def test_passes_arguments_and_output_on(self, program: Program) -> None:
        done = self.run(program("""printf '<%s>' "$@"; echo oops >&2"""), "a b", "", "$HOME", "--conf", "ü")
        assert (done.stdout, done.stderr) == ("<a b><><$HOME><--conf><ü>", "oops\n")

    @pytest.mark.parametrize("name", ["/nowhere/spark-submit", "no-such-spark-submit"])
    def test_says_what_was_not_found(self, name: str) -> None:
        done = self.run(name, "--conf")
        assert (done.returncode, done.stderr) == (127, f"{name}: No such file or directory\n")

    def test_says_what_may_not_be_run(self, tmp_path: Path) -> None:
        path = tmp_path / "plain"
        path.write_text("#!/bin/sh\n")
        done = self.run(str(path))
        assert (done.returncode, done.stderr) == (127, f"{path}: Permission denied\n")

    def test_hands_no_ignored_signal_on(self, program: Program) -> None:
        """Python ignores SIGPIPE and SIGXFSZ, and what is ignored stays so over an exec."""
        ignored = int(self.run(program("grep SigIgn /proc/self/status")).stdout.split()[1], 16)
        assert not [n for n in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM) if ignored >> (n - 1) & 1]

    def test_runs_nothing_when_its_parent_is_dead_already(self, program: Program, tmp_path: Path) -> None:
        dead = subprocess.Popen(["true"])
        dead.wait()
        assert self.run(program("echo run > late"), parent=dead.pid).returncode == 1
        assert not (tmp_path / "late").exists()

    def test_kills_all_when_its_parent_is_killed_at_whatever_moment(self, program: Program, tmp_path: Path) -> None:
        command = [*GUARD, "PARENT", program(STUBBORN)]
        script = f"""
            import os, subprocess, sys, time
            command = {command!r}
            command[command.index("PARENT")] = str(os.getpid())
            print(subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL).pid, flush=True)
            time.sleep(600)
        """
        delays = (0.0, 0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.3, 0.6)
        sessions = []
        for delay in delays:
            parent = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
            )
            assert parent.stdout is not None
            sessions.append(int(parent.stdout.readline()))
            time.sleep(delay)
            parent.kill()
            parent.communicate()
        for session in sessions:
            all_dead(session)
        assert len((tmp_path / "pids").read_text().split()) >= 2, "the last parents lived long enough for the tool"

    def test_leaves_nothing_when_it_is_told_to_end(self, program: Program, tmp_path: Path) -> None:
        guard = subprocess.Popen([*GUARD, str(os.getpid()), program(STUBBORN)], start_new_session=True)
        number_in(tmp_path / "pids")
        guard.terminate()
        assert guard.wait(10) == -signal.SIGKILL
        all_dead(guard.pid)

    @pytest.mark.parametrize(("body", "code"), [("trap 'exit 5' INT", 5), ("", 130)])
    def test_an_interrupt_of_its_group_is_the_tools_own(self, program: Program, body: str, code: int) -> None:
        command = program(f"{body}\necho up; while :; do sleep 0.02; done")
        guard = subprocess.Popen([*GUARD, str(os.getpid()), command], start_new_session=True, stdout=subprocess.PIPE)
        assert guard.stdout is not None
        guard.stdout.readline()
        os.killpg(guard.pid, signal.SIGINT)
        guard.communicate(timeout=10)
        assert guard.returncode == code

    def test_leaves_nothing_when_its_group_is_killed(self, program: Program, tmp_path: Path) -> None:
        guard = subprocess.Popen([*GUARD, str(os.getpid()), program(STUBBORN)], start_new_session=True)
        number_in(tmp_path / "pids")
        os.killpg(guard.pid, signal.SIGKILL)
        guard.wait(10)
        all_dead(guard.pid)

    def test_the_tool_dies_with_it(self, program: Program, tmp_path: Path) -> None:
        body = "trap '' TERM; echo $$ > pid; exec sleep 600"
        guard = subprocess.Popen([*GUARD, str(os.getpid()), program(body)], start_new_session=True)
        number_in(tmp_path / "pid")
        guard.kill()
        guard.wait(10)
        all_dead(guard.pid)


@dataclasses.dataclass
class Cluster:
    """What of a hook a run uses."""

    shown: Callable[[], JobRef | None] = lambda: None
    looks: int = 0
    asked: list[str] = dataclasses.field(default_factory=list)

    def job_in(self, line: str, submission: Submission) -> JobRef | None:
        self.asked.append(line)
        match = re.match(r"has (job-\d+)", line)
        return JobRef(match[1]) if match else None

    async def glimpse(self, submission: Submission) -> JobRef | None:
        self.looks += 1
        return self.shown()


class Run:
    """A run, and what it has reported."""

    def __init__(
        self, command: list[str], cluster: Cluster, on_job: Callable[[], None], env: Mapping[str, str]
    ) -> None:
        self.lines: list[str] = []
        self.jobs: list[str] = []
        self.on_line: Callable[[str], None] = self.lines.append
        hook: Any = cluster

        def note(ref: JobRef) -> None:
            self.jobs.append(ref.id)
            on_job()

        self.itself = SparkSubmitRun(
            command,
            env={**os.environ, **env},
            hook=hook,
            submission=Submission(token=new_token()),
            on_line=lambda line: self.on_line(line),
            on_job=note,
        )

    async def end(self) -> int:
        return await asyncio.wait_for(self.itself.wait(), 20)

    @property
    def group(self) -> int:
        group = self.itself._group
        assert group is not None
        return group


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def start(program: Program, cluster: Cluster, tmp_path: Path) -> Callable[..., Run]:
    def start(body: str, *arguments: str, on_job: Callable[[], None] = (tmp_path / "go").touch, **env: str) -> Run:
        """Prepare a run. The file ``go`` appears when its job is told."""
        return Run([program(body), *arguments], cluster, on_job, env)

    return start


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_spark_submit, "LOOK_INTERVAL", 0.02)


UNTIL_GO = "until [ -e go ]; do sleep 0.02; done"
Start = Callable[..., Run]


class TestRun:
    async def test_what_others_may_say_too_is_but_a_reason_to_look(self, start: Start, cluster: Cluster) -> None:
        """A script that runs ``distcp`` before the real spark-submit: that is not our job."""
        run = start(f"echo has job-1; sleep 0.3; echo has job-2; {UNTIL_GO}")
        run.itself._output_is_proof = False
        cluster.shown = lambda: JobRef("job-2") if "has job-2" in run.lines else None
        assert await run.end() == 0
        assert run.jobs == ["job-2"]

    async def test_a_hint_is_followed_at_once(
        self, start: Start, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_spark_submit, "LOOK_INTERVAL", 60.0)
        run = start(f"echo has job-1; {UNTIL_GO}")
        run.itself._output_is_proof = False
        cluster.shown = lambda: JobRef("job-1")
        assert await run.end() == 0
        assert (run.jobs, cluster.looks) == (["job-1"], 1)

    async def test_it_is_killed_when_the_supervisor_of_the_task_dies(
        self, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The task's process lives on without it, and Airflow runs the task elsewhere."""
        parents = iter([1000, 1000, 1])
        real = os.getppid()
        monkeypatch.setattr(os, "getppid", lambda: next(parents, real))
        assert await start("sleep 600").end() < 0

    async def test_returns_the_exit_code(self, start: Start) -> None:
        assert await start("exit 7").end() == 7

    async def test_a_program_that_is_not_there(self, cluster: Cluster) -> None:
        run = Run(["/nowhere/spark-submit"], cluster, lambda: None, {})
        assert await run.end() == 127
        assert run.lines == ["/nowhere/spark-submit: No such file or directory"]

    async def test_the_environment_is_the_one_that_is_given(
        self, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = start('echo "$ONE|$PYTHONHOME"', ONE="1", PYTHONHOME="/nowhere")
        assert await run.end() == 0
        assert run.lines == ["1|/nowhere"]

    async def test_the_tool_cannot_read_what_is_the_tasks(self, start: Start) -> None:
        """Airflow talks to a task over its standard input."""
        before = os.dup(0)
        reading_end, writing_end = os.pipe()
        os.write(writing_end, b"a secret\n")
        os.dup2(reading_end, 0)
        try:
            run = start("read line; echo $line")
            assert await run.end() == 0
        finally:
            os.dup2(before, 0)
            for descriptor in (before, reading_end, writing_end):
                os.close(descriptor)
        assert run.lines == [""]

    async def test_lines_are_lines_whatever_their_ends_and_bytes(self, start: Start) -> None:
        run = start(r"printf 'one\r\n\ntwo\nth\377ree\n'; printf '\303\274 to err\n' >&2; printf 'no end'")
        assert await run.end() == 0
        assert run.lines == ["one", "", "two", "th\ufffdree", "ü to err", "no end"]

    async def test_lines_written_in_pieces_are_whole(self, start: Start) -> None:
        run = start(r"printf 'ha'; sleep 0.1; printf 's jo'; sleep 0.1; printf 'b-1\nnext\n'")
        assert await run.end() == 0
        assert (run.lines, run.jobs) == (["has job-1", "next"], ["job-1"])

    async def test_long_lines_are_whole_and_endless_ones_are_cut(self, start: Start) -> None:
        run = start("""
            for size in 60000 60000 1000000; do head -c $size /dev/zero | tr '\\0' x; echo; done
            echo end
        """)
        assert await run.end() == 0
        *cut, end = run.lines
        assert [len(line) for line in cut[:2]] == [60000, 60000]
        assert sum(len(line) for line in cut[2:]) == 1000000
        assert max(len(line) for line in cut) <= 1 << 17
        assert end == "end"

    async def test_no_line_is_lost_when_the_tool_ends(self, start: Start) -> None:
        run = start("i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i + 1)); done")
        assert await run.end() == 0
        assert run.lines == [f"line {number}" for number in range(5000)]

    async def test_a_job_in_the_output_is_told_once_and_at_once(self, start: Start) -> None:
        run = start(f"echo before; echo has job-1; echo has job-2; {UNTIL_GO}; echo has job-3")
        assert await run.end() == 0
        assert (run.jobs, run.itself.job) == (["job-1"], JobRef("job-1"))
        assert len(run.lines) == 4

    async def test_a_job_in_the_very_last_line(self, start: Start) -> None:
        run = start("printf 'has job-1'")
        assert await run.end() == 0
        assert run.jobs == ["job-1"]

    async def test_what_its_children_say_right_after_its_end_is_heard(self, start: Start) -> None:
        run = start("(sleep 0.2; echo has job-1) & exit 3")
        assert await run.end() == 3
        assert run.jobs == ["job-1"]

    async def test_a_job_that_the_cluster_shows_first(self, start: Start, cluster: Cluster, tmp_path: Path) -> None:
        def shown() -> JobRef | None:
            (tmp_path / "looked").touch()
            return JobRef("job-1", "u") if (tmp_path / "submitted").exists() else None

        cluster.shown = shown
        until_looked = UNTIL_GO.replace("go", "looked")
        run = start(f"{until_looked}; touch submitted; {UNTIL_GO}; echo has job-1; sleep 0.2")
        assert await run.end() == 0
        assert (run.jobs, run.itself.job) == (["job-1"], JobRef("job-1", "u"))
        assert cluster.looks > 1
        assert "has job-1" not in cluster.asked, "it is known by then"

    async def test_what_is_known_is_not_looked_for(self, start: Start, cluster: Cluster) -> None:
        cluster.shown = lambda: JobRef("job-1")
        run = start("sleep 0.4")
        assert await run.end() == 0
        assert cluster.looks == 1

    async def test_a_cluster_out_of_reach_says_nothing(self, start: Start, cluster: Cluster) -> None:
        def shown() -> JobRef | None:
            if cluster.looks < 4:
                raise ClusterUnreachable("away")
            return JobRef("job-1")

        cluster.shown = shown
        run = start(UNTIL_GO)
        assert await run.end() == 0
        assert (run.jobs, cluster.looks) == (["job-1"], 4)

    async def test_a_look_after_the_end(self, start: Start, cluster: Cluster) -> None:
        run = start("exit 1")
        assert await run.end() == 1
        assert await run.itself.look() is None
        cluster.shown = lambda: JobRef("job-1")
        assert await run.itself.look() == JobRef("job-1")
        assert await run.itself.look() == JobRef("job-1")
        assert run.jobs == ["job-1"]

    async def test_a_tool_that_lingers_is_interrupted_and_may_tidy_up(
        self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_spark_submit, "LINGER", 0.2)
        run = start("trap 'touch tidy; exit 130' INT; echo has job-1; while :; do sleep 0.02; done")
        began = time.monotonic()
        assert await run.end() == 0, "its work was done"
        assert 0.2 <= time.monotonic() - began < 4
        assert (tmp_path / "tidy").exists()

    async def test_a_tool_that_lingers_on_is_killed(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_spark_submit, "LINGER", 0.1)
        monkeypatch.setattr(_spark_submit, "GRACE", 0.2)
        groups: list[int] = []
        run: Run = start("trap '' TERM INT; echo has job-1; sleep 600 & wait", on_job=lambda: groups.append(run.group))
        began = time.monotonic()
        assert await run.end() == 0
        assert 0.3 <= time.monotonic() - began < 4
        assert run.itself.job == JobRef("job-1")
        all_dead(groups[0])

    async def test_a_tool_that_is_slow_is_not_hurried(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_spark_submit, "LINGER", 0.05)
        assert await start("sleep 0.5; echo has job-1; exit 3").end() == 3

    async def test_what_it_leaves_behind_is_killed(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_spark_submit, "_DRAIN", 0.2)
        groups: list[int] = []
        run: Run = start("echo has job-1; sleep 600 & exit 4", on_job=lambda: groups.append(run.group))
        began = time.monotonic()
        assert await run.end() == 4
        assert time.monotonic() - began < 5
        all_dead(groups[0])

    @pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid")
    async def test_a_daemon_that_holds_the_pipe_does_not_hold_the_run(
        self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_spark_submit, "_DRAIN", 0.2)
        run = start("setsid sh -c 'echo $$ > daemon; exec sleep 600' & until [ -s daemon ]; do :; done; echo bye")
        began = time.monotonic()
        try:
            assert await run.end() == 0
            assert time.monotonic() - began < 5
            assert run.lines == ["bye"]
        finally:
            os.kill(number_in(tmp_path / "daemon"), signal.SIGKILL)

    async def test_a_cancellation_kills_all(self, start: Start, tmp_path: Path) -> None:
        run = start(STUBBORN)
        work = asyncio.ensure_future(run.itself.wait())
        pid = await asyncio.to_thread(number_in, tmp_path / "pids")
        session = session_of(pid)
        assert len(living(session)) >= 3
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        all_dead(session)

    @pytest.mark.parametrize("delay", [0.0, 0.001, 0.01, 0.03, 0.06])
    async def test_a_cancellation_at_whatever_moment(self, start: Start, tmp_path: Path, delay: float) -> None:
        run = start("sleep 0.4; touch late")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(run.itself.wait(), delay)
        await asyncio.sleep(0.5)
        assert not (tmp_path / "late").exists()

    async def test_a_kill_from_a_signal_handler(self, start: Start, tmp_path: Path) -> None:
        run = start(STUBBORN)
        sessions: list[int] = []

        def handle(*_: Any) -> None:
            sessions.append(run.group)
            run.itself.kill()

        before = signal.signal(signal.SIGUSR1, handle)
        try:
            work = asyncio.ensure_future(run.end())
            await asyncio.to_thread(number_in, tmp_path / "pids")
            os.kill(os.getpid(), signal.SIGUSR1)
            assert await work == -signal.SIGKILL
        finally:
            signal.signal(signal.SIGUSR1, before)
        all_dead(sessions[0])

    async def test_a_kill_before_and_after_reaches_nobody(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        run = start("exit 0")
        run.itself.kill()
        await run.end()
        monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("its number may be another's by now"))
        run.itself.kill()

    @pytest.mark.parametrize("more", ["", "; yes | head -c 1000000; sleep 600"])
    async def test_an_error_in_a_callback_ends_the_run(self, start: Start, more: str) -> None:
        """Nobody reads on then, and a tool that writes on would never end."""

        def fail(_: str) -> None:
            groups.append(run.group)
            raise KeyError("a bug")

        groups: list[int] = []
        run = start(f"echo one{more}")
        run.on_line = fail
        with pytest.raises(KeyError, match="a bug"):
            await run.end()
        all_dead(groups[0])

    def test_dies_with_the_task(self, program: Program, tmp_path: Path) -> None:
        script = f"""
            import asyncio, os
            from durable_spark.jobs import Submission
            from durable_spark.operators._spark_submit import SparkSubmitRun
            run = SparkSubmitRun(
                [{program(STUBBORN)!r}], env=dict(os.environ), hook=None,
                submission=Submission(token="0" * 32), on_line=print, on_job=print,
            )
            run.look = lambda: asyncio.sleep(0)
            asyncio.run(run.wait())
        """
        task = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT)
        try:
            session = session_of(number_in(tmp_path / "pids"))
            assert len(living(session)) >= 3
        finally:
            task.kill()
            task.wait()
        all_dead(session)


class TestCheckCommand:
    def test_a_program_on_the_path(self, program: Program, tmp_path: Path) -> None:
        path = program("exit 0")
        check_command(["spark-submit"], {"PATH": str(tmp_path)})
        check_command([path], {"PATH": "/nowhere"})

    @pytest.mark.parametrize("name", ["spark-submit", "/nowhere/spark-submit"])
    def test_one_that_is_not_there_is_named(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(BadConfiguration, match=rf"spark_binary: '{name}'.*SparkJobOperator"):
            check_command([name], {"PATH": str(tmp_path)})


CHEAP = "-XX:TieredStopAtLevel=1 -Xmn24m -Xshare:auto"


class TestShortLivedJvm:
    def test_both_jvms_are_told(self) -> None:
        assert short_lived_jvm({}) == {"SPARK_SUBMIT_OPTS": CHEAP, "SPARK_LAUNCHER_OPTS": CHEAP}

    def test_the_users_options_stand_last(self) -> None:
        env = {"SPARK_SUBMIT_OPTS": "-XX:TieredStopAtLevel=4 -Da='b c'", "SPARK_LAUNCHER_OPTS": "-Xshare:off"}
        assert short_lived_jvm(env) == {
            "SPARK_SUBMIT_OPTS": f"{CHEAP} -XX:TieredStopAtLevel=4 -Da='b c'",
            "SPARK_LAUNCHER_OPTS": f"{CHEAP} -Xshare:off",
        }

    def test_no_collector_is_chosen(self) -> None:
        """A JVM that is given two refuses to start, and the other may stand in a file that we do not see."""
        assert "GC" not in " ".join(short_lived_jvm({"SPARK_SUBMIT_OPTS": "-Da=b"}).values())

    def test_nothing_else_is_set(self) -> None:
        assert set(short_lived_jvm({"JAVA_TOOL_OPTIONS": "-Da=b", "PATH": "/bin"})) == {
            "SPARK_SUBMIT_OPTS",
            "SPARK_LAUNCHER_OPTS",
        }


class TestSparkDefaults:
    @pytest.fixture(autouse=True)
    def _nothing_of_the_developers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("SPARK_HOME", "SPARK_CONF_DIR"):
            monkeypatch.delenv(name, raising=False)

    @pytest.fixture
    def homes(self, tmp_path: Path) -> Mapping[str, str]:
        """Four places for ``spark-defaults.conf``, each with its own."""
        for name in ("dir", "home/conf", "spark/conf"):
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "spark-defaults.conf").write_text(f"spark.from {name}\n")
        (tmp_path / "mine.conf").write_text("spark.from mine\nother.key 1\n# no\nspark.a=b c\n")
        binary = tmp_path / "spark" / "bin" / "spark-submit"
        binary.parent.mkdir()
        binary.write_text("#!/bin/sh\n")
        binary.chmod(0o755)
        return {
            "file": str(tmp_path / "mine.conf"),
            "SPARK_CONF_DIR": str(tmp_path / "dir"),
            "SPARK_HOME": str(tmp_path / "home"),
            "PATH": str(binary.parent),
        }

    def read(self, homes: Mapping[str, str], *names: str, file: str | None = None) -> str | None:
        env = {name: homes[name] for name in ("PATH", *names)}
        return read_spark_defaults(file, binary="spark-submit", env=env).get("spark.from")

    def test_the_file_that_the_user_names_is_the_only_one(self, homes: Mapping[str, str]) -> None:
        env = {name: homes[name] for name in ("PATH", "SPARK_CONF_DIR", "SPARK_HOME")}
        properties = read_spark_defaults(homes["file"], binary="spark-submit", env=env)
        assert properties == {"spark.from": "mine", "spark.a": "b c"}

    def test_as_sparks_scripts_find_it(self, homes: Mapping[str, str]) -> None:
        assert self.read(homes, "SPARK_CONF_DIR", "SPARK_HOME") == "dir"
        assert self.read(homes, "SPARK_HOME") == "home/conf"
        assert self.read(homes) == "spark/conf"

    def test_an_empty_directory_is_no_reason_to_look_further(self, homes: Mapping[str, str], tmp_path: Path) -> None:
        (tmp_path / "dir" / "spark-defaults.conf").unlink()
        assert self.read(homes, "SPARK_CONF_DIR", "SPARK_HOME") is None

    def test_next_to_a_program_that_is_linked(self, homes: Mapping[str, str], tmp_path: Path) -> None:
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "spark-submit").symlink_to(tmp_path / "spark" / "bin" / "spark-submit")
        assert self.read({**homes, "PATH": str(tmp_path / "links")}) == "spark/conf"

    def test_in_an_installation_by_pip(self, homes: Mapping[str, str], tmp_path: Path) -> None:
        (tmp_path / "spark" / "conf" / "spark-defaults.conf").unlink()
        conf = tmp_path / "spark" / "lib" / "python3.11" / "site-packages" / "pyspark" / "conf"
        conf.mkdir(parents=True)
        (conf / "spark-defaults.conf").write_text("spark.from pip")
        assert self.read(homes) == "pip"

    def test_no_program_and_no_file(self, tmp_path: Path) -> None:
        assert read_spark_defaults(None, binary="spark-submit", env={"PATH": str(tmp_path)}) == {}

    def test_a_default_that_cannot_be_read_is_none(self, homes: Mapping[str, str], tmp_path: Path) -> None:
        (tmp_path / "dir" / "spark-defaults.conf").write_bytes(b"spark.from \xff")
        assert self.read(homes, "SPARK_CONF_DIR") is None

    @pytest.mark.parametrize("what", ["missing", "directory", "bytes"])
    def test_a_named_file_that_cannot_be_read_is_an_error(self, tmp_path: Path, what: str) -> None:
        path = tmp_path / "named.conf"
        if what == "directory":
            path.mkdir()
        elif what == "bytes":
            path.write_bytes(b"spark.from \xff")
        with pytest.raises(BadArguments, match=r"properties_file '.*named.conf' cannot be read"):
            read_spark_defaults(str(path), binary="spark-submit", env={})
