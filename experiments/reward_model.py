"""Act 2, the reward model: learn to predict how people rank responses (Bradley-Terry over all pairs; InstructGPT §3.5).

    python experiments/reward_model.py --run runs/mine

takes up `runs/mine/sft`, samples K responses to each prompt from it, has simulated annotators rank them best to worst and
writes `runs/mine/reward_model`. With `--data FILE` it learns from the rankings or pairs of that file instead, with
`--model DIRECTORY` a checkpoint takes the place of `runs/mine/sft`. `--reward.ranking-loss` says what a ranking means,
`--reward.ensemble M` trains M of them (`reward_ensemble.py`). Two CPU cores, about two minutes. Deviation: three epochs;
with pretrained networks one is usual, and more overfits (Stiennon et al. 2020).
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import reward_ensemble
import sampling
import sft
import task
import tyro
from acts import alone, facts, is_played, note_command, num_steps_of
from scoring import score_rows

from rlhf_jax.data import synthetic
from rlhf_jax.data.batching import batch_indices
from rlhf_jax.data.records import Prompt, Ranking
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer
from rlhf_jax.functional.reward_losses import first_choice_loss, plackett_luce_loss
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.objectives import reward_model
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.runtime.resume import forget, guarded
from rlhf_jax.runtime.sharding import make_mesh, replicate, shard_batch
from rlhf_jax.training.ensembles import average_members
from rlhf_jax.training.evaluate import evaluate
from rlhf_jax.training.optimizers import adam_optimizer, warmup_cosine
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import Objective, Params, PromptBatch, RankingBatch

RANKING_LOSSES = {"pairs": None, "first_choice": first_choice_loss, "plackett_luce": plackett_luce_loss}
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
    ensemble: int = 1
    """Members; of two or more the mean weights become the reward model (WARM)."""
    num_micro_batches: int = 1
    save_every: int = 100
    """Steps from one checkpoint of the unfinished act to the next."""


@dataclasses.dataclass(frozen=True)
class Config(task.TaskConfig):
    """Act 2 alone."""

    reward: RewardModelConfig = RewardModelConfig()


def build_objective(config: RewardModelConfig, network: TransformerConfig) -> Objective:
    """The ranking loss of the configuration."""
    coefficients = {"label_smoothing": config.label_smoothing, "centering_coef": config.centering_coef}
    ranking_loss = RANKING_LOSSES[config.ranking_loss]
    return reward_model(transformer.causal_model(network), ranking_loss=ranking_loss, **coefficients)


def train(
    config: RewardModelConfig,
    network: TransformerConfig,
    trunk: Params,
    data: RankingBatch,
    *,
    seed: int,
    keep: Callable,
    stage: str = "reward_model",
) -> Params:
    """Fit a reward model that starts from `trunk` (the SFT policy) with a fresh head; `keep` is `task.keeper`'s."""
    mesh = make_mesh()
    num_prompts = data.tokens.shape[0]
    num_steps = num_steps_of(config, num_prompts, "rankings")
    optimizer = adam_optimizer(warmup_cosine(config.learning_rate, num_steps=num_steps))
    train_step = make_train_step(
        build_objective(config, network), optimizer, num_micro_batches=config.num_micro_batches
    )
    train_step = jax.jit(guarded(train_step), donate_argnums=0)
    head = init_reward_head(jax.random.key(seed), network.model_dim)
    state = replicate(init_train_state(jax.tree.map(jnp.copy, {"trunk": trunk, "head": head}), optimizer), mesh)
    show, same = {"rm/loss": "loss", "rm/accuracy": "accuracy"}, facts(config, seed=seed, data=data, start=trunk)
    with (
        keep(stage, state, save_every=config.save_every, facts=same) as kept,
        MetricLog(kept.log_to, stage, num_steps, show=show, first_step=kept.first_step) as log,
    ):
        state = kept.state
        for step in range(kept.first_step, num_steps):
            rows = batch_indices(seed, step, num_examples=num_prompts, batch_size=config.batch_size)
            batch = kept.batch(step, shard_batch(jax.tree.map(lambda x, rows=rows: x[rows], data), mesh))
            state, metrics = train_step(state, batch)
            log.write(step, kept.check(step, state, metrics, batch), tokens=batch.tokens.size)
            kept.finish(step, state)
    return state.params


def collect_rankings(
    config: task.TaskConfig,
    network: TransformerConfig,
    tokenizer: Tokenizer,
    policy: Params,
    questions: Sequence[str],
    *,
    num_responses: int,
    seed: int,
) -> list[Ranking]:
    """The human step of the embedded world: sample K responses to each question, have them ranked."""
    sample = sampling.jitted_sampler(config, network, tokenizer.eos_id, tokenizer.pad_id, num_responses)
    prompts = task.prompt_rows(config, tokenizer, task.world_prompts(questions))
    sampled = sampling.sample_all(sample, policy, prompts, jax.random.key(seed), batch_size=128)
    texts = sampling.completions(tokenizer, sampled)
    groups = [texts[i : i + num_responses] for i in range(0, len(texts), num_responses)]
    return task.world_rankings(questions, groups, seed=seed)


def reference_moments(
    config: task.TaskConfig,
    network: TransformerConfig,
    tokenizer: Tokenizer,
    policy: Params,
    reward: tuple[TransformerConfig, Params],
    prompts: PromptBatch,
    *,
    seed: int,
) -> tuple[float, float]:
    """Mean and standard deviation of the raw scores on fresh samples of the SFT policy (lm-human-preferences #16)."""
    sample = sampling.jitted_sampler(config, network, tokenizer.eos_id, tokenizer.pad_id)
    sampled = sampling.sample_all(sample, policy, prompts, jax.random.key(seed), batch_size=256)
    scores = score_rows(*reward, sampled.tokens, sampled.segment_ids)
    return float(scores.mean()), float(scores.std())


def save(run: Path, params: Params, tokenizer: Tokenizer, *, mean: float, std: float) -> None:
    """Keep the reward model and the moments of its scores on the SFT policy's samples."""
    checkpoint.save(
        run / "reward_model", 0, params, notes={"mean": mean, "std": std, "tokenizer": tokenizer.fingerprint}
    )


def load(run: Path, network: TransformerConfig, tokenizer: Tokenizer) -> tuple[Params, float, float]:
    """The reward model of act 2, and the mean and standard deviation of its scores on the SFT policy's samples."""
    notes = checkpoint.read_notes(run / "reward_model")
    if notes["tokenizer"] != tokenizer.fingerprint:
        raise ValueError(f"the reward model in {run} was trained with another tokenizer than the policy")
    like = jax.eval_shape(
        lambda: {
            "trunk": transformer.init(jax.random.key(0), network),
            "head": init_reward_head(jax.random.key(0), network.model_dim),
        }
    )
    return checkpoint.restore(run / "reward_model", like), notes["mean"], notes["std"]


def load_folder(folder: Path, tokenizer: Tokenizer, *, dtype: str = "float32") -> tuple[TransformerConfig, Params]:
    """A reward model in a Hugging Face folder: network and parameters. Its tokenizer must be the policy's."""
    theirs = load_tokenizer(folder)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{folder}: the reward model's tokenizer ({theirs.fingerprint[:12]}, {theirs.vocab_size} ids) is not the policy's "
            f"({tokenizer.fingerprint[:12]}, {tokenizer.vocab_size} ids), so it would read other text than was written; "
            "nothing was started. Fix: a reward model trained on the policy's tokenizer"
        )
    loaded = huggingface.load_reward_model(folder)
    return sft.computed(loaded.config, dtype), loaded.params


def main(config: Config) -> None:
    """Play act 2 and save the reward model."""
    run = config.run
    if is_played(run, "reward_model", resume=config.resume):
        return
    tokenizer, network, policy = sft.take_up(config)
    note_command(run)
    num_responses = config.reward.num_responses
    if config.data is None:
        prompts, held_out_prompts = task.load_prompts(config)
        settings = {"num_responses": num_responses, "seed": config.seed}
        questions = [record.prompt[0].content for record in prompts[: task.NUM_RANKINGS]]
        rankings = collect_rankings(config, network, tokenizer, policy, questions, **settings)
        questions = [record.prompt[0].content for record in held_out_prompts]
        held_out = collect_rankings(config, network, tokenizer, policy, questions, **settings)
        print(synthetic.agreement_ceiling(task.response_pairs(held_out)))
    else:
        rankings, held_out = task.load_rankings(config)
        prompts = [Prompt(record.id, record.prompt) for record in rankings]
        num_responses = max(len(record.responses) for record in [*rankings, *held_out])
    data = task.ranking_rows(config, tokenizer, rankings, num_responses=num_responses)
    settings, keep, num_members = config.reward, task.keeper(config), config.reward.ensemble
    if num_members > 1:
        objective = build_objective(settings, network)
        members = reward_ensemble.train(settings, network, objective, policy, data, seed=config.seed, keep=keep)
        params = average_members(members)
    else:
        params = train(settings, network, policy, data, seed=config.seed, keep=keep)
    rows = task.prompt_rows(config, tokenizer, prompts[:512])
    held_out_rows = task.ranking_rows(config, tokenizer, held_out, num_responses=num_responses)
    if num_members > 1:
        reward_ensemble.finish(config, network, tokenizer, policy, members, rows, held_out_rows)
    mean, std = reference_moments(config, network, tokenizer, policy, (network, params), rows, seed=config.seed)
    save(run, params, tokenizer, mean=mean, std=std)
    forget(run, "reward_model")
    result = evaluate(reward_model(transformer.causal_model(network)))(params, sft.batches(held_out_rows, 32))
    print(f"held-out accuracy {result['rm/accuracy']:.3f}; reward model saved in {run / 'reward_model'}")


if __name__ == "__main__":
    settings = tyro.cli(Config, description=__doc__)
    with alone(settings):
        main(settings)
