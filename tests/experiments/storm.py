"""A kill storm over the three scripts: `python storm.py FOLDER --kills 100`: 100 kills for each, and one at every named point.

Every attempt is a process of its own, forked from this one, which has imported everything and computed nothing. It is killed
at a random moment, a quarter of them of its whole life and the others after its first step, then the same command goes on
with `--resume`. A chain of kills ends when an attempt outruns its kill; what it leaves must be, byte for byte, what a run
leaves that nobody disturbed.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

from small_act import ACTS, outcome, play

from rlhf_jax.runtime import faults
from rlhf_jax.runtime.runs import write_json

COUNTS = ("points", "equal_points", "kills", "in_training", "chains", "equal")
POINTS = (
    "before_update",
    "after_update",
    "log_write",
    "before_save",
    "mid_save",
    "before_commit",
    "after_commit",
    "mid_prune",
)


class Attempt(NamedTuple):
    """How a process fared; seconds."""

    life: float
    training: float
    """Since it logged its first step; 0 when it never did."""
    killed: bool


def attempt(act, run, *, resume, kill_after=None, training=False, fault=""):
    """Play, and kill that many seconds after the start, or after the first step where `training`."""
    begin, log = time.monotonic(), run / "metrics.jsonl"
    child = os.fork()
    if child == 0:
        code = 1
        with (run.parent / f"{run.name}.log").open("a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            try:
                with faults.injected(fault):
                    play(act, run, resume)
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                sys.stdout.flush()
                os._exit(code)
    status, size, first_step = (0, 0), None, None
    while status[0] == 0:
        time.sleep(0.005)
        now, before = time.monotonic(), size
        size = log.stat().st_size if log.exists() else 0
        if first_step is None and before is not None and size > before:
            first_step = now
        since = first_step if training else begin
        if kill_after is not None and since is not None and now - since > kill_after:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)
        else:
            status = os.waitpid(child, os.WNOHANG)
    killed = os.WIFSIGNALED(status[1]) and os.WTERMSIG(status[1]) == signal.SIGKILL
    if not killed and status[1]:
        raise SystemExit(f"{act} failed, see {run.parent / run.name}.log")
    end = time.monotonic()
    return Attempt(end - begin, end - (first_step or end), killed)


def storm(folder, act, kills, rng):
    """Counts of one act; `folder/before` holds what it takes up."""
    before, untouched = folder / "before", folder / f"{act}_untouched"

    def fresh(run):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(before, run) if before.exists() else run.mkdir(parents=True)

    fresh(untouched)
    attempt(act, untouched, resume=False)  # compiles
    fresh(untouched)
    whole = attempt(act, untouched, resume=False)
    expected, found = outcome(untouched, act), dict.fromkeys(COUNTS, 0)
    if len(expected[1]) < 30:
        raise SystemExit(f"{act}: only {len(expected[1])} steps, nothing to kill")
    for point in POINTS:
        run = folder / f"{act}_{point}"
        fresh(run)
        killed = attempt(act, run, resume=False, fault=f"{point}@2=kill9").killed
        attempt(act, run, resume=True)
        found["points"] += killed
        found["equal_points"] += killed and outcome(run, act) == expected
        print(act, point, found, flush=True)
        shutil.rmtree(run)
    while found["kills"] < kills:
        run = folder / f"{act}_{found['chains']}"
        fresh(run)
        last = Attempt(0.0, 0.0, True)
        while last.killed:
            begun = (run / "config.json").exists() or act != "sft"
            training = rng.random() < 0.75
            after = rng.uniform(0.0, whole.training) if training else rng.uniform(0.0, whole.life)
            limit = {"kill_after": after, "training": training} if found["kills"] < kills else {}
            last = attempt(act, run, resume=begun, **limit)
            found["kills"] += last.killed
            found["in_training"] += last.killed and last.training > 0
        found["chains"] += 1
        found["equal"] += outcome(run, act) == expected
        print(act, found, flush=True)
        shutil.rmtree(run)
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(untouched, before, ignore=shutil.ignore_patterns("final.bin", "run.lock"))
    return found


def main(folder, kills, seed):
    """Counts of all acts, also in `folder/storm.json`."""
    warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    found = {act: storm(folder, act, kills, rng) for act in ACTS}
    write_json(folder / "storm.json", found)
    total = sum(one["kills"] + one["points"] for one in found.values())
    equal = all(one["equal"] == one["chains"] and one["equal_points"] == len(POINTS) for one in found.values())
    print(f"{total} kills, {sum(one['chains'] for one in found.values())} chains, all ends equal: {equal}", flush=True)
    return 0 if equal else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100, help="of each act")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.exit(main(args.folder, args.kills, args.seed))
