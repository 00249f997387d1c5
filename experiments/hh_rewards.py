"""Act 2 of the HH job: reward models, judges, and reward models that learn shuffled labels."""

import functools

import hh_data
import jax
import jax.numpy as jnp
import numpy as np
import ppo
import reward_model
import sft
import task
from acts import num_steps_of
from hh_config import HHRewardConfig, Job
from hh_data import DOMAINS, HHData
from scoring import score_rows

from rlhf_jax.models import transformer
from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.objectives import reward_model as ranking_objective
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.training.optimizers import adam_optimizer, warmup_cosine
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import Generation, RankingBatch


def play(job: Job, data: HHData) -> None:
    """Reward models on half A, judges on half B, shuffled labels of half A; for the accuracy table, `long_*` on half A.

    All but the last are blind to length: they compare the same number of tokens and see no end.
    """
    sampled = reference_samples(job, data)
    for domain in DOMAINS:
        half_a, half_b = (hh_data.differing(job.hh, data, data.of(part, domains=[domain])) for part in ("a", "b"))
        rows = hh_data.matched_rows(job.hh, data, half_a)
        fit(job, domain, rows, sampled, seed=job.seed)
        fit(job, f"judge_{domain}", hh_data.matched_rows(job.hh, data, half_b), sampled, seed=job.seed + 1)
        long = hh_data.ranking_rows(job.hh, data, half_a, length=job.hh.long_length)
        fit(job, f"long_{domain}", long, None, seed=job.seed)
    for i in range(job.hh.num_shuffled):
        half_a = hh_data.differing(job.hh, data, data.of("a", domains=[DOMAINS[i % 2]]))
        rows = hh_data.matched_rows(job.hh, data, half_a)
        seed = 100 * (job.seed + 1) + i
        shuffled = rows.replace(ranks=np.random.default_rng(seed).permuted(rows.ranks, axis=1))
        fit(job, f"shuffled_{i}", shuffled, sampled, seed=seed)


def reference_samples(job: Job, data: HHData) -> Generation:
    """The SFT policy's replies to 512 training prompts: there, scores get mean 0 and standard deviation 1."""
    tokenizer, network, policy = sft.load(job.run)
    prompts = hh_data.prompt_rows(job.hh, data, data.of("a", "b"))
    prompts = jax.tree.map(lambda x: x[np.linspace(0, len(x) - 1, min(512, len(x)), dtype=int)], prompts)
    sample = task.jitted_sampler(job.hh.lengths, network, None, tokenizer.pad_id)
    return task.sample_all(sample, policy, prompts, jax.random.key(job.seed), batch_size=256)


def fit(job: Job, name: str, rows: RankingBatch, sampled: Generation | None, *, seed: int) -> None:
    """Train one reward model from the SFT policy, unless it is there; save it with its moments on `sampled`."""
    folder = job.run / "rewards" / name
    if checkpoint.latest_step(folder / "reward_model") is not None:
        return
    tokenizer, network, policy = sft.load(job.run)
    config, num_pairs = job.hh.reward, rows.tokens.shape[0]
    num_steps = num_steps_of(config, num_pairs, "pairs")
    optimizer, train_step = build(config, network, num_steps)
    # The head starts at 0: drawn at random, its noise outweighs what so few pairs teach.
    head = jax.tree.map(jnp.zeros_like, init_reward_head(jax.random.key(0), network.model_dim))
    state = init_train_state(jax.tree.map(jnp.copy, {"trunk": policy, "head": head}), optimizer)
    show = {"rm/loss": "loss", "rm/accuracy": "accuracy"}
    with MetricLog(job.run / "metrics.jsonl", f"rm_{name}", num_steps, show=show) as log:
        for step in range(num_steps):
            state, metrics = train_step(state, ppo.pick(rows, seed, step, config.batch_size))
            log.write(step, metrics, tokens=rows.tokens[0].size * config.batch_size)
    mean, std = 0.0, 1.0
    if sampled is not None:
        scores = score_rows(network, state.params, sampled.tokens, sampled.segment_ids, sampled.completion_mask)
        mean, std = float(scores.mean()), float(scores.std())
    reward_model.save(folder, state.params, tokenizer, mean=mean, std=std)


@functools.cache
def build(config: HHRewardConfig, network: TransformerConfig, num_steps: int):
    """The optimiser and the jitted step; equal arguments share one compilation."""
    optimizer = adam_optimizer(warmup_cosine(config.learning_rate, num_steps=num_steps))
    objective = ranking_objective(transformer.causal_model(network), mean_over_completion=True)
    return optimizer, jax.jit(make_train_step(objective, optimizer), donate_argnames="state")
