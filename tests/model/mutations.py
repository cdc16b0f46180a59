"""
What a broken or hostile server makes of an answer that a real one gave: mutations that know JSON, and bytes that don't.

In: recorded answers. Out: Hypothesis strategies of the bytes that come in their place. Members are dropped, renamed,
doubled, exchanged for each other and for what no server sends (numbers of 400 digits, infinities, lone surrogates,
a hundred thousand characters, a hundred thousand brackets); then the text itself may be cut off, doubled, sent in
another encoding, or be a login page.

The trap: a mutation that is too wild is refused at the first look, and tests nothing behind it. Most inputs have one to
four small changes, and stay JSON.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

__all__ = ["NASTY", "answers", "changed", "lines", "mutate"]

DEEP: Any = "\0deep"
"""Stands for brackets so deep that a recursive parser falls over; put in when the text is written."""
NASTY: Sequence[Any] = (
    *(None, True, False, 0, -1, 1, 10**15, 10**30, 10**400, -(10**400), 0.5, 1e308, -1e308, float("inf"), float("nan")),
    *("", " ", "0", "-1", "9" * 30, "9" * 5000, "1e999", "NaN", "²", "\u0661", "true", "null", "None"),
    *("x" * 100_000, "<" * 5000, " " * 20_000, "\n" * 5000, "\ud800", "\0", "é", "\u202e", "a\r\nX: y", '"', "'", "\\"),
    *(
        "../../etc/passwd",
        "/",
        "..",
        "%2e%2e",
        "a/b?c#d",
        "@",
        "{app_id}",
        "{0.__class__}",
        "%s%n",
        "$(id)",
        "`id`",
        ";id",
    ),
    *(
        "http://evil/",
        "https://u:p@evil/",
        "javascript:alert(1)",
        "file:///etc/passwd",
        "//evil",
        "http://[",
        "http://a:b",
    ),
    *("http://h:99999", "http://h:-1", "ftp://h", "http://h\n", "http://h /", "http://é", 'http://h/"><script>'),
    *("0001-01-01T00:00:00", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59", "2026-11-25T23:58:15Z", "2026"),
    *("SUCCEEDED", "FINISHED", "FAILED", "KILLED", "Succeeded", "Failed", "Running", "ACTIVE", "ALIVE", "RELAUNCHING"),
    *("driver-20261123035342-0000", "driver-99999999999999-9999", "application_1795664117779_0001", "N/A"),
    *([], {}, [None], [[]], [{}], {"": {}}, [[[[]]]], DEEP),
)
_HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body><form action='/login'>%s</form></body></html>"
_small = st.integers(0, 7)
_big = st.integers(0, 1 << 16)


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Return where each part of a value stands: its container, and its key or index there. The outer ones first."""
    found: list[tuple[Any, Any]] = []
    level = [value]
    while level:
        here = [
            (part, key)
            for part in level
            for key in (part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ())
        ][:500]
        found += here
        level = [container[key] for container, key in here]
    return found


def mutate(draw: Callable[[Any], Any], value: Any, words: Sequence[str] = ()) -> Any:
    """
    Return the value with one change; it is changed in place where it can be.

    :param words: texts that mean something to the parser, beside :data:`NASTY`.
    """
    nodes = _nodes(value)
    if not nodes:
        return copy.deepcopy(NASTY[draw(_big) % len(NASTY)])
    container, key = nodes[int(len(nodes) * (draw(_big) / (1 << 16)) ** 2) % len(nodes)]  # an outer one, rather
    kind, number = draw(_small), draw(_big)
    part = container[key]
    odd = [*NASTY, *words]
    if kind <= 2:
        container[key] = copy.deepcopy(odd[number % len(odd)])
    elif kind == 3:
        del container[key]
    elif kind == 4:  # what stands elsewhere
        other, place = nodes[number % len(nodes)]
        container[key] = copy.deepcopy(other[place])
    elif kind == 5 and isinstance(part, str):
        at = number % (len(part) + 1)
        insertion = odd[number % len(odd)]
        container[key] = part[:at] + str(insertion)[:200] + part[at + number % 3 :]
    elif kind == 5 and isinstance(part, (int, float)):
        container[key] = [-part, part * 1000, str(part), part % 7 + 0.5, [part]][number % 5]
    elif kind == 6 and isinstance(container, list):
        container.extend([part] * (number % 200))
    elif kind == 6:
        container[str(odd[number % len(odd)])[:200]] = container.pop(key)
    else:
        container[key] = [[part], {"app": part}, str(part), {key if isinstance(key, str) else "a": part}][number % 4]
    return value


@st.composite
def changed(draw: Callable[[Any], Any], recordings: Sequence[str], words: Sequence[str] = ()) -> Any:
    """Return a recording as a value, with no change or a few."""
    value = json.loads(recordings[draw(_big) % len(recordings)])
    for _ in range((0, 1, 1, 1, 2, 2, 3, 4)[draw(_small)]):
        value = mutate(draw, value, words)
    return value


def _written(value: Any) -> str:
    text = json.dumps(value)
    return text.replace(json.dumps(DEEP), "[" * 100_000) if "\\u0000deep" in text else text


@st.composite
def answers(draw: Callable[[Any], Any], recordings: Sequence[str], words: Sequence[str] = ()) -> bytes:
    """Return the body of an answer: a recording with a few changes, as bytes that may be broken as well."""
    return draw_bytes(draw, _written(draw(changed(recordings, words))))


def draw_bytes(draw: Callable[[Any], Any], text: str) -> bytes:
    """Return the text as bytes, three times of four as they should be."""
    kind = draw(st.integers(0, 31))
    body = text.encode("utf-8", "surrogatepass")
    if kind < 24:
        return body
    number: int = draw(_big)
    at = number % (len(body) + 1)
    if kind <= 26:
        return body[:at]
    if kind == 27:
        return body[:at] + [b"\xff\xfe", b"\0", b"}", b"]", b",", b'"', b"\xed\xa0\x80", b"-"][number % 8] + body[at:]
    if kind == 28:
        return text.encode(["utf-16", "utf-32", "latin-1", "utf-8-sig"][number % 4], "replace")
    if kind == 29:
        return _HTML % body[:200]
    if kind == 30:  # a member of the same name once more
        names = [part for part in text.split('"')[1:60:2] if part]
        name = names[number % len(names)] if names else "id"
        odd = _written(NASTY[number % len(NASTY)])
        return text.replace("{", "{" + f'"{name}": {odd}, ', 1).encode("utf-8", "surrogatepass")
    return [b"", b"null", b"[]", b"{}", b"1", b'""', body + body, b"\xef\xbb\xbf" + body][number % 8]


@st.composite
def lines(draw: Callable[[Any], Any], recordings: Sequence[str], words: Sequence[str]) -> bytes:
    """Return a text that is no JSON (a log, a page, a tool's output): pieces cut out, doubled, put in."""
    text: str = recordings[draw(_big) % len(recordings)]
    for _ in range((0, 1, 1, 2, 2, 3, 4, 5)[draw(_small)]):
        kind, number, other = draw(_small), draw(_big), draw(_big)
        at, end = sorted((number % (len(text) + 1), other % (len(text) + 1)))
        odd = [*words, *(each for each in NASTY if isinstance(each, str) and each != DEEP)]
        if kind <= 2:
            text = text[:at] + odd[other % len(odd)] + text[at:]
        elif kind <= 4:
            text = text[:at] + text[end:]
        elif kind == 5:
            text = text[:end] + text[at:]
        elif kind == 6:
            text = text[:at] + text[at:end] * (other % 50) + text[end:]
        else:
            word = odd[number % len(odd)]
            text = text[:at] + word * (1 + other % (1 + 50_000 // max(1, len(word)))) + text[at:]
        text = text[:300_000]
    return text.encode("utf-8", "surrogatepass")
