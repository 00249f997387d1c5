"""A run's folder: created once, never overwritten, continued only on request and only with the same configuration."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def open_run(folder: Path, config: Any, *, resume: bool = False) -> Path:
    """Make the run's folder and write `config.json`, or open an old one.

    Args:
      folder: where everything of the run goes.
      config: a dataclass. Its fields `run` and `resume` may change between calls; all others must not.
      resume: continue in a folder that exists.

    Raises:
      FileExistsError: the folder exists and `resume` is off.
      ValueError: `resume` is on and the stored configuration differs; the message lists the fields.
    """
    folder = Path(folder)
    wanted = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    stored_at = folder / "config.json"
    if folder.exists() and any(folder.iterdir()):
        if not resume:
            raise FileExistsError(
                f"{folder} exists and is never overwritten: continue it with --resume or choose another --run"
            )
        if not stored_at.exists():
            raise ValueError(f"{folder} holds no config.json, so it is no run of this program: choose another --run")
        _refuse_changes(folder, json.loads(stored_at.read_text()), wanted)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(stored_at, wanted)
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all (temporary name, then rename)."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write JSON lines whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read_json_lines(path: Path) -> Iterator[dict]:
    """Read what `write_json_lines` or a `MetricLog` wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _refuse_changes(folder: Path, stored: dict, wanted: dict) -> None:
    ignored = {"run", "resume"}
    changed = [
        f"{name}: {stored.get(name)!r} -> {wanted.get(name)!r}"
        for name in sorted(stored.keys() | wanted.keys())
        if name not in ignored and stored.get(name) != wanted.get(name)
    ]
    if changed:
        raise ValueError(
            f"{folder} was started with another configuration, nothing was changed. {'; '.join(changed)}. "
            "Resume with the first values or choose another --run"
        )
