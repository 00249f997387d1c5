"""Act 3 of the HH job: PPO towards a weighted sum of reward models, once for each mixture and each control."""

import dataclasses
import functools

import hh_data
import jax
import jax.numpy as jnp
import kept_reward
import optax
import ppo
import sampling
import sft
import task
from acts import facts
from hh_config import HHConfig, HHPPOConfig, Job
from hh_data import HHData

from rlhf_jax.functional.rewards import normalize_scores
from rlhf_jax.models import transformer
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.models.heads import init_value_head, sequence_scores
from rlhf_jax.objectives import actor_critic, shared_critic
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.runtime.resume import forget, guarded
from rlhf_jax.training.optimizers import linear_anneal, ppo_optimizer
from rlhf_jax.training.ppo import PPOBatch, init_ppo_state, make_ppo_iteration, make_ppo_update
from rlhf_jax.training.rollout import make_experience_fn
from rlhf_jax.training.train_step import make_train_step
from rlhf_jax.types import Frozen, Generation, Params


@dataclasses.dataclass(frozen=True)
class RLRun:
    """One run of act 3: which reward models, with which weights, and what is special."""

    name: str
    weights: tuple[tuple[str, float], ...]
    ppo: HHPPOConfig


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


def detached_critic(params: Params, hidden: jax.Array, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """A head on the policy's hidden states whose loss does not reach the policy."""
    return shared_critic(params, jax.lax.stop_gradient(hidden), tokens, segment_ids)


@functools.cache
def build(config: HHPPOConfig, lengths: task.TaskConfig, network: TransformerConfig, pad_id: int):
    """The optimiser and the jitted iteration. The reward models and their weights are data: no run recompiles it."""
    model = transformer.causal_model(network)
    steps = config.num_epochs * config.num_minibatches
    schedule = linear_anneal(
        config.learning_rate,
        num_iterations=config.num_iterations,
        steps_per_iteration=steps,
        num_warmup=config.num_warmup,
    )
    # Each part has its own gradient clip: under a stiff leash the critic's errors dwarf the policy's gradient.
    parts = {part: ppo_optimizer(schedule) for part in ("policy", "critic")}
    optimizer = optax.multi_transform(parts, {part: part for part in parts})
    temperature = config.temperature
    objective = actor_critic(model, detached_critic, temperature=temperature, vf_coef=config.vf_coef)

    def weighted_score(frozen: Frozen, generation: Generation) -> jax.Array:
        """`Σ weight z(score)` over the reward models, which are stacked on a leading axis."""

        def standard_score(params: Params, mean: jax.Array, std: jax.Array) -> jax.Array:
            raw = sequence_scores(model, params, generation.tokens, generation.segment_ids, generation.completion_mask)
            return normalize_scores(raw, mean=mean, std=std)

        models, weights = frozen.reward_params
        return weights @ jax.vmap(standard_score)(models, frozen.reward_mean, frozen.reward_std)

    iteration = make_ppo_iteration(
        sample_fn=sampling.sampler(lengths, model, eos_id=None, pad_id=pad_id, temperature=temperature),
        score_fn=weighted_score,
        experience_fn=make_experience_fn(model, detached_critic, temperature=temperature, gae_lambda=config.gae_lambda),
        update_fn=make_ppo_update(
            make_train_step(objective, optimizer),
            num_epochs=config.num_epochs,
            num_minibatches=config.num_minibatches,
            kl_target=config.kl_target,
            kl_horizon=config.kl_horizon,
            ptx_coef=config.ptx_coef,
        ),
    )
    return optimizer, jax.jit(guarded(iteration, state_at=1), donate_argnums=1)


def play(job: Job, data: HHData, run: RLRun) -> None:
    """Act 3, once. It ends with the last policy whose rollouts stayed below the KL target.

    Beside the penalty, which needs more iterations to settle, this is early stopping; Gao et al. 2022 find the two alike.
    All policies are then compared at about one distance from SFT.
    """
    tokenizer, network, policy = sft.load(job.run)
    optimizer, iteration = build(run.ppo, job.hh.lengths, network, tokenizer.pad_id)
    loaded = [kept_reward.load(job.run / "rewards" / name, network, tokenizer) for name, _ in run.weights]
    models = jax.tree.map(lambda *arrays: jnp.stack(arrays), *[params for params, _, _ in loaded])
    weights, means, stds = (
        jnp.asarray(x) for x in ([w for _, w in run.weights], [x[1] for x in loaded], [x[2] for x in loaded])
    )
    frozen = Frozen(policy, (models, weights), means, stds)
    prompts = hh_data.prompt_rows(job.hh, data, data.of("a", "b"))
    demonstrations = None
    if run.ppo.ptx_coef:
        demonstrations = hh_data.demonstration_rows(job.hh, data, data.of("a", "b"), replies_per_row=1)
    critic = {"head": init_value_head(network.model_dim)}
    state = init_ppo_state(policy, critic, optimizer, kl_coef=run.ppo.kl_coef)
    root, stage = jax.random.key(job.seed), f"ppo_{run.name}"
    same = facts(run.ppo, seed=job.seed, data=(prompts, demonstrations), frozen=frozen)
    start = {"state": state, "policy": policy}
    with (
        job.keep(stage, start, save_every=run.ppo.save_every, facts=same) as kept,
        MetricLog(kept.log_to, stage, run.ppo.num_iterations, show=ppo.SHOW, first_step=kept.first_step) as log,
    ):
        state, policy = kept.state["state"], kept.state["policy"]
        for step in range(kept.first_step, run.ppo.num_iterations):
            batch = PPOBatch(ppo.pick(prompts, job.seed, step, run.ppo.batch_size))
            if demonstrations is not None:
                batch = batch.replace(demonstrations=ppo.pick(demonstrations, job.seed, step, run.ppo.batch_size))
            batch = kept.batch(step, batch)
            sampler = jax.tree.map(jnp.copy, state.params["policy"])  # the state itself is donated
            state, metrics = iteration(frozen, state, batch, jax.random.fold_in(root, step))
            metrics = kept.check(step, {"state": state, "policy": policy}, metrics, batch)
            log.write(step, metrics, tokens=int(run.ppo.batch_size * metrics["response/len_mean"]))
            if run.ppo.kl_target is not None and metrics["objective/kl"] >= run.ppo.kl_target:
                break
            policy = sampler
            kept.finish(step, {"state": state, "policy": policy})
        else:
            policy = state.params["policy"]
    checkpoint.save(job.run / "policies" / run.name, 0, policy)
    forget(job.run, stage)
