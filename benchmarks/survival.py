"""What surviving costs: the default run's steps with and without their guard, and what checks and checkpoints take beside them.

    python benchmarks/survival.py

Plain and guarded steps alternate, at the sizes of `rlhf.py`; what counts is the ratio of each pair. A block is as many steps as
lie between two checkpoints; `beside` is what it spends, over what its steps take, on checks and its one save, which is waited
for here and not in a run. Prints one JSON line for act 1, one for act 3, and one for the fingerprint of a gigabyte.
Two CPU cores, three minutes.
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
from rlhf_jax.runtime.resume import guarded, resumable
from rlhf_jax.runtime.sharding import make_mesh, shard_batch
from rlhf_jax.training.optimizers import adam_optimizer
from rlhf_jax.training.ppo import PPOBatch, critic_from_trunk, init_ppo_state
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import Frozen


def block(step_fn, state, batches, run, num_steps):
    """Steps inside `resumable`, whose one save is waited for; the state, and seconds beside the steps and of them."""
    begin, computing = time.perf_counter(), 0.0
    with resumable(run, "act", state, save_every=num_steps) as kept:
        for step in range(num_steps):
            start = time.perf_counter()
            batch = kept.batch(step, next(batches))
            state, metrics = jax.block_until_ready(step_fn(state, batch))
            computing += time.perf_counter() - start
            kept.check(step, state, metrics, batch)
            kept.finish(step, state)
    return state, time.perf_counter() - begin - computing, computing


def in_turns(step_fns, state, batches, num_pairs):
    """Seconds of a step of each kind, after a first one of each that compiles."""
    seconds = {kind: [] for kind in step_fns}
    for i in range(-1, num_pairs):
        for kind in list(step_fns)[:: 1 if i % 2 else -1]:
            batch, begin = next(batches), time.perf_counter()
            state, _ = jax.block_until_ready(step_fns[kind](state, batch))
            if i >= 0:
                seconds[kind].append(time.perf_counter() - begin)
    return state, seconds


def compare(name, step_fn, state, batches, *, num_steps, num_blocks, num_pairs):
    """What the guard inside the step costs, and what checks and a save cost beside `num_steps` of them."""
    step_fns = {kind: jax.jit(f, donate_argnums=0) for kind, f in (("plain", step_fn), ("guarded", guarded(step_fn)))}
    state, seconds = in_turns(step_fns, state, batches, num_pairs)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    shares = []
    for i in range(-1, num_blocks):
        with tempfile.TemporaryDirectory() as folder:
            size = num_steps if i >= 0 else 1
            state, beside, computing = block(step_fns["guarded"], state, batches, Path(folder), size)
            if i >= 0:  # the first save compiles
                shares.append(beside / computing)
    line = {"what": name, "steps": num_steps, "step_seconds": round(statistics.median(seconds["plain"]), 4)}
    quartiles = statistics.quantiles(ratios)
    line |= {"guarded / plain step": round(quartiles[1], 4), "its quartiles": [round(quartiles[i], 4) for i in (0, 2)]}
    print(json.dumps(line | {"beside": round(statistics.median(shares), 4), "all": [round(x, 4) for x in shares]}))


def main(num_blocks):
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
    options = {"num_blocks": num_blocks, "num_steps": numbers.save_every, "num_pairs": 60}
    compare("act 1", step_fn, state, batches(rows, numbers.batch_size), **options)

    numbers = ppo.PPOConfig(learning_rate=1e-5)
    head = init_reward_head(jax.random.key(1), network.model_dim)
    frozen = Frozen(params, {"trunk": params, "head": head}, jnp.zeros(()), jnp.ones(()))
    optimizer, iteration = ppo.make_iteration(numbers, config, network, network, tokenizer.eos_id, tokenizer.pad_id)
    state = init_ppo_state(params, critic_from_trunk(params, network.model_dim), optimizer, kl_coef=numbers.kl_coef)
    prompts = task.prompt_rows(config, tokenizer, task.load_prompts(config)[0])
    key = jax.random.key(2)
    options = {"num_blocks": num_blocks, "num_steps": numbers.save_every, "num_pairs": 15}
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
    parser.add_argument("--blocks", type=int, default=5)
    main(parser.parse_args().blocks)
