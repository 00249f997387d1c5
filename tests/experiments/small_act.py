"""The three scripts at a size of seconds, each in a process of its own: `python small_act.py ACT RUN [--resume] ...`."""

import argparse
import sys
from pathlib import Path

import acts
import jax
import kept_reward
import numpy as np
import ppo
import reward_model
import sft
import task
from meshes import COPIES, MeshConfig

from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.processes import Processes, is_first
from rlhf_jax.runtime.runs import read_json_lines

ACTS = ("sft", "reward_model", "ppo")
SIZES = {"NUM_DEMONSTRATIONS": 300, "NUM_RANKINGS": 64, "NUM_PROMPTS": 64, "NUM_HELD_OUT": 20}
LENGTHS = {"prompt_length": 40, "response_length": 12, "row_length": 96, "vocab_size": 600}
CACHE = Path(__file__).parents[2] / ".cache" / "jax"
STEPS = 36
NOBODY = Processes()


def config_of(act, run, resume, processes=NOBODY, mesh=COPIES):
    """The script's own configuration, small."""
    shared = {"run": run, "resume": resume, "processes": processes, "mesh": mesh, **LENGTHS}
    if act == "sft":
        network = {"num_layers": 1, "model_dim": 16, "num_heads": 2, "mlp_dim": 16}
        return sft.Config(**shared, sft=sft.SFTConfig(num_epochs=5, batch_size=8, save_every=3, **network))
    if act == "reward_model":
        numbers = {"num_epochs": 4.5, "batch_size": 8, "save_every": 3, "num_responses": 3}
        return reward_model.Config(**shared, reward=reward_model.RewardModelConfig(**numbers))
    numbers = {"num_iterations": STEPS, "batch_size": 16, "num_minibatches": 2, "save_every": 3, "kl_horizon": 100.0}
    return ppo.Config(**shared, ppo=ppo.PPOConfig(**numbers))


def play(act, run, resume, processes=NOBODY, mesh=COPIES):
    """What the script does, then the parameters that it saved as bytes."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for name, value in SIZES.items():
        setattr(task, name, value)
    script = {"sft": sft, "reward_model": reward_model, "ppo": ppo}[act]
    config = config_of(act, run, resume, processes, mesh)
    with acts.alone(config):
        script.main(config)
        tokenizer, network, params = sft.load(run)
        if act == "reward_model":
            params, *moments = kept_reward.load(run, network, tokenizer)
            params = {"params": params, "moments": np.asarray(moments)}
        if act == "ppo":
            params = checkpoint.restore(run / "ppo", params)
        if is_first():
            (run / "final.bin").write_bytes(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)))


def outcome(run, act):
    """Everything that an act leaves but its clock."""
    clock = ("seconds", "tokens_per_second")
    rows = [row for row in read_json_lines(run / "metrics.jsonl") if row["stage"] == act]
    return (run / "final.bin").read_bytes(), [{k: v for k, v in row.items() if k not in clock} for row in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("act", choices=ACTS)
    parser.add_argument("run", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--devices", type=int, default=1, help="of this process")
    parser.add_argument("--mesh", nargs="*", default=[], help="axis=size")
    parser.add_argument("--coordinator")
    parser.add_argument("--process-id", type=int)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    flags = (args.coordinator, 2, args.process_id) if args.coordinator else ()
    mesh = MeshConfig(**{name: int(size) for name, size in (axis.split("=") for axis in args.mesh)})
    sys.exit(play(args.act, args.run, args.resume, Processes(False, *flags, heartbeat=10), mesh))
