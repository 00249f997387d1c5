"""Length limits: the three policies, what they keep, and what they count."""

import pytest

from rlhf_jax.data.json_lines import DataError
from rlhf_jax.data.lengths import (
    drop_overlong,
    fit_demonstrations,
    fit_prompts,
    fit_rankings,
    refuse_overlong,
    truncate_left,
)
from rlhf_jax.data.records import DataReport, TokenizedDemonstration, TokenizedRanking

EXAMPLES = [
    TokenizedDemonstration((1, 2), (3, 0)),  # fits exactly
    TokenizedDemonstration((1, 2, 3, 4), (5, 0)),  # the prompt is too long
    TokenizedDemonstration((1,), (5, 6, 7, 0)),  # the response leaves no room
    TokenizedDemonstration((8, 9), (5, 6, 0)),  # room for one prompt token
]


def test_refuse():
    assert fit_demonstrations(EXAMPLES[:1], length=4, overlong=refuse_overlong) == (
        EXAMPLES[:1],
        DataReport(read=1, kept=1),
    )
    with pytest.raises(
        DataError, match=r"^example 1: 4 prompt \+ 2 response tokens > length 4; .*fix: raise length, or"
    ):
        fit_demonstrations(EXAMPLES, length=4, overlong=refuse_overlong)


def test_drop():
    kept, report = fit_demonstrations(EXAMPLES, length=4, overlong=drop_overlong)
    assert kept == EXAMPLES[:1]
    assert report == DataReport(read=4, kept=1, overlong_prompts=2, overlong_responses=1)


def test_truncate_left_cuts_prompts_and_never_responses():
    kept, report = fit_demonstrations(EXAMPLES, length=4, overlong=truncate_left)
    assert kept == [
        EXAMPLES[0],
        TokenizedDemonstration((3, 4), (5, 0)),
        TokenizedDemonstration((9,), (5, 6, 0)),
    ]
    assert report == DataReport(read=4, kept=3, overlong_responses=1, truncated_prompts=2)
    assert str(report) == "3 of 4 kept; dropped: 1 overlong responses; kept: 2 truncated prompts"


def test_rankings_keep_one_prompt_for_all_responses():
    examples = [
        TokenizedRanking((1, 2, 3), ((4, 0), (5, 6, 0)), (1, 0)),
        TokenizedRanking((1, 2), ((4, 0), (5, 0)), (0, 0)),
        TokenizedRanking((1,), ((0,), (5, 5, 5, 0)), (0, 1)),
    ]
    kept, report = fit_rankings(examples, length=4, overlong=truncate_left)
    assert kept == [TokenizedRanking((3,), ((4, 0), (5, 6, 0)), (1, 0)), examples[1]]
    assert report == DataReport(read=3, kept=2, overlong_responses=1, truncated_prompts=1)


def test_prompts():
    kept, report = fit_prompts([(1, 2, 3, 4, 5), (1,)], length=4, overlong=truncate_left)
    assert kept == [(2, 3, 4, 5), (1,)]
    assert report == DataReport(read=2, kept=2, truncated_prompts=1)
    kept, report = fit_prompts([(1, 2, 3, 4, 5), (1,)], length=4, overlong=drop_overlong)
    assert kept == [(1,)]
    assert report == DataReport(read=2, kept=1, overlong_prompts=1)
