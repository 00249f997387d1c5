"""One act of a job: played once, timed, and not again on a resume."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rlhf_jax.runtime.runs import write_json


def timed(run: Path, name: str, act: Callable[[], None], *leftovers: Path) -> None:
    """Play an act and note its seconds. On a resume, finished acts are skipped and `leftovers` of an unfinished one go."""
    path = run / "seconds.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    if name in seconds:
        print(f"{name}: finished before, taken from {run}")
        return
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
    start = time.monotonic()
    act()
    write_json(path, {**seconds, name: round(time.monotonic() - start, 1)})
