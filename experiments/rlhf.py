"""The main job: RLHF in three acts, from random weights to a before/after table.

    python experiments/rlhf.py                                        # the embedded world, about five minutes on two cores
    python experiments/rlhf.py --controls                             # and what must fail: shuffled labels, a stiff leash
    python experiments/rlhf.py --dataset hh --data-dir DIRECTORY      # real human comparisons

(1) supervised fine-tuning on demonstrations of mixed manners, (2) a reward model from annotators' rankings of the policy's
own responses, (3) PPO on a KL leash. The last lines say what changed on held-out prompts, judged by the world's true utility,
which no act has seen. Everything goes to the run's folder: metrics.jsonl, samples.jsonl, curves.png, report.md, report.json.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import hh
import jax
import jax.numpy as jnp
import numpy as np
import ppo
import report
import reward_model
import sft
import task
import tyro
from ppo import PPOConfig
from reward_model import RewardModelConfig
from rich.console import Console
from rich.markdown import Markdown
from sft import SFTConfig

from rlhf_jax.data.records import Ranking
from rlhf_jax.functional.masking import masked_sum
from rlhf_jax.models import transformer
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.objectives import sequence_token_logprobs
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.runs import open_run, write_json, write_json_lines
from rlhf_jax.types import Frozen, Generation, Params, RankingBatch

CACHE = Path(os.environ.get("RLHF_JAX_CACHE", Path.home() / ".cache" / "rlhf_jax"))
"""Compiled programs, so that a second run starts at once."""


@dataclasses.dataclass(frozen=True)
class Config(task.TaskConfig):
    """All three acts."""

    dataset: Literal["world", "hh"] = "world"
    data_dir: Path | None = Path(os.environ["RLHF_JAX_DATA"]) if "RLHF_JAX_DATA" in os.environ else None
    """Folder with `preferences/hh_*_base.jsonl.gz`, for `--dataset hh`."""
    controls: bool = False
    num_shuffled: int = 6
    """Reward models trained on shuffled labels, with `--controls`."""
    sft: SFTConfig = SFTConfig()
    reward: RewardModelConfig = RewardModelConfig()
    ppo: PPOConfig = PPOConfig()


def timed(run: Path, name: str, act: Callable[[], None]) -> None:
    """Play an act and note its seconds, which survive a resume."""
    path = run / "seconds.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    if name in seconds:
        print(f"{name}: finished before, taken from {run}")
        return
    start = time.monotonic()
    act()
    seconds[name] = round(time.monotonic() - start, 1)
    seconds["total"] = round(sum(value for key, value in seconds.items() if key != "total"), 1)
    write_json(path, seconds)


def play_sft(config: Config, run: Path) -> None:
    """Act 1."""
    tokenizer, demonstrations, _ = task.load_demonstrations(config, run)
    network = sft.network_config(config.sft, tokenizer.vocab_size)
    rows = task.demonstration_rows(config, tokenizer, demonstrations)
    params = sft.train(config.sft, network, rows, seed=config.seed, log_to=run / "metrics.jsonl")
    sft.save(run, network, tokenizer, params)


def rankings_of_policy(config: Config, run: Path, *, held_out: bool) -> list[Ranking]:
    """K responses of the SFT policy to each question, ranked by the annotators; the same at every call."""
    tokenizer, network, policy = sft.load(run)
    if held_out:
        questions = task.held_out_questions(config)
    else:
        questions = [record.prompt[0].content for record in task.load_prompts(config)[0][: task.NUM_RANKINGS]]
    settings = {"num_responses": config.reward.num_responses, "seed": config.seed + (1000 if held_out else 0)}
    return reward_model.collect_rankings(config, network, tokenizer, policy, questions, **settings)


def play_reward_model(config: Config, run: Path) -> None:
    """Act 2."""
    tokenizer, network, policy = sft.load(run)
    rankings = rankings_of_policy(config, run, held_out=False)
    data = task.ranking_rows(config, tokenizer, rankings, num_responses=config.reward.num_responses)
    fit_reward_model(config, run, network, tokenizer, policy, data, run, seed=config.seed, stage="reward_model")


def fit_reward_model(config, run, network, tokenizer, policy, data: RankingBatch, save_to: Path, *, seed: int, stage: str):
    """Train, normalise to mean 0 and standard deviation 1 on the SFT policy's samples, save."""
    log_to = run / "metrics.jsonl"
    params = reward_model.train(config.reward, network, policy, data, seed=seed, log_to=log_to, stage=stage)
    prompts = task.prompt_rows(config, tokenizer, task.load_prompts(config)[0][:512])
    moments = reward_model.reference_moments(config, network, tokenizer, policy, params, prompts, seed=seed)
    reward_model.save(save_to, params, tokenizer, mean=moments[0], std=moments[1])


def play_ppo(config: Config, run: Path, rewards_from: Path | None = None, save_to: Path | None = None, stage: str = "ppo"):
    """Act 3; a control reads another reward model and saves elsewhere."""
    tokenizer, network, policy = sft.load(run)
    reward_params, mean, std = reward_model.load(rewards_from or run, network, tokenizer)
    frozen = Frozen(policy, reward_params, jnp.asarray(mean), jnp.asarray(std))
    prompts = task.prompt_rows(config, tokenizer, task.load_prompts(config)[0])
    demonstrations = None
    if config.ppo.ptx_coef:
        demonstrations = task.demonstration_rows(config, tokenizer, task.load_demonstrations(config, run)[1])
    options = {"seed": config.seed, "log_to": run / "metrics.jsonl", "demonstrations": demonstrations, "stage": stage}
    params, _ = ppo.train(config.ppo, config, network, tokenizer, frozen, prompts, **options)
    checkpoint.save((save_to or run) / "ppo", 0, params, notes={"tokenizer": tokenizer.fingerprint})


def play_controls(config: Config, run: Path) -> None:
    """Reward models that learned shuffled labels, and a leash too stiff to move on."""
    tokenizer, network, policy = sft.load(run)
    rankings = rankings_of_policy(config, run, held_out=False)
    data = task.ranking_rows(config, tokenizer, rankings, num_responses=config.reward.num_responses)
    for i in range(config.num_shuffled):
        folder = run / "controls" / f"shuffled_labels_{i}"
        rng = np.random.default_rng([config.seed, i])
        shuffled = data.replace(ranks=rng.permuted(data.ranks, axis=1))
        stage = f"shuffled_{i}"
        fit_reward_model(config, run, network, tokenizer, policy, shuffled, folder, seed=i, stage=f"rm_{stage}")
        play_ppo(config, run, rewards_from=folder, save_to=folder, stage=f"ppo_{stage}")
    stiff = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, kl_coef=1e3, kl_target=None))
    play_ppo(stiff, run, save_to=run / "controls" / "kl_coef_1e3_0", stage="ppo_kl_coef_1e3")


def load_policy(folder: Path, network: TransformerConfig) -> Params:
    """The policy of act 3."""
    return checkpoint.restore(folder / "ppo", jax.eval_shape(lambda: transformer.init(jax.random.key(0), network)))


def answer(config: Config, run: Path, policy: Params, *, seed: int) -> tuple[list[str], Generation, np.ndarray]:
    """One completion to each held-out question, and its KL from the SFT policy (k1: sum of log-ratios), `[N]` nats."""
    tokenizer, network, reference = sft.load(run)
    prompts = task.prompt_rows(config, tokenizer, task.world_prompts(task.held_out_questions(config)))
    sample = task.jitted_sampler(config, network, tokenizer.eos_id, tokenizer.pad_id)
    sampled = task.sample_all(sample, policy, prompts, jax.random.key(seed), batch_size=256)
    ratios = sampled.logprobs - row_logprobs(network, reference, sampled.tokens, sampled.segment_ids)
    return task.completions(tokenizer, sampled), sampled, np.asarray(masked_sum(ratios, sampled.completion_mask, axis=1))


def row_logprobs(network: TransformerConfig, params: Params, tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """Token log-probs `[N, T]` of whole rows."""
    model = transformer.causal_model(network)
    return np.asarray(jax.jit(lambda p, t, s: sequence_token_logprobs(model, p, t, s))(params, tokens, segment_ids))


def comparison_rows(config: Config, run: Path) -> list[dict]:
    """SFT and PPO on every held-out question."""
    tokenizer, network, policy = sft.load(run)
    reward_params, mean, std = reward_model.load(run, network, tokenizer)
    sides = {}
    for side, params, seed in (("before", policy, 1), ("after", load_policy(run, network), 2)):
        texts, sampled, kl = answer(config, run, params, seed=config.seed + seed)
        scores = (reward_model.score_rows(network, reward_params, sampled.tokens, sampled.segment_ids) - mean) / std
        columns = (texts, sampled.completion_mask.sum(axis=1), scores, kl)
        names = ("text", "tokens", "score", "kl")
        sides[side] = [dict(zip(names, map(_plain, row), strict=True)) for row in zip(*columns, strict=True)]
    questions = task.held_out_questions(config)
    both = zip(questions, sides["before"], sides["after"], strict=True)
    return [{"kind": "comparison", "prompt": q, "before": before, "after": after} for q, before, after in both]


def ranking_rows(config: Config, run: Path) -> list[dict]:
    """The reward model on held-out rankings."""
    tokenizer, network, _ = sft.load(run)
    params, _, _ = reward_model.load(run, network, tokenizer)
    rankings = rankings_of_policy(config, run, held_out=True)
    data = task.ranking_rows(config, tokenizer, rankings, num_responses=config.reward.num_responses)
    flat = (-1, data.tokens.shape[-1])
    scores = reward_model.score_rows(network, params, data.tokens.reshape(flat), data.segment_ids.reshape(flat))
    return [
        {"kind": "ranking", "prompt": r.prompt[0].content, "responses": r.responses, "ranks": r.ranks, "scores": s.tolist()}
        for r, s in zip(rankings, scores.reshape(data.mask.shape), strict=True)
    ]


def demonstration_rows(config: Config, run: Path) -> list[dict]:
    """Held-out likelihood before and after, in nats per row of packed demonstrations."""
    tokenizer, network, policy = sft.load(run)
    rows = task.demonstration_rows(config, tokenizer, task.load_demonstrations(config, run)[2])
    nll = {
        when: -masked_sum(row_logprobs(network, params, rows.tokens, rows.segment_ids), rows.loss_mask, axis=1)
        for when, params in (("before", policy), ("after", load_policy(run, network)))
    }
    sizes = rows.loss_mask.sum(axis=1)
    return [
        {"kind": "demonstration", "tokens": int(n), "nll_before": float(before), "nll_after": float(after)}
        for n, before, after in zip(sizes, nll["before"], nll["after"], strict=True)
    ]


def control_rows(config: Config, run: Path, baseline: list[dict]) -> list[dict]:
    """Every control's answers beside the SFT policy's."""
    _, network, _ = sft.load(run)
    rows = []
    for folder in sorted((run / "controls").glob("*")):
        name, number = folder.name.rsplit("_", 1)
        texts, _, kl = answer(config, run, load_policy(folder, network), seed=config.seed + 2)
        rows += [
            {"kind": "control", "name": name, "run": int(number), "prompt": r["prompt"], "before": r["before"]["text"],
             "after": text, "kl": float(nats)}
            for r, text, nats in zip(baseline, texts, kl, strict=True)
        ]
    return rows


def _plain(value):
    return value if isinstance(value, str) else value.item()


def main(config: Config) -> dict:
    """Play what is not yet played, then judge."""
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    if config.dataset == "hh":
        return hh.main(config)
    run = open_run(config.run, config, resume=config.resume)
    timed(run, "sft", lambda: play_sft(config, run))
    timed(run, "reward_model", lambda: play_reward_model(config, run))
    timed(run, "ppo", lambda: play_ppo(config, run))
    if config.controls:
        timed(run, "controls", lambda: play_controls(config, run))

    def judge() -> None:
        compared = comparison_rows(config, run)
        rows = [*compared, *ranking_rows(config, run), *demonstration_rows(config, run), *control_rows(config, run, compared)]
        write_json_lines(run / "samples.jsonl", rows)

    timed(run, "judge", judge)
    result = report.write(run, {"dataset": "world", "seed": config.seed, "kl_target": config.ppo.kl_target})
    Console().print(Markdown((run / "report.md").read_text(encoding="utf-8")))
    print(f"report, samples and curves in {run}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
