"""The scripts end to end on a sliver of the embedded world: what they leave in the run's folder, and what they refuse."""

import dataclasses
import json
import shutil

import acts
import jax
import kept_reward
import numpy as np
import ppo
import pytest
import report
import reward_model
import rlhf
import sft
import task
import tyro
from ppo import PPOConfig
from reward_model import RewardModelConfig
from sft import SFTConfig

from rlhf_jax.data import synthetic
from rlhf_jax.runtime import checkpoint, faults
from rlhf_jax.runtime.processes import Processes
from rlhf_jax.runtime.runs import read_json_lines

ACTS = ("sft", "reward_model", "ppo")
KEYS = {"dataset", "seed", "seconds", "reward_model", "win_rate", "kl", "kl_target", "length", "nll", "controls"}


def test_programs_are_kept_where_no_other_folder_was_named(monkeypatch, tmp_path):
    named = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(acts, "CACHE", str(tmp_path))
    acts.keep_programs()
    assert jax.config.jax_compilation_cache_dir == named != str(tmp_path)
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        acts.keep_programs()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", named)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    for name, value in {"DEMONSTRATIONS": 400, "RANKINGS": 32, "PROMPTS": 128, "HELD_OUT": 20}.items():
        patch.setattr(task, f"NUM_{name}", value)
    network = SFTConfig(num_epochs=1, model_dim=16, num_heads=2, mlp_dim=16, num_layers=1)
    run = tmp_path_factory.mktemp("runs") / "tiny"
    yield rlhf.Config(
        run=run,
        response_length=12,
        vocab_size=600,
        prompt_length=40,
        row_length=96,
        controls=True,
        num_shuffled=1,
        sft=network,
        reward=RewardModelConfig(num_epochs=1, batch_size=8),
        ppo=PPOConfig(
            num_iterations=2, batch_size=8, num_epochs=1, num_minibatches=2, kl_horizon=100.0, policy_every=2
        ),
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
    assert stored["win_rate"]["n"] == 20
    assert "not a human" in stored["win_rate"]["judge"]
    assert set(stored["controls"]) == {"shuffled_labels", "kl_coef_1e3"}
    assert len(stored["controls"]["shuffled_labels"]["runs"]) == 1
    for name in ("report.md", "curves.png", "metrics.jsonl", "samples.jsonl", "config.json"):
        assert (config.run / name).stat().st_size > 0
    text = (config.run / "report.md").read_text()
    assert text.split("| held-out prompt |")[1].count("\n| ") == 8
    assert "It must gain nothing: the interval " in text
    assert "It must not move: KL below 0.05" in text


def test_every_figure_follows_from_the_samples(config, result):
    rows = list(read_json_lines(config.run / "samples.jsonl"))
    settings = {name: result[name] for name in ("dataset", "seed", "kl_target")}
    assert report.figures(rows, result["seconds"], settings) == result
    rows[0]["after"]["text"] = synthetic.best_response(rows[0]["prompt"])
    rows[0]["before"]["text"] = "moo"
    assert report.figures(rows, result["seconds"], settings) != result


def test_metrics_are_complete(config, result):
    assert checkpoint.latest_step(config.run / "ppo_steps") == 2
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


@pytest.mark.slow  # the interrupted acts below stop inside an act, this one at its end
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


def test_act_2_alone_reads_real_rankings(config, result, data_dir, tmp_path):
    """Of two to nine responses; and where the lengths leave none of them, it says so."""
    path = data_dir / "rankings" / "oasst_en100.jsonl.gz"
    rankings, held_out = task.load_rankings(dataclasses.replace(config, data=path))
    assert rankings
    assert held_out
    for part in ("sft", "tokenizer"):
        shutil.copytree(config.run / part, tmp_path / part)
    with pytest.raises(ValueError, match="kept"):
        reward_model.main(
            reward_model.Config(run=tmp_path, data=path, prompt_length=1, response_length=1, reward=config.reward)
        )


def test_a_finished_act_is_finished_and_several_processes_are_refused(config, result, capsys):
    """The same command with --resume does nothing and says so; what an end cut short left behind is swept."""
    before = (config.run / "metrics.jsonl").read_text()
    (config.run / "state" / "ppo").mkdir(parents=True)
    ppo.main(ppo.Config(run=config.run, resume=True))
    assert "ppo: finished before, in " in capsys.readouterr().out
    assert not (config.run / "state" / "ppo").exists()
    assert (config.run / "metrics.jsonl").read_text() == before
    with pytest.raises(SystemExit, match="runs in one process; nothing was started"):
        rlhf.main(dataclasses.replace(config, processes=Processes(distributed=True)))


def test_single_acts_refuse_what_is_already_played(config, result):
    """Before they train, and before they drop the act's rows of metrics."""
    before = (config.run / "metrics.jsonl").read_text()
    for main, one in ((reward_model.main, reward_model.Config), (ppo.main, ppo.Config)):
        with pytest.raises(FileExistsError, match="is there already and is never overwritten"):
            main(one(run=config.run))
    assert (config.run / "metrics.jsonl").read_text() == before


def test_single_acts_interrupted_and_resumed(config, result, tmp_path, capsys):
    """`sft.py`, `reward_model.py` and `ppo.py`, each broken off once, make what the main job makes, bit for bit."""
    words = ["--run", str(tmp_path / "run"), "--response-length", "12", "--vocab-size", "600"]
    words += ["--prompt-length", "40", "--row-length", "96"]
    network = "--sft.num-epochs 1 --sft.model-dim 16 --sft.num-heads 2 --sft.mlp-dim 16 --sft.num-layers 1"
    rankings = "--reward.num-epochs 1 --reward.batch-size 8"
    short = "--ppo.num-iterations 2 --ppo.batch-size 8 --ppo.num-epochs 1 --ppo.num-minibatches 2 --ppo.kl-horizon 100"
    for act, options in (
        (sft, f"{network} --sft.save-every"),
        (reward_model, f"{rankings} --reward.save-every"),
        (ppo, f"{short} --ppo.save-every"),
    ):
        command = [*words, *options.split(), "1"]
        with faults.injected("after_update@2=raise"), pytest.raises(faults.InjectedFaultError):
            act.main(tyro.cli(act.Config, args=command))
        with pytest.raises(FileExistsError, match="--resume"):
            act.main(tyro.cli(act.Config, args=command))
        act.main(tyro.cli(act.Config, args=[*command, "--resume"]))
        assert "resumed after 1 steps, state " in capsys.readouterr().err
    assert not any((tmp_path / "run" / "state").iterdir())
    clock = ("seconds", "tokens_per_second")
    logs = [
        [
            {k: v for k, v in row.items() if k not in clock}
            for row in read_json_lines(run / "metrics.jsonl")
            if row["stage"] in ACTS
        ]
        for run in (config.run, tmp_path / "run")
    ]
    assert logs[0] == logs[1]
    for act in ("sft", "reward_model", "ppo"):
        like, mine = (config.run / act, tmp_path / "run" / act)
        assert checkpoint.read_notes(mine) == checkpoint.read_notes(like)
    tokenizer, network, policy = sft.load(tmp_path / "run")
    like = jax.eval_shape(lambda: policy)
    for load in (
        lambda run: sft.load(run)[2],
        lambda run: kept_reward.load(run, network, tokenizer)[0],
        lambda run: checkpoint.restore(run / "ppo", like),
    ):
        jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "run"), load(config.run))


def test_a_file_is_refused_before_the_main_job_starts(tmp_path):
    with pytest.raises(SystemExit, match=r"--data has no meaning here.*nothing was started"):
        rlhf.main(rlhf.Config(run=tmp_path / "run", data=tmp_path / "mine.jsonl"))
    with pytest.raises(ValueError, match=r"mine.jsonl"):
        sft.main(sft.Config(run=tmp_path / "run", data=tmp_path / "mine.jsonl"))
    assert not (tmp_path / "run").exists()


def test_an_act_of_no_step_is_refused():
    with pytest.raises(ValueError, match="5 rankings in batches of 8 for 1 epochs are no step; fix"):
        acts.num_steps_of(RewardModelConfig(num_epochs=1, batch_size=8), 5, "rankings")


def test_interval_over_prompts_not_pairs():
    """And a pair of equal texts, which only noise can rank, is none."""
    texts = ["a", "b", "c"]
    rows = [{"ranks": [0, 1, 2], "scores": [3.0, 2.0, 1.0]}, {"ranks": [0, 1, 1], "scores": [1.0, 2.0, 1.0]}]
    rows = [{"responses": texts, **row} for row in [*rows, {"ranks": [0, 0, 0], "scores": [1.0, 2.0, 3.0]}]]
    assert report.ranking_accuracies(rows) == [1.0, 0.25]
    rows[0]["responses"] = ["a", "a", "c"]
    rows[0]["scores"] = [1.0, 3.0, 2.0]
    assert report.ranking_accuracies(rows[:1]) == [0.5]
