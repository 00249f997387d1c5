"""What a checkpoint says of itself: `record.json` beside the arrays, by which every altered, cut or missing byte is found.

    {"format": 2, "step": 420, "notes": {...}, "leaves": {"params/w": ["float32[2, 3]", fingerprint]},
     "files": {"state/_METADATA": [bytes, sha256]}, "sha256": of all the above}

Files up to a megabyte carry their hash; larger ones hold array data, whose fingerprints are compared after they are read.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from rlhf_jax.runtime.runs import write_text

FORMAT = 2
"""1 had no record: nothing could be checked."""

NAME = "record.json"
HASHED_BYTES = 2**20
"""Larger files are checked by size here and by the fingerprints of the arrays in them."""


class DamagedCheckpointError(ValueError):
    """Bytes of a checkpoint are not those that were written."""


def write_record(folder: Path, *, step: int, notes: dict, leaves: dict[str, tuple[str, str]]) -> None:
    """Describe the files in `folder` (a step's, complete but for this one)."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = _size_and_hash(path)
    record = {"format": FORMAT, "step": step, "notes": notes, "leaves": leaves, "files": files}
    write_text(folder / NAME, json.dumps({**record, "sha256": _digest(record)}, indent=1, allow_nan=False) + "\n")


def read_record(folder: Path, *, files: bool = False) -> dict[str, Any]:
    """The record of a step; of format 1, only its notes. `files` compares the step's other files with it as well.

    Raises:
      DamagedCheckpointError: the record or a file is not what was written; the message names it.
      ValueError: the format is newer than this version.
    """
    path = folder / NAME
    if not path.is_file():
        old = folder / "notes" / "metadata"
        if not old.is_file():
            raise DamagedCheckpointError(f"{path} is missing")
        return {"format": 1, "notes": _json(old), "leaves": None}
    record = _json(path)
    if not isinstance(record, dict) or record.pop("sha256", None) != _digest(record):
        raise DamagedCheckpointError(f"{path} was altered: its own hash differs")
    if record["format"] > FORMAT:
        raise ValueError(f"{folder} has format {record['format']}, this version reads up to {FORMAT}: update rlhf_jax")
    if files:
        _check_files(folder, record["files"])
    return record


def _check_files(folder: Path, files: dict[str, list]) -> None:
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{path} is missing")
        found = path.stat().st_size
        if found != size:
            raise DamagedCheckpointError(f"{path} has {found} bytes, {size} were written")
        if digest is not None and _size_and_hash(path)[1] not in (digest, None):
            raise DamagedCheckpointError(f"{path} was altered: its hash differs")


def _size_and_hash(path: Path) -> tuple[int, str | None]:
    size = path.stat().st_size
    return size, hashlib.sha256(path.read_bytes()).hexdigest() if size <= HASHED_BYTES else None


def _digest(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are kinds of it
        raise DamagedCheckpointError(f"{path} is no JSON ({error})") from error
