"""Experience without a critic against loops, and whole iterations of the methods that need more than a table's row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax.functional import (
    clipped_policy_loss,
    constant_length_mean,
    dpo_loss,
    group_relative,
    leave_one_out,
    reinforce_loss,
    token_mean,
)
from rlhf_jax.generation.generate import generate
from rlhf_jax.objectives import (
    of_policy,
    pair_token_logprobs,
    policy_gradient,
    preference,
    sequence_token_logprobs,
    sft,
)
from rlhf_jax.training.choices import make_best_of_experience_fn, make_pair_experience_fn
from rlhf_jax.training.groups import (
    make_policy_experience_fn,
    make_remax_experience_fn,
    per_completion,
    sample_until_full,
    with_greedy,
    with_overlong_penalty,
)
from rlhf_jax.training.ppo import PPOBatch, init_ppo_state, make_batch_update, make_ppo_iteration, make_ppo_update
from rlhf_jax.training.rollout import make_score_fn
from rlhf_jax.training.train_step import make_train_step

G, NEW = 2, 4
MODEL, PROMPTS = tiny.MODEL, tiny.prompts((3, 5, 1, 4))
OPTIMIZER = optax.adam(1e-2)


def sampler(temperature=1.0, group_size=G):
    options = {"max_new_tokens": NEW, "eos_id": tiny.EOS, "pad_id": tiny.PAD, "temperature": temperature}
    return partial(generate, MODEL, samples_per_prompt=group_size, **options)


SAMPLE = jax.jit(sampler())


@pytest.fixture(scope="module")
def rollout():
    generation = SAMPLE(tiny.init_params(), PROMPTS, jax.random.key(0))
    return generation, jnp.asarray([1.0, 0.0, 0.5, 0.5, -1.0, 2.0, 0.0, 0.25])


def experience_of(rollout, advantages_fn, **options):
    experience_fn = jax.jit(make_policy_experience_fn(MODEL, advantages_fn, **options))
    return experience_fn(None, tiny.init_params(5), *rollout, jnp.asarray(0.2))


def test_log_probs_of_the_reference_that_are_known_take_its_place(rollout):
    """The same experience, computed without the reference; other log-probs give another one."""
    options = {"kl_in_reward": True, "group_size": G, "temperature": 0.7}
    generation, scores = rollout
    experience_fn = make_policy_experience_fn(MODEL, per_completion(leave_one_out, group_size=G), **options)
    expected = experience_of(rollout, per_completion(leave_one_out, group_size=G), **options)
    rows = generation.tokens, generation.segment_ids, generation.completion_mask
    known = sequence_token_logprobs(MODEL, tiny.init_params(5), *rows, temperature=0.7)
    found = jax.jit(experience_fn)(None, None, generation, scores, jnp.asarray(0.2), known)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
    other, _ = jax.jit(experience_fn)(None, None, generation, scores, jnp.asarray(0.2), 2 * known)
    assert np.abs(other.advantages - found[0].advantages).max() > 0.1


def test_rloo_has_the_kl_in_the_score_before_the_baseline(rollout):
    generation, scores = rollout
    advantages_fn = per_completion(leave_one_out, group_size=G)
    batch, metrics = experience_of(rollout, advantages_fn, kl_in_reward=True, group_size=G)
    mask = np.asarray(generation.completion_mask)
    ratios = np.where(mask, np.asarray(generation.logprobs) - np.asarray(batch.ref_logprobs), 0.0)
    kl = ratios.sum(axis=1)
    assert np.abs(kl).max() > 0.1
    returns = (np.asarray(scores) - 0.2 * kl).reshape(-1, G)
    expected = (returns - returns[:, ::-1]).ravel()  # with two samples, the baseline is the other one
    np.testing.assert_allclose(batch.advantages, np.where(mask, expected[:, None], 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], returns.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["objective/kl"], kl.mean(), rtol=1e-4)
    assert float(metrics["frac_reward_zero_std"]) == 0.25


def test_grpo_leaves_the_kl_out_of_the_score_and_dapo_drops_equal_groups(rollout):
    generation, scores = rollout
    advantages_fn = per_completion(group_relative, group_size=G)
    batch, metrics = experience_of(rollout, advantages_fn, kl_in_reward=False, group_size=G, drop_zero_spread=True)
    expected = group_relative(scores, group_size=G)
    mask = np.asarray(generation.completion_mask)
    np.testing.assert_allclose(batch.advantages, np.where(mask, expected[:, None], 0), rtol=1e-5)
    assert float(metrics["objective/rlhf_reward"]) == pytest.approx(float(scores.mean()))
    assert float(metrics["objective/kl_coef"]) == 0.0
    kept = np.array([True, True, False, False, True, True, True, True])
    np.testing.assert_array_equal(batch.mask, mask & kept[:, None])


def test_remax_takes_the_greedy_answers_score_off_and_learns_from_the_samples(rollout):
    generation, scores = rollout
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), generation)
    greedy = 0.5 * jnp.arange(8.0)
    experience_fn = make_remax_experience_fn(MODEL)
    ref = tiny.init_params(5)
    batch, metrics = experience_fn(None, ref, twice, jnp.concatenate([scores, greedy]), jnp.asarray(0.0))
    mask = np.asarray(generation.completion_mask)
    np.testing.assert_allclose(batch.advantages, np.where(mask, np.asarray(scores - greedy)[:, None], 0), atol=1e-6)
    np.testing.assert_allclose(metrics["objective/scores"], scores.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/greedy_scores"], greedy.mean(), rtol=1e-5)
    assert batch.tokens.shape == generation.tokens.shape


def test_greedy_rows_come_second_and_are_the_most_likely_tokens():
    sample = jax.jit(with_greedy(sampler(), sampler(temperature=0.0)))
    both = [sample(tiny.init_params(), PROMPTS, jax.random.key(seed)) for seed in (0, 1)]
    np.testing.assert_array_equal(both[0].tokens[8:], both[1].tokens[8:])
    assert not np.array_equal(both[0].tokens[:8], both[1].tokens[:8])
    np.testing.assert_array_equal(both[0].tokens[8::2], both[0].tokens[9::2])


def test_overlong_penalty_reads_the_completions_length(rollout):
    generation, scores = rollout
    lengths = np.asarray(generation.completion_mask).sum(axis=1)
    assert len(set(lengths.tolist())) > 1
    score = with_overlong_penalty(lambda frozen, rows: scores, max_length=NEW, buffer=2)
    expected = np.asarray(scores) - np.clip((lengths - 2) / 2, 0, 1)
    np.testing.assert_allclose(score(None, generation), expected, rtol=1e-6)


def test_sampling_goes_on_until_enough_groups_have_spread(rollout):
    generation, scores = rollout
    calls = []

    def again(i):
        calls.append(i)
        marked = generation.replace(logprobs=generation.logprobs + i)
        return marked, scores if i else jnp.zeros(8)

    found, kept_scores, rounds = sample_until_full(again, num_groups=5, group_size=G, max_rounds=4)
    assert (rounds, calls) == (3, [0, 1, 2])
    spread = np.array([0, 1, 4, 5, 6, 7])
    np.testing.assert_array_equal(kept_scores, np.concatenate([scores[spread], scores[spread]])[:10])
    np.testing.assert_array_equal(found.tokens[:6], generation.tokens[spread])
    np.testing.assert_allclose(found.logprobs[6:], (generation.logprobs + 2)[spread[:4]])
    with pytest.raises(RuntimeError, match=r"3 of 5 groups .* after 2 rounds; nothing was updated. Fix: prompts"):
        sample_until_full(again, num_groups=5, group_size=G, max_rounds=2)


def remax():
    objective = policy_gradient(MODEL, reinforce_loss, aggregate=partial(constant_length_mean, length=1))
    update = make_ppo_update(make_train_step(objective, OPTIMIZER), num_epochs=1, kl_horizon=100.0)
    return with_greedy(sampler(), sampler(temperature=0.0)), make_remax_experience_fn(MODEL), update


def dapo():
    loss_fn = partial(clipped_policy_loss, clip_high=0.28)
    objective = policy_gradient(MODEL, loss_fn, aggregate=token_mean)
    update = make_ppo_update(
        make_train_step(objective, OPTIMIZER), num_epochs=2, num_minibatches=2, kl_target=None, kl_stop=1e-6
    )
    advantages_fn = per_completion(group_relative, group_size=G)
    options = {"kl_in_reward": False, "group_size": G, "drop_zero_spread": True}
    return sampler(), make_policy_experience_fn(MODEL, advantages_fn, **options), update


def test_pairs_carry_the_reference_of_their_own_rows(rollout):
    """At temperature 1, whatever the sampler's is: what `pair_token_logprobs` of the reference gives for the pairs."""
    reference = tiny.init_params(5)
    experience_fn = jax.jit(make_pair_experience_fn(MODEL, group_size=G, temperature=0.7))
    pairs, metrics = experience_fn(None, reference, *rollout, jnp.zeros(()))
    np.testing.assert_allclose(pairs.ref_logprobs, pair_token_logprobs(MODEL, reference, pairs), atol=1e-5)
    assert not np.array_equal(pairs.tokens[:, 0], pairs.tokens[:, 1])
    assert float(metrics["frac_ties"]) == 0.25


def raft():
    update = make_batch_update(make_train_step(of_policy(sft(MODEL)), OPTIMIZER), num_minibatches=2)
    return sampler(), make_best_of_experience_fn(MODEL, group_size=G), update


def online_dpo():
    objective = of_policy(preference(MODEL, dpo_loss, beta=0.1))
    return sampler(), make_pair_experience_fn(MODEL), make_batch_update(make_train_step(objective, OPTIMIZER))


@pytest.mark.parametrize("method", [remax, dapo, raft, online_dpo])
def test_the_same_iteration_runs_every_method(method):
    sample_fn, experience_fn, update_fn = method()
    score_fn = make_score_fn(MODEL)
    iteration = jax.jit(make_ppo_iteration(sample_fn, score_fn, experience_fn, update_fn))
    start = init_ppo_state(tiny.init_params(), None, OPTIMIZER, kl_coef=0.1)
    state, metrics = iteration(tiny.init_frozen(), start, PPOBatch(PROMPTS), jax.random.key(0))
    assert int(state.step) == 1
    assert all(np.isfinite(float(x)) for x in metrics.values()), metrics
    assert {"objective/kl", "objective/scores", "grad/norm"} <= set(metrics)
    assert abs(float(metrics["objective/kl"])) < 1e-4  # the policy is the reference
    assert metrics.get("policy/first_approxkl", 0.0) < 1e-6
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, start.params)
    assert max(jax.tree.leaves(moved)) > 1e-3
    if method is dapo:
        assert float(metrics["update/taken"]) == 2  # the second step is off policy and the last
    if method is online_dpo:
        np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-4)
    if method is raft:
        assert float(metrics["objective/best_scores"]) > float(metrics["objective/scores"])
