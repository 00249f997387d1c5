"""Best-of-n sampling keeps what a loop over the same samples keeps, and its law is the enumerated one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tabular import Tabular, init_problem

import rlhf_jax as rl

NEW, N = 4, 3
OPTIONS = {"max_new_tokens": NEW, "eos_id": tiny.EOS, "pad_id": tiny.PAD}


def score(generation):
    """Few values, so that samples tie."""
    return jnp.sum(jnp.where(generation.completion_mask, generation.tokens, 0) % 2, axis=1).astype(jnp.float32)


@jax.jit
def both(params, prompts, key):
    best = rl.best_of_n(tiny.MODEL, params, prompts, key, score_fn=score, num_samples=N, **OPTIONS)
    return best, rl.generate(tiny.MODEL, params, prompts, key, samples_per_prompt=N, **OPTIONS)


def test_the_first_of_the_best_of_every_prompt():
    prompts = tiny.prompts((3, 5) * 8)
    (kept, scores), everything = both(tiny.init_params(), prompts, jax.random.key(0))
    all_scores = np.asarray(score(everything)).reshape(-1, N)
    ties = sum(np.sum(row == row.max()) > 1 for row in all_scores)
    assert 0 < ties < len(all_scores)
    for i, row in enumerate(all_scores):
        best = max(range(N), key=lambda k, row=row: row[k])
        for name in ("tokens", "segment_ids", "completion_mask", "logprobs", "ended"):
            np.testing.assert_array_equal(getattr(kept, name)[i], getattr(everything, name)[i * N + best])
        assert scores[i] == row.max()
        np.testing.assert_array_equal(kept.tokens[i, :5], prompts.tokens[i])


def test_winners_are_the_demonstrations_of_raft():
    (kept, _), everything = both(tiny.init_params(), tiny.prompts((3, 5) * 8), jax.random.key(0))
    winners = rl.best_of_group(everything, score(everything), group_size=N)
    np.testing.assert_array_equal(winners.tokens, kept.tokens)
    np.testing.assert_array_equal(winners.loss_mask, kept.completion_mask)


def test_draws_follow_the_enumerated_law():
    """16 completions, 20,000 draws of the best of 3."""
    tabular, count = Tabular(4, 2), 20_000
    table, scores = init_problem(tabular, jax.random.key(0))
    logprobs = tabular.logprobs(table)
    law = np.exp(rl.best_of_n_logprobs(logprobs[None], scores[None], num_samples=N)[0])
    sample = partial(rl.best_of_n, tabular.model(), num_samples=N, max_new_tokens=2, eos_id=None, pad_id=0)
    kept, _ = jax.jit(
        lambda key: sample(table, tabular.prompts(count), key, score_fn=lambda g: scores[tabular.outcome(g.tokens)])
    )(jax.random.key(1))
    drawn = np.bincount(np.asarray(tabular.outcome(kept.tokens)), minlength=16) / count
    np.testing.assert_allclose(drawn, law, atol=4 * 0.5 / count**0.5)
    assert np.abs(drawn - np.exp(logprobs)).max() > 0.1


def test_what_cannot_be_meant_is_refused():
    call = partial(rl.best_of_n, tiny.MODEL, tiny.init_params(), tiny.prompts(), jax.random.key(0), **OPTIONS)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        call(score_fn=score, num_samples=0)
    with pytest.raises(ValueError, match=r"score_fn gave shape \(\) for 8 completions; fix"):
        jax.eval_shape(lambda: call(score_fn=lambda generation: score(generation).sum(), num_samples=2))
