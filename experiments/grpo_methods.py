"""What tells GRPO and its relatives apart: a loss, the mean of it, advantages, and where the KL stands."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import rlhf_jax as rl
from rlhf_jax.training.optimizers import linear_anneal


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
    policy_every: int = 0
    """Iterations from one policy kept in `RUN/METHOD_steps` to the next, points of `evaluate.py`'s frontier; 0 = none."""


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
