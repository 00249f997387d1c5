"""Act 3 without a critic: GRPO and its relatives, each three functions passed to the same iteration as PPO.

    python experiments/grpo.py --run runs/mine --grpo.method rloo

takes up `runs/mine/sft` and `runs/mine/reward_model` and writes `runs/mine/METHOD`. Two CPU cores, about a minute. What
a method is stands in `methods`; RAFT and online DPO choose among a group's answers (`choosing`). Deviations from the
papers, all for a run of minutes: 40 iterations of 48 prompts with 4 samples, a learning rate hundreds of times higher; RLOO
and ReMax take 8 clipped steps on a rollout where their papers take one. DAPO masks groups of equal scores in place of
sampling others, and has no leash: its KL is what it is.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import judge
import ppo
import reward_model
import sampling
import sft
import task
import tyro
from acts import alone, facts, is_played, note_command

import rlhf_jax as rl
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.runtime.resume import forget, guarded
from rlhf_jax.training.optimizers import linear_anneal

SHOW = {"objective/scores": "score", "objective/kl": "KL", "response/len_mean": "length"}


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Numbers of act 3."""

    method: Literal[
        "grpo",
        "dr_grpo",
        "lite_ppo",
        "dapo",
        "gspo",
        "cispo",
        "rloo",
        "rloo_sequence",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "remax",
        "raft",
        "online_dpo",
    ] = "grpo"
    num_iterations: int = 40
    num_prompts: int = 48
    group_size: int = 4
    num_epochs: int = 2
    num_minibatches: int = 4
    num_micro_batches: int = 1
    learning_rate: float = 3e-4
    kl_coef: float = 0.07
    """In the reward, where it adapts to `kl_target`, or fixed in the loss: the method says which."""
    kl_target: float | None = 4.0
    """Nats per completion; for a KL in the reward."""
    kl_horizon: float = 600.0
    beta: float = 0.5
    """Of online DPO, which has the best of a group against its worst."""
    ptx_coef: float = 0.0
    """Weight of the demonstrations' loss relative to the mean loss (PPO-ptx); not for RAFT and online DPO."""
    temperature: float = 1.0
    missing_eos_penalty: float = 1.0
    save_every: int = 10
    """Iterations from one checkpoint of the unfinished act to the next."""


@dataclasses.dataclass(frozen=True)
class Config(task.TaskConfig):
    """Act 3 alone."""

    grpo: GRPOConfig = GRPOConfig()


class Method(NamedTuple):
    """What tells one method from another."""

    loss_fn: Callable
    aggregate: Callable
    advantages_fn: Callable | None
    kl_in_reward: bool = False
    kl_in_loss: bool = True


def methods(config: GRPOConfig, max_length: int) -> dict[str, Method]:
    """Every name that `--grpo.method` knows, but for the two that learn from choices (`choosing`)."""
    group = {"group_size": config.group_size}
    relative = rl.per_completion(rl.group_relative, **group)
    centred = rl.per_completion(rl.group_relative, scale=False, **group)
    by_batch = rl.per_completion(rl.batch_relative, **group)
    rloo, baseline = rl.per_completion(rl.leave_one_out, **group), partial(rl.reinforce_plus_plus_baseline, **group)
    clipped, constant = rl.clipped_policy_loss, partial(rl.constant_length_mean, length=max_length)
    in_reward = {"kl_in_reward": True, "kl_in_loss": False}
    return {
        "grpo": Method(clipped, rl.sequence_mean, relative),
        "dr_grpo": Method(clipped, constant, centred),
        "lite_ppo": Method(clipped, rl.token_mean, by_batch),
        "dapo": Method(partial(clipped, clip_high=0.28), rl.token_mean, relative, kl_in_loss=False),
        "gspo": Method(rl.gspo_loss, rl.sequence_mean, relative),
        "cispo": Method(rl.cispo_loss, rl.token_mean, relative),
        "rloo": Method(clipped, constant, rloo, **in_reward),
        "rloo_sequence": Method(
            rl.clipped_sequence_loss, partial(rl.constant_length_mean, length=1), rloo, **in_reward
        ),
        "reinforce_plus_plus": Method(clipped, rl.token_mean, rl.reinforce_plus_plus, **in_reward),
        "reinforce_plus_plus_baseline": Method(clipped, rl.token_mean, baseline),
        "remax": Method(clipped, constant, rl.rewards_to_go, **in_reward),
    }


def choosing(config: GRPOConfig, model: rl.CausalModel, optimizer):
    """Experience and update of the methods that choose among a group's answers: RAFT and online DPO."""
    if config.method == "raft":
        objective, make_experience_fn = rl.sft(model), rl.make_best_of_experience_fn
    else:
        objective, make_experience_fn = rl.preference(model, rl.dpo_loss, beta=config.beta), rl.make_pair_experience_fn
    step = rl.make_train_step(rl.of_policy(objective), optimizer, num_micro_batches=config.num_micro_batches)
    update_fn = rl.make_batch_update(step, num_epochs=config.num_epochs, num_minibatches=config.num_minibatches)
    return make_experience_fn(model, group_size=config.group_size, temperature=config.temperature), update_fn


def learning(config: GRPOConfig, method: Method, model: rl.CausalModel, optimizer):
    """Experience and update of the methods that `methods` knows."""
    temperature = {"temperature": config.temperature}
    experience_fn = rl.make_policy_experience_fn(
        model,
        method.advantages_fn,
        kl_in_reward=method.kl_in_reward,
        group_size=config.group_size,
        drop_zero_spread=config.method == "dapo",
        **temperature,
    )
    if config.method == "remax":
        experience_fn = rl.make_remax_experience_fn(model, **temperature)
    kl_coef = config.kl_coef if method.kl_in_loss else 0.0
    objective = rl.policy_gradient(model, method.loss_fn, aggregate=method.aggregate, kl_coef=kl_coef, **temperature)
    update_fn = rl.make_ppo_update(
        rl.make_train_step(objective, optimizer, num_micro_batches=config.num_micro_batches),
        num_epochs=config.num_epochs,
        num_minibatches=config.num_minibatches,
        kl_target=config.kl_target if method.kl_in_reward else None,
        kl_horizon=config.kl_horizon,
        ptx_coef=config.ptx_coef,
        aggregate=method.aggregate,
    )
    return experience_fn, update_fn


def annealed_optimizer(config: GRPOConfig):
    """Adam whose learning rate falls to 0 over the run."""
    steps = config.num_epochs * config.num_minibatches
    return rl.ppo_optimizer(
        linear_anneal(config.learning_rate, num_iterations=config.num_iterations, steps_per_iteration=steps)
    )


def build(config: GRPOConfig, lengths: task.TaskConfig, network: rl.TransformerConfig, tokenizer: Tokenizer):
    """The optimiser and the jitted iteration."""
    model, method = rl.causal_model(network), methods(config, lengths.response_length).get(config.method)
    optimizer, is_dapo = annealed_optimizer(config), config.method == "dapo"
    options = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id, "num_samples": config.group_size}
    sampler = partial(sampling.sampler, lengths, model, **options)
    sample_fn = sampler(temperature=config.temperature)
    score_fn = rl.make_score_fn(model, missing_eos_penalty=0.0 if is_dapo else config.missing_eos_penalty)
    if is_dapo:  # its penalty grows over the last fifth of the tokens
        length = lengths.response_length
        score_fn = rl.with_overlong_penalty(score_fn, max_length=length, buffer=max(length // 5, 1))
    if config.method == "remax":
        sample_fn = rl.with_greedy(sample_fn, sampler(temperature=0.0))
    pieces = learning(config, method, model, optimizer) if method else choosing(config, model, optimizer)
    iteration = rl.make_ppo_iteration(sample_fn, score_fn, *pieces)
    return optimizer, jax.jit(guarded(iteration, state_at=1), donate_argnums=1)


def main(config: Config) -> None:
    """Play act 3 with one method and save the policy."""
    run, settings = config.run, config.grpo
    if is_played(run, settings.method, resume=config.resume):
        return
    tokenizer, network, policy = sft.take_up(config)
    note_command(run)
    reward_params, mean, std = reward_model.load(run, network, tokenizer)
    frozen = rl.Frozen(policy, reward_params, jnp.asarray(mean), jnp.asarray(std))
    prompts = task.prompt_rows(config, tokenizer, task.load_prompts(config)[0])
    demonstrations = None
    if settings.ptx_coef:
        demonstrations = task.demonstration_rows(config, tokenizer, task.load_demonstrations(config, run)[1])
    optimizer, iteration = build(settings, config, network, tokenizer)
    mesh, root, name = rl.make_mesh(), jax.random.key(config.seed), settings.method
    state = rl.replicate(rl.init_ppo_state(policy, None, optimizer, kl_coef=settings.kl_coef), mesh)
    keep, data = task.keeper(config), (prompts, demonstrations)
    same = facts(settings, seed=config.seed, data=data, frozen=frozen)
    frozen = rl.replicate(frozen, mesh)
    with (
        keep(name, state, save_every=settings.save_every, facts=same) as kept,
        MetricLog(kept.log_to, name, settings.num_iterations, show=SHOW, first_step=kept.first_step) as log,
    ):
        state = kept.state
        for step in range(kept.first_step, settings.num_iterations):
            batch = rl.PPOBatch(ppo.pick(prompts, config.seed, step, settings.num_prompts))
            if settings.ptx_coef:
                rows = settings.num_prompts * settings.group_size
                batch = batch.replace(demonstrations=ppo.pick(demonstrations, config.seed, step, rows))
            batch = kept.batch(step, rl.shard_batch(batch, mesh))
            state, metrics = iteration(frozen, state, batch, jax.random.fold_in(root, step))
            metrics = kept.check(step, state, metrics, batch)
            tokens = int(settings.num_prompts * settings.group_size * metrics["response/len_mean"])
            log.write(step, metrics, tokens=tokens)
            kept.finish(step, state)
    params = state.params["policy"]
    checkpoint.save(run / name, 0, params, notes={"tokenizer": tokenizer.fingerprint})
    forget(run, name)
    if config.data is None:
        print(judge.gold_line(config, run, params))
    print(f"policy saved in {run / name}")


if __name__ == "__main__":
    settings = tyro.cli(Config, description=__doc__)
    with alone(settings):
        main(settings)
