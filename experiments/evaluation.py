"""What is measured of a policy against a baseline, what looks wrong, and the table of both."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from answers import Answers

import rlhf_jax as rl
from rlhf_jax.runtime.runs import read_json_lines
from rlhf_jax.training.alarms import alarms, first_alarms
from rlhf_jax.training.alarms_scored import SCORED_ALARMS
from rlhf_jax.training.diversity import distinct_n, group_similarity
from rlhf_jax.training.evaluate import group_win_rate, mean_interval

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


def _cell(row: dict, metric: str) -> str:
    if metric not in row:
        return "no such pair"
    ends = f" [{row[metric + '_low']:.3f}, {row[metric + '_high']:.3f}]" if f"{metric}_low" in row else ""
    return f"{row[metric]:.3f}{ends}"
