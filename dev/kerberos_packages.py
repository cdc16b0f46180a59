"""
MIT Kerberos from the distribution's packages, and the ``gssapi`` of PyPI built against it.

Nothing is installed: the packages, whose signatures apt checks, are unpacked into the user's cache. What
flows out is a directory with the key distribution center and its tools, verified by the SHA-256 of every
file whenever it is asked for; and a wheel, since there is none of ``gssapi`` for Linux on PyPI, which takes a
C compiler and Python's headers once.

The trap: the programs are started with the libraries that came with them, but ``gssapi`` loads those of the
system, ``libgssapi-krb5-2``, which curl and ssh bring along.

``python -m dev.kerberos_packages`` gets what is missing and prints the directory, with ``--wheel`` the wheel.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from dev.cache import cached, in_cache, intact
from dev.processes import ToolMissing

__all__ = ["Kerberos", "ensure_gssapi_wheel", "ensure_kerberos"]

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("krb5-kdc", "krb5-admin-server", "krb5-user", "libkrb5-dev")
_ITS_OWN = re.compile(r"krb5|kadm|kdb|gss|k5crypto|verto|^libev\d|com-?err|^libss2|keyutils")  # of what they depend on


class Kerberos:
    """
    The programs, ready to run.

    :param root: where the packages are unpacked.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.libraries = next(root.glob("usr/lib/*-linux-gnu*/libgssapi_krb5.so.2"), root / "absent").parent

    def program(self, name: str) -> str:
        """Return the path of a program."""
        return str(next(self.root.glob(f"usr/*bin/{name}"), self.root / "absent" / name))

    def environment(self) -> dict[str, str]:
        """Return the environment variables that its programs take."""
        return {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": str(self.libraries)}


def ensure_kerberos() -> Kerberos:
    """
    Return MIT Kerberos, unpacked into the user's cache on first use (4 MB, a few seconds).

    :raises ToolMissing: when it has to be fetched and there is no apt.
    """
    return Kerberos(cached(_name(), _unpack))


def ensure_gssapi_wheel() -> Path:
    """
    Return a wheel of ``gssapi`` for this Python, of the version that ``dev/constraints.txt`` has, built on first use.

    :raises ToolMissing: when it has to be built and there is no apt, no compiler, or no ``uv``.
    """
    kerberos = ensure_kerberos()
    version = re.findall(r"^gssapi==([^ ;\n]+)", (_ROOT / "dev" / "constraints.txt").read_text(), re.MULTILINE)[0]
    name = f"gssapi-{version}-py{sys.version_info.major}{sys.version_info.minor}"
    return next(cached(name, lambda directory: _build(version, kerberos, directory)).glob("*.whl"))


def _name() -> str:
    """Return a name for what fits to this release of the distribution."""
    key = " ".join([*_PACKAGES, *_release(), sysconfig.get_platform()])
    return f"kerberos-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _release() -> list[str]:
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except FileNotFoundError:
        return []
    return sorted(line for line in lines if line.startswith(("ID=", "VERSION_ID=")))


def _unpack(directory: Path) -> None:
    if not all(shutil.which(program) for program in ("apt-get", "apt-cache", "dpkg-deb")):
        raise ToolMissing("Kerberos is taken out of the distribution's packages, and there is no apt")
    print("Getting MIT Kerberos ...", file=sys.stderr, flush=True)
    if not _download(directory.parent):
        subprocess.run(["apt-get", "update", "-qq"], stdout=sys.stderr)  # lists that are absent or old
        if not _download(directory.parent):
            raise ToolMissing(f"apt cannot download {', '.join(_PACKAGES)}: run apt-get update")
    for package in directory.parent.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, directory], check=True)
    shutil.rmtree(directory / "usr" / "share")  # documentation


def _download(scratch: Path) -> bool:
    """Download the packages and those of Kerberos that they depend on, whether or not these are installed."""
    implied = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    depends = subprocess.run(
        ["apt-cache", "depends", "--recurse", *implied, *_PACKAGES], capture_output=True, text=True
    )
    names = [name for name in re.findall(r"^([a-z0-9.+-]+)$", depends.stdout, re.MULTILINE) if _ITS_OWN.search(name)]
    download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *names]
    return bool(names) and subprocess.run(download, cwd=scratch, stdout=sys.stderr).returncode == 0


def _build(version: str, kerberos: Kerberos, directory: Path) -> None:
    uv = shutil.which("uv")
    if uv is None:
        raise ToolMissing("uv is not on the PATH: see https://docs.astral.sh/uv/getting-started/installation/")
    if shutil.which("cc") is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise ToolMissing("gssapi is built from source: install gcc and Python's headers (on Debian: python3-dev)")
    print(f"Building gssapi {version} (once; a minute) ...", file=sys.stderr, flush=True)
    include = f"{kerberos.root}/usr/include"
    environment = os.environ | {
        "GSSAPI_COMPILER_ARGS": f"-I{include} -I{include}/mit-krb5 -DHAS_GSSAPI_EXT_H",
        "GSSAPI_LINKER_ARGS": f"-L{kerberos.libraries} -lgssapi_krb5",
        "GSSAPI_SUPPORT_DETECT": "true",  # not by loading the library of the system, which may be older
    }
    pip = ["run", "--quiet", "--no-project", "--isolated", "--python", sys.executable, "--with", "pip"]
    wheel = ["python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-binary=gssapi", f"--wheel-dir={directory}"]
    command = ["nice", uv, *pip, *wheel, f"gssapi=={version}"]
    subprocess.run(command, cwd=directory.parent, env=environment, stdout=sys.stderr, check=True)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.kerberos_packages", description="MIT Kerberos.")
    parser.add_argument("--wheel", action="store_true", help="of gssapi, too")
    parser.add_argument("--cached", action="store_true", help="get nothing; fail when Kerberos is missing")
    options = parser.parse_args()
    if options.cached:
        return 0 if intact(in_cache(_name())) else 1
    try:
        print(ensure_gssapi_wheel() if options.wheel else ensure_kerberos().root)
    except ToolMissing as missing:
        print(missing, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
