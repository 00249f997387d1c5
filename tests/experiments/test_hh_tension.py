"""The helpful/harmless study: folds, controls and criteria, and a sliver of it end to end."""

import dataclasses
import gzip

import hh_data
import hh_tension
import numpy as np
import pytest
from hh_tension import Config

from rlhf_jax.data.records import Message, Preference
from rlhf_jax.training.evaluate import Interval

TINY = Config(num_folds=2, num_shuffled=2, lengths=(8, 4), prompt_length=4, vocab_size=400, model_dim=8, batch_size=8)


def pair(i):
    return Preference(str(i), (Message("user", f"question {i // 2}"),), "yes", "no")


def test_folds_cover_all_pairs_and_keep_prompts_together():
    pairs = [pair(i) for i in range(400)]
    fold = hh_tension.folds(Config(num_folds=5), pairs)
    np.testing.assert_array_equal(fold[0::2], fold[1::2])
    shares = np.bincount(fold) / len(fold)
    assert len(shares) == 5
    np.testing.assert_allclose(shares, 0.2, atol=0.08)


def test_cells_count_who_may_judge():
    """Held out: every pair by the one member of its fold. Across: by the mean of all members."""
    team = hh_tension.members(TINY)
    assert [m.kind for m in team] == ["helpful"] * 2 + ["harmless"] * 2 + ["joint"] * 2 + ["shuffled"] * 2
    fold, on = np.array([0, 1, 0, 1]), np.array([True, True, True, False])
    right = np.zeros((4, len(team)))
    right[:, 0] = [1, 0, 0, 1]
    right[:, 1] = [0, 1, 1, 1]
    pairs, seeds = hh_tension.cell(TINY, right, "helpful", on, fold, held_out=True)
    assert (pairs.mean, pairs.n) == (pytest.approx(2 / 3), 3)
    assert seeds.mean == pytest.approx((1 / 2 + 1) / 2)
    pairs, seeds = hh_tension.cell(TINY, right, "helpful", on, fold, held_out=False)
    assert pairs.mean == pytest.approx(0.5)
    assert seeds.mean == pytest.approx((1 / 3 + 2 / 3) / 2)


def test_both_intervals_must_lie_on_one_side():
    high, across, low = Interval(0.6, 0.55, 0.65, 9), Interval(0.6, 0.45, 0.75, 9), Interval(0.4, 0.35, 0.45, 9)
    assert hh_tension.both((high, high), "above")
    assert not hh_tension.both((high, across), "above")
    assert not hh_tension.both((across, high), "above")
    assert hh_tension.both((low, low), "below")
    assert not hh_tension.both((low, across), "below")


def test_without_a_folder_nothing_starts():
    with pytest.raises(SystemExit, match="no data folder"):
        hh_tension.main(dataclasses.replace(TINY, data_dir=None))


def test_a_sliver_end_to_end(data_dir, tmp_path, capsys):
    (tmp_path / "preferences").mkdir()
    for domain in hh_data.DOMAINS:
        name = f"preferences/hh_{domain}_base.jsonl.gz"
        with gzip.open(data_dir / name, "rt", encoding="utf-8") as source, gzip.open(tmp_path / name, "wt") as target:
            target.writelines(line for line, _ in zip(source, range(60), strict=False))
    passed = hh_tension.main(dataclasses.replace(TINY, data_dir=tmp_path))
    text = capsys.readouterr().out
    assert len(passed) == 3
    assert text.count("prefer the longer whole reply on") == 4
    assert "replies of at most 8 tokens: " in text
    assert "replies of exactly 4 tokens: " in text
    for line in (line for line in text.splitlines() if line.startswith("shuffled")):
        assert "over 2 models" in line
