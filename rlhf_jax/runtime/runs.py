"""A run's folder: created once, never overwritten, continued only on request and only with the same configuration."""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.runtime.processes import is_first, meet

_PARTIAL = ".partial"
_LOCK = "run.lock"
_FREE = ("run", "resume", "force", "replay", "profile", "processes", "mesh")
"""Fields of a configuration that say how to go on, not what to do."""


def open_run(folder: Path, config: Any, *, resume: bool = False, force: bool = False) -> Path:
    """Make the run's folder and write `config.json`, or open an old one.

    Args:
      folder: where everything of the run goes.
      config: a dataclass. Its fields `run`, `resume`, `force`, `replay`, `profile`, `processes` and `mesh` may change between
        calls; no other may.
      resume: continue in a folder that exists.
      force: continue with another configuration; what differed is added to `forced.txt`.

    Raises:
      FileExistsError: the folder exists and `resume` is off.
      ValueError: `resume` is on and the stored configuration differs (the message lists the fields), or there is none.
      OSError: nothing can be written there.
    """
    folder = Path(folder)
    if is_first():
        _open(folder, config, resume=resume, force=force)
    meet("opened")
    return folder


def check_writable(folder: Path) -> None:
    """Make the folder and write a byte there, before anything slow starts.

    Raises:
      OSError: of the kind that the system gave (permission denied, read-only, no space, ...), in one line.
    """
    probe = Path(folder) / f"probe{_PARTIAL}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        reason = os.strerror(error.errno)
        text = f"cannot write to {folder} ({reason}); nothing was started. Fix: choose another --run, or make this one writable"
        raise type(error)(error.errno, text) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process, and every other `with` of this one, out of a run's folder; made when missing.

    The lock is `flock`'s on `run.lock`: it ends with the process, however that ends, so none is ever stale. With several
    processes of one run only the first takes it.

    Raises:
      BlockingIOError: somebody else is there; the message says who.
      OSError: nothing can be written there, or the file system knows no locks.
    """
    if not is_first():
        yield
        return
    check_writable(folder)
    path = Path(folder) / _LOCK
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            text = f"{folder} is in use by {file.read().strip() or 'a process that just started'}; nothing was started"
            raise BlockingIOError(error.errno, f"{text}. Fix: wait for it, stop it, or choose another --run") from error
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")  # to be read, never computed with
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()} (since {now})\n")
        file.flush()
        yield


def refuse_changes(where: Path | str, stored: Mapping, wanted: Mapping, *, force: bool = False) -> list[str]:
    """Compare facts of a saved run with those of this one; returns the differences, `name: old -> new`.

    Raises:
      ValueError: there are differences, and no `force`.
    """
    stored, wanted = (_flat(json.loads(json.dumps(facts))) for facts in (stored, wanted))
    changed = [
        f"{name}: {stored.get(name, 'nothing')} -> {wanted.get(name, 'nothing')}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if changed and not force:
        raise ValueError(
            f"{where} was started with another configuration, nothing was changed. {'; '.join(changed)}. "
            "Fix: resume with the first values, choose another --run, or go on all the same with --force"
        )
    return changed


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all (temporary name, then rename; on the disk before the rename).

    Of several processes the first one writes.
    """
    if not is_first():
        return
    temporary = path.with_name(path.name + _PARTIAL)
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
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


def _open(folder: Path, config: Any, *, resume: bool, force: bool) -> None:
    wanted = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    stored_at = folder / "config.json"
    check_writable(folder)
    if any(path.suffix != _PARTIAL and path.name != _LOCK for path in folder.iterdir()):
        if not resume:
            raise FileExistsError(
                f"{folder} exists and is never overwritten: continue it with --resume or choose another --run"
            )
        if not stored_at.exists():
            raise ValueError(f"{folder} holds no config.json, so it is no run of this program: choose another --run")
        stored = json.loads(stored_at.read_text(encoding="utf-8"))
        facts = ({k: v for k, v in facts.items() if k not in _FREE} for facts in (stored, wanted))
        changed = refuse_changes(folder, *facts, force=force)
        if changed:
            with (folder / "forced.txt").open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in changed))
            write_json(stored_at, wanted)
        return
    write_json(stored_at, wanted)


def _dump(where: Path | str, content: Any, **options: Any) -> str:
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, **options)
    except ValueError as error:
        raise ValueError(f"{where}: not written, a number is not finite ({error})") from error


def _flat(config: dict, prefix: str = "") -> dict[str, str]:
    """`{"ppo": {"kl_coef": 0.1}}` → `{"ppo.kl_coef": "0.1"}`."""
    flat = {}
    for name, value in config.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: repr(value)})
    return flat
