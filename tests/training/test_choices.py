"""Winners, pairs and labels against loops over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.data.batching import ranking_batch
from rlhf_jax.data.records import TokenizedRanking
from rlhf_jax.training.choices import best_and_worst, best_of_group, labelled_rows, ranked_pairs
from rlhf_jax.types import Generation

SCORES = jnp.asarray([0.1, 0.3, 0.2, 0.5, 0.5, 0.5])
GENERATION = Generation(
    tokens=jnp.arange(6)[:, None] * jnp.ones((1, 4), jnp.int32),
    segment_ids=jnp.ones((6, 4), jnp.int32),
    completion_mask=jnp.ones((6, 4), bool),
    logprobs=jnp.zeros((6, 4)),
    ended=jnp.ones(6, bool),
)
RANKINGS = ranking_batch(
    [
        TokenizedRanking((5, 6), ((7, 1), (8, 1), (9, 9, 1)), (1, 0, 1)),
        TokenizedRanking((4,), ((2, 1), (3, 1)), (0, 1)),
        TokenizedRanking((3,), ((2, 1), (9, 1)), (0, 0)),
    ],
    length=6,
    num_responses=3,
    pad_id=tiny.PAD,
    vocab_size=tiny.VOCAB,
)


def completion(batch, at):
    return np.asarray(batch.tokens)[at][np.asarray(batch.completion_mask)[at]].tolist()


def prompt(batch, at):
    keep = (np.asarray(batch.segment_ids)[at] > 0) & ~np.asarray(batch.completion_mask)[at]
    return np.asarray(batch.tokens)[at][keep].tolist()


def test_best_of_group_takes_the_first_of_the_best():
    winners = jax.jit(lambda s: best_of_group(GENERATION, s, group_size=3))(SCORES)
    assert winners.tokens[:, 0].tolist() == [1, 3]


def test_best_and_worst_masks_ties():
    pairs = best_and_worst(GENERATION, SCORES, group_size=2)
    assert pairs.tokens[:, :, 0].tolist()[:2] == [[1, 0], [3, 2]]
    assert pairs.mask.tolist() == [True, True, False]


def test_ranked_pairs_are_all_ordered_ones():
    pairs = ranked_pairs(RANKINGS)
    found = [(completion(pairs, (i, 0)), completion(pairs, (i, 1))) for i in range(len(pairs.mask))]
    assert found == [([8, 1], [7, 1]), ([8, 1], [9, 9, 1]), ([2, 1], [3, 1])]
    ties = jax.tree.map(lambda x: x[2:], RANKINGS)
    with pytest.raises(ValueError, match="1 rankings hold no ordered pair; fix:"):
        ranked_pairs(ties)


def test_labelled_rows_pair_each_prompt_with_another_prompts_completion():
    pairs = ranked_pairs(RANKINGS)
    rows = labelled_rows(pairs, pad_id=tiny.PAD)
    assert rows.desirable.tolist() == [True, False] * 3
    for i in range(6):
        assert completion(rows, (i, 0)) == completion(pairs, (i // 2, i % 2))
        assert prompt(rows, (i, 0)) == prompt(rows, (i, 1)) == prompt(pairs, (i // 2, 0))
        other = {(2, 1), (3, 1)} if i < 4 else {(8, 1)}
        assert tuple(completion(rows, (i, 1))) in other
    assert rows.tokens.shape[-1] == 5  # the longest that occurs: two and three tokens
    one_prompt = jax.tree.map(lambda x: x[:2], pairs)
    with pytest.raises(ValueError, match="4 completions of one prompt cannot be mismatched; fix:"):
        labelled_rows(one_prompt, pad_id=tiny.PAD)
