"""Logits at once or in chunks: temporaries over the vocabulary, seconds over tokens, whole steps; policy and critic in turn.

    python benchmarks/memory.py [--only-critic]

Prints one JSON line a measurement. Memory is the compiler's count of a step's temporaries (`memory_analysis`): of the value and
gradient of the SFT objective, and of a PPO step, so nothing as large is run. Seconds are medians of steps taken in turns, and
what counts is the ratio. Ten minutes of CPU time; other work on the machine blurs the ratios.
"""

import argparse
import dataclasses
import json
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from work import LEARNING_RATE, MODELS

import rlhf_jax as rl

LOGITS = 2**21
"""Logits of a chunk: 8 MB in float32."""


def network(vocab_size, width, num_layers=1, logits_chunk=None):
    """Heads of 16 (of 64 from a width of 512 on), an MLP four times as wide."""
    head_dim = 64 if width >= 512 else 16
    heads = width // head_dim
    return rl.TransformerConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        model_dim=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        mlp_dim=4 * width,
        logits_chunk=logits_chunk,
    )


def texts(num_rows, length, vocab_size, first_counted=0):
    """Random rows; the tokens from `first_counted` on count."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (num_rows, length)).astype(np.int32)
    mask = np.broadcast_to(np.arange(length) >= max(first_counted, 1), tokens.shape)
    return rl.SequenceBatch(jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32), jnp.asarray(mask))


def compiled(config, batch, objective=rl.sft):
    """Parameters and the compiled value and gradient of the mean loss."""
    params = jax.jit(rl.transformer.init, static_argnums=1)(jax.random.key(0), config)
    bound = objective(rl.causal_model(config))

    def loss(params, batch):
        total, weight, metrics = bound(params, batch)
        return total / weight, metrics

    return params, jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, batch).compile()


def megabytes(step):
    """Of temporaries."""
    return round(step.memory_analysis().temp_size_in_bytes / 1e6, 1)


def in_turns(runs, repeats):
    """Seconds of each run, one after the other, `repeats` times after a first one that does not count."""
    seconds = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            if i:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def memory(width=16, num_rows=16, length=512):
    """Temporaries over the vocabulary; a chunk is always of `LOGITS` logits."""
    for vocab_size in (8_192, 32_768, 131_072):
        batch, config = texts(num_rows, length, vocab_size), network(vocab_size, width)
        chunk = LOGITS // vocab_size
        plain, chunked = (compiled(dataclasses.replace(config, logits_chunk=size), batch)[1] for size in (None, chunk))
        line = {"what": "temporaries, MB", "vocabulary": vocab_size, "tokens": num_rows * length, "chunk": chunk}
        one = round(4e-6 * num_rows * length * vocab_size, 1)
        print(json.dumps(line | {"one [B, T, V]": one, "plain": megabytes(plain), "chunked": megabytes(chunked)}))


def critic_first(num_rows=8, length=128, new=64):
    """Temporaries of a PPO step of `small` networks, both at once and the critic first."""
    network = MODELS["small"]
    model, optimizer, read = rl.causal_model(network), rl.adam_optimizer(LEARNING_RATE), {"completion_columns": new}
    ids, floats = jnp.ones((num_rows, length), jnp.int32), jnp.zeros((num_rows, length))
    rollout = rl.Experience(ids, ids, ids > 0, floats, floats, old_values=floats, returns=floats)

    def start():
        trunk = rl.transformer.init(jax.random.key(0), network)
        critic = {"trunk": trunk, "head": rl.init_value_head(network.model_dim)}
        return rl.init_train_state({"policy": trunk, "critic": critic}, optimizer), rl.PolicyBatch(rollout)

    def temporaries(first):
        objective = rl.actor_critic(model, rl.separate_critic(model, **read), **read, critic_first=first)
        step = jax.jit(rl.make_train_step(objective, optimizer), donate_argnums=0)
        return megabytes(step.lower(*jax.eval_shape(start)).compile())

    line = {"what": "temporaries of a PPO step, MB", "rows": num_rows, "length": length}
    print(json.dumps(line | {"both at once": temporaries(False), "critic first": temporaries(True)}))


def per_token(width=16, vocab_size=8_192, length=256, largest_plain=16_384):
    """Microseconds a token over the tokens of a step, all steps in turns."""
    runs = {}
    for num_tokens in (1_024, 4_096, 16_384, 65_536):
        batch = texts(num_tokens // length, length, vocab_size)
        sizes = {"chunked": LOGITS // vocab_size} | ({"plain": None} if num_tokens <= largest_plain else {})
        for name, size in sizes.items():
            params, step = compiled(network(vocab_size, width, logits_chunk=size), batch)
            runs[num_tokens, name] = partial(step, params, batch)
    for (num_tokens, name), times in in_turns(runs, repeats=9).items():
        micro = [round(1e6 * seconds / num_tokens, 1) for seconds in statistics.quantiles(times)]
        line = {"what": "microseconds a token, quartiles", "vocabulary": vocab_size, "tokens": num_tokens}
        print(json.dumps(line | {name: micro}), flush=True)


def bonus(model):
    """A PPO loss whose entropies have a gradient, on the rows of the texts."""
    objective = rl.policy_gradient(model, rl.reinforce_loss, entropy_coef=0.01)

    def of_texts(params, batch):
        ones = jnp.ones(batch.tokens.shape)
        data = rl.Experience(batch.tokens, batch.segment_ids, batch.loss_mask, -ones, ones)
        return objective({"policy": params}, rl.PolicyBatch(data))

    return of_texts


def whole_steps(repeats):
    """Seconds of a step in chunks over those of the plain one; two layers; also where three quarters of a row are prompt."""
    for vocab_size, width, num_rows, length in ((1_024, 64, 32, 64), (8_192, 512, 8, 64)):
        for name, objective in (("sft", rl.sft), ("policy, entropy bonus", bonus)):
            for prompt in (0, 3 * length // 4):
                batch = texts(num_rows, length, vocab_size, prompt)
                sizes = {"plain": None, **{f"{n} columns": n * num_rows for n in (4, 16)}}
                runs = {}
                for key, size in sizes.items():
                    params, step = compiled(network(vocab_size, width, 2, size), batch, objective)
                    runs[key] = partial(step, params, batch)
                seconds = in_turns(runs, repeats)
                ratios = {
                    key: round(statistics.median(a / b for a, b in zip(times, seconds["plain"], strict=True)), 3)
                    for key, times in seconds.items()
                    if key != "plain"
                }
                line = {"what": f"seconds over plain, {name}", "vocabulary": vocab_size, "width": width}
                line |= {"tokens": num_rows * length, "prompt": prompt, **ratios}
                print(json.dumps(line | {"plain, ms": round(1e3 * statistics.median(seconds["plain"]), 1)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only-critic", action="store_true", help="the PPO step alone, half a minute")
    options = parser.parse_args()
    critic_first()
    if not options.only_critic:
        memory()
        whole_steps(options.repeats)
        per_token()
