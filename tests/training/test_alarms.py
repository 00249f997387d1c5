"""Alarms ring over series that go wrong, at the step where they do, and over no series of a run that went well."""

import functools
import inspect
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.training.alarms import ALARMS, alarms, entropy_collapse, kl_explosion
from rlhf_jax.training.rollout import rollout_metrics
from rlhf_jax.types import Generation

STEPS = 40


def test_every_alarm_hears_a_metric_that_is_logged():
    ones, half = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    generation = Generation(ones.astype(int), ones.astype(int), half, -ones, jnp.ones(2, bool))
    rollout = rollout_metrics(generation, jnp.asarray([0.0, 2.0]), -ones, jnp.zeros(()))
    assert float(rollout["objective/scores_std"]) == 1.0
    logged = {*rollout, "policy/entropy_avg"}  # the latter by the objectives
    for alarm in ALARMS:
        options = inspect.signature(alarm).parameters
        assert {options[name].default for name in ("metric", "ended") if name in options} <= logged, alarm


def healthy(rng):
    """A run of PPO as the reference runs show it: KL grows to its target, entropy falls by half, lengths wander."""
    t = np.linspace(0, 1, STEPS)

    def noise(scale):
        return 1 + scale * rng.normal(size=STEPS)

    return {
        "objective/kl": 6.5 * t * noise(0.2),
        "policy/entropy_avg": 2.2 * (1 - 0.68 * t) * noise(0.1),
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
    assert ": fix: " in lines[0]


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
