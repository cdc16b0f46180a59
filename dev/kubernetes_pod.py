"""
One container as a process of this machine: what :mod:`dev.kubernetes_node` runs for each pod.

What flows in is a JSON file (the command, its environment and directory, the volumes), what flows out is
the exit code, as a shell has it. The process sees the machine's files as they are, and the pod's volumes
where they are mounted: the root is a tmpfs of the pod's own, into which everything in ``/`` is bound. A
directory of the machine is remade in the same way only where a volume's mount point would have to be
made in it, so nothing is ever written there.

Three processes: this one, which passes signals on; the first one of a new PID namespace, which is the
``tini`` of Spark's image; and the command. When either of the first two dies, however it dies, the kernel
kills all that is in the namespace. This one is killed by the kernel when its parent, the node, dies.

The trap: it starts for each pod, so it is run with ``python -IS`` and imports little. And the kernel
forgets who is to be killed with its parent whenever a process gains rights, so this is said last.

A machine that forbids root new namespaces may still allow them together with a user namespace, as it
does anybody else: that is tried next.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import sys
from typing import Any

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
_MS_BIND, _MS_REC, _MS_UNBINDABLE, _MS_PRIVATE = 0x1000, 0x4000, 0x20000, 0x40000
_PR_SET_PDEATHSIG = 1
_PASSED_ON = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}

_libc = ctypes.CDLL(None, use_errno=True)


def main(specification: str, descriptor: int) -> int:
    """
    Run what the file specifies and return its exit code.

    :param descriptor: it is closed when the command runs; what is written to it before is why it cannot.
    """
    with open(specification, encoding="utf-8") as file:
        pod = json.load(file)
    os.set_inheritable(descriptor, False)
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # none is lost before there is somebody to pass it on to
    try:
        _enter_namespaces()
    except OSError as error:
        os.write(descriptor, f"no namespaces for pods: {error}".encode())
        return 128
    _die_with_parent()
    if os.getppid() != pod["parent"]:
        return 128
    watched, held = os.pipe()
    first = os.fork()
    if first == 0:
        os.close(held)
        os._exit(_first_process(pod, descriptor, watched))
    os.close(descriptor)
    return _wait_for(first)


def _first_process(pod: dict[str, Any], descriptor: int, watched: int) -> int:
    _die_with_parent()
    if select.select([watched], [], [], 0)[0]:  # the parent has died before it was said
        return 128
    try:
        _change_root(pod["root"], pod["mounts"])
        os.makedirs(pod["directory"], exist_ok=True)
        os.chdir(pod["directory"])
        command = os.fork()
        if command == 0:
            _execute(pod["command"], pod["environment"])
    except OSError as error:
        os.write(descriptor, f"{error}".encode())
        return 128
    os.close(descriptor)
    return _wait_for(command)


def _execute(command: list[str], environment: dict[str, str]) -> None:
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and so would the command
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, environment)
    except FileNotFoundError:
        raise OSError(f'exec: "{command[0]}": executable file not found in $PATH') from None


def _wait_for(child: int) -> int:
    """Pass signals on until the child ends; return its exit code. Reap what others leave, as PID 1 has to."""
    for number in _PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    while True:
        pid, status = os.wait()
        if pid == child:
            signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _enter_namespaces() -> None:
    try:
        _call("unshare", _CLONE_NEWNS | _CLONE_NEWPID)
    except PermissionError:
        user, group = os.geteuid(), os.getegid()
        _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID)
        for name, content in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(content)


def _die_with_parent() -> None:
    _call("prctl", _PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def _change_root(root: str, mounts: list[list[str]]) -> None:
    _mount("none", "/", flags=_MS_REC | _MS_PRIVATE)
    view = _View(root)
    view.mirror("/")
    try:
        _mount("proc", f"{root}/proc", "proc")
    except PermissionError:
        pass  # a container that hides parts of its own /proc may not have a whole one: the machine's is there
    for source, target in sorted(mounts, key=lambda mount: mount[1].count("/")):
        view.place(source, os.path.realpath(target))
    os.chroot(root)


class _View:
    """The machine's files as the pod sees them: everything bound where it is, volumes over it."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._is_own: dict[str, bool] = {}  # whether a path is the pod's to write to; what is beneath it is alike

    def mirror(self, directory: str) -> None:
        """Put a tmpfs in place of a directory, and bind into it all that the machine has there."""
        here = self._root + directory.rstrip("/")
        _mount("tmpfs", here, "tmpfs", data="mode=755")
        if directory == "/":
            _mount("none", here, flags=_MS_UNBINDABLE)  # or the one that holds it would bring it along
        self._is_own[directory] = True
        for entry in os.scandir(directory):
            new = f"{here}/{entry.name}"
            if entry.is_symlink():
                os.symlink(os.readlink(entry.path), new)
            else:
                self._bind(entry.path, new)
                self._is_own[entry.path] = False

    def place(self, source: str, target: str) -> None:
        """Bind a volume to its mount point, which is made where there is none."""
        existing, missing = target, []
        while not os.path.lexists(self._root + existing):
            missing.append(existing)
            existing = os.path.dirname(existing)
        if missing and not self._own(existing):
            self.mirror(existing)
        for directory in reversed(missing[1:]):
            os.mkdir(self._root + directory)
        self._bind(source, self._root + target)
        self._is_own[target] = True

    def _own(self, path: str) -> bool:
        while path not in self._is_own:
            path = os.path.dirname(path)
        return self._is_own[path]

    def _bind(self, source: str, new: str) -> None:
        if not os.path.lexists(new):
            if os.path.isdir(source):
                os.mkdir(new)
            else:
                os.close(os.open(new, os.O_CREAT))
        _mount(source, new, flags=_MS_BIND | _MS_REC)


def _mount(source: str, target: str, kind: str | None = None, *, flags: int = 0, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3], about=target)


def _call(function: str, *arguments: Any, about: str | None = None) -> None:
    if getattr(_libc, function)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number or errno.EIO, f"{function}: {os.strerror(number)}", about)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
