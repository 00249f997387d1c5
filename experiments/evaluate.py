"""What a policy is worth against a baseline on held-out prompts, how far it went for it, and what looks wrong on the way.

    python experiments/evaluate.py --run runs/mine                                    # act 3's policy against act 1's
    python experiments/evaluate.py --run runs/mine --policies ppo grpo dpo            # several
    python experiments/evaluate.py --run runs/mine --policies ppo_steps              # kept on the way (`--ppo.policy-every 5`)
    python experiments/evaluate.py --run runs/mine --model DIRECTORY                  # a checkpoint folder as the policy

Reward, KL (every token's own, summed; and k1), win rate under the reward model: as it is, on pairs of equal length, and with
what the baseline's score owes to length taken off; diversity, length, end of sequence, in the embedded world its true
utility; and the red flags of `metrics.jsonl`. Of a policy folder every saved step is a point of the frontier. Writes
`evaluation.json`, `frontier.jsonl` and `frontier.png`. A reward model is no person, nor is the world's utility: no number here
is a human's preference. Intervals are 95 %, over prompts. Two CPU cores, about a minute; no paper.
"""

import dataclasses
from pathlib import Path

import answers
import judge
import kept_reward
import report
import sft
import task
import tyro
from acts import keep_programs, refuse_mesh
from answers import Model
from evaluation import METRICS, measure, red_flags, table

from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.plots import plot_lines
from rlhf_jax.runtime.runs import write_json, write_json_lines

JUDGES = {"win_rate": "the reward model that was optimised", "gold/win_rate": report.JUDGE}


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
    reward = kept_reward.load_folder(config.reward_model, tokenizer, dtype=config.dtype)
    rows = task.prompt_rows(config, tokenizer, task.load_prompts(config)[0][:512])
    moments = kept_reward.reference_moments(
        config, baseline.network, tokenizer, baseline.params, reward, rows, seed=config.seed
    )
    return answers.Reward(Model(*reward), *moments, config.missing_eos_penalty)


def main(config: Config) -> dict:
    """Evaluate, print, write."""
    refuse_mesh(config)
    keep_programs()
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


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
