"""Diversity against loops, and what each measure is at its ends."""

import functools

import numpy as np
import pytest

from rlhf_jax.training.diversity import distinct_n, edit_similarity, group_similarity


def test_distinct_bigrams_by_hand():
    assert distinct_n([[1, 2, 1, 2], [1, 2], [7]], 2) == 2 / 4  # 12, 21, 12 | 12 | none
    assert distinct_n([["the", "cat", "sat"], ["the", "cat", "ran"]], 2) == 3 / 4
    assert distinct_n([[1, 2, 3]], 1) == 1.0
    with pytest.raises(ValueError, match="none of 2 completions has 3 tokens; fix:"):
        distinct_n([[1, 2], []], 3)


def edits(a, b):
    """Levenshtein's recursion as it is written in books."""

    @functools.cache
    def of(i, j):
        if not i or not j:
            return i + j
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return of(len(a), len(b))


@pytest.mark.parametrize("seed", range(8))
def test_edit_similarity_is_the_recursion(seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 3, rng.integers(1, 9)).tolist() for _ in range(2))
    assert edit_similarity(a, b) == pytest.approx(1 - edits(a, b) / max(len(a), len(b)))
    assert edit_similarity(a, b) == edit_similarity(b, a)


def test_the_ends():
    assert edit_similarity([1, 2, 3], [1, 2, 3]) == 1.0
    assert edit_similarity([1, 2, 3], [4, 5, 6]) == 0.0
    assert edit_similarity([], []) == 1.0
    assert edit_similarity([], [1]) == 0.0
    assert group_similarity([[[1], [1], [1]], [[1], [2], [1]]]).tolist() == [1.0, 1 / 3]
    with pytest.raises(ValueError, match=r"prompt 1 has 1 sample\(s\)"):
        group_similarity([[[1], [1]], [[2]]])
