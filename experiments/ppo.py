"""Act 3, PPO on a KL leash (Ziegler et al. 2019; Stiennon et al. 2020): generate, score, learn from the score, repeat.

    python experiments/ppo.py --run runs/mine

takes up `runs/mine/sft` and `runs/mine/reward_model` and writes `runs/mine/ppo`. Two CPU cores, about a minute and a half.
`--model` and `--reward-model` name checkpoints of the Hugging Face ecosystem to take up instead.
Defaults are those of lm-human-preferences where it has one. Deviations, all for a run of minutes instead of days: 40
iterations of 192 completions, 2 epochs of 4 minibatches, a learning rate 30 times higher, a KL controller 17 times faster.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import kept_reward
import meshes
import sampling
import sft
import task
import tyro
from acts import alone, check_rollout, facts, is_played, note_command, policy_keeper

from rlhf_jax.data.batching import batch_indices
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models import transformer
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.models.heads import init_value_head
from rlhf_jax.objectives import actor_critic, separate_critic, shared_critic
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.runtime.resume import forget, guarded
from rlhf_jax.runtime.runs import read_json_lines
from rlhf_jax.runtime.sharding import shard_batch
from rlhf_jax.training.optimizers import linear_anneal, ppo_optimizer
from rlhf_jax.training.ppo import PPOBatch, critic_from_trunk, init_ppo_state, make_ppo_iteration, make_ppo_update
from rlhf_jax.training.rollout import make_experience_fn, make_score_fn
from rlhf_jax.training.train_step import make_train_step
from rlhf_jax.types import Frozen, Params, PromptBatch, SequenceBatch

SHOW = {
    "objective/rlhf_reward": "reward",
    "objective/scores": "score",
    "objective/kl": "KL",
    "loss/value_avg": "value loss",
}


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Numbers of act 3."""

    num_iterations: int = 40
    batch_size: int = 192
    num_epochs: int = 2
    num_minibatches: int = 4
    num_micro_batches: int = 1
    learning_rate: float = 3e-4
    kl_coef: float = 0.07
    kl_target: float | None = 4.0
    """Nats per completion; none keeps `kl_coef` fixed."""
    kl_horizon: float = 600.0
    save_every: int = 10
    """Iterations from one checkpoint of the unfinished act to the next."""
    policy_every: int = 0
    """Iterations from one policy kept in `RUN/ppo_steps` to the next, points of `evaluate.py`'s frontier; 0 = none."""
    temperature: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2
    """Of the ratio, both ways."""
    vf_coef: float = 0.1
    separate_critic: bool = True
    """A critic of its own, started from the reward model's trunk; else a head on the policy."""
    missing_eos_penalty: float = 1.0
    """Taken off the z-scored reward of a completion that did not end."""
    ptx_coef: float = 0.0
    """Weight of the demonstrations' loss (PPO-ptx)."""


@dataclasses.dataclass(frozen=True)
class Config(task.TaskConfig):
    """Act 3 alone."""

    reward_model: Path | None = None
    """Folder of an `AutoModelForSequenceClassification` with one label; none = the run's own."""
    ppo: PPOConfig = PPOConfig()


def make_iteration(
    config: PPOConfig,
    lengths: task.TaskConfig,
    network: TransformerConfig,
    reward_network: TransformerConfig,
    eos_id: int,
    pad_id: int,
):
    """The optimiser, and the whole iteration as one pure function `(frozen, state, batch, key) -> (state, metrics)`."""
    model, reward = transformer.causal_model(network), transformer.causal_model(reward_network)
    critic = separate_critic(reward) if config.separate_critic else shared_critic
    steps = config.num_epochs * config.num_minibatches
    schedule = linear_anneal(config.learning_rate, num_iterations=config.num_iterations, steps_per_iteration=steps)
    optimizer = ppo_optimizer(schedule)
    clips = {"clip_low": config.clip, "clip_high": config.clip}
    objective = actor_critic(model, critic, temperature=config.temperature, vf_coef=config.vf_coef, **clips)
    iteration = make_ppo_iteration(
        sample_fn=sampling.sampler(lengths, model, eos_id=eos_id, pad_id=pad_id, temperature=config.temperature),
        score_fn=make_score_fn(reward, missing_eos_penalty=config.missing_eos_penalty),
        experience_fn=make_experience_fn(model, critic, temperature=config.temperature, gae_lambda=config.gae_lambda),
        update_fn=make_ppo_update(
            make_train_step(objective, optimizer, num_micro_batches=config.num_micro_batches),
            num_epochs=config.num_epochs,
            num_minibatches=config.num_minibatches,
            kl_target=config.kl_target,
            kl_horizon=config.kl_horizon,
            ptx_coef=config.ptx_coef,
        ),
    )
    return optimizer, iteration


@functools.cache
def build(*arguments):
    """`make_iteration`, guarded and jitted; equal arguments share one compilation."""
    optimizer, iteration = make_iteration(*arguments)
    return optimizer, jax.jit(guarded(iteration, state_at=1), donate_argnums=1)


def train(
    config: PPOConfig,
    lengths: task.TaskConfig,
    network: TransformerConfig,
    tokenizer: Tokenizer,
    frozen: Frozen,
    prompts: PromptBatch,
    *,
    seed: int,
    keep: Callable,
    keep_policy: Callable[[int, Params], None] = lambda step, params: None,
    reward_network: TransformerConfig | None = None,
    demonstrations: SequenceBatch | None = None,
    stage: str = "ppo",
) -> tuple[Params, list[dict[str, float]]]:
    """Train the policy that `frozen.ref_params` starts; returns its parameters and the metrics of every iteration.

    `keep` is `task.keeper`'s, `keep_policy` that of `acts`. `reward_network` is the reward model's shape, the policy's where
    it is None. `demonstrations` are the rows that PPO-ptx keeps likely; needed when `config.ptx_coef` is not 0.
    """
    mesh, reward_network = lengths.mesh, reward_network or network
    optimizer, iteration = build(config, lengths, network, reward_network, tokenizer.eos_id, tokenizer.pad_id)
    critic = {"head": init_value_head(network.model_dim)}
    if config.separate_critic:
        critic = critic_from_trunk(frozen.reward_params["trunk"], reward_network.model_dim)
    state = init_ppo_state(frozen.ref_params, critic, optimizer, kl_coef=config.kl_coef)
    policy_specs, reward_specs = transformer.param_specs(network), kept_reward.specs_of(reward_network)
    state = meshes.put(state, {"policy": policy_specs, "critic": reward_specs}, mesh)
    root, same = jax.random.key(seed), facts(config, seed=seed, data=(prompts, demonstrations), frozen=frozen)
    frozen = meshes.put(frozen, Frozen(policy_specs, reward_specs, None, None), mesh)
    devices = meshes.mesh_of(mesh)
    with (
        keep(stage, state, save_every=config.save_every, facts=same) as kept,
        MetricLog(kept.log_to, stage, config.num_iterations, show=SHOW, first_step=kept.first_step) as log,
    ):
        state = kept.state
        for step in range(kept.first_step, config.num_iterations):
            batch = PPOBatch(pick(prompts, seed, step, config.batch_size))
            if config.ptx_coef:
                batch = batch.replace(demonstrations=pick(demonstrations, seed, step, config.batch_size))
            batch = kept.batch(step, shard_batch(batch, devices))
            state, metrics = iteration(frozen, state, batch, jax.random.fold_in(root, step))
            metrics = kept.check(step, state, metrics, batch)
            log.write(step, metrics, tokens=int(config.batch_size * metrics["response/len_mean"]))
            keep_policy(step + 1, state.params["policy"])
            kept.finish(step, state)
    return state.params["policy"], [row for row in read_json_lines(kept.log_to) if row["stage"] == stage]


def pick(data, seed: int, step: int, batch_size: int):
    """Rows of one step."""
    rows = batch_indices(seed, step, num_examples=data.tokens.shape[0], batch_size=batch_size)
    return jax.tree.map(lambda x: x[rows], data)


def check_mesh(config: Config) -> None:
    """Refuse what the mesh cannot share evenly."""
    part = config.ppo.batch_size // config.ppo.num_minibatches // config.ppo.num_micro_batches
    check_rollout(config, {"--ppo.batch-size / --ppo.num-minibatches / --ppo.num-micro-batches": part})


def main(config: Config) -> None:
    """Play act 3 and save the policy."""
    run = config.run
    check_mesh(config)
    if is_played(run, "ppo", resume=config.resume):
        return
    tokenizer, network, policy = sft.take_up(config)
    note_command(run)
    train_prompts, _ = task.load_prompts(config)
    rows = task.prompt_rows(config, tokenizer, train_prompts)
    if config.reward_model is None:
        reward_network, (reward_params, mean, std) = network, kept_reward.load(run, network, tokenizer, config.mesh)
    else:
        reward = reward_network, reward_params = kept_reward.load_folder(
            config.reward_model, tokenizer, dtype=config.dtype, mesh=config.mesh
        )
        some = jax.tree.map(lambda x: x[:512], rows)
        mean, std = kept_reward.reference_moments(config, network, tokenizer, policy, reward, some, seed=config.seed)
    frozen = Frozen(policy, reward_params, jnp.asarray(mean), jnp.asarray(std))
    demonstrations = None
    if config.ppo.ptx_coef:
        demonstrations = task.demonstration_rows(config, tokenizer, task.load_demonstrations(config, run)[1])
    params, history = train(
        config.ppo,
        config,
        network,
        tokenizer,
        frozen,
        rows,
        seed=config.seed,
        keep=task.keeper(config),
        keep_policy=policy_keeper(run, "ppo", tokenizer, every=config.ppo.policy_every),
        reward_network=reward_network,
        demonstrations=demonstrations,
    )
    checkpoint.save(run / "ppo", 0, params, notes={"tokenizer": tokenizer.fingerprint})
    forget(run, "ppo")
    print(f"KL {history[-1]['objective/kl']:.2f} nats; policy saved in {run / 'ppo'}")


if __name__ == "__main__":
    settings = tyro.cli(Config, description=__doc__)
    with alone(settings):
        main(settings)
