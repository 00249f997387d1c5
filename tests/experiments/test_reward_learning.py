"""The study of reward learning: its world by closed forms, and its logic at a small size."""

from functools import partial

import conv_gold
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reward_learning
from reward_learning import Config

TINY = Config(
    seeds=(0, 1),
    sizes=(40, 320),
    num_ranked=40,
    num_held_out=200,
    width=8,
    batch_size=8,
    num_checks=2,
    steps_per_check=20,
    epochs_size=40,
    epochs_width=8,
)


def test_a_convolution_scores_as_a_loop_over_windows():
    params = conv_gold.init_conv(jax.random.key(0), width=5)
    tokens = np.random.default_rng(0).integers(0, conv_gold.VOCAB_SIZE, (3, conv_gold.LENGTH))
    trunk, head = jax.tree.map(np.float64, (params["trunk"], params["head"]))
    expected = []
    for row in tokens:
        embedded = [np.zeros(conv_gold.EMBED_DIM)] * 2 + [trunk["embed"][token] for token in row]
        windows = [np.concatenate(embedded[t : t + 3][::-1]) for t in range(len(row))]
        features = [np.maximum(window @ trunk["kernel"] + trunk["bias"], 0) for window in windows]
        expected.append(np.mean(features, axis=0) @ head["weight"] + head["bias"])
    np.testing.assert_allclose(conv_gold.conv_scores(params, jnp.asarray(tokens)), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def world():
    make = partial(reward_learning.make_data, Config(sizes=(4000,), num_held_out=4000))
    return jax.jit(make)(jnp.asarray(0), jnp.asarray(0.25))


def test_annotators_contradict_the_gold_as_often_as_told(world):
    gaps = np.asarray(world["test_gold"][:, 0] - world["test_gold"][:, 1], np.float64)
    wrong = (gaps > 0) != np.asarray(world["test"].ranks[:, 0] == 0)
    assert np.mean(wrong) == pytest.approx(0.25, abs=0.025)
    chance = 1 / (1 + np.exp(np.abs(gaps) / float(world["scale"])))
    assert chance.mean() == pytest.approx(0.25, abs=1e-4)
    clear = np.abs(gaps) > np.median(np.abs(gaps))
    assert np.mean(wrong[clear]) == pytest.approx(chance[clear].mean(), abs=0.03)  # near ties are missed more often
    assert np.mean(wrong[~clear]) > np.mean(wrong[clear]) + 0.15


def test_gold_is_of_unit_scale_and_rankings_are_its_order(world):
    assert float(world["test_gold"].mean()) == pytest.approx(0, abs=0.1)
    assert float(world["test_gold"].std()) == pytest.approx(1, abs=0.1)
    exact = conv_gold.rankings(jax.random.key(0), world["test"].tokens, world["test_gold"], jnp.zeros(()))
    np.testing.assert_array_equal(exact.ranks[:, 0] == 0, world["test_gold"][:, 0] > world["test_gold"][:, 1])
    assert sorted(np.unique(np.asarray(world["train"].ranks))) == [0, 1, 2, 3]


def test_rows_pass_over_all_examples_before_any_comes_again():
    rows = reward_learning.training_rows(10, (2, 5, 3)).ravel()
    for epoch in range(3):
        assert sorted(rows[10 * epoch : 10 * (epoch + 1)]) == list(range(10))


def findings(**changes):
    """What a study finds when every criterion holds."""
    rng = np.random.default_rng(0)
    noise = 0.001 * rng.normal(size=5)
    found = {
        "pairs 40": 0.6 + noise,
        "pairs 320": 0.7 + noise,
        "rankings, all pairs": 0.65 + noise[::-1],
        "epochs": np.stack([np.full(5, 0.5), 0.6 + noise], axis=1),
        "ceiling": np.full(5, 0.75),
        "gold on labels": 0.752 + noise,
        "coins": 0.5 + 10 * (noise - noise.mean()),
    }
    return {**found, **changes}


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        (0, {"pairs 320": np.full(5, 0.6 - 1e-3)}),
        (1, {"gold on labels": np.full(5, 0.77)}),
        (2, {"rankings, all pairs": np.array([0.7, 0.5, 0.6, 0.75, 0.5])}),
        (3, {"epochs": np.stack([np.full(5, 0.5), [0.6, 0.4, 0.5, 0.55, 0.45]], axis=1)}),
        (4, {"coins": np.array([0.55, 0.56, 0.57, 0.55, 0.56])}),
    ],
)
def test_each_criterion_fails_on_what_breaks_it(place, changes):
    assert all(reward_learning.verdict(TINY, findings()).values())
    assert [held for held in reward_learning.verdict(TINY, findings(**changes)).values()].index(False) == place
    assert sum(reward_learning.verdict(TINY, findings(**changes)).values()) == 4


def test_the_study_at_a_small_size(capsys):
    programs = reward_learning.compiled(TINY)
    reward_learning.study(TINY, programs, 0.0)
    sizes = [program._cache_size() for program in programs.values()]
    found = reward_learning.study(TINY, programs, 0.25)
    assert [program._cache_size() for program in programs.values()] == sizes  # the rate is data
    assert found["pairs 320"].shape == (2,)
    assert found["epochs"].shape == (2, 5)
    assert np.all(found["pairs 320"] > 0.52)
    assert found["ceiling"].mean() == pytest.approx(0.75, abs=0.01)
    np.testing.assert_allclose(found["gold on labels"], found["ceiling"], atol=0.12)
    assert len(reward_learning.verdict(TINY, found)) == 5
