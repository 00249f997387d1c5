"""Evaluation of untrained policies, and a run's best-of-n curve: the numbers, and what is refused."""

import dataclasses
import json

import answers
import best_of_n
import evaluate
import evaluation
import numpy as np
import pytest
from best_of_n_curve import CurveConfig
from evaluate import Config
from experiments.untrained import LENGTHS, shrink, write_run

from rlhf_jax.runtime.runs import read_json_lines, write_json_lines
from rlhf_jax.training.evaluate import mean_interval
from rlhf_jax.types import Generation


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "untrained", steps=(3, 10))
    steps = [{"stage": "ppo", "step": i, "objective/kl": 0.5 * i, "objective/kl_coef": 0.1} for i in range(6)]
    rings = [{"stage": "grpo", "step": i, "objective/kl": 20.0 * i} for i in range(6)]
    write_json_lines(folder / "metrics.jsonl", [*steps, *rings])
    return folder


@pytest.fixture(scope="module")
def config(run):
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield Config(run=run, num_prompts=6, num_samples=3, **LENGTHS)


@pytest.fixture(scope="module")
def result(config):
    return evaluate.main(config)


def test_every_saved_step_is_a_point_of_the_frontier(run, result, config):
    rows = list(read_json_lines(run / "frontier.jsonl"))
    assert rows == json.loads(json.dumps(result["policies"]))
    assert [(row["policy"], row["step"]) for row in rows] == [("baseline", 0), ("ppo", 3), ("ppo", 10)]
    assert json.loads((run / "evaluation.json").read_text()) == json.loads(json.dumps(result))
    assert (run / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "not a human" in result["judges"]["gold/win_rate"]
    assert set(evaluation.METRICS) - {"win_rate_equal_length"} <= rows[1].keys()


def test_the_baseline_against_itself(result):
    row = result["policies"][0]
    assert row["win_rate"] == row["gold/win_rate"] == row["win_rate_without_length"] == 0.5
    assert row["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert result["policies"][1]["objective/kl"] > 10 * abs(row["objective/kl"])


def test_red_flags_name_stage_and_step(result):
    assert [flag.split(":")[0] for flag in result["red_flags"]] == [
        "grpo step 1",
        "grpo step 3",
    ], result["red_flags"]
    assert result["red_flags"][0].startswith("grpo step 1: KL rose by 20 nats in the first 2 steps: likely ")


def test_measures_are_those_of_loops():
    rng = np.random.default_rng(0)
    generation = Generation(
        tokens=rng.integers(0, 5, (8, 6)),
        segment_ids=np.ones((8, 6), int),
        completion_mask=np.arange(6) < rng.integers(2, 7, (8, 1)),
        logprobs=np.zeros((8, 6)),
        ended=np.arange(8) < 6,
    )
    sizes = generation.completion_mask.sum(axis=1).reshape(4, 2)
    scores = 2.0 * np.log(sizes) + 1.0 + 0.1 * rng.normal(size=(4, 2))
    ours = answers.Answers(generation, [""] * 8, scores, sizes, rng.normal(size=(4, 2)))
    theirs = ours._replace(scores=2.0 * np.log(sizes) + 1.0, gold=ours.gold - 1.0)
    row = evaluation.measure(ours, theirs, {"exact": np.ones((4, 2)), "k1": np.zeros((4, 2))})
    assert row["response/eos_frac"] == 6 / 8
    assert row["response/len_mean"] == sizes.mean()
    assert row["objective/kl"] == 1.0
    assert row["objective/scores_low"] == mean_interval(ours.scores.mean(axis=1)).low
    wins = [np.mean([[a > b for b in theirs.scores[i]] for a in ours.scores[i]]) for i in range(4)]
    assert row["win_rate"] == pytest.approx(np.mean(wins))
    level = ours.scores - 2.0 * np.log(sizes) - 1.0  # all that the baseline's scores hold is length
    wins = [np.mean([[a > 0 for _ in range(2)] for a in level[i]]) for i in range(4)]
    assert row["win_rate_without_length"] == pytest.approx(np.mean(wins), abs=1e-9)
    rows = [row[mask].tolist() for row, mask in zip(generation.tokens, generation.completion_mask, strict=True)]
    assert ours.groups == [rows[i : i + 2] for i in range(0, 8, 2)]


def test_the_best_of_n_curve_of_a_run(config, run, capsys):
    curve = CurveConfig(num_prompts=6, pool_size=8, num_samples=3)
    best_of_n.main(best_of_n.Config(run=run, curve=curve, **LENGTHS))
    rows = list(read_json_lines(run / "best_of_n.jsonl"))
    assert [row["name"] for row in rows] == ["best of 1", "best of 2", "best of 4", "ppo"]
    assert [row["kl"] for row in rows[:3]] == pytest.approx([0, np.log(2) - 1 / 2, np.log(4) - 3 / 4], abs=1e-6)
    scores = [row["score"] for row in rows[:3]]
    assert scores == sorted(scores)
    assert all(0 <= row["kl_pool"] <= row["kl"] + 1e-6 and row["gold_low"] <= row["gold"] for row in rows[:3])
    assert (run / "best_of_n.png").read_bytes().startswith(b"\x89PNG")
    assert "best of 4" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="dpo holds no policy; nothing was written"):
        best_of_n.main(best_of_n.Config(run=run, curve=dataclasses.replace(curve, policies=("dpo",)), **LENGTHS))


def test_what_is_not_there_is_refused(config, run):
    with pytest.raises(FileNotFoundError, match="dpo holds no policy; nothing was sampled"):
        evaluate.main(dataclasses.replace(config, policies=("dpo",)))
