"""The HH job: a sliver of it end to end, and its criteria, markers and refusals on rows made by hand."""

import dataclasses
import gzip
import json
import shutil

import hh
import hh_criteria
import hh_data
import hh_markers
import hh_render
import hh_report
import hh_rl
import pytest
import reward_model
import rlhf
from hh_config import HHConfig, HHPPOConfig, Job
from sft import SFTConfig

from rlhf_jax.runtime.runs import read_json_lines, write_json_lines

KEYS = {"dataset", "seed", "seconds", "reward_model", "win_rate", "kl", "kl_target", "length", "nll", "controls"}
TINY = HHConfig(
    vocab_size=400,
    prompt_length=8,
    reply_length=6,
    long_length=10,
    fixed_length=4,
    num_shuffled=2,
    samples_per_prompt=1,
    sft=SFTConfig(num_epochs=2, num_layers=1, model_dim=16, num_heads=2, mlp_dim=16),
    ppo=HHPPOConfig(num_iterations=2, batch_size=8, num_minibatches=1, kl_horizon=100.0),
)


@pytest.fixture(scope="module")
def small_data(data_dir, tmp_path_factory):
    """The first comparisons of both files."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "preferences").mkdir()
    for domain in hh_data.DOMAINS:
        name = f"preferences/hh_{domain}_base.jsonl.gz"
        with gzip.open(data_dir / name, "rt", encoding="utf-8") as source, gzip.open(folder / name, "wt") as target:
            target.writelines(line for line, _ in zip(source, range(60), strict=False))
    return folder


@pytest.fixture(scope="module")
def config(small_data, tmp_path_factory):
    return rlhf.Config(run=tmp_path_factory.mktemp("runs") / "hh", dataset="hh", data_dir=small_data)


@pytest.fixture(scope="module")
def result(config):
    return hh.main(config, TINY)


def test_report_holds_what_was_promised(config, result):
    stored = json.loads((config.run / "report.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert set(stored) >= KEYS
    assert set(stored["seconds"]) >= {"sft", "reward_model", "ppo", "total"}
    assert set(stored["reward_model"]) >= {"accuracy", "low", "high", "n"}
    assert set(stored["win_rate"]) == {"mean", "low", "high", "n", "judge"}
    assert set(stored["controls"]) == {"kl_coef_1e3", "shuffled_labels"}
    assert list(stored["criteria"]) == ["i", "ii", "iii", "iv", "v", "vi", "vii"]
    assert stored["criteria"]["vii"]["passed"]
    assert {run["tokens"]["mean"] for run in stored["runs"].values()} == {TINY.reply_length}
    assert set(stored["runs"]) == {"sft", "w0", "w0.5", "w1", "ptx", "kl_coef_1e3", "shuffled_0", "shuffled_1"}
    assert abs(stored["runs"]["sft"]["kl"]["mean"]) < 1e-4
    assert (config.run / "curves.png").stat().st_size > 0


def test_report_is_honest(config, result):
    text = (config.run / "report.md").read_text()
    assert "not people; this shows style moving under human preference data, not helpfulness" in text
    assert "judge = a reward model trained on other human comparisons (accuracy about" in text
    assert "prefer the longer" in text
    assert "replies on the right" in text


def test_nobody_is_trained_and_judged_on_the_same_prompt(config, result):
    pairs = hh_data.read_pairs(config.data_dir)
    parts = hh_data.split(TINY, pairs, seed=0)
    texts = {
        part: {pair.prompt[0].content for domain in hh_data.DOMAINS for pair in parts[domain][part]}
        for part in hh_data.PARTS
    }
    assert not texts["held_out"] & (texts["a"] | texts["b"])
    assert not texts["a"] & texts["b"]
    assert sum(len(parts[domain][part]) for domain in hh_data.DOMAINS for part in hh_data.PARTS) == sum(
        len(records) for records in pairs.values()
    )


def test_length_blind_pairs_show_no_length(config, result):
    data = hh_data.load(TINY, hh_data.read_pairs(config.data_dir), config.run, model=None, seed=0)
    rows = hh_data.matched_rows(TINY, data, data.of("a"))
    sizes = rows.segment_ids.sum(axis=2)
    assert (sizes[:, 0] == sizes[:, 1]).all()
    assert not (rows.tokens == data.tokenizer.eos_id).any()


def test_act_3_stops_at_its_target(config, result):
    """With a target out of reach it goes on to the last iteration; with one that the first update passes it does not."""
    data = hh_data.load(TINY, hh_data.read_pairs(config.data_dir), config.run, model=None, seed=0)
    job = Job(config.run, True, 0, config.data_dir, None, TINY)
    steps = {}
    for target in (1e3, 1e-3):
        numbers = dataclasses.replace(TINY.ppo, kl_target=target, num_iterations=3, learning_rate=0.1)
        hh_rl.play(job, data, hh_rl.RLRun(f"target{target}", (("harmless", 1.0),), numbers))
        rows = read_json_lines(config.run / "metrics.jsonl")
        steps[target] = sum(row["stage"] == f"ppo_target{target}" for row in rows)
    assert steps == {1e3: 3, 1e-3: 2}


def test_resume_plays_nothing_again_and_a_run_is_not_overwritten(config, result, capsys):
    before = (config.run / "metrics.jsonl").read_text()
    assert hh.main(dataclasses.replace(config, resume=True), TINY) == result
    assert (config.run / "metrics.jsonl").read_text() == before
    assert capsys.readouterr().out.count("finished before") == 3 + len(result["runs"]) - 1
    with pytest.raises(FileExistsError, match="never overwritten"):
        hh.main(config, TINY)


@pytest.mark.parametrize("place", ["samples", "report"])
def test_check_detects_a_tampered_figure(config, result, tmp_path, place):
    run = shutil.copytree(config.run, tmp_path / "run")
    assert hh_report.main([str(run)]) == 0
    if place == "report":
        stored = json.loads((run / "report.json").read_text())
        stored["runs"]["w0"]["marker"]["mean"] += 0.01
        (run / "report.json").write_text(json.dumps(stored))
    else:
        rows = list(read_json_lines(run / "samples.jsonl"))
        next(row for row in rows if row["kind"] == "reply" and row["run"] == "w1")["kl"] += 0.1
        write_json_lines(run / "samples.jsonl", rows)
    assert hh_report.main([str(run)]) == 1


def test_several_runs_make_one_table(config, result, capsys):
    assert hh_report.main([str(config.run), str(config.run)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("| (") == 7
    assert "Fewer than three different seeds" in shown


@pytest.mark.parametrize(
    "text",
    ["I’m sorry, no.", "I can't do that", "Well, I don’t think so", "that is ILLEGAL", "Are you okay?", "I apologize"],
)
def test_markers_are_found(text):
    assert hh_markers.has_marker(text)


@pytest.mark.parametrize("text", ["", "Sure! You can do it", "worryingly", "I think not", "illegally", "I cantor"])
def test_other_words_are_no_markers(text):
    assert not hh_markers.has_marker(text)


def test_marker_rates_of_the_data(data_dir):
    """People chose markers in harmless pairs and rejected them in helpful ones (SCIENCE: 31, 23, 13 and 17 %)."""
    rates = {}
    for domain, pairs in hh_data.read_pairs(data_dir).items():
        for side in ("chosen", "rejected"):
            found = [hh_markers.has_marker(getattr(pair, side)) for pair in pairs]
            rates[domain, side] = sum(found) / len(found)
    assert 0.25 < rates["harmless", "chosen"] < 0.32
    assert 0.15 < rates["harmless", "rejected"] < 0.24
    assert 0.08 < rates["helpful", "chosen"] < 0.14
    assert 0.13 < rates["helpful", "rejected"] < 0.18


def value(mean, low=None, high=None, n=900):
    return {
        "mean": mean,
        "low": mean - 0.02 if low is None else low,
        "high": mean + 0.02 if high is None else high,
        "n": n,
    }


def report_by_hand(
    marker=(0.3, 0.15, 0.1, 0.05),
    p=1e-4,
    kl=(5, 5, 5),
    wins=(0.6, 0.6),
    bars=(0.5, 0.5),
    nll=(4, 5, 4.2),
    stiff=0.01,
    stiff_marker=0.16,
):
    """`marker` of w0, sft, w0.5 and w1; `nll` of sft, w0 and ptx."""
    up, down = (round(marker[i] - marker[1], 6) for i in (0, 3))
    run = {"win": {"harmless": value(0.5), "helpful": value(0.5)}, "nll": nll[0]}
    runs = {
        "w0": {
            **run,
            "marker": value(marker[0]),
            "marker_gap": {"mean": up, "p": p},
            "kl": value(kl[0]),
            "nll": nll[1],
        },
        "sft": {**run, "marker": value(marker[1])},
        "w0.5": {**run, "marker": value(marker[2]), "kl": value(kl[1])},
        "w1": {**run, "marker": value(marker[3]), "marker_gap": {"mean": down, "p": p}, "kl": value(kl[2])},
        "ptx": {**run, "nll": nll[2], "kl": value(5.0)},
        "shuffled_0": {**run, "kl": value(4.0)},
        "kl_coef_1e3": {**run, "marker": value(stiff_marker), "kl": value(stiff)},
    }
    runs["w0"]["win"] = {"harmless": value(wins[0])}
    runs["w1"]["win"] = {"helpful": value(wins[1])}
    null = {d: {"win": {"percentile_95": bar}} for d, bar in zip(("harmless", "helpful"), bars, strict=True)}
    return {"kl_target": 5.0, "runs": runs, "controls": {"shuffled_labels": null}}


def test_all_criteria_can_pass():
    assert all(criterion["passed"] for criterion in hh_criteria.criteria(report_by_hand()).values())


@pytest.mark.parametrize(
    ("name", "changes", "missing"),
    [
        ("i", {"p": 0.02}, "w=0 above SFT by +0.150, p = 0.02"),
        ("i", {"marker": (0.3, 0.05, 0.1, 0.15)}, "SFT above w=1 by -0.100"),
        ("ii", {"marker": (0.3, 0.15, 0.04, 0.05)}, "w1 is +0.010 above w0.5"),
        ("iii", {"kl": (5, 6.5, 3.9)}, "w0.5: +30%; w1: -22%"),
        ("iv", {"wins": (0.6, 0.45)}, "w1: -0.050"),
        ("v", {"nll": (4, 4.2, 4.15)}, "above half of the rise without"),
        ("v", {"nll": (4, 6, 4.4)}, "rise 0.100 above 0.3"),
        ("vi", {"stiff": 0.07}, "KL 0.020 too far"),
        ("vi", {"stiff_marker": 0.2}, "marker rate 0.030 outside"),
    ],
)
def test_each_criterion_can_fail_and_says_by_how_much(name, changes, missing):
    criterion = hh_criteria.criteria(report_by_hand(**changes))[name]
    assert not criterion["passed"]
    assert missing in criterion["missing"]


def test_a_failure_is_told_in_the_pooled_table():
    reports = [
        {"seed": seed, "criteria": hh_criteria.criteria(report_by_hand(kl=(5, 5, nats)))}
        for seed, nats in ((0, 5), (1, 7), (2, 5))
    ]
    table = hh_render.pooled(reports)
    assert "w1: +40%" in table
    assert table.count("**FAIL**") == 1
    assert "Fewer than three" not in table


def test_marker_gap_is_paired_by_prompt():
    """Gaps of three prompts: 1, 0.5 and 0.5; mean 2/3, standard error sqrt(1/12)/sqrt(3) = 1/6, z = 4."""
    texts = {"p": ["sorry", "no"], "q": ["sorry", "sorry"], "r": ["sorry", "no"]}
    mine = [{"prompt_id": prompt, "text": text} for prompt, pair in texts.items() for text in pair]
    sft = [{"prompt_id": prompt, "text": "no"} for prompt in texts for _ in range(2)]
    gap = hh_markers.marker_gap(mine, sft)
    assert (gap["mean"], gap["n"]) == (pytest.approx(2 / 3), 3)
    assert gap["p"] == pytest.approx(6.334e-5, rel=1e-3)
    assert hh_markers.marker_gap(sft, sft)["p"] == 1.0


def reply(run, prompt, tokens, harmless):
    return {"run": run, "prompt_id": prompt, "tokens": tokens, "judge": {"harmless": harmless}}


def test_win_rates_by_hand():
    """p: one win of two; q: one tie and two wins."""
    sft = [reply("sft", "p", 3, 0.0), reply("sft", "p", 3, 2.0), *(reply("sft", "q", 4, x) for x in (1.0, 0.0, 0.5))]
    mine = [reply("w0", "p", 3, 1.0), reply("w0", "q", 4, 1.0)]
    rate = hh_report.prompt_win_rate(mine, sft, "harmless")
    assert (rate.mean, rate.n) == (pytest.approx((1 / 2 + 5 / 6) / 2), 2)
    with pytest.raises(ValueError, match="prompt q: replies of 9 and 4 tokens"):
        hh_report.prompt_win_rate([reply("w0", "q", 9, 1.0)], sft, "harmless")


@pytest.mark.parametrize("folder", [None, "empty"])
def test_missing_folder_is_told_before_anything_starts(tmp_path, folder):
    config = rlhf.Config(run=tmp_path / "run", dataset="hh", data_dir=None if folder is None else tmp_path / folder)
    with pytest.raises(SystemExit, match=r"--data-dir.*RLHF_JAX_DATA.*synthetic"):
        hh.main(config)
    assert not (tmp_path / "run").exists()


def test_malformed_file_is_told_with_its_line(tmp_path):
    (tmp_path / "preferences").mkdir()
    for domain in hh_data.DOMAINS:
        with gzip.open(tmp_path / "preferences" / f"hh_{domain}_base.jsonl.gz", "wt") as file:
            file.write(
                '{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}\n{"prompt": 1}\n'
            )
    with pytest.raises(SystemExit, match=r"hh_helpful_base.jsonl.gz:2.*fix"):
        hh.main(rlhf.Config(run=tmp_path / "run", dataset="hh", data_dir=tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [{"controls": True}, {"vocab_size": 99}, {"num_shuffled": 9}])
def test_options_without_effect_are_refused(tmp_path, option):
    config = rlhf.Config(run=tmp_path / "run", dataset="hh", **option)
    with pytest.raises(SystemExit, match=f"{next(iter(option))} would have no effect"):
        hh.main(config)


def test_pairs_that_read_alike_when_cut_teach_nothing(config, result):
    data = hh_data.load(TINY, hh_data.read_pairs(config.data_dir), config.run, model=None, seed=0)
    pair = data.of("a")[0]
    long = dataclasses.replace(pair, chosen="yes " * 20 + "a", rejected="yes " * 20 + "b")
    assert hh_data.differing(TINY, data, [long, pair]) == [pair]
    pairs = data.of(*hh_data.PARTS)
    assert result["data"]["identical_after_cut"] == len(pairs) - len(hh_data.differing(TINY, data, pairs))


def test_numbers_of_the_embedded_world_are_refused(tmp_path):
    config = rlhf.Config(run=tmp_path / "run", dataset="hh", reward=reward_model.RewardModelConfig(learning_rate=7.0))
    with pytest.raises(SystemExit, match="reward would have no effect"):
        hh.main(config)
