"""Members train as if alone, each on rows of its own; averaged weights need a common start."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax.functional import ensemble_mean, uncertainty_weighted, worst_case
from rlhf_jax.models import transformer
from rlhf_jax.models.heads import ensemble_scores, init_reward_head, sequence_scores
from rlhf_jax.objectives import reward_model
from rlhf_jax.training.ensembles import (
    average_members,
    init_ensemble,
    make_ensemble_score_fn,
    make_ensemble_step,
    member_indices,
)
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import Frozen, Generation, RankingBatch

M, N, LENGTH, BATCH, STEPS = 4, 256, 6, 32, 40
OPTIMIZER = optax.adam(3e-3)
TRAIN_STEP = make_train_step(reward_model(tiny.MODEL), OPTIMIZER)


def pairs(seed, num):
    """Random sequences; the one with more even tokens is better."""
    tokens = np.random.default_rng(seed).integers(2, tiny.VOCAB, (num, 2, LENGTH)).astype(np.int32)
    even = (tokens % 2 == 0).sum(axis=-1)
    everything = np.ones_like(tokens)
    ranks = np.stack([even[:, 0] < even[:, 1], even[:, 1] < even[:, 0]], axis=1).astype(np.int32)
    return RankingBatch(tokens, everything, everything > 0, ranks, np.ones((num, 2), bool))


DATA, TEST = (jax.tree.map(jnp.asarray, pairs(seed, N)) for seed in (0, 1))


@jax.jit
def init(key):
    trunk_key, head_key = jax.random.split(key)
    return {
        "trunk": transformer.init(trunk_key, tiny.CONFIG),
        "head": init_reward_head(head_key, tiny.CONFIG.model_dim),
    }


@pytest.fixture(scope="module")
def fit():
    step = jax.jit(make_ensemble_step(TRAIN_STEP))

    def run(states, num_steps=STEPS, seed=0):
        for i in range(num_steps):
            rows = member_indices(seed, i, num_members=M, num_examples=N, batch_size=BATCH, bootstrap=True)
            states, metrics = step(states, DATA, rows)
        return states, metrics

    return run


@pytest.fixture(scope="module")
def from_scratch(fit):
    return fit(init_ensemble(init, jax.random.key(0), OPTIMIZER, num_members=M), num_steps=80)


def test_a_member_trains_as_if_alone(fit):
    """Two steps of the ensemble against two of one plain state on the same rows."""
    states, metrics = fit(init_ensemble(init, jax.random.key(0), OPTIMIZER, num_members=M), num_steps=2)
    assert metrics["rm/loss"].shape == (M,)
    alone, plain_step = init_train_state(init(jax.random.fold_in(jax.random.key(0), 2)), OPTIMIZER), jax.jit(TRAIN_STEP)
    for i in range(2):
        rows = member_indices(0, i, num_members=M, num_examples=N, batch_size=BATCH, bootstrap=True)[2]
        alone, _ = plain_step(alone, jax.tree.map(lambda x, rows=rows: x[rows], DATA))
    found = jax.tree.map(lambda x: x[2], states.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, alone.params)


def test_members_start_apart_or_together():
    apart = init_ensemble(init, jax.random.key(0), OPTIMIZER, num_members=M)
    assert len(np.unique(apart.params["head"]["weight"], axis=0)) == M
    together = init_ensemble(lambda key: init(jax.random.key(7)), jax.random.key(0), OPTIMIZER, num_members=M)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[1:], x[:-1]), together.params)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_members_see_data_of_their_own(bootstrap):
    options = {"num_members": 3, "num_examples": 1000, "batch_size": 50, "bootstrap": bootstrap}
    epoch = np.concatenate([member_indices(5, step, **options) for step in range(20)], axis=1)
    np.testing.assert_array_equal(member_indices(5, 3, **options), epoch[:, 150:200])
    shares = [len(np.unique(rows)) / 1000 for rows in epoch]
    np.testing.assert_allclose(shares, 1 - np.exp(-1) if bootstrap else 1.0, atol=0.04 if bootstrap else 0)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(epoch[a] == epoch[b]) < 0.02
    later = np.concatenate([member_indices(5, step, **options) for step in range(20, 40)], axis=1)
    np.testing.assert_array_equal(np.sort(later), np.sort(epoch))  # the same sample, in another order
    assert np.mean(later == epoch) < 0.02


compiled = functools.cache(lambda fn: jax.jit(partial(fn, tiny.MODEL)))


def scores_of(params, fn):
    rows = TEST.tokens.reshape(-1, LENGTH)
    return np.asarray(compiled(fn)(params, rows, jnp.ones_like(rows)))


def accuracy(scores):
    first, second = scores.reshape(-1, 2).T
    strict = np.asarray(TEST.ranks[:, 0] != TEST.ranks[:, 1])
    return np.mean(((first > second) == np.asarray(TEST.ranks[:, 0] < TEST.ranks[:, 1]))[strict])


def test_members_are_scored_one_by_one(from_scratch):
    params = from_scratch[0].params
    together = scores_of(params, ensemble_scores)
    alone = [scores_of(jax.tree.map(lambda x, m=m: x[m], params), sequence_scores) for m in range(M)]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [ensemble_mean, worst_case, partial(uncertainty_weighted, coef=0.3)])
def test_a_reward_from_members_on_one_scale(from_scratch, rule):
    """Each member in its own standard deviations first: a member a hundred times as loud changes nothing."""
    params, num = from_scratch[0].params, 6
    tokens = TEST.tokens[:num, 0]
    rows = Generation(tokens, jnp.ones_like(tokens), tokens > 0, jnp.zeros(tokens.shape), jnp.arange(num) != 4)
    raw = np.asarray(compiled(ensemble_scores)(params, tokens, rows.segment_ids), np.float64)
    means, stds = raw.mean(axis=1), raw.std(axis=1)
    score = jax.jit(make_ensemble_score_fn(tiny.MODEL, rule, missing_eos_penalty=0.5))
    found = score(Frozen(None, params, jnp.asarray(means), jnp.asarray(stds)), rows)
    z = (raw - means[:, None]) / stds[:, None]
    expected = {ensemble_mean: z.mean(0), worst_case: z.min(0)}.get(rule, z.mean(0) - 0.3 * z.var(0))
    expected[4] -= 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    gains = jnp.asarray([1.0, 100.0, 1.0, 1.0])
    loud = {**params, "head": jax.tree.map(lambda x: x * gains.reshape(-1, *[1] * (x.ndim - 1)), params["head"])}
    again = score(Frozen(None, loud, means * gains, stds * gains), rows)
    np.testing.assert_allclose(again, found, rtol=1e-3, atol=1e-3)


def test_averaged_weights_need_a_common_start(from_scratch, fit):
    """WARM of members that were fine-tuned from one network scores nearly as their mean; of others it does not."""
    apart = from_scratch[0].params
    start = jax.tree.map(lambda x: x[0], apart)
    forked, _ = fit(init_ensemble(lambda key: start, jax.random.key(1), OPTIMIZER, num_members=M), seed=9)

    def agreement(params):
        members = scores_of(params, ensemble_scores)
        averaged = scores_of(average_members(params), sequence_scores)
        return np.corrcoef(members.mean(axis=0), averaged)[0, 1], accuracy(members.mean(axis=0)), accuracy(averaged)

    shared_correlation, shared_mean, shared_warm = agreement(forked.params)
    apart_correlation, apart_mean, apart_warm = agreement(apart)
    print(shared_correlation, shared_mean, shared_warm, apart_correlation, apart_mean, apart_warm)
    assert np.abs(np.diff(forked.params["head"]["weight"], axis=0)).max() > 0.01  # they did move apart
    assert shared_correlation > 0.97
    assert apart_correlation < 0.8
    assert shared_warm > shared_mean - 0.02
    assert apart_warm < apart_mean - 0.1
