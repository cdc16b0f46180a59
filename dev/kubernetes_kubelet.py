"""
One real node of a Kubernetes cluster: kubelet, containerd and runc, in namespaces of their own.

It is the node of :class:`dev.kubernetes.KubernetesCluster` the full way. What flows in and out is what any kubelet
and the API server tell each other; the images are those of :mod:`dev.kubernetes_images`.

Nothing of it shows on the machine. Two processes are this module:

* the one outside, which the cluster starts. It makes a cgroup, starts the one inside, and forwards connections from
  there to the API server on loopback. However it ends, the kernel kills all that is inside.
* the one inside, the first process of new PID, mount and network namespaces, which starts containerd and the
  kubelet, and starts them again when they end; containers go on meanwhile. The network is a bridge with the pods on
  it, and leads nowhere but to the API server, at the address that the service ``kubernetes`` has on any cluster. The
  API server asks for logs through a socket file, by ``CONNECT``.

So mounts, interfaces and processes vanish with the namespaces. Only the cgroup has to be removed, by the process
outside when it is told to end or its parent dies, or else by the next one.

The traps: a kubelet insists on a few kernel settings (``vm.overcommit_memory``) and would change those of the whole
machine, so it is shown files that have them as it wants. And it takes no node address that is loopback's, hence the
bridge. Meant for both versions of cgroups, tried with v1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dev.kubernetes_images import PAUSE, mounts, write_images
from dev.processes import ToolMissing, wait_until

__all__ = ["API_ADDRESS", "NODE_ADDRESS", "check_machine"]

API_ADDRESS = "10.0.0.1"
"""Where pods find the API server, at port 443: the service ``kubernetes``."""
NODE_ADDRESS = "10.88.0.1"
"""The node's, on the bridge."""
_PODS = "10.88.0.0/24"
_NAMESPACES = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
_CGROUP = "durable-spark-"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_START = 60.0  # seconds
_HOPELESS = 2.0  # seconds
_WANTED_SETTINGS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1_000_000,
    "kernel/keys/root_maxbytes": 25_000_000,
}


def check_machine() -> None:
    """
    Look for what a real node needs of the machine.

    :raises ToolMissing: when something is not there.
    """
    if os.geteuid():
        raise ToolMissing("a real kubelet needs root")
    for program, package in (
        ("ip", "iproute2"),
        ("mount", "mount"),
        ("setpriv", "util-linux"),
        ("unshare", "util-linux"),
    ):
        if not shutil.which(program):
            raise ToolMissing(f"{program} is not on the PATH: install {package}")
    script = "ip link add name probe type bridge && mount -t tmpfs none /run"
    answer = subprocess.run([*_NAMESPACES, "sh", "-ec", script], capture_output=True, text=True, timeout=60)
    if answer.returncode:
        raise ToolMissing(f"a real kubelet needs namespaces of its own: {answer.stderr.strip()}")
    try:
        with _cgroup(f"{_CGROUP}{os.getpid()}"):
            pass
    except OSError as error:
        raise ToolMissing(f"a real kubelet needs cgroups: {error}") from None


# Outside


def _outside(arguments: list[str], options: argparse.Namespace) -> None:
    """Keep a node until SIGTERM comes, the parent dies, or the node ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))  # until now SIGKILL, which would leave the cgroup
    prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))
    _remove_what_others_left()
    with _cgroup(f"{_CGROUP}{os.getpid()}") as cgroup:
        ours, theirs = socket.socketpair()
        inside = [sys.executable, "-m", "dev.kubernetes_kubelet", *arguments, f"--cgroup={cgroup}"]
        command = ["setpriv", "--pdeathsig", "KILL", *_NAMESPACES, *inside, f"--inside={theirs.fileno()}"]
        node = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        try:
            if listening := socket.recv_fds(ours, 1, 1)[1]:
                asyncio.run(_forward(socket.socket(fileno=listening[0]), options.url, ours))
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            node.kill()
            node.wait()
            with contextlib.suppress(ChildProcessError):
                while True:  # the one inside, which has become a child of this one, ends after all others there
                    os.wait()


async def _forward(listening: socket.socket, url: str, inside: socket.socket) -> None:
    """Forward what arrives at a socket that listens inside, until that side ends."""
    port = int(url.rpartition(":")[2])

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await _join(reader, writer, *await asyncio.open_connection("127.0.0.1", port))
        writer.close()

    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    loop.add_reader(inside, ended.set)
    server = await asyncio.start_server(forward, sock=listening)
    await ended.wait()
    server.close()  # and no connection is waited for


async def _join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    far_reader: asyncio.StreamReader,
    far_writer: asyncio.StreamWriter,
) -> None:
    """Pass on in both directions until either side ends."""

    async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while content := await source.read(1 << 16):
                target.write(content)
                await target.drain()
        target.close()

    await asyncio.gather(pass_on(reader, far_writer), pass_on(far_reader, writer))


def _hierarchies() -> list[Path]:
    """Return where cgroups are mounted: one place (v2), or one for each controller (v1)."""
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [Path(where) for _, where, kind, *_ in lines if kind in ("cgroup", "cgroup2")]


@contextlib.contextmanager
def _cgroup(name: str) -> Iterator[str]:
    """Make a cgroup, and remove it with all that is in it."""
    made = [hierarchy / name for hierarchy in _hierarchies()]
    if not made:
        raise OSError("none are mounted")
    try:
        for directory in made:
            directory.mkdir()
        yield name
    finally:
        for directory in made:
            _remove_cgroup(directory)


def _remove_cgroup(directory: Path) -> None:
    def removed() -> bool:
        for path, _, _ in os.walk(directory, topdown=False):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(path)  # an OSError when a process is in it
        return True

    wait_until(removed, 8, f"the cgroup {directory} to be empty")


def _remove_what_others_left() -> None:
    """Remove the cgroups of those that had no time to."""
    for hierarchy in _hierarchies():
        for directory in hierarchy.glob(f"{_CGROUP}*"):
            if not Path("/proc", directory.name.removeprefix(_CGROUP)).exists():
                _remove_cgroup(directory)


# Inside


def _inside(options: argparse.Namespace) -> None:
    directory: Path = options.directory
    directory.mkdir(parents=True, exist_ok=True)
    _hide_the_machine()
    _make_network()
    listener = socket.create_server((API_ADDRESS, 443))
    outside = socket.socket(fileno=options.inside)  # that it is closed tells that all has ended here
    socket.send_fds(outside, [b"0"], [listener.fileno()])
    listener.close()
    programs = [_start_containerd(options), _start_kubelet(options)]
    options.tunnel.unlink(missing_ok=True)
    asyncio.run(_keep(programs, options.tunnel))


def _hide_the_machine() -> None:
    """Give containerd and the kubelet other files than the machine's where neither can be told another place."""
    _mount("-t", "tmpfs", "none", "/run")
    for path in ("/var/lib", "/var/log"):
        over = Path("/run/over", path[1:])
        for part in ("upper", "work"):
            (over / part).mkdir(parents=True)
        _mount("-t", "overlay", "none", "-o", f"lowerdir={path},upperdir={over}/upper,workdir={over}/work", path)
    for name, value in _WANTED_SETTINGS.items():
        shown = Path("/run/settings", name)
        shown.parent.mkdir(parents=True, exist_ok=True)
        shown.write_text(f"{value}\n")
        _mount("--bind", str(shown), f"/proc/sys/{name}")


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _make_network() -> None:
    for command in (
        "link set lo up",
        f"address add {API_ADDRESS}/32 dev lo",
        "link add name pods type bridge",
        f"address add {NODE_ADDRESS}/24 dev pods",
        "link set pods up",
    ):
        subprocess.run(["ip", *command.split()], check=True)


class _Program:
    """A program that is started again when it ends, as a machine's init does."""

    def __init__(self, command: Iterable[str | Path], options: argparse.Namespace) -> None:
        self._command = [str(part) for part in command]
        self._environment = os.environ | {"PATH": f"{options.programs}:{os.environ['PATH']}"}
        self._log = options.directory.with_name(f"{Path(self._command[0]).name}.log")
        self.start()

    def start(self) -> None:
        """Start it."""
        self._began = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.pid = self._process.pid

    def start_again(self) -> bool:
        """Start it, unless it ended as soon as it was started."""
        if time.monotonic() - self._began < _HOPELESS:
            print(f"{self._command[0]} does not run, see {self._log}", flush=True)
            return False
        self.start()
        return True


def _start_containerd(options: argparse.Namespace) -> _Program:
    directory, programs = options.directory, options.programs
    network = {
        "cniVersion": "0.3.1",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "pods",
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/run/addresses",
                    "ranges": [[{"subnet": _PODS, "rangeStart": _PODS.replace(".0/24", ".10")}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }
        ],
    }
    (directory / "network").mkdir(exist_ok=True)
    (directory / "network" / "pods.conflist").write_text(json.dumps(network))
    ctr = [programs / "ctr", "--address", "/run/containerd.sock", "--namespace", "k8s.io"]
    base = json.loads(subprocess.run([ctr[0], "oci", "spec"], check=True, stdout=subprocess.PIPE).stdout)
    (directory / "base.json").write_text(json.dumps({**base, "mounts": [*base["mounts"], *mounts()]}))
    configuration = directory / "containerd.toml"
    configuration.write_text(_CONTAINERD.format(directory=directory, programs=programs, pause=PAUSE))
    containerd = _Program([programs / "containerd", "--config", configuration], options)

    def answers() -> bool:
        return subprocess.run([*ctr, "version"], capture_output=True).returncode == 0

    wait_until(answers, _START, "containerd")
    for image in write_images(directory / "images"):
        subprocess.run([*ctr, "images", "import", image], check=True, stdout=subprocess.DEVNULL)
    return containerd


_CONTAINERD = """
version = 2
root = "{directory}/containerd"
state = "/run/containerd-state"
disabled_plugins = ["io.containerd.internal.v1.opt"]

[grpc]
  address = "/run/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  tolerate_missing_hugetlb_controller = true

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{programs}"
  conf_dir = "{directory}/network"

[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "native"
  default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  base_runtime_spec = "{directory}/base.json"
"""


def _start_kubelet(options: argparse.Namespace) -> _Program:
    directory: Path = options.directory
    (directory / "resolv.conf").touch()
    configuration = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": NODE_ADDRESS,
        "healthzPort": 0,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": False},
            "x509": {"clientCAFile": options.ca},
        },
        "authorization": {"mode": "AlwaysAllow"},
        "tlsCertFile": options.certificate,
        "tlsPrivateKeyFile": options.certificate,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{options.cgroup}",
        "enforceNodeAllocatable": [],
        "containerRuntimeEndpoint": "unix:///run/containerd.sock",
        "failSwapOn": False,
        "protectKernelDefaults": True,
        "makeIPTablesUtilChains": False,
        "localStorageCapacityIsolation": False,
        "resolvConf": str(directory / "resolv.conf"),
        "evictionHard": {"memory.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        "nodeStatusUpdateFrequency": "5s",
        "volumePluginDir": str(directory / "plugins"),
        "podLogsDir": str(directory / "logs"),
    }
    (directory / "kubelet.json").write_text(json.dumps(configuration))
    server = {"server": f"https://{API_ADDRESS}", "certificate-authority": options.ca}
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "node",
        "clusters": [{"name": "node", "cluster": server}],
        "contexts": [{"name": "node", "context": {"cluster": "node", "user": "node"}}],
        "users": [{"name": "node", "user": {"tokenFile": str(options.token_file)}}],
    }
    (directory / "kubelet.kubeconfig").write_text(json.dumps(kubeconfig))
    arguments: Mapping[str, object] = {
        "config": directory / "kubelet.json",
        "kubeconfig": directory / "kubelet.kubeconfig",
        "hostname-override": options.name,
        "node-ip": NODE_ADDRESS,
        "node-labels": ",".join(f"{name}={value}" for name, value in json.loads(options.labels).items()),
        "root-dir": directory / "kubelet",
    }
    return _Program(
        [options.programs / "kubelet", *(f"--{name}={value}" for name, value in arguments.items())], options
    )


async def _keep(programs: Iterable[_Program], tunnel: Path) -> None:
    """Let the API server in, and keep programs running, until one of them does not run."""
    hopeless = asyncio.Event()

    def reap() -> None:
        with contextlib.suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:  # also what others left, as the first process has to
                for program in programs:
                    if program.pid == pid and not program.start_again():
                        hopeless.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, reap)
    reap()
    server = await asyncio.start_unix_server(_connect, tunnel)
    await hopeless.wait()
    server.close()


async def _connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one ``CONNECT``, RFC 9110, section 9.3.6."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        request = await reader.readuntil(b"\r\n\r\n")
        host, _, port = request.split()[1].decode().rpartition(":")
        far: Any = await asyncio.open_connection(host.strip("[]"), int(port))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await _join(reader, writer, *far)
    writer.close()


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dev.kubernetes_kubelet", description="A node with a real kubelet.")
    parser.add_argument("--name", required=True)
    parser.add_argument("--url", required=True, help="of the API server, on loopback")
    parser.add_argument("--ca", required=True, help="file with the authority's certificate")
    parser.add_argument("--token-file", required=True, type=Path, help="the administrator's token")
    parser.add_argument("--certificate", required=True, help="file with the node's certificate and key")
    parser.add_argument("--tunnel", required=True, type=Path, help="socket for the API server to reach the node")
    parser.add_argument("--programs", required=True, type=Path, help="directory with kubelet, containerd and so on")
    parser.add_argument("--directory", required=True, type=Path, help="for images, volumes and logs")
    parser.add_argument("--labels", default="{}", help="JSON, further labels")
    parser.add_argument("--cgroup", help=argparse.SUPPRESS)
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is None:
        _outside(sys.argv[1:], options)
    else:
        _inside(options)


if __name__ == "__main__":
    _main()
