"""A tiny run for the tests of this folder: `python loop.py RUN [--steps N] [--save-every N] [--sleep S] ...`.

Everything a real act has (train step, schedule, batches by step, noise by step, log, checkpoints) over a network of two
matrices, so that a process lives for three seconds. Writes `final.bin` (the last state's bytes) and `final.json`.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.data.batching import batch_indices
from rlhf_jax.functional.logprobs import token_logprobs
from rlhf_jax.runtime.fingerprint import fingerprint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.runtime.processes import Processes, is_first, joined
from rlhf_jax.runtime.resume import guarded, resumable
from rlhf_jax.runtime.runs import locked, write_json
from rlhf_jax.runtime.sharding import make_mesh, place, replicated, shard_batch
from rlhf_jax.training.train_step import init_train_state, make_train_step

ROWS, LENGTH, VOCAB, WIDTH, SEED = 40, 8, 11, 6, 3
HEARTBEAT = 10
"""Seconds; of two processes."""
YEAR = 365 * 24 * 3600


def objective(params, batch):
    """Weighted next-token loss of a bigram network with noise on its hidden layer."""
    hidden = params["embedding"][batch["tokens"]]
    hidden = hidden + 0.1 * jax.random.normal(jax.random.wrap_key_data(batch["noise"]), hidden.shape)
    logprobs = token_logprobs(jnp.tanh(hidden) @ params["output"], batch["tokens"])
    total = -jnp.sum(logprobs * batch["weights"][:, None])
    return total, jnp.asarray(batch["tokens"].size, jnp.float32), {}


def raising_sink(step, values):
    values["loss"] = 1e9
    raise LookupError(f"no tracker at step {step}")


def jumping(clock, year):
    """`clock` as it is when somebody sets it a year back and forward again, all the time."""
    readings = itertools.count()
    return lambda: clock() - next(readings) % 2 * year


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--sleep", type=float, default=0.01)
    parser.add_argument("--for-good", type=int)
    parser.add_argument("--sink", action="store_true")
    parser.add_argument("--jumping-clock", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--process-id", type=int, default=0)
    parser.add_argument("--devices", type=int, default=1, help="of this process")
    args = parser.parse_args(argv)
    if args.jumping_clock:
        time.time, time.time_ns = jumping(time.time, YEAR), jumping(time.time_ns, YEAR * 10**9)
    jax.config.update("jax_num_cpu_devices", args.devices)
    flags = (args.coordinator, 2, args.process_id) if args.coordinator else ()
    with joined(args.run, Processes(False, *flags, heartbeat=HEARTBEAT)):
        play(args)


def play(args):
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[2] / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    rng = np.random.default_rng(SEED)
    data = {"tokens": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32), "weights": rng.random(ROWS, np.float32)}
    optimizer = optax.adam(optax.linear_schedule(1e-2, 0.0, args.steps))
    train_step = jax.jit(guarded(make_train_step(objective, optimizer)), donate_argnums=0)
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}
    state, root, mesh = init_train_state(params, optimizer), jax.random.key(SEED), make_mesh()
    state = jax.tree.map(lambda x: place(x, replicated(mesh)), state)
    options = {"for_good": args.for_good, "facts": {"rows": ROWS}}
    sinks = [raising_sink] if args.sink else []
    with locked(args.run), resumable(args.run, "sft", state, save_every=args.save_every, **options) as kept:
        state = kept.state
        log_to = args.run / "metrics.jsonl"
        with MetricLog(log_to, "sft", args.steps, show={}, first_step=kept.first_step, sinks=sinks) as log:
            for step in range(kept.first_step, args.steps):
                rows = batch_indices(SEED, step, num_examples=ROWS, batch_size=8)
                noise = np.asarray(jax.random.key_data(jax.random.fold_in(root, step)))
                sharded = shard_batch({name: x[rows] for name, x in data.items()}, mesh)
                batch = kept.batch(step, {**sharded, "noise": noise})
                state, metrics = train_step(state, batch)
                metrics = kept.check(step, state, metrics, batch)
                log.write(step, metrics, tokens=batch["tokens"].size)
                kept.finish(step, state)
                if step == kept.first_step:
                    print("started", flush=True)
                time.sleep(args.sleep)
    fingerprints = fingerprint(state)
    if not is_first():
        return
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    (args.run / "final.bin").write_bytes(b"".join(leaves))
    write_json(args.run / "final.json", fingerprints)


SHAPES = {"embedding": (VOCAB, WIDTH), "output": (WIDTH, VOCAB)}

if __name__ == "__main__":
    main(sys.argv[1:])
