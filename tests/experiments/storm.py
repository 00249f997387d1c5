"""A kill storm over the three scripts: `python storm.py FOLDER --kills 100`: 100 kills for each, and one at every named point.

Every attempt is a process of its own, forked from this one, which has imported everything and computed nothing. It is killed
at a random moment of its life, then the same command goes on with `--resume`. A chain of kills ends when an attempt outruns
its kill; what it leaves must be, byte for byte, what a run leaves that nobody disturbed.
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

from small_act import ACTS, outcome, play

from rlhf_jax.runtime import faults
from rlhf_jax.runtime.runs import write_json

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


def attempt(act, run, *, resume, kill_after=None, fault=""):
    """Seconds that it lived, and whether the kill, or that of the fault, came before its end."""
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        with (run.parent / f"{run.name}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                with faults.injected(fault):
                    play(act, run, resume)
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                sys.stdout.flush()
                os._exit(code)
    status = (0, 0)
    while status[0] == 0:
        time.sleep(0.01)
        status = os.waitpid(child, os.WNOHANG)
        if status[0] == 0 and kill_after is not None and time.monotonic() - begin > kill_after:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status[1]) and os.WTERMSIG(status[1]) == signal.SIGKILL
    if not killed and status[1]:
        raise SystemExit(f"{act} failed, see {run.parent / run.name}.log")
    return time.monotonic() - begin, killed


def storm(folder, act, kills, rng):
    """Counts of one act; `folder/before` holds what it takes up."""
    before, untouched = folder / "before", folder / f"{act}_untouched"

    def fresh(run):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(before, run) if before.exists() else run.mkdir(parents=True)

    fresh(untouched)
    attempt(act, untouched, resume=False)  # compiles
    fresh(untouched)
    lifetime, _ = attempt(act, untouched, resume=False)
    expected, found = outcome(untouched, act), {"points": 0, "equal_points": 0, "kills": 0, "chains": 0, "equal": 0}
    if len(expected[1]) < 30:
        raise SystemExit(f"{act}: only {len(expected[1])} steps, nothing to kill")
    for point in POINTS:
        run = folder / f"{act}_{point}"
        fresh(run)
        _, killed = attempt(act, run, resume=False, fault=f"{point}@2=kill9")
        attempt(act, run, resume=True)
        found["points"] += killed
        found["equal_points"] += killed and outcome(run, act) == expected
        print(act, point, found, flush=True)
        shutil.rmtree(run)
    while found["kills"] < kills:
        run = folder / f"{act}_{found['chains']}"
        fresh(run)
        killed, first = True, True
        while killed:
            seconds, killed = attempt(act, run, resume=not first, kill_after=rng.uniform(0.1, 1.0) * lifetime)
            lifetime = lifetime if killed else seconds  # other work on the machine stretches all of them
            found["kills"] += killed
            first = first and not (run / "config.json").exists() and act == "sft"
            if found["kills"] >= kills and killed:
                attempt(act, run, resume=not first)
                killed = False
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
