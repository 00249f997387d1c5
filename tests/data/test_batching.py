"""Batches: order as a pure function, splits that no prompt straddles, masks that come from lengths."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.batching import (
    batch_indices,
    check_token_ids,
    demonstration_batch,
    dialogue_batch,
    packed_demonstration_batch,
    prompt_batch,
    ranking_batch,
    split_by_prompt,
)
from rlhf_jax.data.preferences import read_preferences
from rlhf_jax.data.records import (
    Message,
    Preference,
    TokenizedDemonstration,
    TokenizedDialogue,
    TokenizedRanking,
)

# --- order --------------------------------------------------------------------------------


def test_batch_order_is_what_it_was():
    """Golden: a change here means that interrupted runs would resume on other examples."""
    orders = [batch_indices(3, step, num_examples=7, batch_size=3).tolist() for step in range(4)]
    assert orders == [[5, 6, 2], [1, 4, 3], [2, 1, 4], [0, 5, 6]]


@settings(max_examples=40, deadline=None, database=None)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 50), num_examples=st.integers(1, 40), data=st.data())
def test_an_epoch_holds_every_example_at_most_once(seed, epoch, num_examples, data):
    batch_size = data.draw(st.integers(1, num_examples))
    steps = num_examples // batch_size
    batches = [
        batch_indices(seed, epoch * steps + i, num_examples=num_examples, batch_size=batch_size) for i in range(steps)
    ]
    assert all(batch.shape == (batch_size,) and batch.dtype == np.int64 for batch in batches)
    seen = np.concatenate(batches)
    assert len(set(seen.tolist())) == len(seen) == steps * batch_size
    assert seen.min() >= 0
    assert seen.max() < num_examples


def test_batch_indices_are_pure_and_vary_with_seed_and_epoch():
    def order(seed, step):
        return batch_indices(seed, step, num_examples=100, batch_size=10).tolist()

    np.random.default_rng(0)
    assert order(1, 7) == order(1, 7)
    assert order(1, 7) != order(2, 7)
    first, second = ([i for step in range(s, s + 10) for i in order(1, step)] for s in (0, 10))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(100))


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="batch_size 11 with num_examples 10: no full batch exists; fix: "):
        batch_indices(0, 0, num_examples=10, batch_size=11)
    for batch_size, num_examples in ((0, 10), (1, 0), (-1, 10)):
        with pytest.raises(ValueError, match="no full batch"):
            batch_indices(0, 0, num_examples=num_examples, batch_size=batch_size)
    for seed, step in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="must not be negative"):
            batch_indices(seed, step, num_examples=10, batch_size=2)


# --- splits --------------------------------------------------------------------------------


def some_pairs(num_prompts):
    return [
        Preference(f"{i}/{k}", (Message("user", f"question {i}"),), f"good {k}", "bad")
        for i in range(num_prompts)
        for k in range(3)
    ]


def test_no_prompt_is_in_both_splits():
    records = some_pairs(200)
    train, validation = split_by_prompt(records, fraction=0.25, seed=1)
    assert not {r.prompt for r in train} & {r.prompt for r in validation}
    assert sorted(r.id for r in train + validation) == sorted(r.id for r in records)
    assert 0.15 < len(validation) / len(records) < 0.35
    shuffled = random.Random(0).sample(records, len(records))
    again, others = split_by_prompt(shuffled[:400], fraction=0.25, seed=1)
    assert {r.id for r in again} <= {r.id for r in train}
    assert {r.id for r in others} <= {r.id for r in validation}
    assert {r.id for r in split_by_prompt(records, fraction=0.25, seed=2)[1]} != {r.id for r in validation}
    wider = split_by_prompt(records, fraction=0.5, seed=1)[1]
    assert {r.id for r in validation} < {r.id for r in wider}


def test_prompts_that_differ_in_case_and_space_share_a_side():
    records = some_pairs(50)
    loud = [
        dataclasses.replace(r, id=r.id + "!", prompt=(Message("user", f" {r.prompt[0].content.upper()}\n"),))
        for r in records
    ]
    train, validation = split_by_prompt(records + loud, fraction=0.4, seed=0)
    for side in (train, validation):
        assert {r.id + "!" for r in side if "!" not in r.id} == {r.id for r in side if "!" in r.id}


def test_splits_are_stable_between_machines():
    _, validation = split_by_prompt(some_pairs(8), fraction=0.5, seed=7)
    assert sorted({r.id[0] for r in validation}) == list("034567")


def test_empty_sides_are_refused():
    for fraction in (0, 1, -0.1, 1.5):
        with pytest.raises(ValueError, match="is not between 0 and 1"):
            split_by_prompt(some_pairs(3), fraction=fraction, seed=0)
    with pytest.raises(ValueError, match="of 3 records leaves 3 for training and 0 for validation; fix: "):
        split_by_prompt(some_pairs(1), fraction=1e-9, seed=0)


def test_real_split(data_dir):
    records, _ = read_preferences(data_dir / "preferences" / "pandalm_human.jsonl.gz")
    train, validation = split_by_prompt(records, fraction=0.3, seed=0)
    assert not {r.prompt for r in train} & {r.prompt for r in validation}
    assert len(train) + len(validation) == len(records)


# --- arrays --------------------------------------------------------------------------------

EXAMPLES = [TokenizedDemonstration((5, 6), (7, 1)), TokenizedDemonstration((5,), (1,))]


def test_demonstration_batch():
    batch = demonstration_batch(EXAMPLES, length=5, pad_id=0, vocab_size=8)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 1, 0], [5, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]])
    assert (batch.tokens.dtype, batch.segment_ids.dtype, batch.loss_mask.dtype) == (np.int32, np.int32, bool)


def test_dialogue_batch():
    turns = TokenizedDialogue((5, 6, 7, 1, 5, 2, 1), (False, False, True, True, False, True, True))
    batch = dialogue_batch([turns, TokenizedDialogue((5, 1), (False, True))], length=8, pad_id=1, vocab_size=8)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 1, 5, 2, 1, 1], [5, 1, 1, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 1, 1, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0]])
    assert (batch.tokens.dtype, batch.segment_ids.dtype, batch.loss_mask.dtype) == (np.int32, np.int32, bool)


def test_dialogues_of_one_reply_are_demonstrations():
    dialogues = [TokenizedDialogue(p + r, (False,) * len(p) + (True,) * len(r)) for p, r in EXAMPLES]
    options = {"length": 6, "pad_id": 0, "vocab_size": 8}
    for field, expected in vars(demonstration_batch(EXAMPLES, **options)).items():
        np.testing.assert_array_equal(getattr(dialogue_batch(dialogues, **options), field), expected)


@pytest.mark.parametrize(
    ("ids", "mask", "fault"),
    [
        ((5, 6, 7, 1, 2), "..***", r"row 1: 2 prompt \+ 3 response tokens > length 4; fix: "),
        ((5, 6), "..", "row 1: the response has no token; fix: "),
        ((5, 6), "**", "row 1: the prompt has no token; fix: "),
        ((5, 6), ".", "row 1: 2 ids, but a loss mask of 1; fix: give each id its own"),
        ((5, 8), ".*", "tokens: token id 8 >= vocabulary 8 at row 1, column 1"),
    ],
)
def test_dialogues_that_do_not_fit_are_refused(ids, mask, fault):
    examples = [TokenizedDialogue((5, 1), (False, True)), TokenizedDialogue(ids, tuple(m == "*" for m in mask))]
    with pytest.raises(ValueError, match=fault):
        dialogue_batch(examples, length=4, pad_id=0, vocab_size=8)
    with pytest.raises(ValueError, match="a batch of 0 rows"):
        dialogue_batch([], length=4, pad_id=0, vocab_size=8)


def test_packed_rows_hold_every_example_once():
    lengths = [(3, 2), (1, 1), (2, 4), (1, 2), (4, 4), (1, 1), (2, 2)]
    examples = [TokenizedDemonstration((10 * i + 1,) * p, (10 * i + 2,) * r) for i, (p, r) in enumerate(lengths)]
    batch = packed_demonstration_batch(examples, length=8, pad_id=2, vocab_size=70)
    assert batch.tokens.shape[0] < len(examples)
    found = []
    for tokens, segments, mask in zip(batch.tokens, batch.segment_ids, batch.loss_mask, strict=True):
        used = segments > 0
        assert not used[used.sum() :].any()
        assert not mask[~used].any()
        assert (tokens[~used] == 2).all()
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            assert np.diff(np.flatnonzero(inside)).max(initial=1) == 1
            found.append((tuple(tokens[inside & ~mask].tolist()), tuple(tokens[inside & mask].tolist())))
    assert sorted(found) == sorted(tuple(example) for example in examples)
    with pytest.raises(ValueError, match=r"example 4: 4 prompt \+ 4 response tokens > length 7"):
        packed_demonstration_batch(examples, length=7, pad_id=2, vocab_size=70)


def test_ranking_batch():
    examples = [
        TokenizedRanking((5, 6), ((7, 1), (1,)), (1, 0)),
        TokenizedRanking((4,), ((2, 1), (3, 1), (2, 3, 1)), (0, 1, 1)),
    ]
    batch = ranking_batch(examples, length=4, num_responses=3, pad_id=0, vocab_size=8)
    np.testing.assert_array_equal(
        batch.tokens,
        [[[5, 6, 7, 1], [5, 6, 1, 0], [0, 0, 0, 0]], [[4, 2, 1, 0], [4, 3, 1, 0], [4, 2, 3, 1]]],
    )
    np.testing.assert_array_equal(
        batch.segment_ids,
        [[[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]],
    )
    np.testing.assert_array_equal(
        batch.completion_mask,
        [[[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]], [[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]]],
    )
    np.testing.assert_array_equal(batch.ranks, [[1, 0, 0], [0, 1, 1]])
    np.testing.assert_array_equal(batch.mask, [[1, 1, 0], [1, 1, 1]])
    assert [a.dtype for a in (batch.tokens, batch.segment_ids, batch.ranks, batch.mask)] == [np.int32] * 3 + [bool]
    assert batch.completion_mask.dtype == bool


def test_prompt_batch():
    batch = prompt_batch([(5, 6), (1, 2, 3)], length=4, pad_id=0, vocab_size=8)
    np.testing.assert_array_equal(batch.tokens, [[0, 0, 5, 6], [0, 1, 2, 3]])
    np.testing.assert_array_equal(batch.mask, [[0, 0, 1, 1], [0, 1, 1, 1]])
    assert (batch.tokens.dtype, batch.mask.dtype) == (np.int32, bool)


def test_masks_do_not_look_at_the_pad_id():
    """With pad == eos, and even with pad ids inside the text, all but the padding itself is the same."""
    for pad_id in (1, 5):
        apart = demonstration_batch(EXAMPLES, length=5, pad_id=0, vocab_size=8)
        same = demonstration_batch(EXAMPLES, length=5, pad_id=pad_id, vocab_size=8)
        np.testing.assert_array_equal(same.loss_mask, apart.loss_mask)
        np.testing.assert_array_equal(same.segment_ids, apart.segment_ids)
        np.testing.assert_array_equal(same.tokens, np.where(apart.segment_ids, apart.tokens, pad_id))
        ranking = [TokenizedRanking((5, 6), ((7, 1), (1,)), (1, 0))]
        apart, same = (ranking_batch(ranking, length=5, num_responses=2, pad_id=i, vocab_size=8) for i in (0, pad_id))
        np.testing.assert_array_equal(same.segment_ids, apart.segment_ids)
        np.testing.assert_array_equal(same.mask, apart.mask)
        apart, same = (prompt_batch([(5, 1), (1,)], length=3, pad_id=i, vocab_size=8) for i in (0, pad_id))
        np.testing.assert_array_equal(same.mask, apart.mask)


def test_what_does_not_fit_is_refused():
    def demonstrate(*examples):
        return demonstration_batch([TokenizedDemonstration(*e) for e in examples], length=3, pad_id=0, vocab_size=8)

    with pytest.raises(ValueError, match=r"row 1: 2 prompt \+ 2 response tokens > length 3; fix: apply fit_"):
        demonstrate(((5,), (1,)), ((5, 6), (7, 1)))
    with pytest.raises(ValueError, match="row 0: the prompt has no token; fix: "):
        demonstrate(((), (1,)))
    with pytest.raises(ValueError, match="row 0: the response has no token; fix: "):
        demonstrate(((5,), ()))
    with pytest.raises(ValueError, match="a batch of 0 rows; fix: "):
        demonstrate()
    with pytest.raises(ValueError, match=r"row 0, response 1: 2 prompt \+ 3 response tokens > length 4"):
        ranking_batch(
            [TokenizedRanking((5, 6), ((1,), (7, 7, 1)), (0, 1))],
            length=4,
            num_responses=2,
            pad_id=0,
            vocab_size=8,
        )
    for responses, ranks in ((((1,),) * 3, (0, 1, 2)), (((1,),) * 2, (0,)), ((), ())):
        with pytest.raises(ValueError, match=r"row 0 has \d responses and \d ranks where 1 to num_responses 2 fit"):
            ranking_batch([TokenizedRanking((5,), responses, ranks)], length=4, num_responses=2, pad_id=0, vocab_size=8)
    with pytest.raises(ValueError, match="row 1: 4 prompt"):
        prompt_batch([(1,), (1, 2, 3, 4)], length=3, pad_id=0, vocab_size=8)
    with pytest.raises(ValueError, match="row 0: the prompt has no token"):
        prompt_batch([()], length=3, pad_id=0, vocab_size=8)


# --- ids --------------------------------------------------------------------------------


def test_check_token_ids_passes_what_fits():
    check_token_ids(np.array([[0, 7], [3, 4]]), 8, "tokens")
    check_token_ids(np.array([2**31 - 1]), 2**40, "tokens")
    check_token_ids(np.zeros((0, 3), np.int64), 8, "tokens")


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (50257, r"token id 50257 >= vocabulary 50257"),
        (-1, r"token id -1 < 0"),
        (2**31, r"token id 2147483648 does not fit int32"),
        (2**32 + 3, r"token id 4294967299 does not fit int32"),  # would pass as 3 after a cast
        (2**63, r"token id 9223372036854775808 does not fit int32"),
        (2**70, r"token id 1180591620717411303424 does not fit int32"),
    ],
)
def test_ids_outside_the_vocabulary_are_placed(bad, fault):
    rows = [[1] * 4 for _ in range(8)]
    rows[7][3] = bad
    with pytest.raises(ValueError, match=f"^tokens: {fault} at row 7, column 3; the batch was not used; fix: use"):
        check_token_ids(np.array(rows, dtype=object if bad >= 2**63 else np.int64), 50257, "tokens")
    examples = [TokenizedDemonstration(row[:2], row[2:]) for row in rows]
    with pytest.raises(ValueError, match=f"^tokens: {fault} at row 7, column 3"):
        demonstration_batch(examples, length=6, pad_id=0, vocab_size=50257)
    with pytest.raises(ValueError, match=f"^tokens: {fault} at row 7, column 5"):
        prompt_batch(rows, length=6, pad_id=0, vocab_size=50257)
    ranking = [TokenizedRanking((1,), ((1,), (1, bad)), (0, 1))]
    with pytest.raises(ValueError, match=f"^tokens: {fault} at row 0, response 1, column 2"):
        ranking_batch(ranking, length=6, num_responses=2, pad_id=0, vocab_size=50257)


def test_ids_beyond_int32_are_refused_in_any_vocabulary():
    with pytest.raises(ValueError, match="token id 2147483648 does not fit int32 at column 1"):
        check_token_ids(np.array([1, 2**31]), 2**40, "ids")


def test_bad_ids_are_counted_and_other_dtypes_refused():
    with pytest.raises(ValueError, match="token id 9 >= vocabulary 8 at column 1 and 2 more;"):
        check_token_ids(np.array([1, 9, -1, 8]), 8, "ids")
    for array in (np.array([1.0]), np.array([True]), np.array(["1"]), np.array([1, 2.5], dtype=object)):
        with pytest.raises(ValueError, match=r"ids: ids have dtype .*, expected integers; fix: "):
            check_token_ids(array, 8, "ids")
    with pytest.raises(ValueError, match=r"tokens: ids have dtype .*, expected integers; fix: "):
        demonstration_batch([TokenizedDemonstration((1,), (1.5,))], length=3, pad_id=0, vocab_size=8)
