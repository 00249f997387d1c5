"""How varied completions are: what falls when a policy comes to say one thing. On the host, over token ids or words.

Both measures depend on how much they are shown: compare policies on as many completions to the same prompts.
"""

import itertools
from collections.abc import Hashable, Sequence

import numpy as np


def distinct_n(rows: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """Different n-grams over all n-grams of all rows (Li et al. 2016): near 1 nothing is said twice, near 0 everything is.

    Raises:
      ValueError: no row has n tokens.
    """
    ngrams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    if not ngrams:
        raise ValueError(f"none of {len(rows)} completions has {n} tokens; fix: longer completions or a smaller n")
    return len(set(ngrams)) / len(ngrams)


def edit_similarity(a: Sequence[int], b: Sequence[int]) -> float:
    """`1 - edits / max(len(a), len(b))`, Levenshtein's insertions, deletions and substitutions: 1 = the same, 0 = nothing."""
    if not len(a) or not len(b):
        return float(len(a) == len(b))
    a, b = np.asarray(a), np.asarray(b)
    places = np.arange(len(b) + 1)
    row = places
    for i, token in enumerate(a):
        changed = np.concatenate([[i + 1], np.minimum(row[:-1] + (b != token), row[1:] + 1)])
        row = np.minimum.accumulate(changed - places) + places  # the cheapest place to insert from
    return float(1.0 - row[-1] / max(len(a), len(b)))


def group_similarity(groups: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """Mean edit similarity of two samples to one prompt, `[num_prompts]`: 1 where a prompt has one answer left.

    What a policy says to different prompts differs anyway; collapse shows among samples to the same one.

    Raises:
      ValueError: a prompt has fewer than two samples.
    """
    for i, group in enumerate(groups):
        if len(group) < 2:
            raise ValueError(f"prompt {i} has {len(group)} sample(s), a pair needs two; fix: more samples per prompt")
    return np.array([np.mean([edit_similarity(a, b) for a, b in itertools.combinations(group, 2)]) for group in groups])
