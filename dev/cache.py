"""
Directories in the user's cache, made once and verified whenever they are asked for.

What flows in is the name of a directory and a function that fills a new one; what flows out is the directory. A list
of checksums, made when it was filled, tells one that is whole from one that was damaged since, which is made anew.

The trap: several processes ask at once. The first one fills the directory, the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["cached", "in_cache", "intact", "sums"]

_SUMS = "SHA256SUMS"


def in_cache(name: str) -> Path:
    """Return the path of this name in the user's cache."""
    cache = Path(
        os.environ.get("DURABLE_SPARK_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "durable-spark"
    )
    return cache / name


def cached(name: str, fill: Callable[[Path], None]) -> Path:
    """
    Return a directory of the cache, filled already or now.

    :param fill: makes the directory whose path it gets. It may leave other files beside it, which are removed.
    """
    directory = in_cache(name)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not intact(directory):
            with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f"{name}.") as scratch:
                new = Path(scratch) / "new"
                fill(new)
                (new / _SUMS).write_text(sums(new))
                if directory.exists():
                    directory.rename(Path(scratch) / "old")
                new.rename(directory)
    return directory


def intact(directory: Path) -> bool:
    """Whether the files are those that it was filled with, each with every byte."""
    try:
        return (directory / _SUMS).read_text() == sums(directory)
    except FileNotFoundError:
        return False


def sums(directory: Path) -> str:
    """Return checksums in the form that ``sha256sum --check`` reads."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != _SUMS)
    return "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(directory)}\n" for file in files
    )
