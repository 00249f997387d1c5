"""What a policy is worth against a baseline on held-out prompts, how far it went for it, and what looks wrong on the way.

    python experiments/evaluate.py --run runs/mine                                    # act 3's policy against act 1's
    python experiments/evaluate.py --run runs/mine --policies ppo grpo dpo            # several: the KL-reward frontier
    python experiments/evaluate.py --run runs/mine --model DIRECTORY                  # a checkpoint folder as the policy

Reward, KL (every token's own, summed; and k1), win rate under the reward model: as it is, on pairs of equal length, and with
what the baseline's score owes to length taken off; diversity, length, end of sequence, in the embedded world its true
utility; and the red flags of `metrics.jsonl`. Of a policy folder every saved step is a point of the frontier. Writes
`evaluation.json`, `frontier.jsonl` and `frontier.png`. A reward model is no person, nor is the world's utility: no number here
is a human's preference. Intervals are 95 %, over prompts. Two CPU cores, about a minute; no paper.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import answers
import jax.numpy as jnp
import judge
import numpy as np
import report
import reward_model
import sft
import task
import tyro
from answers import Answers, Model

import rlhf_jax as rl
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.plots import plot_lines
from rlhf_jax.runtime.runs import read_json_lines, write_json, write_json_lines
from rlhf_jax.training.alarms import alarms, first_alarms
from rlhf_jax.training.alarms_scored import SCORED_ALARMS
from rlhf_jax.training.diversity import distinct_n, group_similarity
from rlhf_jax.training.evaluate import group_win_rate, mean_interval

JUDGES = {"win_rate": "the reward model that was optimised", "gold/win_rate": report.JUDGE}
METRICS = {
    "objective/scores": "reward, baseline's standard deviations",
    "objective/kl": "KL from the baseline, nats per completion",
    "objective/kl_k1": "the same by k1",
    "win_rate": "win rate, reward model",
    "win_rate_equal_length": "on pairs of equal length",
    "win_rate_without_length": "length taken off the score",
    "gold/score": "true utility",
    "gold/win_rate": "win rate, true utility",
    "response/distinct_2": "distinct bigrams",
    "response/similarity": "likeness of two answers to one prompt",
    "response/len_mean": "length, tokens",
    "response/eos_frac": "come to an end",
}


@dataclasses.dataclass(frozen=True)
class Config(task.TaskConfig):
    """What is evaluated; `--model` takes the place of `policies`. The lengths are those of the run."""

    policies: tuple[str, ...] = ("ppo",)
    """Folders of the run, each with one saved policy or more."""
    baseline: Path | None = None
    """Checkpoint folder; none = the run's act 1."""
    reward_model: Path | None = None
    """Folder of an `AutoModelForSequenceClassification` with one label; none = the run's act 2."""
    num_prompts: int = 256
    num_samples: int = 4
    """Answers to each prompt."""
    temperature: float = 1.0
    missing_eos_penalty: float = 1.0
    """Taken off the score of an answer without an end, as in act 3."""


def load_baseline(config: Config) -> tuple[Tokenizer, Model]:
    """The policy that others are compared with, and the tokenizer of them all."""
    if config.baseline is None:
        tokenizer, network, params = sft.load(config.run)
        return tokenizer, Model(network, params)
    return load_tokenizer(config.baseline), load_checkpoint(config, config.baseline)


def load_checkpoint(config: Config, folder: Path) -> Model:
    """A policy in a Hugging Face folder."""
    loaded = sft.start(sft.SFTConfig(), load_tokenizer(folder), model=folder, seed=config.seed, dtype=config.dtype)
    return Model(loaded.config, loaded.params)


def load_policies(config: Config, tokenizer: Tokenizer, baseline: Model) -> list[tuple[str, int, Model]]:
    """(name, step, model) of everything that is to be evaluated."""
    if config.model is not None:
        if load_tokenizer(config.model).fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"{config.model}: its tokenizer is not the baseline's, so KL has no meaning; nothing was sampled"
            )
        return [(config.model.name, 0, load_checkpoint(config, config.model))]
    found = []
    for name in config.policies:
        folder = config.run / name
        if checkpoint.latest_step(folder) is None:
            raise FileNotFoundError(f"{folder} holds no policy; nothing was sampled. Fix: --policies of the run's own")
        for step in sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()):
            params = judge.load_policy(config.run, baseline.network, tokenizer, name, step=step)
            found.append((name, step, Model(baseline.network, params)))
    return found


def load_reward(config: Config, tokenizer: Tokenizer, baseline: Model) -> answers.Reward:
    """The run's reward model with its moments, or a folder's with moments on the baseline's answers to training prompts."""
    if config.reward_model is None:
        options = {"missing_eos_penalty": config.missing_eos_penalty}
        return answers.reward_of_run(config.run, baseline.network, tokenizer, **options)
    reward = reward_model.load_folder(config.reward_model, tokenizer, dtype=config.dtype)
    rows = task.prompt_rows(config, tokenizer, task.load_prompts(config)[0][:512])
    moments = reward_model.reference_moments(
        config, baseline.network, tokenizer, baseline.params, reward, rows, seed=config.seed
    )
    return answers.Reward(Model(*reward), *moments, config.missing_eos_penalty)


def measure(ours: Answers, theirs: Answers, kl: dict[str, np.ndarray]) -> dict[str, float]:
    """One policy's row: each metric, with `_low` and `_high` where it has an interval, as the alarms and plots read it."""
    slope, intercept = rl.fit_log_length(jnp.float32(theirs.scores.ravel()), jnp.asarray(theirs.sizes.ravel()))
    level = [x.scores - (float(slope) * np.log(x.sizes) + float(intercept)) for x in (ours, theirs)]
    intervals = {
        "objective/scores": mean_interval(ours.scores.mean(axis=1)),
        "objective/kl": mean_interval(kl["exact"].mean(axis=1)),
        "objective/kl_k1": mean_interval(kl["k1"].mean(axis=1)),
        "win_rate": group_win_rate(ours.scores, theirs.scores),
        "win_rate_without_length": group_win_rate(*level),
    }
    if (ours.sizes[:, :, None] == theirs.sizes[:, None, :]).any():
        sizes = {"our_sizes": ours.sizes, "their_sizes": theirs.sizes}
        intervals["win_rate_equal_length"] = group_win_rate(ours.scores, theirs.scores, **sizes)
    if ours.scores.shape[1] > 1:
        intervals["response/similarity"] = mean_interval(group_similarity(ours.groups))
    if ours.gold is not None:
        intervals["gold/score"] = mean_interval(ours.gold.mean(axis=1))
        intervals["gold/win_rate"] = group_win_rate(ours.gold, theirs.gold)
    row = {
        "response/distinct_2": distinct_n([completion for group in ours.groups for completion in group], 2),
        "response/len_mean": float(ours.sizes.mean()),
        "response/eos_frac": float(np.mean(ours.generation.ended)),
    }
    for name, found in intervals.items():
        row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
    if ours.gold is not None:
        row["gold/score_se"] = float(ours.gold.mean(axis=1).std(ddof=1) / len(ours.gold) ** 0.5)
    return row


def red_flags(run: Path, rows: Sequence[dict]) -> list[str]:
    """What rings over the run's metrics, by stage, over the reward model, and over the frontier."""
    lines, stages, path = [], {}, run / "metrics.jsonl"
    for row in read_json_lines(path) if path.exists() else []:
        stages.setdefault(row["stage"], []).append(row)
    for stage, history in stages.items():
        lines += [f"{stage} step {history[at]['step']}: {line}" for at, line in first_alarms(history)]
    if "reward_model" in stages and (run / "report.json").exists():
        late = [row["rm/accuracy"] for row in stages["reward_model"][-50:] if "rm/accuracy" in row]
        held_out = json.loads((run / "report.json").read_text())["reward_model"]["accuracy"]
        lines += alarms([{"rm/accuracy": float(np.mean(late)), "rm/held_out_accuracy": held_out}], SCORED_ALARMS)
    for name in dict.fromkeys(row["policy"] for row in rows[1:]):
        path_of = [rows[0], *(row for row in rows if row["policy"] == name)]
        lines += [f"{name}: {line}" for line in alarms(path_of, SCORED_ALARMS)]
    return lines


def table(rows: Sequence[dict]) -> str:
    """Metrics down, policies across."""
    names = [row["policy"] + (f" {row['step']}" if row["step"] else "") for row in rows]
    lines = [f"{'':40}" + "".join(f"{name:>26}" for name in names)]
    for metric, label in METRICS.items():
        if any(metric in row for row in rows):
            lines.append(f"{label:40}" + "".join(f"{_cell(row, metric):>26}" for row in rows))
    return "\n".join(lines)


def main(config: Config) -> dict:
    """Evaluate, print, write."""
    tokenizer, baseline = load_baseline(config)
    policies = load_policies(config, tokenizer, baseline)
    reward = load_reward(config, tokenizer, baseline)
    prompts = task.load_prompts(config)[1][: config.num_prompts]
    options = {"num_samples": config.num_samples, "temperature": config.temperature}
    theirs, rows = None, []
    for i, (name, step, model) in enumerate([("baseline", 0, baseline), *policies]):
        ours = answers.collect(config, tokenizer, model, reward, prompts, seed=config.seed + 5 + i, **options)
        theirs = theirs or ours
        kl = answers.divergences(model, baseline, ours, temperature=config.temperature)
        rows.append({"policy": name, "step": step, **measure(ours, theirs, kl)})
    flags = red_flags(config.run, rows)
    judges = {name: text for name, text in JUDGES.items() if name in rows[0]}
    result = {
        "prompts": len(prompts),
        "answers": config.num_samples,
        "judges": judges,
        "policies": rows,
        "red_flags": flags,
    }
    config.run.mkdir(parents=True, exist_ok=True)
    write_json(config.run / "evaluation.json", result)
    write_json_lines(config.run / "frontier.jsonl", rows)
    lines = {
        name: [rows[0], *(r for r in rows if r["policy"] == name)] for name in {row["policy"]: 0 for row in rows[1:]}
    }
    panels = [(name, METRICS[name]) for name in ("objective/scores", "gold/score") if name in rows[0]]
    x = ("objective/kl", METRICS["objective/kl"])
    plot_lines(lines, config.run / "frontier.png", x=x, y=panels, title=f"{len(prompts)} held-out prompts")
    print(table(rows))
    print(*(f"{name}: {text}" for name, text in judges.items()), sep="\n")
    print(*(f"red flag, {flag}" for flag in flags), f"{len(flags)} red flags", sep="\n")
    return result


def _cell(row: dict, metric: str) -> str:
    if metric not in row:
        return "no such pair"
    ends = f" [{row[metric + '_low']:.3f}, {row[metric + '_high']:.3f}]" if f"{metric}_low" in row else ""
    return f"{row[metric]:.3f}{ends}"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
