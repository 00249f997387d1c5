"""The report of the embedded world's run: every figure is computed from the rows of `samples.jsonl`, and from nothing else.

python experiments/report.py runs/mine        # computes report.json anew and says whether it is the same
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import report_render

from rlhf_jax.data import synthetic
from rlhf_jax.runtime.plots import plot_curves
from rlhf_jax.runtime.runs import read_json_lines, write_json, write_text
from rlhf_jax.training.evaluate import Interval, mean_interval, proportion_interval, win_rate

JUDGE = "gold: the embedded world's true utility, read from the words; not a human"
CURVES = {
    "sft/nll": ("sft", "loss, nats per token"),
    "rm/loss": ("reward_model", "ranking loss, nats"),
    "rm/accuracy": ("reward_model", "accuracy on pairs"),
    "objective/scores": ("ppo", "score, reference std"),
    "objective/kl": ("ppo", "KL, nats per completion"),
    "objective/kl_coef": ("ppo", "KL coefficient"),
    "objective/entropy": ("ppo", "entropy, nats per completion"),
    "response/len_mean": ("ppo", "length, tokens"),
    "val/explained_var": ("ppo", "explained variance of returns"),
}


def figures(rows: Sequence[dict], seconds: dict[str, float], settings: dict) -> dict:
    """What goes into `report.json`; `settings` holds dataset, seed and kl_target."""
    pairs = [row for row in rows if row["kind"] == "comparison"]
    rankings = [row for row in rows if row["kind"] == "ranking"]
    demonstrations = [row for row in rows if row["kind"] == "demonstration"]
    before, after = ([row[side] for row in pairs] for side in ("before", "after"))
    gold_before, gold_after = (
        [gold(row["prompt"], row[side]["text"]) for row in pairs] for side in ("before", "after")
    )
    compared = [(row["prompt"], a, b) for row in rankings for a, b in _different(row["responses"])]
    agreement = synthetic.agreement_ceiling(compared)
    tokens = sum(row["tokens"] for row in demonstrations)
    return {
        **settings,
        "seconds": seconds,
        "reward_model": {
            **interval(mean_interval(ranking_accuracies(rankings)), "accuracy"),
            "ceiling": agreement.best_predictor,
            "annotator_agreement": agreement.between_annotators,
        },
        "win_rate": {**interval(win_rate(gold_after, gold_before)), "judge": JUDGE},
        "gold_utility": {"before": float(np.mean(gold_before)), "after": float(np.mean(gold_after))},
        "score": _means(before, after, "score"),
        "kl": float(np.mean([side["kl"] for side in after])),
        "length": _means(before, after, "tokens"),
        "nll": {when: sum(row[f"nll_{when}"] for row in demonstrations) / tokens for when in ("before", "after")},
        "traits": {
            name: {"before": trait(pairs, "before", name), "after": trait(pairs, "after", name)}
            for name in report_render.TRAITS
        },
        "controls": controls([row for row in rows if row["kind"] == "control"]),
    }


def gold(prompt: str, text: str) -> float:
    """The true utility, ties within rounding made exact."""
    return round(synthetic.gold_utility(prompt, text), 6)


def interval(value: Interval, name: str = "mean") -> dict[str, float]:
    """An interval as JSON."""
    return {name: value.mean, "low": value.low, "high": value.high, "n": value.n}


def ranking_accuracies(rankings: Sequence[dict]) -> list[float]:
    """Of each prompt with an ordered pair: the share of its pairs that the scores order as the annotator did.

    Two samples with the same text are no pair: noise alone ranked them. Prompts, not pairs, are independent, so the
    interval is over prompts.
    """
    accuracies = []
    for row in rankings:
        ranks, scores = np.asarray(row["ranks"]), np.asarray(row["scores"])
        texts = np.asarray(row["responses"])
        better = (ranks[:, None] < ranks[None, :]) & (texts[:, None] != texts[None, :])
        gaps = scores[:, None] - scores[None, :]
        if better.any():
            accuracies.append(float(((gaps > 0) + 0.5 * (gaps == 0))[better].mean()))
    return accuracies


def trait(pairs: Sequence[dict], side: str, name: str) -> dict[str, float]:
    """Share of the completions that have a trait, among those to which it applies."""
    parsed = [synthetic.parse(row["prompt"], row[side]["text"]) for row in pairs]
    if name == "right":
        return interval(proportion_interval([traits.right for traits in parsed if traits.right is not None]))
    if name == "declines":
        return interval(proportion_interval([traits.declined for traits in parsed if traits.kind == "harm"]))
    values = {"direct": [t.direct for t in parsed], "warm": [t.warm for t in parsed]}
    return interval(proportion_interval(values.get(name, [t.well_formed for t in parsed])))


def controls(rows: Sequence[dict]) -> dict:
    """Each control's win rate and KL. With several runs the run is the unit: the interval is over their win rates."""
    result = {}
    for name in sorted({row["name"] for row in rows}):
        mine = [row for row in rows if row["name"] == name]
        runs = [[row for row in mine if row["run"] == run] for run in sorted({row["run"] for row in mine})]
        wins = [
            win_rate([gold(r["prompt"], r["after"]) for r in run], [gold(r["prompt"], r["before"]) for r in run])
            for run in runs
        ]
        whole = wins[0] if len(wins) == 1 else mean_interval([win.mean for win in wins])
        result[name] = {
            "win_rate": interval(whole),
            "runs": [interval(win) for win in wins],
            "kl": float(np.mean([row["kl"] for row in mine])),
        }
    return result


def write(run: Path, settings: dict) -> dict:
    """Read `samples.jsonl`, `seconds.json` and `metrics.jsonl`; write `report.json`, `report.md` and `curves.png`."""
    rows = list(read_json_lines(run / "samples.jsonl"))
    seconds = json.loads((run / "seconds.json").read_text())
    report = figures(rows, {**seconds, "total": round(sum(seconds.values()), 1)}, settings)
    write_json(run / "report.json", report)
    write_text(run / "report.md", report_render.render(report, rows))
    plot_curves(list(read_json_lines(run / "metrics.jsonl")), CURVES, run / "curves.png", title=str(run))
    return report


def _different(texts: Sequence[str]) -> list[tuple[str, str]]:
    return [(a, b) for i, a in enumerate(texts) for b in texts[i + 1 :] if a != b]


def _means(before: Sequence[dict], after: Sequence[dict], name: str) -> dict[str, float]:
    return {
        "before": float(np.mean([side[name] for side in before])),
        "after": float(np.mean([side[name] for side in after])),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    stored = json.loads((folder / "report.json").read_text())
    kept = {name: stored[name] for name in ("dataset", "seed", "kl_target")}
    anew = figures(list(read_json_lines(folder / "samples.jsonl")), stored["seconds"], kept)
    same = anew == stored
    print("report.json follows from samples.jsonl" if same else "report.json DIFFERS from what samples.jsonl gives")
    sys.exit(0 if same else 1)
