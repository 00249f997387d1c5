"""Sampling, side by side: plain, with shared prompts, with refilled slots, filtered; and what the machine itself can do.

    python benchmarks/generation.py --pairs 5

Prints one JSON line a task. Both sides of a comparison are run in turns on the same numbers, and what counts is the ratio
of each pair; `cpu_ratio` is of the process's CPU seconds, which other work on the machine disturbs less. Random weights, no
EOS: lengths are exactly what each task says. A roofline is the time that the FLOPs of the matrix products and the bytes of
weights and cache, counted from shapes, take at the rates of a product and a copy measured in the same process.
"""

import dataclasses
import json
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from roofline import Rates, machine
from work import MODELS

import rlhf_jax as rl
from rlhf_jax.generation.sampling import filter_top_k, filter_top_p


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the tasks."""

    sizes: tuple[str, ...] = ("tiny", "small")
    """Networks for plain generation."""
    pairs: int = 5
    batch: int = 32
    """Rows decoded side by side, everywhere."""
    prompt: int = 64
    new: int = 64
    shared_prompt: int = 512
    samples: int = 8
    queue: int = 256
    """Prompts of the comparison with refilled slots, answered with lengths that are geometric."""
    queue_prompt: int = 16
    mean_length: float = 16.0
    most_new: int = 128
    refill: int = 4
    vocabularies: tuple[int, ...] = (1024, 8192, 32768, 131072)
    """Of the logits that are filtered."""


def clock(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(one: Callable[[], object], other: Callable[[], object], pairs: int) -> dict:
    """How many times slower `one` is, pair by pair, after a first run of each that compiles."""
    jax.block_until_ready((one(), other()))
    times = [(clock(one), clock(other)) if i % 2 else (clock(other), clock(one))[::-1] for i in range(pairs)]
    wall, cpu = (sorted(a[i] / b[i] for a, b in times) for i in (0, 1))
    return {
        "ratio": round(statistics.median(wall), 3),
        "ratios": [round(x, 2) for x in wall],
        "cpu_ratio": round(statistics.median(cpu), 3),
        "cpu_ratios": [round(x, 2) for x in cpu],
        "seconds": [round(statistics.median(pair[i][0] for pair in times), 4) for i in (0, 1)],
        "cpu_seconds": [round(statistics.median(pair[i][1] for pair in times), 4) for i in (0, 1)],
    }


def prompts_of(rows: int, length: int, vocab: int) -> rl.PromptBatch:
    """Random tokens, no padding."""
    tokens = np.random.default_rng(0).integers(4, vocab, (rows, length))
    return rl.PromptBatch(jnp.asarray(tokens, jnp.int32), jnp.ones((rows, length), bool))


def report(task: str, line: dict) -> None:
    """One JSON line; memory is the process's peak so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"task": task, **line, "peak_rss_mb": round(peak)}), flush=True)


def sampler(model: rl.CausalModel, new: int, generate: Callable = rl.generate, **options) -> Callable:
    """`run(params, prompts, key, row_limits)`, compiled."""
    return jax.jit(partial(generate, model, max_new_tokens=new, eos_id=None, pad_id=0, **options))


def plain(config: Config, size: str, rates: Rates) -> None:
    """New tokens a second, prefill included, and the decode step beside its roofline."""
    network = MODELS[size]
    params, key = rl.transformer.init(jax.random.key(0), network), jax.random.key(1)
    prompts = prompts_of(config.batch, config.prompt, network.vocab_size)
    model = rl.causal_model(network)
    whole, first = (sampler(model, new) for new in (config.new, 1))
    runs = [lambda run=run: run(params, prompts, key) for run in (whole, first)]
    line = compare(*runs, config.pairs)
    step, step_cpu = ((line[k][0] - line[k][1]) / (config.new - 1) for k in ("seconds", "cpu_seconds"))
    weights = sum(x.size for x in jax.tree.leaves(params)) - params["embedding"].size
    columns = config.prompt + config.new
    cache = 2 * network.num_layers * config.batch * columns * network.num_kv_heads * network.head_dim
    seen = 2 * network.num_layers * config.batch * columns * network.num_heads * network.head_dim
    flops, moved = 2 * (config.batch * weights + seen), 4 * (weights + cache)
    bound = max(flops / rates.flops, moved / rates.bytes)
    tokens = config.batch * config.new
    report(
        f"generate {size}",
        {
            "tokens_per_second": round(tokens / line["seconds"][0]),
            "tokens_per_cpu_second": round(tokens / line["cpu_seconds"][0]),
            "step_ms": round(1e3 * step, 3),
            "step_cpu_ms": round(1e3 * step_cpu, 3),
            "step_flops": flops,
            "step_bytes": moved,
            "roofline_ms": round(1e3 * bound, 3),
            "roofline_fraction": round(bound / step, 3),
        },
    )


def shared(config: Config) -> None:
    """The samples of a prompt: it repeated against it once."""
    network = MODELS["tiny"]
    params, key = rl.transformer.init(jax.random.key(0), network), jax.random.key(1)
    prompts = prompts_of(config.batch // config.samples, config.shared_prompt, network.vocab_size)
    model = rl.causal_model(network)
    for new in (1, config.new):
        runs = [
            sampler(each, new, samples_per_prompt=config.samples).lower(params, prompts, key).compile()
            for each in (model._replace(fork_cache=None), model)
        ]
        line = compare(*[lambda run=run: run(params, prompts, key) for run in runs], config.pairs)
        line["temp_mb"] = [round(run.memory_analysis().temp_size_in_bytes / 1e6, 1) for run in runs]
        report(f"repeated / shared prompt, {new} new", line)


def continuous(config: Config) -> None:
    """Batches that wait for their longest row against slots that are refilled."""
    network = MODELS["tiny"]
    params, key = rl.transformer.init(jax.random.key(0), network), jax.random.key(1)
    prompts = prompts_of(config.queue, config.queue_prompt, network.vocab_size)
    lengths = np.random.default_rng(1).geometric(1 / config.mean_length, config.queue).clip(1, config.most_new)
    limits, model = jnp.asarray(lengths, jnp.int32), rl.causal_model(network)
    batched = sampler(model, config.most_new)
    options = {"num_slots": config.batch, "refill_size": config.refill}
    queued = sampler(model, config.most_new, rl.generate_continuously, **options)

    def batch_by_batch() -> list:
        parts = [slice(i, i + config.batch) for i in range(0, config.queue, config.batch)]
        return [
            batched(params, jax.tree.map(lambda x, part=part: x[part], prompts), key, row_limits=limits[part])
            for part in parts
        ]

    line = compare(batch_by_batch, lambda: queued(params, prompts, key, row_limits=limits), config.pairs)
    useful = int(lengths.sum())
    rates = {"useful_tokens": useful, "tokens_per_second": [round(useful / x) for x in line["seconds"]]}
    report("batches / refilled slots", {**rates, **line})


def sorted_top_p(logits: jax.Array, p: float) -> jax.Array:
    """`rl.filter_top_p` with the whole vocabulary sorted."""
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    kept = jnp.cumsum(probabilities, axis=-1) - probabilities < p
    return jnp.where(logits >= jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True), logits, -jnp.inf)


def sorted_top_k(logits: jax.Array, k: int) -> jax.Array:
    """`rl.filter_top_k` with `lax.top_k`."""
    return jnp.where(logits >= jax.lax.top_k(logits, k)[0][:, -1:], logits, -jnp.inf)


def filters(config: Config) -> None:
    """Top-p and top-k: a sort against bisection."""
    tasks = {
        "sort / bisection, top-p 0.9": (partial(sorted_top_p, p=0.9), partial(filter_top_p, p=0.9)),
        "lax.top_k / bisection, top-k 50": (partial(sorted_top_k, k=50), partial(filter_top_k, k=50)),
    }
    for vocab in config.vocabularies:
        logits = 3 * jax.random.normal(jax.random.key(0), (config.batch, vocab))
        for task, sides in tasks.items():
            runs = [partial(jax.jit(side), logits) for side in sides]
            report(f"{task}, {vocab} tokens", compare(*runs, config.pairs))


def main(config: Config) -> None:
    """All tasks."""
    rates = machine()
    report("machine", {"gflops": round(rates.flops / 1e9, 1), "gbytes": round(rates.bytes / 1e9, 1)})
    filters(config)
    continuous(config)
    shared(config)
    for size in config.sizes:
        plain(config, size, rates)


if __name__ == "__main__":
    main(tyro.cli(Config))
