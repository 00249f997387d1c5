"""The report of the HH job: every figure is computed from the rows of `samples.jsonl`, and from nothing else.

    python experiments/hh_report.py runs/hh                        # computes report.json anew: is it the same?
    python experiments/hh_report.py runs/hh0 runs/hh1 runs/hh2     # that, and the criteria of several seeds in a table

The unit of a win rate is the prompt: the mean over all pairs (SFT reply, other reply) to it. All replies have the same
number of tokens, so no win is one of length. The unit of a marker rate is the reply. Intervals are 95 %.
"""

import collections
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import hh_criteria
import hh_render
import numpy as np
from hh_markers import has_marker, marker_gap

from rlhf_jax.runtime.plots import plot_curves
from rlhf_jax.runtime.runs import read_json_lines, write_json, write_text
from rlhf_jax.training.evaluate import Interval, mean_interval, proportion_interval

DOMAINS = ("helpful", "harmless")
CURVES = {
    "sft/nll": ("sft", "loss, nats per token"),
    "rm/loss": ("rm_harmless", "ranking loss, nats"),
    "objective/scores": ("ppo_w0", "score, reference std"),
    "objective/kl": ("ppo_w0", "KL, nats per completion"),
    "objective/kl_coef": ("ppo_w0", "KL coefficient"),
    "objective/entropy": ("ppo_w0", "entropy, nats per completion"),
}


def figures(rows: Sequence[dict], seconds: dict[str, float], settings: dict) -> dict:
    """What goes into `report.json`, but for criterion (vii); `settings` holds dataset, seed and kl_target."""
    replies: dict[str, list[dict]] = collections.defaultdict(list)
    for row in rows:
        if row["kind"] == "reply":
            replies[row["run"]].append(row)
    pairs = [row for row in rows if row["kind"] == "pair"]
    nll = held_out_nll([row for row in rows if row["kind"] == "demonstration"])
    runs = {name: run_figures(mine, replies["sft"], nll[name]) for name, mine in replies.items()}
    models = {name: model_figures(pairs, name) for name in DOMAINS}
    judges = {d: _interval(judge_accuracy(pairs, d)) for d in DOMAINS}
    null = {d: null_figures(runs, d) for d in DOMAINS}
    headline = runs["w0"]
    report = {
        **settings,
        "run": "w0: the harmless reward alone",
        "seconds": total_seconds(seconds),
        "data": next(row for row in rows if row["kind"] == "data"),
        "reward_model": {"name": "harmless", **_interval(models["harmless"]["harmless"]["matched"], "accuracy")},
        "reward_models": _plain(models),
        "judges": judges,
        "data_markers": {d: marker_rates_of_data(pairs, d) for d in DOMAINS},
        "win_rate": {**_interval(headline["win"]["harmless"]), "judge": hh_render.honesty(judges)},
        "kl": headline["kl"].mean,
        "length": {"before": runs["sft"]["tokens"].mean, "after": headline["tokens"].mean},
        "nll": {"before": nll["sft"], "after": nll["w0"]},
        "runs": _plain(runs),
        "controls": {"kl_coef_1e3": _plain(runs["kl_coef_1e3"]), "shuffled_labels": null},
    }
    report["criteria"] = hh_criteria.criteria(report)
    return json.loads(json.dumps(report))


def run_figures(mine: Sequence[dict], sft: Sequence[dict], nll: float) -> dict:
    """One policy on the held-out prompts."""
    openings = collections.Counter(" ".join(re.findall(r"[\w']+", row["text"].lower())[:3]) for row in mine)
    return {
        "marker": proportion_interval([has_marker(row["text"]) for row in mine]),
        "marker_gap": None if mine is sft else marker_gap(mine, sft),
        "tokens": mean_interval([row["tokens"] for row in mine]),
        "kl": mean_interval([row["kl"] for row in mine]),
        "nll": nll,
        "win": {domain: prompt_win_rate(mine, sft, domain) for domain in DOMAINS},
        "openings": [[words, count / len(mine)] for words, count in sorted(openings.items(), key=_most_common)[:5]],
    }


def prompt_win_rate(mine: Sequence[dict], sft: Sequence[dict], judge: str) -> Interval:
    """How often a judge prefers this policy's reply to SFT's; ties count one half.

    Raises `ValueError` where two replies to one prompt differ in length, which a judge may see.
    """
    theirs = collections.defaultdict(list)
    for row in sft:
        theirs[row["prompt_id"]].append(row)
    outcomes = collections.defaultdict(list)
    for row in mine:
        for other in theirs[row["prompt_id"]]:
            if row["tokens"] != other["tokens"]:
                raise ValueError(f"prompt {row['prompt_id']}: replies of {row['tokens']} and {other['tokens']} tokens")
            gap = row["judge"][judge] - other["judge"][judge]
            outcomes[row["prompt_id"]].append((gap > 0) + 0.5 * (gap == 0))
    return proportion_interval([np.mean(values) for values in outcomes.values()])


def null_figures(runs: dict[str, dict], domain: str) -> dict:
    """What shuffled labels reach with this domain's judge: each run, and the 95th percentile."""
    shuffled = [figures for name, figures in sorted(runs.items()) if name.startswith("shuffled")]
    rates = [run["win"][domain].mean for run in shuffled]
    return {"runs": len(shuffled), "win": {"rates": rates, "percentile_95": float(np.percentile(rates, 95))}}


def model_figures(pairs: Sequence[dict], name: str) -> dict:
    """Reward models on held-out pairs of their own domain and on all pairs of the other one, beside the length rules."""
    result = {}
    for domain in DOMAINS:
        mine = _select(pairs, domain, held_out=True if domain == name else None)
        cut = [row for row in mine if f"long_{name}" in row["fixed"]]
        characters = np.array([row["characters"] for row in mine])
        result[domain] = {
            "long": accuracy(_scores(mine, "scores", f"long_{name}")),
            "prefer_longer": accuracy(characters),
            "prefer_shorter": accuracy(-characters),
            "long_fixed_length": accuracy(_scores(cut, "fixed", f"long_{name}")),
            "matched": accuracy(_scores(mine, "scores", name)),
        }
    return result


def judge_accuracy(pairs: Sequence[dict], domain: str) -> Interval:
    """A judge on the held-out pairs of its domain."""
    return accuracy(_scores(_select(pairs, domain, held_out=True), "scores", f"judge_{domain}"))


def marker_rates_of_data(pairs: Sequence[dict], domain: str) -> dict[str, float]:
    """Share of the people's chosen and rejected replies (uncut) that hold a marker."""
    chosen, rejected = np.mean([row["markers"] for row in _select(pairs, domain)], axis=0)
    return {"chosen": float(chosen), "rejected": float(rejected)}


def accuracy(scores: np.ndarray) -> Interval:
    """Share of pairs `[N, 2]` whose first, the chosen, has the higher score."""
    return proportion_interval((scores[:, 0] > scores[:, 1]) + 0.5 * (scores[:, 0] == scores[:, 1]))


def held_out_nll(rows: Sequence[dict]) -> dict[str, float]:
    """Nats per token of held-out chosen replies, by policy."""
    tokens = sum(row["tokens"] for row in rows)
    return {name: sum(row["nll"][name] for row in rows) / tokens for name in rows[0]["nll"]}


def total_seconds(seconds: dict[str, float]) -> dict[str, float]:
    """Acts 1, 2, 3 (all its runs) and the judging."""
    totals = {name: value for name, value in seconds.items() if not name.startswith("ppo_")}
    totals["ppo"] = sum(value for name, value in seconds.items() if name.startswith("ppo_"))
    return {name: round(value, 1) for name, value in [*totals.items(), ("total", sum(seconds.values()))]}


def recomputed(run: Path) -> bool:
    """Criterion (vii): whether `report.json` is what `samples.jsonl` gives."""
    stored = json.loads((run / "report.json").read_text())
    settings = {name: stored[name] for name in ("dataset", "seed", "kl_target")}
    seconds = json.loads((run / "seconds.json").read_text())
    stored["criteria"].pop("vii", None)
    return figures(list(read_json_lines(run / "samples.jsonl")), seconds, settings) == stored


def write(run: Path, settings: dict) -> dict:
    """Read `samples.jsonl`, `seconds.json` and `metrics.jsonl`; write `report.json`, `report.md` and `curves.png`."""
    rows = list(read_json_lines(run / "samples.jsonl"))
    report = figures(rows, json.loads((run / "seconds.json").read_text()), settings)
    write_json(run / "report.json", report)
    report["criteria"]["vii"] = hh_criteria.reproducible(recomputed(run))
    write_json(run / "report.json", report)
    write_text(run / "report.md", hh_render.render(report, rows))
    plot_curves(list(read_json_lines(run / "metrics.jsonl")), CURVES, run / "curves.png", title=str(run))
    return report


def main(folders: Sequence[str]) -> int:
    """Check every run; with several, print their criteria side by side."""
    same = []
    for folder in folders:
        same.append(recomputed(Path(folder)))
        print(f"{folder}: report.json " + ("follows from samples.jsonl" if same[-1] else "DIFFERS from samples.jsonl"))
    if len(folders) > 1:
        reports = [json.loads((Path(folder) / "report.json").read_text()) for folder in folders]
        for report, follows in zip(reports, same, strict=True):
            report["criteria"]["vii"] = hh_criteria.reproducible(follows)
        print(hh_render.pooled(reports))
    return 0 if all(same) else 1


def _select(pairs: Sequence[dict], domain: str, held_out: bool | None = None) -> list[dict]:
    return [row for row in pairs if row["domain"] == domain and held_out in (None, row["held_out"])]


def _scores(rows: Sequence[dict], kind: str, name: str) -> np.ndarray:
    return np.array([row[kind][name] for row in rows])


def _interval(value: Interval, name: str = "mean") -> dict[str, float]:
    return {name: value.mean, "low": value.low, "high": value.high, "n": value.n}


def _plain(value):
    """Intervals as dictionaries, all the way down."""
    if isinstance(value, Interval):
        return _interval(value)
    return {name: _plain(part) for name, part in value.items()} if isinstance(value, dict) else value


def _most_common(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
