"""SFT, reward model, generation, PPO, GRPO and DPO on the work of `work.py`, one process a task.

    python benchmarks/tasks.py --task ppo --size tiny

prints one JSON line: units a second of wall time and of CPU time (medians of the steps after the first ones), seconds from
the start of the process to the end of the first step and those of compiling, the process's largest memory, and the
roofline (`roofline.py`). Nothing here is faster than what a user of the package gets.
"""

import dataclasses
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from roofline import Phase, Rates, line, machine, num_bytes
from work import FIRST_WORD, LEARNING_RATE, MODELS, STEPS, Sizes, Weights, stored_weights, words

import rlhf_jax as rl
from rlhf_jax.runtime.heap import COMPILED, give_back_after_compiling
from rlhf_jax.training.ppo import PPOIteration
from rlhf_jax.types import Metrics, Objective, Params


class Task(NamedTuple):
    """Work that is repeated."""

    step: Callable[[int], Any]
    """Does it once, with the data of step i; what it returns is waited for."""
    units: int
    unit: str
    count: Callable[[], dict[str, Phase]]
    """What a step multiplies and moves at least."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One task."""

    task: Literal["sft", "rm", "gen", "ppo", "grpo", "dpo"]
    size: Literal["tiny", "small"]
    steps: int = 0
    """Measured ones; 0 = as many as `work.STEPS` says."""
    weights: Path = Path(tempfile.gettempdir()) / "rlhf_jax_benchmarks"
    """Random weights as Hugging Face folders, written where they are missing."""


def supervised(network: rl.TransformerConfig, sizes: Sizes, weights: Weights) -> Task:
    """Next-token loss over whole rows."""
    batch = (sizes.rows, sizes.length)
    mask = jnp.broadcast_to(jnp.arange(sizes.length) > 0, batch)

    def data(i: int) -> rl.SequenceBatch:
        return rl.SequenceBatch(jnp.asarray(words(i, network.vocab_size, *batch)), jnp.ones(batch, jnp.int32), mask)

    units = sizes.rows * sizes.length
    return training(rl.sft(rl.causal_model(network)), weights.policy(), data, units, "tokens")


def pairs(network: rl.TransformerConfig, sizes: Sizes, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, segments and completion mask `[B, 2, T]`: two responses to each prompt."""
    half, shape = sizes.length // 2, (sizes.rows, 2, sizes.length)
    tokens = words(seed, network.vocab_size, *shape)
    tokens[:, 1, :half] = tokens[:, 0, :half]
    return jnp.asarray(tokens), jnp.ones(shape, jnp.int32), jnp.broadcast_to(jnp.arange(sizes.length) >= half, shape)


def halves(sizes: Sizes) -> rl.SharedPrompts:
    """Of a row of `pairs`: both responses run their prompt once."""
    return rl.SharedPrompts(prompt=sizes.length // 2, completion=sizes.length // 2)


def reward_model(network: rl.TransformerConfig, sizes: Sizes, weights: Weights) -> Task:
    """Bradley-Terry on a scalar head."""
    ranks, mask = (jnp.broadcast_to(jnp.asarray(row), (sizes.rows, 2)) for row in ([0, 1], [True, True]))

    def data(i: int) -> rl.RankingBatch:
        return rl.RankingBatch(*pairs(network, sizes, i), ranks=ranks, mask=mask)

    objective = rl.reward_model(rl.causal_model(network), shared=halves(sizes))
    return training(objective, weights.scorer(), data, sizes.rows, "pairs")


def dpo(network: rl.TransformerConfig, sizes: Sizes, weights: Weights) -> Task:
    """The sigmoid loss; the reference's log-probs are computed in every step, by a frozen copy."""
    model, mask = rl.causal_model(network), jnp.ones((sizes.rows,), bool)
    objective = rl.preference(model, rl.dpo_loss, beta=0.1, shared=halves(sizes))

    def data(i: int) -> rl.PreferenceBatch:
        return rl.PreferenceBatch(*pairs(network, sizes, i), mask=mask)

    def referred(ref_params: Params, batch: rl.PreferenceBatch) -> rl.PreferenceBatch:
        return batch.replace(ref_logprobs=rl.pair_token_logprobs(model, ref_params, batch, halves(sizes)))

    return training(objective, weights.policy(), data, sizes.rows, "pairs", referred, weights.policy())


def training(
    objective: Objective,
    params: Params,
    data: Callable[[int], Any],
    units: int,
    unit: str,
    referred: Callable[[Params, Any], Any] | None = None,
    frozen: Params | None = None,
) -> Task:
    """Steps of Adam on `objective`; `referred(frozen, batch)` completes the batch with what a frozen copy says of it."""
    optimizer = rl.adam_optimizer(LEARNING_RATE)
    train_step = rl.make_train_step(objective, optimizer)
    state = rl.init_train_state(params, optimizer)

    def whole(frozen: Params, state: rl.TrainState, batch: Any) -> tuple[rl.TrainState, Metrics]:
        return train_step(state, batch if referred is None else referred(frozen, batch))

    jitted = jax.jit(whole, donate_argnums=1)

    def step(i: int) -> Metrics:
        nonlocal state
        state, metrics = jitted(frozen, state, data(i))
        return metrics

    def count() -> dict[str, Phase]:
        shapes = jax.eval_shape(lambda: (frozen, state, data(0)))
        moved = num_bytes(frozen) + updated_bytes(state.params)
        return {"step": Phase(rl.matmul_flops(whole, *shapes), moved)}

    return Task(step, units, unit, count)


def updated_bytes(params: Params) -> int:
    """Moved at least by a step of Adam: parameters read forward, backward and then changed, gradient, two moments."""
    return 9 * num_bytes(params)


def sampling_phases(network: rl.TransformerConfig, sample: Callable, rows: int, sizes: Sizes, *args: Any) -> dict:
    """Prefill and decode: every new token reads the weights, the output matrix among them, and what the cache holds."""
    shapes = jax.eval_shape(lambda: args)
    whole, first = (rl.matmul_flops(sample, *shapes, while_steps=steps) for steps in (sizes.new - 1, 0))
    params = shapes[0]
    weights = num_bytes(params) - (0 if network.tie_embeddings else num_bytes(params["embedding"]))
    per_column = (
        2 * jnp.dtype(network.dtype).itemsize * network.num_layers * rows * network.num_kv_heads * network.head_dim
    )
    columns = sum(sizes.prompt + i for i in range(1, sizes.new))
    decode = Phase(whole - first, (sizes.new - 1) * weights + per_column * columns)
    return {"prefill": Phase(first, weights + per_column * sizes.prompt), "decode": decode}


def sampler(network: rl.TransformerConfig, sizes: Sizes, samples_per_prompt: int = 1) -> Callable:
    """`sample(params, prompts, key)`."""
    options = {"max_new_tokens": sizes.new, "eos_id": None, "pad_id": 0, "samples_per_prompt": samples_per_prompt}
    return partial(rl.generate, rl.causal_model(network), **options)


def prompts(network: rl.TransformerConfig, rows: int, length: int, seed: int) -> rl.PromptBatch:
    """Without padding."""
    return rl.PromptBatch(jnp.asarray(words(seed, network.vocab_size, rows, length)), jnp.ones((rows, length), bool))


def generation(network: rl.TransformerConfig, sizes: Sizes, weights: Weights) -> Task:
    """Ancestral sampling with a cache."""
    params = weights.policy()
    batch, sample = prompts(network, sizes.prompts, sizes.prompt, 0), sampler(network, sizes)
    jitted = jax.jit(sample)
    return Task(
        lambda i: jitted(params, batch, jax.random.key(i)),
        sizes.prompts * sizes.new,
        "tokens",
        lambda: sampling_phases(network, sample, sizes.prompts, sizes, params, batch, jax.random.key(0)),
    )


def ppo_iteration(
    network: rl.TransformerConfig, sizes: Sizes, weights: Weights
) -> tuple[PPOIteration, rl.Frozen, rl.PPOState]:
    """Policy, critic of its own, frozen reference and reward model: an iteration, what it reads, and where it starts."""
    sample, score, experience, update, optimizer = ppo_parts(network, sizes)
    policy, rewarding = weights.policy(), weights.scorer()
    frozen = rl.Frozen(ref_params=policy, reward_params=rewarding)
    state = rl.init_ppo_state(policy, rewarding, optimizer, kl_coef=0.05)
    return rl.make_ppo_iteration(sample, score, experience, update), frozen, state


def ppo_parts(network: rl.TransformerConfig, sizes: Sizes) -> tuple[Callable, Callable, Callable, Callable, Any]:
    """What an iteration is composed of, and the optimiser."""
    model, optimizer = rl.causal_model(network), rl.adam_optimizer(LEARNING_RATE)
    read = {"completion_columns": sizes.new}
    critic, score = rl.separate_critic(model, **read), rl.make_score_fn(model, missing_eos_penalty=0.0)
    experience = rl.make_experience_fn(model, critic, **read)
    first = network is MODELS["small"]  # half the activations; the short products of `tiny` are faster side by side
    train_step = rl.make_train_step(rl.actor_critic(model, critic, **read, critic_first=first), optimizer)
    rounds = {"num_epochs": sizes.epochs, "num_minibatches": sizes.minibatches}
    update = rl.make_ppo_update(train_step, kl_target=None, **rounds)
    return sampler(network, sizes), score, experience, update, optimizer


def ppo(network: rl.TransformerConfig, sizes: Sizes, weights: Weights) -> Task:
    """One program an iteration."""
    iteration, frozen, state = ppo_iteration(network, sizes, weights)
    jitted = jax.jit(iteration, donate_argnames="state")

    def batch(i: int) -> rl.PPOBatch:
        return rl.PPOBatch(prompts(network, sizes.prompts, sizes.prompt, i))

    def step(i: int) -> Metrics:
        nonlocal state
        state, metrics = jitted(frozen, state, batch(i), jax.random.key(i))
        return metrics

    def count() -> dict[str, Phase]:
        sample, *parts, _ = ppo_parts(network, sizes)
        policy, key = frozen.ref_params, jax.random.key(0)
        sampled = jax.eval_shape(sample, policy, batch(0).prompts, key)
        shapes = jax.eval_shape(lambda: (frozen, state))
        learned = rl.matmul_flops(rl.make_learn(*parts), *shapes, sampled, None, key)
        moved = num_bytes(frozen) + sizes.epochs * sizes.minibatches * updated_bytes(state.params)
        phases = sampling_phases(network, sample, sizes.prompts, sizes, policy, batch(0).prompts, key)
        return {**phases, "learn": Phase(learned, moved)}

    return Task(step, sizes.prompts, "episodes", count)


def grpo(network: rl.TransformerConfig, sizes: Sizes, weights: Weights) -> Task:
    """Groups of samples, and a reward in Python that reads their words: how many of them are different."""
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{i}" if i >= FIRST_WORD else f"<{i}>": i for i in range(network.vocab_size)}
    decode = Tokenizer(models.WordLevel(vocabulary, unk_token="<3>")).decode_batch
    model, optimizer = rl.causal_model(network), rl.adam_optimizer(LEARNING_RATE)
    advantages = rl.per_completion(rl.group_relative, group_size=sizes.group_size)
    sample = sampler(network, sizes, sizes.group_size)
    read = {"completion_columns": sizes.new}
    grouped = {"kl_in_reward": False, "group_size": sizes.group_size}
    experience = rl.make_policy_experience_fn(model, advantages, **grouped, **read)
    loss = partial(rl.clipped_policy_loss, clip_low=0.2, clip_high=0.2)
    options = {"aggregate": rl.sequence_mean, "kl_coef": 0.04, "kl_fn": rl.k3, **read}
    objective = rl.policy_gradient(model, lambda *args, mask: loss(*args), **options)
    update = rl.make_ppo_update(rl.make_train_step(objective, optimizer), num_epochs=1, kl_target=None)
    policy = weights.policy()
    frozen = rl.Frozen(ref_params=policy)
    state = rl.init_ppo_state(policy, None, optimizer)

    def learn(frozen: rl.Frozen, state: rl.PPOState, generation: rl.Generation, scores: jax.Array, key: jax.Array):
        return rl.make_learn(lambda *_: scores, experience, update)(frozen, state, generation, None, key)

    jitted, learned = jax.jit(sample), jax.jit(learn, donate_argnums=1)

    def batch(i: int) -> rl.PromptBatch:
        return prompts(network, sizes.groups, sizes.prompt, i)

    def step(i: int) -> Metrics:
        nonlocal state
        sample_key, key = jax.random.split(jax.random.key(i))
        answers = jitted(state.params["policy"], batch(i), sample_key)
        texts = decode(np.asarray(answers.tokens[:, sizes.prompt :]))
        scores = rl.check_scores([len(set(text.split())) / sizes.new for text in texts], num_completions=len(texts))
        state, metrics = learned(frozen, state, answers, jnp.asarray(scores), key)
        return metrics

    def count() -> dict[str, Phase]:
        key = jax.random.key(0)
        rows = sizes.groups * sizes.group_size
        sampled = jax.eval_shape(sample, policy, batch(0), key)
        shapes = jax.eval_shape(lambda: (frozen, state, sampled, jnp.zeros((rows,)), key))
        moved = num_bytes(frozen) + updated_bytes(state.params)
        phases = sampling_phases(network, sample, rows, sizes, policy, batch(0), key)
        return {**phases, "learn": Phase(rl.matmul_flops(learn, *shapes), moved)}

    return Task(step, sizes.groups * sizes.group_size, "completions", count)


TASKS = {"sft": supervised, "rm": reward_model, "gen": generation, "ppo": ppo, "grpo": grpo, "dpo": dpo}


def process_age() -> float:
    """Seconds since this process was started: imports count."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        started = int(stat.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(uptime.read().split()[0]) - started


def measure(task: Task, warmup: int, steps: int, rates: Callable[[], Rates] = machine) -> dict[str, Any]:
    """Do it so often, and what came of it."""
    compiling: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED:
            compiling.append(seconds)

    give_back_after_compiling()
    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.block_until_ready(task.step(0))
    first = process_age()
    times = []
    for i in range(1, warmup + steps):
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(task.step(i))
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = (statistics.median(x) for x in zip(*times[warmup - 1 :], strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "unit": f"{task.unit}/s",
        "value": round(task.units / wall, 3),
        "units_per_cpu_s": round(task.units / cpu, 3),
        "step_s_median": round(wall, 4),
        "time_to_first_step_s": round(first, 2),
        "compile_s": round(sum(compiling), 2),
        "peak_rss_mb": round(peak, 1),
        "roofline": line(task.count(), rates(), wall),
    }


def main(config: Config) -> None:
    """One task."""
    network, warmup = MODELS[config.size], 1 if config.task in ("ppo", "grpo") else 2
    task = TASKS[config.task](network, Sizes(), stored_weights(network, config.weights / config.size))
    found = measure(task, warmup, config.steps or STEPS[config.size][config.task])
    versions = {"jax": jax.__version__, "devices": [device.device_kind for device in jax.devices()]}
    print(json.dumps({"lib": "rlhf_jax", "task": config.task, "size": config.size, **found, "versions": versions}))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
