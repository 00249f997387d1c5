"""The listeners' rule by hand, the report from rows alone, and (slow) the three acts on the real storyteller."""

import convert_llama2c
import numpy as np
import pytest
import stories
import stories_judge
from ppo import PPOConfig
from reward_model import RewardModelConfig
from sft import SFTConfig

from rlhf_jax.runtime.runs import read_json_lines, write_json_lines


def test_the_rule_reads_what_it_says():
    glad = 'Tom was happy. He smiled and said, "I love my new friend." They had a lot of fun.'
    assert stories_judge.traits(glad) == {"happy": 5.0, "sad": 0.0, "speaks": 1.0, "repeats": 0.0, "ends": 1.0}
    assert stories_judge.utility(glad) == 3 + 1 + 1
    cut = "She was sad and scared and sad. She did not want to play. She did not want to eat and"
    assert stories_judge.traits(cut) == {"happy": 0.0, "sad": 2.0, "speaks": 0.0, "repeats": 1.0, "ends": 0.0}
    assert stories_judge.utility(cut) == -2 - 1
    assert stories_judge.traits("The end.")["ends"] == 0.0  # too short to be a story


def test_whole_sentences():
    assert stories_judge.whole_sentences('She ran. He said, "Oh!" and then') == 'She ran. He said, "Oh!"'
    assert stories_judge.whole_sentences("no end at") == ""
    assert stories_judge.whole_sentences("It cost 3.50 and") == ""


def test_no_opening_is_in_both_sets():
    seen, held_out = (stories_judge.openings(held_out=flag) for flag in (False, True))
    assert not set(seen) & set(held_out)
    assert len(set(held_out)) == len(held_out) == 144
    assert not any(name in text for text in seen for name in stories_judge.HELD_OUT_NAMES)


def test_listeners_prefer_the_better_story_more_often():
    groups = [["She was happy and they laughed and smiled at home all day.", "It was sad."]] * 400
    first = np.mean([ranks[0] == 0 for ranks in stories_judge.rank(groups, seed=0)])
    gap = stories_judge.utility(groups[0][0]) - stories_judge.utility(groups[0][1])
    # P(the sum of a gap and the difference of two logistic noises > 0), by simulation of another generator
    noise = np.random.default_rng(5).logistic(scale=stories_judge.NOISE, size=(2, 200_000))
    assert first == pytest.approx(np.mean(gap + noise[0] > noise[1]), abs=0.03)


def test_report_follows_from_the_rows(tmp_path):
    texts = {"pretrained": "Tom sat.", "sft": "Tom sat.", "ppo": "Tom was happy and smiled at his little dog."}
    rows = [{"storyteller": k, "opening": f"{i}", "text": v, "kl": 2.0} for k, v in texts.items() for i in range(10)]
    write_json_lines(tmp_path / "samples.jsonl", rows)
    report = stories_judge.report(tmp_path / "samples.jsonl", kl_target=3.0)
    assert report["win_rate"]["mean"] == 1.0
    assert report["storytellers"]["ppo"]["utility"]["mean"] == 3.0
    assert report["storytellers"]["sft"]["ends"]["mean"] == 0.0
    text = stories_judge.render(report, tmp_path / "samples.jsonl", count=2)
    assert "not people" in text
    assert text.count("*PPO:*") == 2


@pytest.mark.slow
def test_three_acts(data_dir, tmp_path):
    source = data_dir / "weights" / "stories260K"
    convert_llama2c.main(
        convert_llama2c.Config(source / "stories260K.bin", source / "tok512.bin", tmp_path / "stories")
    )
    config = stories.Config(
        run=tmp_path / "run",
        model=tmp_path / "stories",
        num_samples=1,
        sft=SFTConfig(num_epochs=0.5, batch_size=16, learning_rate=5e-4),
        reward=RewardModelConfig(num_epochs=0.25),
        ppo=PPOConfig(num_iterations=2, batch_size=32, num_minibatches=2),
    )
    report = stories.main(config)
    names = [row["storyteller"] for row in read_json_lines(config.run / "samples.jsonl")]
    assert [names.count(name) for name in ("pretrained", "sft", "ppo")] == [144] * 3
    assert report["storytellers"]["sft"]["kl"] == pytest.approx(0.0, abs=1e-3)
    assert "not people" in (config.run / "report.md").read_text()


def test_a_model_is_needed(tmp_path):
    with pytest.raises(SystemExit, match="--model is missing"):
        stories.main(stories.Config(run=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
