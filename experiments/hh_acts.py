"""The three acts of the HH job, one function each; `hh.py` calls them in order."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import hh_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import ppo
import reward_model
import sft
import task
from hh_data import DOMAINS, HHConfig, HHData

from rlhf_jax.data.records import Preference
from rlhf_jax.functional.rewards import normalize_scores
from rlhf_jax.models import transformer
from rlhf_jax.models.heads import init_reward_head, init_value_head, sequence_scores
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.objectives import actor_critic, sequence_token_logprobs, shared_critic
from rlhf_jax.objectives import reward_model as ranking_objective
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.training.optimizers import adam_optimizer, linear_anneal, ppo_optimizer, warmup_cosine
from rlhf_jax.training.ppo import PPOBatch, init_ppo_state, make_ppo_iteration, make_ppo_update
from rlhf_jax.training.rollout import make_experience_fn
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import Frozen, Generation, Params


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run's folder is opened with."""

    run: Path
    resume: bool
    seed: int
    data_dir: Path | None
    hh: HHConfig


@dataclasses.dataclass(frozen=True)
class RLRun:
    """One run of act 3: which reward models, with which weights, and what is special."""

    name: str
    weights: tuple[tuple[str, float], ...]
    ppo: ppo.PPOConfig


def rl_runs(config: HHConfig) -> list[RLRun]:
    """Every run of act 3. All start from the SFT policy."""
    mixtures = {w: tuple(x for x in (("helpful", w), ("harmless", 1 - w)) if x[1]) for w in config.weights}
    harmless = (("harmless", 1.0),)
    stiff = dataclasses.replace(config.ppo, kl_coef=1e3, kl_target=None)
    return [
        *(RLRun(f"w{w:g}", weights, config.ppo) for w, weights in mixtures.items()),
        RLRun("ptx", harmless, dataclasses.replace(config.ppo, ptx_coef=config.ptx_coef)),
        RLRun("kl_coef_1e3", harmless, stiff),
        *(RLRun(f"shuffled_{i}", ((f"shuffled_{i}", 1.0),), config.ppo) for i in range(config.num_shuffled)),
    ]


def play_sft(job: Job, data: HHData) -> None:
    """Act 1, on the chosen replies of both halves of both domains."""
    network = sft.network_config(job.hh.sft, data.tokenizer.vocab_size)
    rows = hh_data.demonstration_rows(job.hh, data, data.of("a", "b"))
    params = sft.train(job.hh.sft, network, rows, seed=job.seed, log_to=job.run / "metrics.jsonl")
    sft.save(job.run, network, data.tokenizer, params)


def play_reward_models(job: Job, data: HHData) -> None:
    """Act 2: reward models on half A, judges on half B, and reward models that learn shuffled labels of half A."""
    sampled = reference_samples(job, data)
    for domain in DOMAINS:
        fit(job, data, domain, data.of("a", domains=[domain]), sampled, seed=job.seed)
        fit(job, data, f"judge_{domain}", data.of("b", domains=[domain]), sampled, seed=job.seed + 1)
    for i in range(job.hh.num_shuffled):
        pairs, seed = data.of("a", domains=[DOMAINS[i % 2]]), 100 * (job.seed + 1) + i
        fit(job, data, f"shuffled_{i}", pairs, sampled, seed=seed, shuffle=True)


def reference_samples(job: Job, data: HHData) -> Generation:
    """The SFT policy's replies to 512 training prompts: there, every reward model's scores get mean 0 and std 1."""
    tokenizer, network, policy = sft.load(job.run)
    prompts = hh_data.prompt_rows(job.hh, data, data.of("a", "b"))
    prompts = jax.tree.map(lambda x: x[np.linspace(0, len(x) - 1, min(512, len(x)), dtype=int)], prompts)
    sample = task.jitted_sampler(job.hh.lengths, network, tokenizer.eos_id, tokenizer.pad_id)
    return task.sample_all(sample, policy, prompts, jax.random.key(job.seed), batch_size=256)


def fit(
    job: Job,
    data: HHData,
    name: str,
    pairs: Sequence[Preference],
    sampled: Generation,
    *,
    seed: int,
    shuffle: bool = False,
) -> None:
    """Train one reward model from the SFT policy and save it with the moments of its scores on `sampled`."""
    folder = job.run / "rewards" / name
    if checkpoint.latest_step(folder / "reward_model") is not None:
        return
    tokenizer, network, policy = sft.load(job.run)
    rows = hh_data.ranking_rows(job.hh, data, pairs, length=job.hh.reply_length)
    if shuffle:
        rows = rows.replace(ranks=np.random.default_rng(seed).permuted(rows.ranks, axis=1))
    config, num_pairs = job.hh.reward, len(pairs)
    num_steps = int(config.num_epochs * (num_pairs // config.batch_size))
    optimizer, train_step = build_reward_model(config, network, num_steps)
    # The head starts at 0: drawn at random, its noise outweighs what so few pairs teach.
    params = {
        "trunk": policy,
        "head": jax.tree.map(jnp.zeros_like, init_reward_head(jax.random.key(0), network.model_dim)),
    }
    state = init_train_state(jax.tree.map(jnp.copy, params), optimizer)
    show = {"rm/loss": "loss", "rm/accuracy": "accuracy"}
    with MetricLog(job.run / "metrics.jsonl", f"rm_{name}", num_steps, show=show) as log:
        for step in range(num_steps):
            state, metrics = train_step(state, ppo.pick(rows, seed, step, config.batch_size))
            log.write(step, metrics, tokens=rows.tokens[0].size * config.batch_size)
    scores = score_rows(network, state.params, sampled.tokens, sampled.segment_ids)
    reward_model.save(folder, state.params, tokenizer, mean=float(scores.mean()), std=float(scores.std()))


@functools.cache
def build_reward_model(config: reward_model.RewardModelConfig, network: TransformerConfig, num_steps: int):
    """The optimiser and the jitted step; equal arguments share one compilation."""
    optimizer = adam_optimizer(warmup_cosine(config.learning_rate, num_steps=num_steps))
    objective = ranking_objective(transformer.causal_model(network), label_smoothing=config.label_smoothing)
    return optimizer, jax.jit(make_train_step(objective, optimizer), donate_argnames="state")


def detached_critic(params: Params, hidden: jax.Array, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """A head on the policy's hidden states whose loss does not reach the policy."""
    return shared_critic(params, jax.lax.stop_gradient(hidden), tokens, segment_ids)


@functools.cache
def _jitted_scores(network: TransformerConfig):
    model = transformer.causal_model(network)
    return jax.jit(lambda params, tokens, segment_ids: sequence_scores(model, params, tokens, segment_ids))


@functools.cache
def _jitted_logprobs(network: TransformerConfig):
    model = transformer.causal_model(network)
    return jax.jit(lambda params, tokens, segment_ids: sequence_token_logprobs(model, params, tokens, segment_ids))


def score_rows(network: TransformerConfig, params: Params, tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """Raw scores `[N]`."""
    return in_parts(functools.partial(_jitted_scores(network), params), tokens, segment_ids)


def row_logprobs(network: TransformerConfig, params: Params, tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """Token log-probs `[N, T]`."""
    return in_parts(functools.partial(_jitted_logprobs(network), params), tokens, segment_ids)


def in_parts(function: Callable, tokens: np.ndarray, segment_ids: np.ndarray, size: int = 256) -> np.ndarray:
    """`function` of whole rows, `size` at a time; the last part is filled with its last row, which is thrown away."""
    parts = []
    for start in range(0, len(tokens), size):
        rows = np.minimum(np.arange(start, start + size), len(tokens) - 1)
        parts.append(np.asarray(function(tokens[rows], segment_ids[rows]))[: len(tokens) - start])
    return np.concatenate(parts)


@functools.cache
def build(config: ppo.PPOConfig, lengths: task.TaskConfig, network: TransformerConfig, eos_id: int, pad_id: int):
    """The optimiser and the jitted iteration. The reward models and their weights are data: no run recompiles it."""
    model = transformer.causal_model(network)
    steps = config.num_epochs * config.num_minibatches
    schedule = linear_anneal(config.learning_rate, num_iterations=config.num_iterations, steps_per_iteration=steps)
    # Each part has its own gradient clip: under a stiff leash the critic's errors dwarf the policy's gradient.
    parts = {part: ppo_optimizer(schedule) for part in ("policy", "critic")}
    optimizer = optax.multi_transform(parts, {part: part for part in parts})
    objective = actor_critic(model, detached_critic, vf_coef=config.vf_coef)

    def weighted_score(frozen: Frozen, generation: Generation) -> jax.Array:
        """`Σ weight z(score)` over the reward models, which are stacked on a leading axis."""

        def standard_score(params: Params, mean: jax.Array, std: jax.Array) -> jax.Array:
            raw = sequence_scores(model, params, generation.tokens, generation.segment_ids)
            return normalize_scores(raw, mean=mean, std=std)

        models, weights = frozen.reward_params
        return weights @ jax.vmap(standard_score)(models, frozen.reward_mean, frozen.reward_std)

    iteration = make_ppo_iteration(
        sample_fn=task.sampler(lengths, model, eos_id=eos_id, pad_id=pad_id),
        score_fn=weighted_score,
        experience_fn=make_experience_fn(model, detached_critic, gae_lambda=config.gae_lambda),
        update_fn=make_ppo_update(
            make_train_step(objective, optimizer),
            num_epochs=config.num_epochs,
            num_minibatches=config.num_minibatches,
            kl_target=config.kl_target,
            kl_horizon=config.kl_horizon,
            ptx_coef=config.ptx_coef,
        ),
    )
    return optimizer, jax.jit(iteration, donate_argnames="state")


def play_run(job: Job, data: HHData, run: RLRun) -> None:
    """Act 3, once."""
    tokenizer, network, policy = sft.load(job.run)
    optimizer, iteration = build(run.ppo, job.hh.lengths, network, tokenizer.eos_id, tokenizer.pad_id)
    loaded = [reward_model.load(job.run / "rewards" / name, network, tokenizer) for name, _ in run.weights]
    models = jax.tree.map(lambda *arrays: jnp.stack(arrays), *[params for params, _, _ in loaded])
    weights, means, stds = (
        jnp.asarray(x) for x in ([w for _, w in run.weights], [x[1] for x in loaded], [x[2] for x in loaded])
    )
    frozen = Frozen(policy, (models, weights), means, stds)
    prompts = hh_data.prompt_rows(job.hh, data, data.of("a", "b"))
    demonstrations = hh_data.demonstration_rows(job.hh, data, data.of("a", "b")) if run.ppo.ptx_coef else None
    critic = {"head": init_value_head(network.model_dim)}
    state = init_ppo_state(policy, critic, optimizer, kl_coef=run.ppo.kl_coef)
    root = jax.random.key(job.seed)
    with MetricLog(job.run / "metrics.jsonl", f"ppo_{run.name}", run.ppo.num_iterations, show=ppo.SHOW) as log:
        for step in range(run.ppo.num_iterations):
            batch = PPOBatch(ppo.pick(prompts, job.seed, step, run.ppo.batch_size))
            if demonstrations is not None:
                batch = batch.replace(demonstrations=ppo.pick(demonstrations, job.seed, step, run.ppo.batch_size))
            state, metrics = iteration(frozen, state, batch, jax.random.fold_in(root, step))
            log.write(step, metrics, tokens=int(run.ppo.batch_size * metrics["response/len_mean"]))
    checkpoint.save(job.run / "policies" / run.name, 0, state.params["policy"])
