"""
Kubernetes' own programs, built from their Go modules, and what a kubelet runs containers with.

There is no package to install kube-apiserver from, and what downloads it fetches it from places that
are often out of reach; the Go module proxy is not. What flows in is the pinned version, what flows
out is a directory in the user's cache with the programs, each verified by its SHA-256 whenever it is
asked for. containerd, runc (which is partly C) and the network plugins are those of Debian's or Ubuntu's
packages, taken out of them: nothing is installed.

The replacements that Kubernetes' go.mod makes (``k8s.io/api => ./staging/...``) count only for its
own repository, so the module that is built here repeats them, with the version each was published as.

The trap: the result is the same to the byte (``-trimpath``), but only from the same compiler. So the
compiler's version is pinned, too, and any Go fetches that one: since 1.21 by itself (``GOTOOLCHAIN``),
before as the module that it is.

``python -m dev.kubernetes_binaries`` gets what is missing and prints the directory.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from dev.processes import ToolMissing

__all__ = ["CONTROL_PLANE", "KUBERNETES_VERSION", "REAL_NODE", "ensure_kubernetes"]

KUBERNETES_VERSION = "1.34.4"

_GO = "go1.26.8"
_PACKAGES = {
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "etcd": "go.etcd.io/etcd/server/v3",  # 3.6.4, as Kubernetes' go.mod asks for
    "kubelet": "k8s.io/kubernetes/cmd/kubelet",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
}
_PINNED = {  # SHA-256 on Linux, x86-64
    "kube-apiserver": "60d4b6b62a67e71d977432ad9affe37f0b6c52f8fc0f32da21b0b9d7edd457f4",
    "etcd": "4fc43e630386d6bcf8842e494c8342983c4f8b57d4439acebdb0404d71e741b2",
    "kubelet": "870561ae9cbb8e48c3a147a61822c6b2cfbf0130bcb6e18efa0bc44ed3ec462f",
    "kube-scheduler": "dfa75ae7208461a2ca893e28708ba9daa9be081f8375eda23b923e27e4decb63",
}
_PACKAGED = {
    "containerd": ("containerd", "usr/bin/containerd"),
    "containerd-shim-runc-v2": ("containerd", "usr/bin/containerd-shim-runc-v2"),
    "ctr": ("containerd", "usr/bin/ctr"),
    "runc": ("runc", "usr/sbin/runc"),
    "bridge": ("containernetworking-plugins", "usr/lib/cni/bridge"),
    "host-local": ("containernetworking-plugins", "usr/lib/cni/host-local"),
    "loopback": ("containernetworking-plugins", "usr/lib/cni/loopback"),
}
CONTROL_PLANE = ("kube-apiserver", "etcd")
REAL_NODE = ("kubelet", "kube-scheduler", *_PACKAGED)
"""What :mod:`dev.kubernetes_kubelet` runs, and the scheduler that it takes."""
_SUMS = "SHA256SUMS"


def ensure_kubernetes(*names: str) -> Path:
    """
    Return the directory of these programs, built into the user's cache on first use (3 GB meanwhile, five minutes).

    :param names: :data:`CONTROL_PLANE` when there are none.
    :raises ToolMissing: when something has to be built and there is no Go, or to be unpacked and there is no apt.
    """
    directory = _directory()
    if not _missing(names, directory):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = _missing(names, directory)
        if built := [name for name in missing if name in _PACKAGES]:
            _build(built, directory)
        if packaged := [name for name in missing if name in _PACKAGED]:
            _unpack(packaged, directory)
    return directory


def _directory() -> Path:
    cache = Path(
        os.environ.get("DURABLE_SPARK_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "durable-spark"
    )
    return cache / f"kubernetes-{KUBERNETES_VERSION}"


def _missing(names: Iterable[str], directory: Path) -> list[str]:
    recorded = _recorded(directory)
    return [name for name in tuple(names) or CONTROL_PLANE if _sum(directory / name) != recorded.get(name, "none")]


def _recorded(directory: Path) -> dict[str, str]:
    """Return the checksums that were noted when the programs were built."""
    try:
        lines = (directory / _SUMS).read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {name: digest for digest, name in (line.split() for line in lines)}


def _record(directory: Path, digests: Mapping[str, str]) -> None:
    """Note checksums, in the form that ``sha256sum --check`` reads."""
    new = directory / f"{_SUMS}.new"
    new.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))
    new.replace(directory / _SUMS)


def _sum(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        return ""
    return digest.hexdigest()


def _build(names: Iterable[str], directory: Path) -> None:
    go = _go()
    print(f"Building {', '.join(names)} {KUBERNETES_VERSION} (once; some minutes) ...", file=sys.stderr, flush=True)
    scratch = directory / "build"  # what a build that was interrupted had compiled already serves the next one
    scratch.mkdir(exist_ok=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("GOEXPERIMENT", "GOAMD64"))},
        "CGO_ENABLED": "0",
        "GOCACHE": str(scratch / "gocache"),
        "GOFLAGS": "-buildvcs=false -mod=mod",
        "GOTOOLCHAIN": _GO,
        "GOWORK": "off",
    }
    _write_module(go, scratch, environment)
    major, minor, _ = KUBERNETES_VERSION.split(".")
    flags = {
        "k8s.io/component-base/version.gitVersion": f"v{KUBERNETES_VERSION}",
        "k8s.io/component-base/version.gitMajor": major,
        "k8s.io/component-base/version.gitMinor": minor,
        "k8s.io/client-go/pkg/version.gitVersion": f"v{KUBERNETES_VERSION}",
    }
    linked = " ".join(["-s", "-w", *(f"-X {name}={value}" for name, value in flags.items())])
    for name in names:
        command = ["nice", go, "build", "-trimpath", "-ldflags", linked, "-o", str(scratch / name), _PACKAGES[name]]
        subprocess.run(command, cwd=scratch, env=environment, check=True)
        _install(scratch / name, directory)
    shutil.rmtree(scratch)


def _install(built: Path, directory: Path) -> None:
    digest, pinned = _sum(built), _PINNED.get(built.name)
    if pinned not in (None, digest) and (sys.platform, platform.machine()) == ("linux", "x86_64"):
        raise RuntimeError(f"{built} has SHA-256 {digest}, but {_GO} is known to build {pinned}")
    _record(directory, _recorded(directory) | {built.name: digest})
    built.replace(directory / built.name)


def _unpack(names: Iterable[str], directory: Path) -> None:
    """Take programs out of the distribution's packages, whose signatures apt checks."""
    packages = sorted({_PACKAGED[name][0] for name in names})
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise ToolMissing(f"{', '.join(packages)} are taken out of the distribution's packages, and there is no apt")
    print(f"Getting {', '.join(packages)} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="durable-spark-") as scratch:
        download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *packages]
        if subprocess.run(download, cwd=scratch, stdout=sys.stderr).returncode:
            subprocess.run(["apt-get", "update", "-qq"], stdout=sys.stderr, check=True)  # lists that are absent or old
            subprocess.run(download, cwd=scratch, stdout=sys.stderr, check=True)
        for package in Path(scratch).glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", package, scratch], check=True)
        for name in names:
            unpacked = directory / f"{name}.new"
            shutil.copy(Path(scratch) / _PACKAGED[name][1], unpacked)
            _record(directory, _recorded(directory) | {name: _sum(unpacked)})
            unpacked.replace(directory / name)


def _write_module(go: str, scratch: Path, environment: Mapping[str, str]) -> None:
    """Write a go.mod that stands where Kubernetes' own one would."""
    version = f"v{KUBERNETES_VERSION}"
    download = [go, "mod", "download", "-json", f"k8s.io/kubernetes@{version}"]
    answer = subprocess.run(download, cwd=scratch, env=environment, check=True, stdout=subprocess.PIPE)
    original = Path(json.loads(answer.stdout)["GoMod"]).read_text()
    language = re.findall(r"^go (\S+)$", original, re.MULTILINE)[0]
    staged = re.findall(r"^\s*(k8s\.io/\S+) => \./staging/", original, re.MULTILINE)
    published = f"v0.{version.partition('.')[2]}"
    lines = [
        "module cluster",
        f"go {language}",
        f"require k8s.io/kubernetes {version}",
        *(f"replace {module} => {module} {published}" for module in staged),
    ]
    (scratch / "go.mod").write_text("\n".join(lines) + "\n")


def _go() -> str:
    """Return a ``go`` that is the pinned one, or that runs it when GOTOOLCHAIN names it."""
    go = shutil.which("go")
    if go is None:
        raise ToolMissing("Kubernetes is built from its Go modules, and there is no Go: install golang (any version)")
    answer = subprocess.run([go, "env", "GOVERSION"], env=os.environ | {"GOTOOLCHAIN": "local"}, capture_output=True)
    version = re.match(rb"go1\.(\d+)", answer.stdout)
    if version and int(version[1]) >= 21:
        return go
    return _downloaded_go(go)


def _downloaded_go(go: str) -> str:
    """Return the pinned Go itself, fetched by one that is too old to do so unasked."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    module = f"golang.org/toolchain@v0.0.1-{_GO}.{sys.platform}-{machine}"
    environment = os.environ | {"GOFLAGS": "", "GO111MODULE": "on"}
    answer = subprocess.run(
        [go, "mod", "download", "-json", module], cwd="/", env=environment, check=True, stdout=subprocess.PIPE
    )
    root = Path(json.loads(answer.stdout)["Dir"])
    for program in (*root.glob("bin/*"), *root.glob("pkg/tool/*/*")):
        program.chmod(0o755)  # files in the module cache are not executable
    return str(root / "bin" / "go")


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.kubernetes_binaries", description="Programs of Kubernetes.")
    parser.add_argument("names", nargs="*", help="the API server and etcd by default")
    parser.add_argument("--full", action="store_true", help="all that a cluster with a real kubelet takes")
    parser.add_argument("--cached", action="store_true", help="get nothing; fail when anything is missing")
    options = parser.parse_args()
    names = [*options.names, *(CONTROL_PLANE + REAL_NODE if options.full else ())]
    if options.cached:
        return 1 if _missing(names, _directory()) else 0
    try:
        print(ensure_kubernetes(*names))
    except ToolMissing as missing:
        print(missing, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
