"""Strict JSON Lines: every line is one JSON object, or the error says which is not, why, and how to mend it.

Stricter than `json.loads` where leniency would train on garbage: `NaN`, `Infinity` and numbers that overflow,
repeated keys, bytes that are not UTF-8 and half surrogates are refused. Problems are collected, up to
`MAX_PROBLEMS` of them, so that one run shows more than the first.
"""

import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MAX_PROBLEMS = 20
"""A reader gives up after this many problems and lists them all."""

_GZIP_MAGIC = b"\x1f\x8b"
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN|-?\d[\d.eE+-]*')


class DataError(ValueError):
    """Data that cannot be used. The text says what is wrong, where, what was done, and how to fix it."""


class UnusableError(ValueError):
    """One record cannot be used: raised by parsers, which know no place; the reader adds file and line."""

    def __init__(self, what: str, fix: str, column: int | None = None):
        super().__init__(f"{what}; fix: {fix}")
        self.what, self.fix, self.column = what, fix, column


@dataclass(frozen=True)
class Problem:
    """One record that cannot be used: where (`file:line:column`), what is wrong, how to fix it."""

    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        """`file:line:column: what; fix: how`, on one line."""
        return f"{self.where}: {self.what}; fix: {self.fix}"


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields `(line_number, object)` of a JSON Lines file, plain or gzip, from line 1.

    Blank lines are skipped. Raises `DataError` for a missing, empty or damaged file and, once the file has
    been read (or after `MAX_PROBLEMS` bad lines), for its malformed lines, all listed as `file:line:column:
    what; fix: how`. A caller that must not act on part of a file takes `list(...)` first.
    """
    problems: list[Problem] = []
    found = False
    for number, item in _scan(path):
        found = True
        if isinstance(item, Problem):
            problems.append(item)
            if len(problems) == MAX_PROBLEMS:
                break
        else:
            yield number, item
    raise_problems(path, problems)
    if not found:
        raise DataError(f"{path}: holds no record; nothing was read; fix: check that the file was written fully")


def parse_lines(path: str | Path, parse: Callable[[int, dict[str, Any]], T]) -> list[T]:
    """`[parse(line_number, object), ...]` for every line of a JSON Lines file.

    `parse` raises `UnusableError` for an object that it refuses. Raises one `DataError` that lists malformed
    lines and refused objects together, in file order, at most `MAX_PROBLEMS`.
    """
    return _parse_all(path, ((number, f"{path}:{number}", item) for number, item in _scan(path)), parse)


def parse_array(path: str | Path, parse: Callable[[int, dict[str, Any]], T]) -> list[T]:
    """`[parse(position, object), ...]` for a file, plain or gzip, that holds one JSON array.

    Positions count from 0.

    Raises `DataError` as `parse_lines` does; refused objects are placed as `file: item position`.
    """
    text = _decode(b"".join(raw for _, raw in _raw_lines(path)), first=True, where=str(path))
    try:
        items = load_strict(text)
    except UnusableError as error:
        line = text.count("\n", 0, error.column - 1) + 1 if error.column else 1
        raise DataError(str(Problem(f"{path}:{line}", error.what, error.fix))) from error
    if not isinstance(items, list):
        raise DataError(f"{path}: holds {json_type(items)}, expected an array of objects; fix: check the layout")
    return _parse_all(
        path,
        ((i, f"{path}: item {i}", _object_or_problem(item, f"{path}: item {i}")) for i, item in enumerate(items)),
        parse,
    )


def load_strict(text: str) -> Any:
    """`json.loads` that refuses NaN, infinities, overflowing numbers, repeated keys and half surrogates.

    Raises `UnusableError`, with the column (from 1, in characters of `text`) where it is known.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_number, parse_float=_finite, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise UnusableError(
            f"not valid JSON ({error.msg})", "write one complete JSON object per line", error.pos + 1
        ) from error
    except _NumberError as error:
        column = next(m.start() + 1 for m in _TOKEN.finditer(text) if m.group() == error.token)
        raise UnusableError(
            f"{error.token} is not a finite number",
            "JSON has no NaN and no Infinity: drop the record or mend it",
            column,
        ) from error
    except RecursionError as error:
        raise UnusableError("nested too deeply", "write flat records") from error
    except UnusableError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise UnusableError(f"not valid JSON ({error})", "write numbers of a sensible size") from error
    if "\\u" in text and _has_half_surrogate(value):
        raise UnusableError("holds half of a surrogate pair, which is no character", "write the text as UTF-8 again")
    return value


def raise_problems(path: str | Path, problems: list[Problem]) -> None:
    """Raises one `DataError` that lists `problems`; does nothing when there are none."""
    if not problems:
        return
    count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    more = "; reading stopped here, there may be more" if len(problems) == MAX_PROBLEMS else ""
    lines = "\n".join(f"  {problem}" for problem in problems)
    raise DataError(f"{path}: {count}, no record was used{more}:\n{lines}")


def json_type(value: Any) -> str:
    """The JSON name of a value's type, with its article: `a string`, `an array`, `null`, ..."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "an integer"}
    return "null" if value is None else names.get(type(value), "a number")


class _NumberError(ValueError):
    def __init__(self, token: str):
        super().__init__(token)
        self.token = token


def _refuse_number(token: str) -> float:
    raise _NumberError(token)


def _finite(token: str) -> float:
    value = float(token)
    return value if math.isfinite(value) else _refuse_number(token)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise UnusableError(f"key {twice!r} occurs twice in one object", "keep one of the two")
    return result


def _has_half_surrogate(value: Any) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in json.dumps(value, ensure_ascii=False))


def _parse_all(
    path: str | Path,
    items: Iterable[tuple[int, str, dict[str, Any] | Problem]],
    parse: Callable[[int, dict[str, Any]], T],
) -> list[T]:
    parsed: list[T] = []
    problems: list[Problem] = []
    for number, where, item in items:
        if isinstance(item, Problem):
            problems.append(item)
        else:
            try:
                parsed.append(parse(number, item))
            except UnusableError as error:
                problems.append(Problem(where, error.what, error.fix))
        if len(problems) == MAX_PROBLEMS:
            break
    raise_problems(path, problems)
    if not parsed:
        raise DataError(f"{path}: holds no record; nothing was read; fix: check that the file was written fully")
    return parsed


def _scan(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    for number, raw in _raw_lines(path):
        where = f"{path}:{number}"
        try:
            text = _decode_line(raw, first=number == 1)
            if text.strip():
                yield number, _object_or_problem(load_strict(text), where)
        except UnusableError as error:
            place = where if error.column is None else f"{where}:{error.column}"
            cut = error.column is not None and not raw.endswith(b"\n")
            fix = f"{error.fix} (this last line has no line end: the file may be cut off)" if cut else error.fix
            yield number, Problem(place, error.what, fix)


def _object_or_problem(value: Any, where: str) -> dict[str, Any] | Problem:
    if isinstance(value, dict):
        return value
    return Problem(where, f"holds {json_type(value)}, expected an object", 'write records as {"field": value, ...}')


def _raw_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file as bytes; gzip is known by its first two bytes, whatever the file's name."""
    number = 0
    try:
        with open(path, "rb") as stream:
            packed = stream.read(2) == _GZIP_MAGIC
        with gzip.open(path) if packed else open(path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                yield number, raw
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"{path}: {error.strerror}; nothing was read; fix: check the path") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}:{number + 1}: the gzip data is cut off or damaged ({error}); no record was used; "
            "fix: copy the file again"
        ) from error


def _decode_line(raw: bytes, first: bool) -> str:
    try:
        return raw.rstrip(b"\r\n").decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        column = len(raw[: error.start].decode("utf-8", errors="replace")) + 1
        raise UnusableError(f"byte 0x{raw[error.start]:02x} is not UTF-8", "save the file as UTF-8", column) from error


def _decode(raw: bytes, first: bool, where: str) -> str:
    try:
        return _decode_line(raw, first)
    except UnusableError as error:
        raise DataError(str(Problem(where, error.what, error.fix))) from error
