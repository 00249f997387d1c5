"""What surviving costs: the default run's steps with and without guards, checks and checkpoints, in turns.

    python benchmarks/survival.py

A block is as many steps as lie between two checkpoints (the one save included), at the sizes of `rlhf.py`; plain and guarded
blocks alternate, and what counts is the ratio of each pair. Prints one JSON line for act 1, one for act 3, and one for the
fingerprint of a gigabyte. Two CPU cores, about ten minutes; other work on the machine blurs the ratios, not their median.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.append(str(Path(__file__).parents[1] / "experiments"))

import ppo
import sft
import task

from rlhf_jax.data.batching import batch_indices
from rlhf_jax.models import transformer
from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.objectives import sft as sft_objective
from rlhf_jax.runtime.fingerprint import fingerprint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.runtime.resume import guarded, resumable
from rlhf_jax.runtime.sharding import make_mesh, shard_batch
from rlhf_jax.training.optimizers import adam_optimizer
from rlhf_jax.training.ppo import PPOBatch, critic_from_trunk, init_ppo_state
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import Frozen


def plain_block(step_fn, state, batches, run, num_steps):
    """Steps and their log, nothing else."""
    with MetricLog(run / "metrics.jsonl", "act", num_steps, show={}) as log:
        for step in range(num_steps):
            state, metrics = step_fn(state, next(batches))
            log.write(step, metrics, tokens=1)
    return state


def surviving_block(step_fn, state, batches, run, num_steps):
    """The same inside `resumable`; its one save is waited for."""
    with (
        resumable(run, "act", state, save_every=num_steps) as kept,
        MetricLog(kept.log_to, "act", num_steps, show={}) as log,
    ):
        for step in range(num_steps):
            batch = kept.batch(step, next(batches))
            state, metrics = step_fn(state, batch)
            log.write(step, kept.check(step, state, metrics, batch), tokens=1)
            kept.finish(step, state)
    return state


def compare(name, step_fn, state, batches, *, num_steps, num_pairs):
    """Seconds of both kinds of blocks, in turns."""
    kinds = {
        "plain": (plain_block, jax.jit(step_fn, donate_argnums=0)),
        "surviving": (surviving_block, jax.jit(guarded(step_fn), donate_argnums=0)),
    }
    seconds = {kind: [] for kind in kinds}
    for i in range(-1, num_pairs):
        for kind in list(kinds)[:: 1 if i % 2 else -1]:
            block, jitted = kinds[kind]
            with tempfile.TemporaryDirectory() as folder:
                begin = time.monotonic()
                state = jax.block_until_ready(block(jitted, state, batches, Path(folder), num_steps if i >= 0 else 2))
                if i >= 0:  # the first pair compiles
                    seconds[kind].append(time.monotonic() - begin)
    ratios = sorted(b / a for a, b in zip(*seconds.values(), strict=True))
    medians = {f"{kind}_seconds": round(statistics.median(times), 3) for kind, times in seconds.items()}
    line = {"what": name, "steps": num_steps, "pairs": num_pairs, **medians}
    print(json.dumps(line | {"ratio": round(statistics.median(ratios), 4), "ratios": [round(r, 3) for r in ratios]}))


def main(num_pairs):
    """Both acts and the fingerprint."""
    mesh, config, numbers = make_mesh(), task.TaskConfig(), sft.SFTConfig()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, records, _ = task.load_demonstrations(config, Path(folder))
    rows = task.demonstration_rows(config, tokenizer, records)
    network = sft.computed(sft.network_config(numbers, tokenizer.vocab_size), config.dtype)
    params = jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), network)

    def batches(data, size):
        for step in itertools.count():
            picked = batch_indices(0, step, num_examples=len(data.tokens), batch_size=size)
            yield shard_batch(jax.tree.map(lambda x, picked=picked: x[picked], data), mesh)

    optimizer = adam_optimizer(1e-4)
    step_fn = make_train_step(sft_objective(transformer.causal_model(network)), optimizer)
    state = init_train_state(jax.tree.map(jnp.copy, params), optimizer)
    options = {"num_steps": numbers.save_every, "num_pairs": num_pairs}
    compare("act 1", step_fn, state, batches(rows, numbers.batch_size), **options)

    numbers = ppo.PPOConfig(learning_rate=1e-5)
    head = init_reward_head(jax.random.key(1), network.model_dim)
    frozen = Frozen(params, {"trunk": params, "head": head}, jnp.zeros(()), jnp.ones(()))
    optimizer, iteration = ppo.make_iteration(numbers, config, network, network, tokenizer.eos_id, tokenizer.pad_id)
    state = init_ppo_state(params, critic_from_trunk(params, network.model_dim), optimizer, kl_coef=numbers.kl_coef)
    prompts = task.prompt_rows(config, tokenizer, task.load_prompts(config)[0])
    key = jax.random.key(2)
    options = {"num_steps": numbers.save_every, "num_pairs": num_pairs}
    compare(
        "act 3",
        lambda state, batch: iteration(frozen, state, PPOBatch(batch), key),
        state,
        batches(prompts, numbers.batch_size),
        **options,
    )

    gigabyte = jnp.arange(2**28, dtype=jnp.float32)
    fingerprint(gigabyte)
    begin = time.monotonic()
    fingerprint(gigabyte)
    seconds = time.monotonic() - begin
    print(json.dumps({"what": "fingerprint of 2^30 bytes", "device": jax.devices()[0].device_kind, "seconds": seconds}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    main(parser.parse_args().pairs)
