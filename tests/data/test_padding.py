"""Less padding changes no loss, no gradient, and never which examples an epoch holds."""

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.batching import demonstration_batch, ranking_batch
from rlhf_jax.data.padding import alike_batch_indices, best_fit, pack, trim
from rlhf_jax.data.records import TokenizedDemonstration, TokenizedRanking
from rlhf_jax.objectives import PolicyBatch, actor_critic, separate_critic
from rlhf_jax.types import Experience

SEQUENCES = {"pad_id": tiny.PAD, "vocab_size": tiny.VOCAB}
CRITIC = separate_critic(tiny.MODEL)


def experience(sizes, length, *, left=()):
    """One completion a row with random numbers; the rows of `left` are padded on the left, too."""
    rng = np.random.default_rng(0)
    examples = [TokenizedDemonstration(tuple(rng.integers(2, 17, 2)), tuple(rng.integers(2, 17, n - 2))) for n in sizes]
    rows = demonstration_batch(examples, length=length, **SEQUENCES)
    names = ("old_logprobs", "old_values", "advantages", "returns")
    numbers = {name: rng.normal(size=rows.tokens.shape).astype(np.float32) * rows.loss_mask for name in names}
    batch = Experience(rows.tokens, rows.segment_ids, rows.loss_mask, **numbers)
    shift = np.where(np.isin(np.arange(len(sizes)), left), 3, 0)
    return jax.tree.map(lambda x: np.stack([np.roll(row, k) for row, k in zip(x, shift, strict=True)]), batch)


def test_trimmed_batches_are_as_wide_as_a_bucket_and_lose_nothing():
    examples = [TokenizedRanking((5, 6), ((7, 1), (1,)), (1, 0)), TokenizedRanking((4,), ((2, 3, 1),), (0,))]
    batch = ranking_batch(examples, length=16, num_responses=2, **SEQUENCES)
    for buckets, width in (((2, 4, 8), 4), ((5, 8), 5), ((2,), 16), ((), 16), ((99,), 16), ((8, 6), 6)):
        trimmed = trim(batch, buckets=buckets)
        assert trimmed.tokens.shape == (2, 2, width)
        same = ranking_batch(examples, length=width, num_responses=2, **SEQUENCES)
        jax.tree.map(np.testing.assert_array_equal, trimmed, same)


def test_trimming_takes_columns_from_either_side():
    batch = experience((4, 5), 12, left=(0, 1))
    trimmed = trim(batch, buckets=(6,))
    np.testing.assert_array_equal(trimmed.tokens, batch.tokens[:, 3:9])
    far = trim(jax.tree.map(lambda x: np.roll(x, 4, axis=1), batch), buckets=(6,))
    np.testing.assert_array_equal(far.tokens, np.pad(batch.tokens[:, 3:8], ((0, 0), (1, 0))))


def test_trimming_refuses_what_it_cannot_do():
    batch = experience((4, 5), 12)
    with pytest.raises(ValueError, match=r"buckets \[4, 0\]: fix: widths of at least one token"):
        trim(batch, buckets=(4, 0))
    with pytest.raises(ValueError, match=r"segment_ids \[2, 12\] are 0 throughout"):
        trim(batch.replace(segment_ids=0 * batch.segment_ids), buckets=(4,))


@settings(max_examples=40, deadline=None, database=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 3), st.data())
def test_an_epoch_of_alike_batches_holds_every_example_at_most_once(num_examples, num_batches, epoch, data):
    batch_size = data.draw(st.integers(1, num_examples))
    lengths = np.random.default_rng(num_examples).integers(1, 9, num_examples)
    steps = num_examples // batch_size
    options = {"lengths": lengths, "batch_size": batch_size, "num_batches": num_batches}
    batches = [alike_batch_indices(7, epoch * steps + i, **options) for i in range(steps)]
    assert all(batch.shape == (batch_size,) and batch.dtype == np.int64 for batch in batches)
    assert len(np.unique(np.concatenate(batches))) == steps * batch_size


def test_alike_batches_are_alike():
    """One pool of everything: the batches are the sorted lengths, cut, in an order that the epoch shuffles."""
    lengths = np.random.default_rng(0).permutation(64)
    orders = []
    for epoch in range(2):
        batches = [alike_batch_indices(1, 8 * epoch + i, lengths=lengths, batch_size=8) for i in range(8)]
        assert sorted(lengths[batch].tolist() for batch in batches) == np.arange(64).reshape(8, 8).tolist()
        orders.append([lengths[batch][0] for batch in batches])
    assert orders[0] != orders[1] != sorted(orders[1])
    apart = [np.ptp(lengths[alike_batch_indices(1, i, lengths=lengths, batch_size=8, num_batches=1)]) for i in range(8)]
    assert np.mean(apart) > 30


def test_alike_batches_refuse_what_leaves_no_batch():
    with pytest.raises(ValueError, match=r"batch_size 3, num_batches 50 with 2 examples: no full batch exists"):
        alike_batch_indices(0, 0, lengths=[1, 2], batch_size=3)
    with pytest.raises(ValueError, match=r"seed 0 and step -1 must not be negative"):
        alike_batch_indices(0, -1, lengths=[1, 2], batch_size=1)


def test_packed_completions_have_the_same_loss_and_gradient():
    batch = experience((5, 3, 8, 4, 4), 12, left=(1, 3))
    packed = pack(batch, length=12, multiple_of=2)
    assert packed.tokens.shape == (2, 12)
    assert packed.segment_ids.tolist() == [[1] * 8 + [2] * 4, [1] * 5 + [2] * 4 + [3] * 3]
    params = {"policy": tiny.init_params(0), "critic": tiny.init_critic()}

    @jax.jit
    def loss(params, batch):
        total, weight, _ = actor_critic(tiny.MODEL, CRITIC)(params, PolicyBatch(batch))
        return total / weight

    (plain, plain_grads), (full, full_grads) = (jax.value_and_grad(loss)(params, b) for b in (batch, packed))
    assert abs(plain) > 0.1
    np.testing.assert_allclose(full, plain, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), full_grads, plain_grads)


def test_packing_keeps_every_number_and_adds_rows_of_padding():
    batch = experience((5, 3, 8), 9)
    packed = pack(batch, length=8, multiple_of=4)
    assert packed.tokens.shape == (4, 8)
    assert not packed.segment_ids[2:].any()
    for name in ("tokens", "old_logprobs", "advantages", "returns"):
        before, after = (getattr(x, name)[x.segment_ids != 0] for x in (batch, packed))
        np.testing.assert_array_equal(np.sort(after), np.sort(before), err_msg=name)
        assert getattr(packed, name).dtype == getattr(batch, name).dtype


def test_packing_refuses_rows_that_are_no_single_sequence():
    batch = experience((5, 3), 9)
    with pytest.raises(ValueError, match=r"pack: a sequence of 5 tokens, length 4; fix"):
        pack(batch, length=4)
    two = batch.replace(segment_ids=np.array([[1, 1, 2, 2, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0, 0]]))
    gap = batch.replace(segment_ids=np.array([[1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0, 0]]))
    for wrong, row in ((two, 0), (gap, 1)):
        with pytest.raises(ValueError, match=rf"pack: row {row} is not one sequence without gaps, length 9"):
            pack(wrong, length=9)
    with pytest.raises(ValueError, match=r"pack: a leaf of shape \[2\] beside segment_ids \[2, 9\]"):
        pack(batch.replace(returns=np.zeros(2)), length=9)


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.integers(0, 10), max_size=30))
def test_best_fit_holds_everything_once_in_few_rows(sizes):
    rows = best_fit(sizes, 10)
    assert sorted(i for row in rows for i in row) == [i for i, size in enumerate(sizes) if size]
    assert all(0 < sum(sizes[i] for i in row) <= 10 for row in rows)
    at_least = max(-(-sum(sizes) // 10), sum(size > 5 for size in sizes))  # the fewest rows possible need no fewer
    assert (
        len(rows) <= 11 / 9 * 3 / 2 * at_least + 4
    )  # the optimum is at most 3/2 of that bound (Martello and Toth 1990)
