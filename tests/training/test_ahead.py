"""One batch ahead: the numbers of a loop that says what it means, on one device and on two; rollouts are one update old."""

from functools import partial

import jax
import numpy as np
import pytest
import tiny
from training.pieces import SIZES, fresh_state, parts

from rlhf_jax.training.ahead import AheadState, make_ahead_iteration
from rlhf_jax.training.ppo import PPOBatch, make_learn

SAMPLE, LEARN = jax.jit(parts()[0]), jax.jit(make_learn(*parts()[1:]))
BATCHES = [PPOBatch(tiny.prompts(SIZES, seed=seed)) for seed in range(4)]
KEYS = jax.random.split(jax.random.key(5), 3)


@pytest.fixture(scope="module")
def by_hand():
    """Rollout k is of the policy before update k - 1; the first one of the policy that starts."""
    frozen, states, metrics = tiny.init_frozen(), [fresh_state()], []
    keys = [jax.random.split(key) for key in KEYS]
    for k in range(3):
        policy = states[max(k - 1, 0)].params["policy"]
        rollout = SAMPLE(policy, BATCHES[k].prompts, jax.random.key(0) if k == 0 else keys[k - 1][0])
        state, found = LEARN(frozen, states[k], rollout, None, keys[k][1])
        states.append(state)
        metrics.append(found)
    return states, metrics


def run(**moves):
    state = fresh_state()
    ahead = AheadState(state, SAMPLE(state.params["policy"], BATCHES[0].prompts, jax.random.key(0)))
    iteration, metrics = make_ahead_iteration(SAMPLE, LEARN, **moves), []
    for batch, key in zip(BATCHES[1:], KEYS, strict=True):
        ahead, found = iteration(tiny.init_frozen(), ahead, batch, key)
        metrics.append(found)
    return ahead, metrics


def test_it_is_the_loop_by_hand(by_hand):
    states, expected = by_hand
    ahead, metrics = run()
    jax.tree.map(np.testing.assert_array_equal, ahead.state, states[-1])
    jax.tree.map(np.testing.assert_array_equal, metrics, expected)
    assert metrics[0]["policy/first_approxkl"] < 1e-6  # the first rollout is on-policy
    assert metrics[1]["policy/first_approxkl"] > 1e-5  # the others are one update old, and the ratio knows
    assert abs(float(metrics[1]["val/ratio"]) - 1) > 1e-4


def test_halves_on_devices_of_their_own_make_the_same_numbers(by_hand):
    one, two = jax.devices()[:2]
    seen = set()

    def to_rollout(params):
        params = jax.device_put(params, two)
        seen.update(*(leaf.devices() for leaf in jax.tree.leaves(params)))
        return params

    ahead, _ = run(to_rollout=to_rollout, to_training=partial(jax.device_put, device=one))
    assert seen == {two}
    assert {device for leaf in jax.tree.leaves(ahead.state) for device in leaf.devices()} == {one}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ahead.state, by_hand[0][-1])
