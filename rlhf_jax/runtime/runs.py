"""A run's folder: created once, never overwritten, continued only on request and only with the same configuration."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_PARTIAL = ".partial"


def open_run(folder: Path, config: Any, *, resume: bool = False) -> Path:
    """Make the run's folder and write `config.json`, or open an old one.

    Args:
      folder: where everything of the run goes.
      config: a dataclass. Its fields `run` and `resume` may change between calls; all others must not.
      resume: continue in a folder that exists.

    Raises:
      FileExistsError: the folder exists and `resume` is off.
      ValueError: `resume` is on and the stored configuration differs (the message lists the fields), or there is none.
    """
    folder = Path(folder)
    wanted = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    stored_at = folder / "config.json"
    if folder.exists() and any(path.suffix != _PARTIAL for path in folder.iterdir()):
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


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all (temporary name, then rename)."""
    temporary = path.with_name(path.name + _PARTIAL)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all.

    Raises:
      ValueError: a number is not finite. Nothing was written.
    """
    write_text(path, _dump(path, content, indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write JSON lines whole or not at all.

    Raises:
      ValueError: a number is not finite. Nothing was written.
    """
    write_text(path, "".join(_dump(f"{path}:{i}", row) + "\n" for i, row in enumerate(rows, start=1)))


def read_json_lines(path: Path) -> Iterator[dict]:
    """Read what `write_json_lines` or a `MetricLog` wrote.

    Raises:
      ValueError: a line is damaged; the message names file and line.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: no JSON ({error.msg}); the lines before it were read") from error


def _dump(where: Path | str, content: Any, **options: Any) -> str:
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, **options)
    except ValueError as error:
        raise ValueError(f"{where}: not written, a number is not finite ({error})") from error


def _refuse_changes(folder: Path, stored: dict, wanted: dict) -> None:
    stored, wanted = _flat(stored), _flat(wanted)
    changed = [
        f"{name}: {stored.get(name, 'nothing')} -> {wanted.get(name, 'nothing')}"
        for name in sorted(stored.keys() | wanted.keys())
        if name not in ("run", "resume") and stored.get(name) != wanted.get(name)
    ]
    if changed:
        raise ValueError(
            f"{folder} was started with another configuration, nothing was changed. {'; '.join(changed)}. "
            "Resume with the first values or choose another --run"
        )


def _flat(config: dict, prefix: str = "") -> dict[str, str]:
    """`{"ppo": {"kl_coef": 0.1}}` → `{"ppo.kl_coef": "0.1"}`."""
    flat = {}
    for name, value in config.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: repr(value)})
    return flat
