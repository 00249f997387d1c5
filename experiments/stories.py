"""The three acts on a real pretrained model: a storyteller of 260,000 parameters learns what its listeners like.

    python experiments/convert_llama2c.py --weights DIR/stories260K.bin --tokenizer DIR/tok512.bin --to runs/stories260K
    python experiments/stories.py --model runs/stories260K --run runs/stories

**The preference**, checkable by eye (`stories_judge.py`): a happy story, not a sad or frightening one, in which somebody
speaks, that does not repeat itself and that comes to its end. (1) The pretrained model tells long stories; act 1 imitates
beginnings of its own, cut after a whole sentence, so that it learns to end within the length. (2) Of four stories to each
opening, simulated listeners with noise say which they like; a reward model that starts from the storyteller learns their
rankings. (3) PPO. The last table is on openings that no act has seen. Deviations: no person ranked, and no other
demonstrations exist than the model's own stories.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import judge
import kept_reward
import numpy as np
import ppo
import reward_model
import sampling
import sft
import stories_judge
import task
import tyro
from acts import keep_programs, note_command, refuse_mesh, refuse_processes, timed
from ppo import PPOConfig
from reward_model import RewardModelConfig
from scoring import row_logprobs, row_sums
from sft import SFTConfig

from rlhf_jax.data.batching import packed_demonstration_batch, prompt_batch, ranking_batch
from rlhf_jax.data.records import TokenizedDemonstration, TokenizedRanking
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.resume import forget
from rlhf_jax.runtime.runs import locked, open_run, write_json, write_json_lines, write_text
from rlhf_jax.types import Frozen, PromptBatch, RankingBatch


@dataclasses.dataclass(frozen=True)
class Config(task.TaskConfig):
    """The numbers of this job."""

    run: Path = Path("runs/stories")
    prompt_length: int = 40
    response_length: int = 96
    row_length: int = 136
    num_samples: int = 4
    """Stories to each opening, which act 1 imitates."""
    num_rankings: int = 2
    """Rankings of each opening, every time of other stories."""
    sft: SFTConfig = SFTConfig(num_epochs=2.0, batch_size=16, learning_rate=5e-4)
    reward: RewardModelConfig = RewardModelConfig(num_epochs=2.0, learning_rate=1e-3, label_smoothing=0.05)
    ppo: PPOConfig = PPOConfig(
        num_iterations=25, batch_size=128, learning_rate=2e-4, kl_target=8.0, kl_coef=0.15, kl_horizon=300.0
    )


def rows_of_openings(config: Config, tokenizer: Tokenizer, openings: Sequence[str]) -> PromptBatch:
    """A story's beginning as the pretrained model knows it: bos, then the text."""
    ids = [(tokenizer.bos_id, *tokenizer.encode(opening)) for opening in openings]
    return prompt_batch(ids, length=config.prompt_length, pad_id=tokenizer.pad_id, vocab_size=tokenizer.vocab_size)


def tell(config: Config, policy, openings: Sequence[str], *, seed: int, num_samples: int = 1):
    """Stories to each opening: their generation, and their texts in groups."""
    tokenizer, network, params = policy
    sample = sampling.jitted_sampler(config, network, tokenizer.eos_id, tokenizer.pad_id, num_samples)
    prompts = rows_of_openings(config, tokenizer, openings)
    sampled = sampling.sample_all(sample, params, prompts, jax.random.key(seed), batch_size=128)
    tokens, masks = sampled.tokens, sampled.completion_mask
    texts = [tokenizer.decode(row[mask].tolist()) for row, mask in zip(tokens, masks, strict=True)]
    return sampled, [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


def play_sft(config: Config, run: Path) -> None:
    """Act 1: imitate the model's own stories, ended after the last whole sentence that fits."""
    tokenizer = load_tokenizer(config.model)
    base = sft.start(config.sft, tokenizer, model=config.model, seed=config.seed, dtype=config.dtype)
    openings = stories_judge.openings(held_out=False)
    policy = (tokenizer, base.config, base.params)
    _, groups = tell(config, policy, openings, seed=1, num_samples=config.num_samples)
    examples = [
        TokenizedDemonstration((tokenizer.bos_id, *tokenizer.encode(opening)), (*ids, tokenizer.eos_id))
        for opening, group in zip(openings, groups, strict=True)
        for story in map(stories_judge.whole_sentences, group)
        if story and len(ids := tokenizer.encode(story)) < config.response_length
    ]
    print(f"act 1: {len(examples)} stories to {len(openings)} openings")
    ids = {"pad_id": tokenizer.pad_id, "vocab_size": tokenizer.vocab_size}
    data = packed_demonstration_batch(examples, length=config.row_length, **ids)
    keep = task.keeper(config)
    params = sft.train(config.sft, base.config, base.params, data, seed=config.seed, keep=keep)
    save_tokenizer(tokenizer, run / "tokenizer")
    sft.save(run, tokenizer, base._replace(params=params))


def ranked_stories(config: Config, policy, openings: Sequence[str], *, seed: int) -> RankingBatch:
    """Four stories to each opening, ranked by a listener."""
    sampled, groups = tell(config, policy, openings, seed=seed, num_samples=config.reward.num_responses)
    ranks = stories_judge.rank(groups, seed=seed)
    shape = (len(openings), config.reward.num_responses, -1)
    tokens, here, told = (x.reshape(shape) for x in (sampled.tokens, sampled.segment_ids > 0, sampled.completion_mask))
    examples = [
        TokenizedRanking(
            tuple(tokens[i, 0][here[i, 0] & ~told[i, 0]].tolist()),
            tuple(tuple(row[mask].tolist()) for row, mask in zip(tokens[i], told[i], strict=True)),
            ranks[i],
        )
        for i in range(len(openings))
    ]
    ids = {"pad_id": policy[0].pad_id, "vocab_size": policy[0].vocab_size}
    length = config.prompt_length + config.response_length
    return ranking_batch(examples, length=length, num_responses=config.reward.num_responses, **ids)


def play_reward_model(config: Config, run: Path) -> None:
    """Act 2: listeners rank, a network that starts from the storyteller learns to predict them."""
    policy = tokenizer, network, start = sft.load(run)
    openings = stories_judge.openings(held_out=False)
    asked = openings * config.num_rankings
    data = ranked_stories(config, policy, asked, seed=config.seed + 2)
    params = reward_model.train(config.reward, network, start, data, seed=config.seed, keep=task.keeper(config))
    prompts = rows_of_openings(config, tokenizer, openings[:256])
    mean, std = kept_reward.reference_moments(
        config, network, tokenizer, start, (network, params), prompts, seed=config.seed
    )
    kept_reward.save(run, params, tokenizer, mean=mean, std=std)
    forget(run, "reward_model")


def play_ppo(config: Config, run: Path) -> None:
    """Act 3."""
    tokenizer, network, start = sft.load(run)
    reward_params, mean, std = kept_reward.load(run, network, tokenizer)
    frozen = Frozen(start, reward_params, jnp.asarray(mean), jnp.asarray(std))
    prompts = rows_of_openings(config, tokenizer, stories_judge.openings(held_out=False))
    options = {"seed": config.seed, "keep": task.keeper(config)}
    params, _ = ppo.train(config.ppo, config, network, tokenizer, frozen, prompts, **options)
    checkpoint.save(run / "ppo", 0, params, notes={"tokenizer": tokenizer.fingerprint})
    forget(run, "ppo")


def play_judge(config: Config, run: Path) -> None:
    """One story to each held-out opening by every storyteller, with its KL from act 1's."""
    tokenizer, network, reference = sft.load(run)
    base = sft.start(config.sft, tokenizer, model=config.model, seed=config.seed, dtype=config.dtype).params
    rows, openings = [], stories_judge.openings(held_out=True)
    for name, params in (("pretrained", base), ("sft", reference), ("ppo", judge.load_policy(run, network, tokenizer))):
        sampled, groups = tell(config, (tokenizer, network, params), openings, seed=config.seed + 3)
        ratios = sampled.logprobs - row_logprobs(network, reference, sampled.tokens, sampled.segment_ids)
        kl = row_sums(ratios, np.asarray(sampled.completion_mask))
        for opening, (text,), nats in zip(openings, groups, kl, strict=True):
            rows.append({"storyteller": name, "opening": opening, "text": text, "kl": float(nats)})
    write_json_lines(run / "samples.jsonl", rows)


def main(config: Config) -> dict:
    """Play what is not yet played, then judge."""
    refuse_processes(config)
    refuse_mesh(config)
    if config.model is None:
        raise SystemExit("--model is missing: the folder that convert_llama2c.py wrote, or another storyteller's")
    keep_programs()
    with locked(config.run):
        return play(config)


def play(config: Config) -> dict:
    """The three acts of the storyteller."""
    run = open_run(config.run, config, resume=config.resume, force=config.force)
    note_command(run)
    for name, act in (("sft", play_sft), ("reward_model", play_reward_model), ("ppo", play_ppo)):
        timed(run, name, lambda act=act: act(config, run), run / name)
    timed(run, "judge", lambda: play_judge(config, run))
    report = stories_judge.report(run / "samples.jsonl", kl_target=config.ppo.kl_target)
    write_json(run / "report.json", report)
    text = stories_judge.render(report, run / "samples.jsonl")
    write_text(run / "report.md", text)
    print(text)
    return report


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
