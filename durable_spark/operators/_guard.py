"""
Runs a command that must not outlive the process that asked for it. A program of its own, not to be imported.

A task that is killed with SIGKILL leaves its children alive, and a ``spark-submit`` that lives on submits a job
after the retry has looked for it. So it is run by this process, which the kernel tells when its parent dies
(``PR_SET_PDEATHSIG``), and which then kills its whole process group; the command itself is killed by the kernel
when this process dies. Both are needed: a ``spark-submit`` of a site may be a script that starts the real one as a
child, which no parent-death signal of ours reaches.

Arguments: the process ID of the parent, the command. The traps: the signal is sent on the death of the *thread* that
started this process, so that must be one that lives as long as the task; and whoever dies before the signal is
asked for is not noticed by it, hence the look at the parent afterwards. Linux only; elsewhere nothing is guarded.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NOT_FOUND = 127  # as a shell says it
_WAITED_FOR = {
    signal.SIGTERM,  # of the kernel, or of whoever wants this to end
    signal.SIGINT,  # of the group: the command may end well, and its code is passed on
    signal.SIGCHLD,
}


def _die_with(parent: int, number: int) -> None:
    """Have the kernel send the signal when the parent dies; end now if it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def _run(command: "list[str]") -> int:
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            _die_with(guard, signal.SIGKILL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.execvp(command[0], command)  # noqa: S606
        except OSError as error:
            os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(_NOT_FOUND)
    while True:
        if signal.sigwait(_WAITED_FOR) == signal.SIGTERM:
            os.killpg(0, signal.SIGKILL)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)


def _main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    # Waited for, not handled: a handler that Python calls comes too late for a signal just before a call that blocks.
    signal.pthread_sigmask(signal.SIG_SETMASK, _WAITED_FOR)
    for number in (*_WAITED_FOR, signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores the latter two
        signal.signal(number, signal.SIG_DFL)
    _die_with(parent, signal.SIGTERM)
    code = _run(command)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    _main()
