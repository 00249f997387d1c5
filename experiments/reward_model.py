"""Act 2, the reward model: learn to predict how people rank responses (Bradley-Terry over all pairs; InstructGPT §3.5).

    python experiments/reward_model.py --run runs/mine

takes up `runs/mine/sft`, samples K responses to each prompt from it, has simulated annotators rank them best to worst and
writes `runs/mine/reward_model`. With `--data FILE` it learns from the rankings or pairs of that file instead, with
`--model DIRECTORY` a checkpoint takes the place of `runs/mine/sft`. `--reward.ranking-loss` says what a ranking means,
`--reward.ensemble M` trains M of them (`reward_ensemble.py`). Two CPU cores, about two minutes. Deviation: three epochs;
with pretrained networks one is usual, and more overfits (Stiennon et al. 2020).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import kept_reward
import meshes
import reward_ensemble
import sampling
import sft
import task
import tyro
from acts import alone, facts, is_played, note_command, num_steps_of
from meshes import COPIES, MeshConfig

import rlhf_jax as rl
from rlhf_jax.data import synthetic
from rlhf_jax.data.batching import batch_indices
from rlhf_jax.data.padding import alike_batch_indices, trim
from rlhf_jax.data.records import Prompt
from rlhf_jax.models.attention import under_vmap
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.runtime.resume import forget, guarded
from rlhf_jax.training.optimizers import warmup_cosine
from rlhf_jax.types import Objective, Params

RANKING_LOSSES = {"pairs": None, "first_choice": rl.first_choice_loss, "plackett_luce": rl.plackett_luce_loss}
"""What a ranking means: Bradley-Terry over all its pairs (the objective's own), one choice among K, or K - 1 choices."""


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """Numbers of act 2."""

    num_epochs: float = 3.0
    batch_size: int = 16
    """Prompts; each brings all its responses."""
    learning_rate: float = 2e-3
    num_responses: int = 4
    """K; people ranked 4 to 9 for InstructGPT."""
    ranking_loss: Literal["pairs", "first_choice", "plackett_luce"] = "pairs"
    label_smoothing: float = 0.0
    """For pairs, as is `centering_coef`."""
    centering_coef: float = 0.0
    buckets: int = 0
    """Widths to which batches, then of rows about equally long, are cut, one compilation each; 0 = one width, any rows."""
    share_prompts: bool = False
    """Run a prompt once for all its responses; every batch has the columns of the longest prompt and response."""
    ensemble: int = 1
    """Members; of two or more the mean weights become the reward model (WARM)."""
    num_micro_batches: int = 1
    save_every: int = 100
    """Steps from one checkpoint of the unfinished act to the next."""


@dataclasses.dataclass(frozen=True)
class Config(task.TaskConfig):
    """Act 2 alone."""

    reward: RewardModelConfig = RewardModelConfig()


def build_objective(
    config: RewardModelConfig, network: rl.TransformerConfig, shared: rl.SharedPrompts | None = None
) -> Objective:
    """The ranking loss of the configuration."""
    coefficients = {"label_smoothing": config.label_smoothing, "centering_coef": config.centering_coef}
    ranking_loss = RANKING_LOSSES[config.ranking_loss]
    return rl.reward_model(rl.causal_model(network), ranking_loss=ranking_loss, shared=shared, **coefficients)


def check_buckets(config: RewardModelConfig) -> None:
    """Refuse what cannot be before anything is started."""
    if config.buckets < 0 or (config.buckets and config.ensemble > 1):
        raise SystemExit(
            f"--reward.buckets {config.buckets} with --reward.ensemble {config.ensemble}: nothing was started. Fix: 0 or more "
            "buckets, and 0 with an ensemble, whose members draw rows of any length"
        )


def batches_of(config: RewardModelConfig, data: rl.RankingBatch, seed: int) -> Callable[[int], rl.RankingBatch]:
    """`batch(step)`, on the host, a pure function of (seed, step)."""
    num_prompts, _, length = data.tokens.shape
    size, lengths = config.batch_size, (data.segment_ids > 0).sum(axis=-1).max(axis=-1)
    widths = [-(-length * i // config.buckets // 8) * 8 for i in range(1, config.buckets)]  # T itself is always one

    def batch(step: int) -> rl.RankingBatch:
        if not config.buckets:
            rows = batch_indices(seed, step, num_examples=num_prompts, batch_size=size)
            return jax.tree.map(lambda x: x[rows], data)
        rows = alike_batch_indices(seed, step, lengths=lengths, batch_size=size)
        return trim(jax.tree.map(lambda x: x[rows], data), buckets=widths)

    return batch


def train(
    config: RewardModelConfig,
    network: rl.TransformerConfig,
    trunk: Params,
    data: rl.RankingBatch,
    *,
    seed: int,
    keep: Callable,
    stage: str = "reward_model",
    mesh: MeshConfig = COPIES,
) -> Params:
    """Fit a reward model that starts from `trunk` (the SFT policy) with a fresh head; `keep` is `task.keeper`'s."""
    devices, num_prompts = meshes.mesh_of(mesh), len(data.tokens)
    num_steps = num_steps_of(config, num_prompts, "rankings")
    optimizer = rl.adam_optimizer(warmup_cosine(config.learning_rate, num_steps=num_steps))
    shared = task.shared_prompts(config, data)
    objective, num_micro_batches = build_objective(config, network, shared), config.num_micro_batches
    step_fn = rl.make_train_step(objective, optimizer, num_micro_batches=num_micro_batches)
    train_step = jax.jit(guarded(step_fn), donate_argnums=0)
    head = rl.init_reward_head(jax.random.key(seed), network.model_dim)
    state = rl.init_train_state(jax.tree.map(jnp.copy, {"trunk": trunk, "head": head}), optimizer)
    state, batch_of = meshes.put(state, kept_reward.specs_of(network), mesh), batches_of(config, data, seed)
    show, same = {"rm/loss": "loss", "rm/accuracy": "accuracy"}, facts(config, seed=seed, data=data, start=trunk)
    with (
        keep(stage, state, save_every=config.save_every, facts=same) as kept,
        MetricLog(kept.log_to, stage, num_steps, show=show, first_step=kept.first_step) as log,
    ):
        state = kept.state
        for step in range(kept.first_step, num_steps):
            batch = kept.batch(step, rl.shard_batch(batch_of(step), devices))
            state, metrics = train_step(state, batch)
            log.write(step, kept.check(step, state, metrics, batch), tokens=batch.tokens.size)
            kept.finish(step, state)
    return state.params


def check_mesh(config: Config) -> None:
    """Refuse what the mesh cannot share evenly."""
    part = config.reward.batch_size // config.reward.num_micro_batches
    meshes.check(config.mesh, rows={"--reward.batch-size / --reward.num-micro-batches": part})


def main(config: Config) -> None:
    """Play act 2 and save the reward model."""
    run, seed = config.run, config.seed
    check_buckets(config.reward)
    check_mesh(config)
    if is_played(run, "reward_model", resume=config.resume):
        return
    tokenizer, network, policy = sft.take_up(config)
    if config.reward.ensemble > 1:
        network = dataclasses.replace(network, attention_fn=under_vmap(network.attention_fn))
    note_command(run)
    num_responses = config.reward.num_responses
    if config.data is None:
        prompts, held_out_prompts = task.load_prompts(config)
        questions = [[r.prompt[0].content for r in part] for part in (prompts[: task.NUM_RANKINGS], held_out_prompts)]
        options = {"num_responses": num_responses, "seed": seed}
        rankings, held_out = (
            sampling.collect_rankings(config, network, tokenizer, policy, asked, **options) for asked in questions
        )
        print(synthetic.agreement_ceiling(task.response_pairs(held_out)))
    else:
        rankings, held_out = task.load_rankings(config)
        prompts = [Prompt(record.id, record.prompt) for record in rankings]
        num_responses = max(len(record.responses) for record in [*rankings, *held_out])
    data = task.ranking_rows(config, tokenizer, rankings, num_responses=num_responses)
    settings, num_members = config.reward, config.reward.ensemble
    options = {"seed": seed, "keep": task.keeper(config), "mesh": config.mesh}
    if num_members > 1:
        objective = build_objective(settings, network, task.shared_prompts(settings, data))
        members = reward_ensemble.train(settings, network, objective, policy, data, **options)
        params = rl.average_members(members)
    else:
        params = train(settings, network, policy, data, **options)
    rows = task.prompt_rows(config, tokenizer, prompts[:512])
    held_out_rows = task.ranking_rows(config, tokenizer, held_out, num_responses=num_responses)
    if num_members > 1:
        reward_ensemble.finish(config, network, tokenizer, policy, members, rows, held_out_rows)
    mean, std = kept_reward.reference_moments(config, network, tokenizer, policy, (network, params), rows, seed=seed)
    kept_reward.save(run, params, tokenizer, mean=mean, std=std)
    forget(run, "reward_model")
    result = rl.evaluate(rl.reward_model(rl.causal_model(network)))(params, sft.batches(held_out_rows, 32))
    print(f"held-out accuracy {result['rm/accuracy']:.3f}; reward model saved in {run / 'reward_model'}")


if __name__ == "__main__":
    settings = tyro.cli(Config, description=__doc__)
    with alone(settings):
        main(settings)
