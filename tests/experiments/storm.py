"""A kill storm over the three scripts: `python storm.py FOLDER --kills 100`, 100 SIGKILLs for each act.

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

import jax
import numpy as np
import ppo
import reward_model
import sft
import task

from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.runs import locked, read_json_lines, write_json

ACTS = ("sft", "reward_model", "ppo")
SIZES = {"NUM_DEMONSTRATIONS": 300, "NUM_RANKINGS": 64, "NUM_PROMPTS": 64, "NUM_HELD_OUT": 20}
LENGTHS = {"prompt_length": 40, "response_length": 12, "row_length": 96, "vocab_size": 600}
CACHE = Path(__file__).parents[2] / ".cache" / "jax"
STEPS = 36


def config_of(act, run, resume):
    """The script's own configuration, small."""
    shared = {"run": run, "resume": resume, **LENGTHS}
    if act == "sft":
        network = {"num_layers": 1, "model_dim": 16, "num_heads": 2, "mlp_dim": 16}
        return sft.Config(**shared, sft=sft.SFTConfig(num_epochs=5, batch_size=8, save_every=3, **network))
    if act == "reward_model":
        numbers = {"num_epochs": 4.5, "batch_size": 8, "save_every": 3, "num_responses": 3}
        return reward_model.Config(**shared, reward=reward_model.RewardModelConfig(**numbers))
    numbers = {"num_iterations": STEPS, "batch_size": 8, "num_minibatches": 2, "save_every": 3, "kl_horizon": 100.0}
    return ppo.Config(**shared, ppo=ppo.PPOConfig(**numbers))


def play(act, run, resume):
    """What the script does, then the parameters that it saved as bytes."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for name, value in SIZES.items():
        setattr(task, name, value)
    script = {"sft": sft, "reward_model": reward_model, "ppo": ppo}[act]
    with locked(run):
        script.main(config_of(act, run, resume))
        tokenizer, network, params = sft.load(run)
        if act == "reward_model":
            params, *moments = reward_model.load(run, network, tokenizer)
            params = {"params": params, "moments": np.asarray(moments)}
        if act == "ppo":
            params = checkpoint.restore(run / "ppo", params)
    (run / "final.bin").write_bytes(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)))


def attempt(act, run, *, resume, kill_after=None):
    """Seconds that it lived, and whether the kill came before its end."""
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        with (run.parent / f"{run.name}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
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


def outcome(run, act):
    """Everything that an act leaves but its clock."""
    clock = ("seconds", "tokens_per_second")
    rows = [row for row in read_json_lines(run / "metrics.jsonl") if row["stage"] == act]
    return (run / "final.bin").read_bytes(), [{k: v for k, v in row.items() if k not in clock} for row in rows]


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
    expected, found = outcome(untouched, act), {"kills": 0, "chains": 0, "equal": 0, "lifetime": round(lifetime, 2)}
    if len(expected[1]) < 30:
        raise SystemExit(f"{act}: only {len(expected[1])} steps, nothing to kill")
    while found["kills"] < kills:
        run = folder / f"{act}_{found['chains']}"
        fresh(run)
        killed, first = True, True
        while killed:
            killed = attempt(act, run, resume=not first, kill_after=rng.uniform(0.1, 1.0) * lifetime)[1]
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
    total = sum(one["kills"] for one in found.values())
    equal = all(one["equal"] == one["chains"] for one in found.values())
    print(f"{total} kills, {sum(one['chains'] for one in found.values())} chains, all ends equal: {equal}", flush=True)
    return 0 if equal else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100, help="of each act")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.exit(main(args.folder, args.kills, args.seed))
