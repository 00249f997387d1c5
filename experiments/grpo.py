"""Act 3 without a critic: GRPO and its relatives, each three functions passed to the same iteration as PPO.

    python experiments/grpo.py --run runs/mine --grpo.method rloo

takes up `runs/mine/sft` and `runs/mine/reward_model` and writes `runs/mine/METHOD`. Two CPU cores, about a minute. What
a method is stands in `grpo_methods.py`. Deviations from the
papers, all for a run of minutes: 40 iterations of 48 prompts with 4 samples, a learning rate hundreds of times higher; RLOO
and ReMax take 8 clipped steps on a rollout where their papers take one. DAPO masks groups of equal scores in place of
sampling others, and has no leash: its KL is what it is.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import judge
import kept_reward
import meshes
import ppo
import sampling
import sft
import task
import tyro
from acts import alone, check_rollout, facts, is_played, note_command, policy_keeper
from grpo_methods import GRPOConfig, annealed_optimizer, choosing, learning, methods

import rlhf_jax as rl
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.runtime.resume import forget, guarded

SHOW = {"objective/scores": "score", "objective/kl": "KL", "response/len_mean": "length"}


@dataclasses.dataclass(frozen=True)
class Config(task.TaskConfig):
    """Act 3 alone."""

    grpo: GRPOConfig = GRPOConfig()


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
    check_rollout(config, {"--grpo.num-prompts": settings.num_prompts})
    if is_played(run, settings.method, resume=config.resume):
        return
    tokenizer, network, policy = sft.take_up(config)
    note_command(run)
    reward_params, mean, std = kept_reward.load(run, network, tokenizer, config.mesh)
    frozen = rl.Frozen(policy, reward_params, jnp.asarray(mean), jnp.asarray(std))
    prompts = task.prompt_rows(config, tokenizer, task.load_prompts(config)[0])
    demonstrations = None
    if settings.ptx_coef:
        demonstrations = task.demonstration_rows(config, tokenizer, task.load_demonstrations(config, run)[1])
    optimizer, iteration = build(settings, config, network, tokenizer)
    mesh, root, name = meshes.mesh_of(config.mesh), jax.random.key(config.seed), settings.method
    specs = rl.Frozen(rl.transformer.param_specs(network), kept_reward.specs_of(network), None, None)
    state = rl.init_ppo_state(policy, None, optimizer, kl_coef=settings.kl_coef)
    state = meshes.put(state, {"policy": specs.ref_params}, config.mesh)
    keep, data = task.keeper(config), (prompts, demonstrations)
    keep_policy = policy_keeper(run, name, tokenizer, every=settings.policy_every)
    same = facts(settings, seed=config.seed, data=data, frozen=frozen)
    frozen = meshes.put(frozen, specs, config.mesh)
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
            keep_policy(step + 1, state.params["policy"])
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
