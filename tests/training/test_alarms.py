"""Alarms ring over series that go wrong, at the step where they do, and over no series of a run that went well."""

import functools
import inspect
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.training.alarms import ALARMS, alarms, entropy_collapse, first_alarms, kl_explosion, kl_jump
from rlhf_jax.training.alarms_scored import SCORED_ALARMS

STEPS = 40
ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_alarm_hears_a_metric_that_is_logged():
    """By the objectives, the rollouts, or the rows that `experiments/evaluation.py` makes."""
    paths = [*(ROOT / "rlhf_jax").rglob("*.py"), ROOT / "experiments" / "evaluation.py"]
    logged = "".join(path.read_text("utf-8") for path in paths if not path.name.startswith("alarms"))
    for alarm in (*ALARMS, *SCORED_ALARMS):
        options = [option.default for option in inspect.signature(alarm).parameters.values()]
        names = [name for name in options if isinstance(name, str)]
        assert names
        assert [name for name in names if f'"{name}"' not in logged] == [], alarm


def healthy(rng):
    """A run of PPO as the reference runs show it: KL grows to its target, entropy falls by half, lengths wander."""
    t = np.linspace(0, 1, STEPS)

    def noise(scale):
        return 1 + scale * rng.normal(size=STEPS)

    return {
        "objective/kl": 6.5 * t * noise(0.2),
        "objective/kl_coef": 0.07 - 0.05 * t,
        "objective/scores": t + 0.08 * (noise(1.0) - 1),
        "policy/entropy_avg": 2.2 * (1 - 0.68 * t) * noise(0.1),
        "policy/first_approxkl": 1e-9 * np.abs(noise(1.0)),
        "policy/clipfrac_avg": 0.04 * np.abs(noise(0.5)),
        "clip_ratio/region_mean": 0.04 * np.abs(noise(0.5)),
        "val/clipfrac_avg": 0.1 * np.abs(noise(0.5)),
        "val/explained_var": 0.8 * t,
        "objective/scores_std": 0.8 * np.abs(noise(0.3)),
        "response/len_mean": 12 * (1 + 0.3 * t) * noise(0.1),
        "response/eos_frac": np.clip(0.97 * noise(0.02), 0, 1),
    }


def rows_of(series):
    return [{name: float(values[i]) for name, values in series.items()} for i in range(STEPS)]


def first_alarm(rows):
    return next(((step, alarms(rows[: step + 1])) for step in range(len(rows)) if alarms(rows[: step + 1])), None)


@pytest.mark.parametrize("seed", range(20))
def test_no_alarm_over_healthy_series(seed):
    assert first_alarm(rows_of(healthy(np.random.default_rng(seed)))) is None


BAD = {
    "KL": ({"objective/kl": lambda t, x: x + np.where(t >= 20, 3.0 * 2 ** (t - 20.0), 0)}, (24, 27), "KL "),
    "entropy": ({"policy/entropy_avg": lambda t, x: np.where(t >= 20, 0.01, x)}, (22, 22), "entropy 0.01 <"),
    "equal": (
        {"objective/scores_std": lambda t, x: np.where(t >= 20, 0.0, x)},
        (22, 22),
        "all rewards equal for 3 steps",
    ),
    "length": (
        {
            "response/len_mean": lambda t, x: np.where(t >= 20, 48.0, x),
            "response/eos_frac": lambda t, x: np.where(t >= 20, 0.1, x),
        },
        (22, 22),
        "length 48 tokens, 1.5 times the first",
    ),
}


BAD |= {
    "sampler": (
        {"policy/first_approxkl": lambda t, x: np.where(t >= 20, 1e-3, x)},
        (21, 21),
        "the policy differs from its sampler before any update (policy/first_approxkl 0.001 > 1e-05)",
    ),
    "negative KL": ({"objective/kl": lambda t, x: np.where(t >= 20, -0.5, x)}, (22, 22), "KL -0.5 < -0.2 nats"),
    "jump": ({"objective/kl": lambda t, x: np.where(t == 4, 12.0, x)}, (4, 4), "KL rose by 12 nats in the first 5"),
    "standstill": (
        {"objective/kl": lambda t, x: 0.01 + 0 * x, "objective/scores": lambda t, x: 0.01 * x},
        (19, 19),
        "KL below 0.05 nats and the score moved by 0.0",
    ),
    "leash": (
        {
            "objective/kl": lambda t, x: np.where(t >= 20, 12 + (t - 20.0), x),
            "objective/kl_coef": lambda t, x: np.where(t >= 20, 0.07 + 0.001 * t, x),
        },
        (29, 29),
        "KL grew from 14 to 19 nats in 10 steps under kl_coef 0.099: likely an estimator in the wrong place",
    ),
    "no end": ({"response/eos_frac": lambda t, x: np.where(t >= 20, 0.01, x)}, (22, 22), "1% of the completions end"),
    "critic": (
        {
            "val/clipfrac_avg": lambda t, x: np.where(t >= 20, 0.6, x),
            "val/explained_var": lambda t, x: np.where(t >= 20, -0.3, x),
        },
        (24, 24),
        "explained variance -0.3 and 60% of the values clipped",
    ),
    "clipped": (
        {"policy/clipfrac_avg": lambda t, x: np.where(t >= 20, 0.4, x)},
        (22, 22),
        "40% of the tokens clipped for 3 steps (policy/clipfrac_avg)",
    ),
    "clipped, no critic": (
        {"clip_ratio/region_mean": lambda t, x: np.where(t >= 20, 0.4, x)},
        (22, 22),
        "40% of the tokens clipped for 3 steps (clip_ratio/region_mean)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_each_alarm_rings_where_it_goes_wrong(name):
    changes, (earliest, latest), text = BAD[name]
    series = healthy(np.random.default_rng(0))
    for metric, change in changes.items():
        series[metric] = change(np.arange(STEPS), series[metric])
    step, lines = first_alarm(rows_of(series))
    assert earliest <= step <= latest
    assert len(lines) == 1
    assert lines[0].startswith(text)
    assert re.search(r": likely .+: fix: .+", lines[0])
    rung = first_alarms(rows_of(series))
    assert (step, lines[0]) in rung
    assert len({line.split(" ")[0] for _, line in rung}) == len(rung)  # each alarm once, whatever went on after it


def test_one_bad_batch_is_no_trend():
    series = healthy(np.random.default_rng(1))
    for metric, value in (("objective/kl", 500.0), ("policy/entropy_avg", 0.0), ("objective/scores_std", 0.0)):
        series[metric][20] = value
    assert first_alarm(rows_of(series)) is None


def test_a_longer_answer_that_ends_is_no_alarm():
    series = healthy(np.random.default_rng(2))
    series["response/len_mean"] *= np.linspace(1, 6, STEPS)
    assert first_alarm(rows_of(series)) is None
    series["response/len_mean"] = np.full(STEPS, 16.0)
    series["response/eos_frac"] = np.zeros(STEPS)
    assert first_alarm(rows_of(series)) is None


def test_a_slow_rise_is_no_jump():
    rows = [{"objective/kl": 1.05 * i} for i in range(STEPS)]
    assert [kl_jump(rows[:end]) for end in range(STEPS + 1)] == [None] * (STEPS + 1)


def test_no_rows_and_foreign_rows_are_quiet():
    assert alarms([]) == []
    assert alarms([{"sft/nll": 1.0}] * 10) == []


def test_thresholds_are_arguments():
    rows = [{"objective/kl": 5.0, "policy/entropy_avg": 1.0}] * 3
    assert alarms(rows) == []
    checks = (functools.partial(kl_explosion, limit=4.0), functools.partial(entropy_collapse, floor=1.5))
    assert [line.split(":")[0] for line in alarms(rows, checks)] == [
        "KL 5 > 4 nats for 2 steps",
        "entropy 1 < 1.5 nats per token for 3 steps (first 1)",
    ]


def rows_of_pairs(fall, fall_rejected, margin):
    """A direct method's log-probs of both sides, which fall linearly, and its margin."""
    rng, t = np.random.default_rng(0), np.linspace(0, 1, STEPS)
    ends = {"logps/chosen": -15 - fall * t, "logps/rejected": -16 - fall_rejected * t, "rewards/margins": margin * t}
    return rows_of({name: values + 0.3 * rng.normal(size=STEPS) for name, values in ends.items()})


def test_direct_methods_that_lose_both_sides():
    """The chosen may fall a little, or gain while the rejected fall; both far below with a growing margin is the alarm."""
    assert first_alarms(rows_of_pairs(3, 20, 2)) == []
    assert first_alarms(rows_of_pairs(-5, 40, 4)) == []
    assert first_alarms(rows_of_pairs(20, 30, -4)) == []
    ((step, line),) = first_alarms(rows_of_pairs(20, 40, 4))
    assert 20 < step < STEPS
    assert line.startswith("chosen completions lost ")


def scored(gold=1.0, score=0.0, length=10.0, distinct=0.5):
    return {
        "gold/score": gold,
        "gold/score_se": 0.05,
        "objective/scores": score,
        "response/len_mean": length,
        "response/distinct_2": distinct,
    }


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            [scored(), scored(2.0, 1.0), scored(1.7, 1.5)],
            "gold score 1.7, 0.3 below its best, while the score rose to 1.5",
        ),
        ([scored(), scored(0.8, 1.5)], "gold score 0.8, 0.2 below its best"),
        ([scored(), scored(1.1, 1.0, 13.0, 0.3)], "score 0 to 1, length 10 to 13 tokens, distinct bigrams 50% to 30%"),
        ([{"rm/accuracy": 0.9, "rm/held_out_accuracy": 0.55}], "reward model right on 90% in training, 55% held out"),
    ],
)
def test_scored_alarms_ring(rows, text):
    (line,) = alarms(rows, SCORED_ALARMS)
    assert line.startswith(text)
    assert re.search(r": likely .+: fix: .+", line)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [scored()],
        [scored(), scored(2.0, 1.0), scored(1.9, 1.5)],  # a fall within its error
        [scored(), scored(2.0, 1.0), scored(1.5, 0.5)],  # the score fell as well
        [scored(), scored(1.1, 1.0, 13.0, 0.45)],  # longer, and as varied
        [scored(), scored(1.1, 1.0, 9.0, 0.3)],  # one answer, no longer
        [{"rm/accuracy": 0.84, "rm/held_out_accuracy": 0.76}],
    ],
)
def test_scored_alarms_are_quiet(rows):
    assert alarms(rows, SCORED_ALARMS) == []


def test_no_alarm_over_the_reference_run():
    series = json.loads((ROOT / "tests" / "golden" / "reference_run.json").read_text("utf-8"))["rows"]
    rows = [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]
    assert len(rows) == 40
    assert {"objective/kl", "policy/first_approxkl", "val/explained_var", "objective/kl_coef"} <= rows[0].keys()
    assert first_alarms(rows) == []


def test_no_alarm_over_real_runs():
    """`RLHF_JAX_RUNS` lists folders of finished runs, separated by colons."""
    folders = [Path(text) for text in os.environ.get("RLHF_JAX_RUNS", "").split(":") if text]
    if not folders:
        pytest.skip("no finished runs at hand: set RLHF_JAX_RUNS")
    judged = 0
    for folder in folders:
        stages = {}
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            stages.setdefault(row["stage"], []).append(row)
        for stage, rows in stages.items():
            for end in range(1, len(rows) + 1):
                assert alarms(rows[:end]) == [], f"{folder} {stage} step {end - 1}"
            judged += any("objective/kl" in row for row in rows)
    assert judged
