"""
What every kind of cluster asks of a :class:`~durable_spark.jobs.SparkJob`: checks of its arguments, and their merging.

Every error is a :class:`~durable_spark.jobs.BadArguments` that names the argument, what is wrong with it, and the fix.
Pure: no I/O.

The trap: no message may hold the value of a setting or of an environment variable that was not
meant to be read by people: they are where passwords are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from durable_spark.jobs import BadArguments

if TYPE_CHECKING:
    from durable_spark.jobs import SparkJob

__all__ = [
    "COUNTS",
    "check_main_class",
    "check_memory",
    "count",
    "given",
    "mebibytes",
    "merge_properties",
    "parse_properties",
    "string",
    "string_map",
    "strings",
    "trimmed",
    "write_properties",
]

COUNTS = ("driver_cores", "executor_cores", "total_executor_cores", "num_executors")
"""Arguments that are whole numbers greater than 0."""

_PROPERTY_OF = {
    "driver_memory": "spark.driver.memory",
    "driver_cores": "spark.driver.cores",
    "driver_class_path": "spark.driver.extraClassPath",
    "executor_memory": "spark.executor.memory",
    "executor_cores": "spark.executor.cores",
    "packages": "spark.jars.packages",
    "exclude_packages": "spark.jars.excludes",
    "repositories": "spark.jars.repositories",
}

_BLANKS = "".join({chr(code) for code in range(33)} - {"\r", "\n"})
_SURROGATE = re.compile("[\ud800-\udfff]")
_MEMORY = re.compile(r"([0-9]+)([a-z]*)\Z")
_MEMORY_UNITS = {"b": 0, "k": 10, "kb": 10, "m": 20, "mb": 20, "g": 30, "gb": 30, "t": 40, "tb": 40, "p": 50, "pb": 50}
"""As powers of two."""


def merge_properties(job: SparkJob, defaults: Mapping[str, str], further: Mapping[str, str]) -> dict[str, str]:
    """
    Return defaults, then conf, then the arguments: as with spark-submit, the more explicit one wins.

    :param defaults: properties that the job's own override, from its properties file.
    :param further: properties of arguments that mean something to one kind of cluster, by argument.
    """
    conf = string_map("conf", job.conf)
    for key in conf:
        if not key.startswith("spark."):
            raise BadArguments(f"conf has {key!r}, which Spark would ignore: its properties begin with 'spark.'")
    if "spark.master" in conf:
        raise BadArguments("conf must not set spark.master: the master comes from the connection")
    properties = {**defaults, **conf}
    if properties.pop("spark.submit.deployMode", "cluster") != "cluster":
        raise BadArguments("spark.submit.deployMode must be 'cluster': the driver runs on the cluster, not in Airflow")
    for name, key in {**_PROPERTY_OF, **further}.items():
        if (value := given(job, name)) is not None:
            properties[key] = count(name, value) if name in COUNTS else string(name, value)
    properties["spark.app.name"] = string("name", job.name)
    for key in ("spark.driver.memory", "spark.executor.memory"):
        if key in properties:
            check_memory(key, properties[key])
    for key in ("spark.driver.cores", "spark.executor.cores", "spark.cores.max"):
        if key in properties:
            count(key, properties[key])
    return properties


def given(job: SparkJob, name: str) -> object:
    """Return an argument, ``None`` also for an empty string, which templates leave behind."""
    value = getattr(job, name)
    return None if value == "" else value


def check_main_class(job: SparkJob, *, language: str | None) -> None:
    """
    Check that a jar has a main class, and nothing else has.

    :param language: ``"Python"`` or ``"R"`` for a script, ``None`` for a jar.
    """
    if job.java_class is not None and not isinstance(job.java_class, str):
        raise BadArguments(f"java_class must be a string, not {type(job.java_class).__name__}")
    article = "an" if language == "R" else "a"
    if language and job.java_class:
        raise BadArguments(f"java_class has no meaning for {article} {language} application: leave it out")
    if not language and not job.java_class:
        raise BadArguments(
            f"java_class is missing: application {job.application!r} is not a .py file, and the main class of a jar "
            "cannot be read from here"
        )


def check_memory(key: str, value: str) -> int:
    """
    Return an amount of memory in whole MiB, as Spark counts it.

    All that Spark accepts, except a number without a unit, which the JVM's ``-Xmx`` takes for bytes.
    """
    amount = mebibytes(key, value)
    if amount == 0:
        raise BadArguments(f"{key} is {value!r}, less than a mebibyte")
    return amount


def mebibytes(key: str, value: str, *, unit: str = "") -> int:
    """
    Return an amount of memory in whole MiB, rounded down, as ``org.apache.spark.network.util.JavaUtils`` reads it.

    :param unit: of a number without one; by default it needs one.
    """
    match = _MEMORY.match(value.strip().lower())
    exponent = _MEMORY_UNITS.get(match[2] or unit) if match else None
    if match is None or exponent is None:
        raise BadArguments(f"{key} is {value!r}: give a whole number and a unit, such as 512m or 2g")
    return int(match[1]) << exponent >> 20


def count(name: str, value: object) -> str:
    """Return a whole number greater than 0, as text."""
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal() or int(text) == 0:
        raise BadArguments(f"{name} is {value!r}: give a whole number greater than 0")
    return text


def string(name: str, value: object) -> str:
    """Return a string that says something."""
    text = _text(name, value)
    if not text.strip():
        raise BadArguments(f"{name} is empty")
    return text


def strings(name: str, values: Sequence[str]) -> list[str]:
    """Return a list of strings."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise BadArguments(f"{name} must be a list of strings, not {type(values).__name__}")
    return [_text(f"{name}[{index}]", value) for index, value in enumerate(values)]


def string_map(name: str, values: Mapping[str, str]) -> dict[str, str]:
    """Return strings by name."""
    if not isinstance(values, Mapping):
        raise BadArguments(f"{name} must be a mapping of strings, not {type(values).__name__}")
    for key, value in values.items():
        if not isinstance(key, str) or not re.fullmatch(r"[^\s=\0]+", key):
            raise BadArguments(f"{name} has the key {key!r}, which is not a name")
        _text(f"the value of {key} in {name}", value, advice=": quote it")
    return dict(values)


def _text(name: str, value: object, *, advice: str = "") -> str:
    if not isinstance(value, str):
        raise BadArguments(f"{name} must be a string, not {type(value).__name__}{advice}")
    if "\0" in value:
        raise BadArguments(f"{name} holds a NUL character")
    if _SURROGATE.search(value):
        raise BadArguments(f"{name} holds half a character (a surrogate), which UTF-8 cannot write")
    return value


def parse_properties(text: str) -> dict[str, str]:
    """
    Parse a Java properties file the way spark-submit does: ``key=value``, ``key: value``, ``key value``.

    Only Spark's own properties are kept, as spark-submit keeps them.
    """
    properties: dict[str, str] = {}
    for line in _logical_lines(text):
        key, value = _split_property(line)
        if key.startswith("spark."):
            properties[key] = trimmed(value)
    return properties


def write_properties(properties: Mapping[str, str]) -> str:
    """
    Return a Java properties file from which ``java.util.Properties`` reads the same keys and values.

    The values are trimmed, as Spark would do with those of every properties file.
    """
    return "".join(f"{_escape(key, ' :=#!')}={_escape(trimmed(value), '')}\n" for key, value in properties.items())


def trimmed(value: str) -> str:
    """Return a property's value as Spark reads it from a file: without blanks at its ends (``trimExceptCRLF``)."""
    return value.strip(_BLANKS)


def _escape(text: str, special: str) -> str:
    return "".join(_escape_character(character, special) for character in text)


def _escape_character(character: str, special: str) -> str:
    if character in special or character == "\\":
        return "\\" + character
    if character in _ESCAPED:
        return "\\" + _ESCAPED[character]
    if " " <= character <= "~":
        return character
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def _logical_lines(text: str) -> list[str]:
    """Join continued lines; drop blank lines and comments. After ``java.util.Properties.load``."""
    lines: list[str] = []
    continued = False
    for raw in re.split(r"\r\n|\r|\n", text):
        line = raw.lstrip(" \t\f")
        if not continued and (not line or line[0] in "#!"):
            continue
        if continued:
            lines[-1] += line
        else:
            lines.append(line)
        slashes = len(line) - len(line.rstrip("\\"))
        continued = slashes % 2 == 1
        if continued:
            lines[-1] = lines[-1][:-1]
    return lines


_SEPARATOR = re.compile(r"(?:[^\\:= \t\f]|\\.)*", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_CONTROL = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
_ESCAPED = {character: letter for letter, character in _CONTROL.items()}


def _split_property(line: str) -> tuple[str, str]:
    match = _SEPARATOR.match(line)
    end = match.end() if match else 0
    value = re.sub(r"\A[ \t\f]*[:=]?[ \t\f]*", "", line[end:])
    return _unescape(line[:end]), _unescape(value)


def _unescape(text: str) -> str:
    text = _ESCAPE.sub(lambda m: chr(int(m[1], 16)) if m[1] else _CONTROL.get(m[2], m[2]), text)
    return text.encode("utf-16-be", "surrogatepass").decode("utf-16-be", "replace")  # Java escapes UTF-16
