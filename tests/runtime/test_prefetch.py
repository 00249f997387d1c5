"""Batches made ahead are the same batches, in the same order, made while the caller works."""

import threading

import pytest

from rlhf_jax.runtime.prefetch import prefetched


def test_every_batch_comes_with_its_step_and_in_order():
    assert list(prefetched(lambda step: step * step, range(3, 7))) == [(3, 9), (4, 16), (5, 25), (6, 36)]
    assert list(prefetched(str, [5])) == [(5, "5")]
    assert list(prefetched(str, [])) == []


def test_the_next_batch_is_made_while_the_caller_has_this_one_and_no_further():
    made = [threading.Event() for _ in range(4)]
    steps = prefetched(lambda step: made[step].set(), range(4))
    for step in range(3):
        assert next(steps)[0] == step
        assert made[step + 1].wait(timeout=10)
        assert not any(event.is_set() for event in made[step + 2 :])


def test_an_error_waits_for_its_turn_and_the_thread_ends():
    def make(step):
        if step == 2:
            raise ValueError("row 7 has no token")
        return step

    seen = []
    with pytest.raises(ValueError, match=r"row 7 has no token"):
        seen.extend(prefetched(make, range(5)))
    assert seen == [(0, 0), (1, 1)]
    steps = prefetched(make, range(2))
    next(steps)
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
