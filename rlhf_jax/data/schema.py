"""Checks of single fields: a JSON object and a field's name in, the value with its true type out.

All raise `UnusableError` that names the field, what it holds, what was expected, and how to fix it.
"""

from pathlib import Path
from typing import Any

from rlhf_jax.data.json_lines import UnusableError, json_type
from rlhf_jax.data.records import ROLES, Message


def require(record: dict[str, Any], name: str) -> Any:
    """The value of a field that must be there."""
    if name not in record:
        raise UnusableError(
            f"field {name!r} is missing (found: {', '.join(sorted(record)) or 'no field'})",
            f"add {name!r} to the record",
        )
    return record[name]


def text_field(record: dict[str, Any], name: str) -> str:
    """A string, possibly empty."""
    value = require(record, name)
    if not isinstance(value, str):
        raise UnusableError(f"field {name!r} is {json_type(value)}, expected a string", "write it as a JSON string")
    return value


def list_field(record: dict[str, Any], name: str) -> list[Any]:
    """An array of anything."""
    value = require(record, name)
    if not isinstance(value, list):
        raise UnusableError(f"field {name!r} is {json_type(value)}, expected an array", "write it as [...]")
    return value


def texts_field(record: dict[str, Any], name: str) -> tuple[str, ...]:
    """An array of strings."""
    values = list_field(record, name)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise UnusableError(
                f"field '{name}[{i}]' is {json_type(value)}, expected a string", "write it as a JSON string"
            )
    return tuple(values)


def numbers_field(record: dict[str, Any], name: str, *, whole: bool) -> tuple[float, ...]:
    """An array of finite numbers; of integers when `whole`."""
    values = list_field(record, name)
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            kind = "an integer" if whole else "a number"
            raise UnusableError(
                f"field '{name}[{i}]' is {json_type(value)}, expected {kind}", "write numbers without quotes"
            )
    return tuple(values)


def messages_field(record: dict[str, Any], name: str) -> tuple[Message, ...]:
    """An array of `{"role", "content"}` objects. Roles may repeat; the system speaks first or not at all."""
    value = require(record, name)
    if not isinstance(value, list):
        raise UnusableError(
            f"field {name!r} is {json_type(value)}, expected an array of messages",
            'write [{"role": "user", "content": "..."}]',
        )
    return tuple(_message(item, i, name) for i, item in enumerate(value))


def id_field(record: dict[str, Any], default: str) -> str:
    """The record's `id`, or `default` where the record has none."""
    return text_field(record, "id") if "id" in record else default


def file_stem(path: str | Path) -> str:
    """The file's name without `.gz` and `.jsonl` / `.json`: the first half of ids made from positions."""
    return Path(path).name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")


def is_blank(messages: tuple[Message, ...]) -> bool:
    """True for no message, or nothing but white space in all of them."""
    return not any(message.content.strip() for message in messages)


def _message(item: Any, i: int, name: str) -> Message:
    place = f"{name}[{i}]"
    if not isinstance(item, dict):
        raise UnusableError(
            f"field {place!r} is {json_type(item)}, expected an object",
            'write {"role": "user", "content": "..."}',
        )
    for key in ("role", "content"):
        if not isinstance(item.get(key), str):
            found = json_type(item[key]) if key in item else "missing"
            raise UnusableError(
                f"field '{place}.{key}' is {found}, expected a string", f"give every message its {key!r}"
            )
    if item["role"] not in ROLES:
        raise UnusableError(
            f"field '{place}.role': unknown role {item['role']!r} (allowed: {', '.join(ROLES)})",
            "rename the role",
        )
    if item["role"] == "system" and i > 0:
        raise UnusableError(
            f"field '{place}.role': a system message after another message", "put the system message first"
        )
    return Message(item["role"], item["content"])
