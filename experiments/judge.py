"""The judge's part of the main job: rows of `samples.jsonl`, from which every figure of the report is computed."""

from pathlib import Path

import jax
import kept_reward
import numpy as np
import report
import sampling
import sft
import task
from meshes import COPIES, MeshConfig
from scoring import row_logprobs, row_sums, score_rows

from rlhf_jax.data.records import Ranking
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.runtime import checkpoint
from rlhf_jax.training.evaluate import win_rate
from rlhf_jax.types import Generation, Params


def rankings_of_policy(config: task.TaskConfig, run: Path, *, num_responses: int, held_out: bool) -> list[Ranking]:
    """K responses of the SFT policy to each question, ranked by the annotators; the same at every call."""
    tokenizer, network, policy = sft.load(run, config.mesh)
    if held_out:
        questions = task.held_out_questions(config)
    else:
        questions = [record.prompt[0].content for record in task.load_prompts(config)[0][: task.NUM_RANKINGS]]
    settings = {"num_responses": num_responses, "seed": config.seed + (1000 if held_out else 0)}
    return sampling.collect_rankings(config, network, tokenizer, policy, questions, **settings)


def load_policy(
    folder: Path,
    network: TransformerConfig,
    tokenizer: Tokenizer,
    act: str = "ppo",
    *,
    step: int | None = None,
    mesh: MeshConfig = COPIES,
) -> Params:
    """The policy of act 3, on this mesh, by its name and, where it was saved more than once, its step."""
    if checkpoint.read_notes(folder / act, step=step)["tokenizer"] != tokenizer.fingerprint:
        raise ValueError(f"the policy in {folder / act} was trained with another tokenizer than act 1's")
    return checkpoint.restore(folder / act, sft.policy_like(network, mesh), step=step)


def answer(
    config: task.TaskConfig, run: Path, policy: Params, *, seed: int
) -> tuple[list[str], Generation, np.ndarray]:
    """One completion to each held-out question, and its KL from the SFT policy (k1: sum of log-ratios), `[N]` nats."""
    tokenizer, network, reference = sft.load(run, config.mesh)
    prompts = task.prompt_rows(config, tokenizer, task.world_prompts(task.held_out_questions(config)))
    sample = sampling.jitted_sampler(config, network, tokenizer.eos_id, tokenizer.pad_id)
    sampled = sampling.sample_all(sample, policy, prompts, jax.random.key(seed), batch_size=256)
    ratios = sampled.logprobs - row_logprobs(network, reference, sampled.tokens, sampled.segment_ids)
    return (
        sampling.completions(tokenizer, sampled),
        sampled,
        row_sums(ratios, sampled.completion_mask),
    )


def comparison_rows(config: task.TaskConfig, run: Path) -> list[dict]:
    """SFT and PPO on every held-out question."""
    tokenizer, network, policy = sft.load(run, config.mesh)
    reward_params, mean, std = kept_reward.load(run, network, tokenizer, config.mesh)
    sides, trained = {}, load_policy(run, network, tokenizer, mesh=config.mesh)
    for side, params, seed in (("before", policy, 1), ("after", trained, 2)):
        texts, sampled, kl = answer(config, run, params, seed=config.seed + seed)
        scores = (score_rows(network, reward_params, sampled.tokens, sampled.segment_ids) - mean) / std
        columns = (texts, sampled.completion_mask.sum(axis=1), scores, kl)
        names = ("text", "tokens", "score", "kl")
        sides[side] = [dict(zip(names, map(_plain, row), strict=True)) for row in zip(*columns, strict=True)]
    questions = task.held_out_questions(config)
    both = zip(questions, sides["before"], sides["after"], strict=True)
    return [{"kind": "comparison", "prompt": q, "before": before, "after": after} for q, before, after in both]


def ranking_rows(config: task.TaskConfig, run: Path, *, num_responses: int) -> list[dict]:
    """The reward model on held-out rankings."""
    tokenizer, network, _ = sft.load(run, config.mesh)
    params, _, _ = kept_reward.load(run, network, tokenizer, config.mesh)
    rankings = rankings_of_policy(config, run, num_responses=num_responses, held_out=True)
    data = task.ranking_rows(config, tokenizer, rankings, num_responses=num_responses)
    flat = (-1, data.tokens.shape[-1])
    scores = score_rows(network, params, data.tokens.reshape(flat), data.segment_ids.reshape(flat))
    return [
        {
            "kind": "ranking",
            "prompt": r.prompt[0].content,
            "responses": r.responses,
            "ranks": r.ranks,
            "scores": s.tolist(),
        }
        for r, s in zip(rankings, scores.reshape(data.mask.shape), strict=True)
    ]


def demonstration_rows(config: task.TaskConfig, run: Path) -> list[dict]:
    """Held-out likelihood before and after, in nats per row of packed demonstrations."""
    tokenizer, network, policy = sft.load(run, config.mesh)
    rows = task.demonstration_rows(config, tokenizer, task.load_demonstrations(config, run)[2])
    nll = {
        when: -row_sums(row_logprobs(network, params, rows.tokens, rows.segment_ids), rows.loss_mask)
        for when, params in (("before", policy), ("after", load_policy(run, network, tokenizer, mesh=config.mesh)))
    }
    sizes = rows.loss_mask.sum(axis=1)
    return [
        {"kind": "demonstration", "tokens": int(n), "nll_before": float(before), "nll_after": float(after)}
        for n, before, after in zip(sizes, nll["before"], nll["after"], strict=True)
    ]


def control_rows(config: task.TaskConfig, run: Path, baseline: list[dict]) -> list[dict]:
    """Every control's answers beside the SFT policy's."""
    tokenizer, network, _ = sft.load(run, config.mesh)
    rows = []
    for folder in sorted((run / "controls").glob("*")):
        name, number = folder.name.rsplit("_", 1)
        policy = load_policy(folder, network, tokenizer, mesh=config.mesh)
        texts, _, kl = answer(config, run, policy, seed=config.seed + 2)
        rows += [
            {
                "kind": "control",
                "name": name,
                "run": int(number),
                "prompt": r["prompt"],
                "before": r["before"]["text"],
                "after": text,
                "kl": float(nats),
            }
            for r, text, nats in zip(baseline, texts, kl, strict=True)
        ]
    return rows


def _plain(value):
    return value if isinstance(value, str) else value.item()


def gold_line(config: task.TaskConfig, run: Path, params: Params) -> str:
    """The embedded world's judge on held-out questions: the policy against SFT's."""
    questions = task.held_out_questions(config)
    before, *_ = answer(config, run, sft.load(run, config.mesh)[2], seed=config.seed + 1)
    after, _, kl = answer(config, run, params, seed=config.seed + 2)
    gold = [[report.gold(q, text) for q, text in zip(questions, texts, strict=True)] for texts in (after, before)]
    return f"gold win rate over SFT {win_rate(*gold)}; KL {kl.mean():.2f} nats per completion"
