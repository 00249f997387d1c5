"""The scripts end to end on a sliver of the embedded world: what they leave in the run's folder, and what they refuse."""

import dataclasses
import json

import pytest
import report
import reward_model
import rlhf
import task
from ppo import PPOConfig
from reward_model import RewardModelConfig
from sft import SFTConfig

from rlhf_jax.data import synthetic
from rlhf_jax.runtime.runs import read_json_lines

KEYS = {"dataset", "seed", "seconds", "reward_model", "win_rate", "kl", "kl_target", "length", "nll", "controls"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    for name, value in {"DEMONSTRATIONS": 400, "RANKINGS": 32, "PROMPTS": 128, "HELD_OUT": 24}.items():
        patch.setattr(task, f"NUM_{name}", value)
    patch.setattr(rlhf, "CACHE", None)
    network = SFTConfig(num_epochs=1, model_dim=16, num_heads=2, mlp_dim=16, num_layers=1)
    run = tmp_path_factory.mktemp("runs") / "tiny"
    yield rlhf.Config(
        run=run,
        response_length=12,
        vocab_size=600,
        prompt_length=40,
        row_length=96,
        controls=True,
        num_shuffled=2,
        sft=network,
        reward=RewardModelConfig(num_epochs=1, batch_size=8),
        ppo=PPOConfig(num_iterations=2, batch_size=8, num_epochs=1, num_minibatches=2, kl_horizon=100.0),
    )
    patch.undo()


@pytest.fixture(scope="module")
def result(config):
    return rlhf.main(config)


def test_report_holds_what_was_promised(config, result):
    stored = json.loads((config.run / "report.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert set(stored) >= KEYS
    assert set(stored["seconds"]) >= {"sft", "reward_model", "ppo", "total"}
    assert set(stored["reward_model"]) >= {"accuracy", "low", "high", "n", "ceiling"}
    assert set(stored["win_rate"]) == {"mean", "low", "high", "n", "judge"}
    assert stored["win_rate"]["n"] == 24
    assert "not a human" in stored["win_rate"]["judge"]
    assert set(stored["controls"]) == {"shuffled_labels", "kl_coef_1e3"}
    assert len(stored["controls"]["shuffled_labels"]["runs"]) == 2
    for name in ("report.md", "curves.png", "metrics.jsonl", "samples.jsonl", "config.json"):
        assert (config.run / name).stat().st_size > 0
    text = (config.run / "report.md").read_text()
    assert text.count("\n| ") >= 8 + len(report.TRAITS)


def test_every_figure_follows_from_the_samples(config, result):
    rows = list(read_json_lines(config.run / "samples.jsonl"))
    settings = {name: result[name] for name in ("dataset", "seed", "kl_target")}
    assert report.figures(rows, result["seconds"], settings) == result
    rows[0]["after"]["text"] = synthetic.best_response(rows[0]["prompt"])
    rows[0]["before"]["text"] = "moo"
    assert report.figures(rows, result["seconds"], settings) != result


def test_metrics_are_complete(config, result):
    rows = list(read_json_lines(config.run / "metrics.jsonl"))
    assert [row["step"] for row in rows if row["stage"] == "ppo"] == [0, 1]
    assert all({"tokens_per_second", "objective/kl"} <= set(row) for row in rows if row["stage"] == "ppo")
    first = next(row for row in rows if row["stage"] == "ppo")
    assert abs(first["objective/kl"]) < 1e-4
    assert first["policy/first_approxkl"] < 1e-6


def test_a_finished_run_is_not_overwritten_but_resumed(config, result, capsys):
    with pytest.raises(FileExistsError, match="never overwritten"):
        rlhf.main(config)
    again = rlhf.main(dataclasses.replace(config, resume=True))
    assert again == result
    assert "sft: finished before" in capsys.readouterr().out
    with pytest.raises(ValueError, match="seed"):
        rlhf.main(dataclasses.replace(config, resume=True, seed=5))


def test_an_interrupted_act_is_played_again(config, result):
    """Killed after the act's checkpoint, before its seconds: the checkpoint is a leftover, the act plays anew."""
    seconds = json.loads((config.run / "seconds.json").read_text())
    kept = {name: value for name, value in seconds.items() if name not in ("ppo", "judge")}
    (config.run / "seconds.json").write_text(json.dumps(kept))
    again = rlhf.main(dataclasses.replace(config, resume=True))
    for figure in ("win_rate", "kl", "length", "nll", "reward_model"):
        assert again[figure] == result[figure], figure
    rows = list(read_json_lines(config.run / "metrics.jsonl"))
    assert [row["step"] for row in rows if row["stage"] == "ppo"] == [0, 1]


def test_scripts_of_single_acts_take_up_the_run(config, result, data_dir):
    """Act 2 alone, on real rankings of two to nine responses."""
    path = data_dir / "rankings" / "oasst_en100.jsonl.gz"
    rankings, held_out = task.load_rankings(dataclasses.replace(config, data=path))
    assert rankings
    assert held_out
    with pytest.raises(ValueError, match="kept"):
        reward_model.main(
            reward_model.Config(run=config.run, data=path, prompt_length=1, response_length=1, reward=config.reward)
        )


def test_interval_over_prompts_not_pairs():
    rows = [{"ranks": [0, 1, 2], "scores": [3.0, 2.0, 1.0]}, {"ranks": [0, 1, 1], "scores": [1.0, 2.0, 1.0]}]
    assert report.ranking_accuracies([*rows, {"ranks": [0, 0, 0], "scores": [1.0, 2.0, 3.0]}]) == [1.0, 0.25]
