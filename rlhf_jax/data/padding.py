"""Less padding: columns that nobody uses cut off, batches of like lengths, sequences packed into full rows.

All three happen on the host, before a batch is placed on devices, and change no loss but by rounding. Cutting gives a jitted
step as many shapes as there are buckets, and so as many compilations.
"""

from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np

Batch = TypeVar("Batch")


def trim(batch: Batch, *, buckets: Sequence[int]) -> Batch:
    """The batch without columns that are padding in every row, as wide as the smallest bucket that holds the rest.

    Args:
      batch: any with `segment_ids` `[..., T]` (0 = padding, left or right); the leaves of that shape are cut, others stay.
      buckets: widths in tokens; T is always one of them, and wider ones count as T.

    Raises:
      ValueError: a bucket below 1, or nothing but padding.
    """
    if not all(bucket >= 1 for bucket in buckets):
        raise ValueError(f"buckets {list(buckets)}: fix: widths of at least one token")
    shape = np.shape(batch.segment_ids)
    used = np.flatnonzero(np.asarray(batch.segment_ids).any(axis=tuple(range(len(shape) - 1))))
    if not used.size:
        raise ValueError(f"segment_ids {list(shape)} are 0 throughout; fix: leave out a batch of nothing but padding")
    needed = used[-1] + 1 - used[0]
    width = min([bucket for bucket in buckets if bucket >= needed], default=shape[-1])
    width = min(width, shape[-1])
    start = min(used[0], shape[-1] - width)
    return jax.tree.map(lambda x: x[..., start : start + width] if np.shape(x) == shape else x, batch)


def alike_batch_indices(
    seed: int, step: int, *, lengths: Sequence[int] | np.ndarray, batch_size: int, num_batches: int = 50
) -> np.ndarray:
    """As `batch_indices`, but the examples of a batch are about equally long: int64 `[batch_size]`.

    Each epoch's permutation is cut into pools of `num_batches` batches; a pool is sorted by length, then cut into batches,
    and the epoch's batches are shuffled. No example occurs twice in an epoch. With `num_batches=1` lengths play no part; the
    more, the less padding, and the less chance in which examples meet. Raises `ValueError` as `batch_indices` does.
    """
    lengths = np.asarray(lengths)
    if not 1 <= batch_size <= len(lengths) or num_batches < 1:
        raise ValueError(
            f"batch_size {batch_size}, num_batches {num_batches} with {len(lengths)} examples: no full batch exists; "
            "fix: choose a batch_size from 1 to the number of examples, and at least one batch a pool"
        )
    if seed < 0 or step < 0:
        raise ValueError(f"seed {seed} and step {step} must not be negative")
    per_epoch = len(lengths) // batch_size
    epoch, position = divmod(step, per_epoch)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))[: per_epoch * batch_size]
    pools = np.split(order, range(num_batches * batch_size, len(order), num_batches * batch_size))
    batches = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    return batches.reshape(per_epoch, batch_size)[rng.permutation(per_epoch)[position]]


def pack(batch: Batch, *, length: int, multiple_of: int = 1) -> Batch:
    """The sequences of a batch in fewer and fuller rows `[R, length]`, told apart by `segment_ids` 1, 2, 3, ...

    A sampled batch has one completion a row, padded to the longest that there could be; packed, `policy_gradient` and
    `actor_critic` compute the same sums of tokens on fewer columns. Only for losses whose `aggregate` is over tokens
    (`token_mean`): one that knows rows as sequences (`sequence_mean`, GSPO, DPO) would take a packed row for one.

    Args:
      batch: `Experience`, `SequenceBatch`, or any whose leaves are all `[B, T]`, `segment_ids` among them: one sequence a row,
        in neighbouring columns.
      length: of the new rows; at least that of the longest sequence.
      multiple_of: R is raised to a multiple of this by rows of padding (minibatches, devices; few different R are few
        compilations).

    Raises:
      ValueError: a leaf of another shape, a row with several sequences or gaps, or one longer than `length`.
    """
    segments = np.asarray(batch.segment_ids)
    for leaf in jax.tree.leaves(batch):
        if np.shape(leaf) != segments.shape or segments.ndim != 2:
            raise ValueError(
                f"pack: a leaf of shape {list(np.shape(leaf))} beside segment_ids {list(segments.shape)}; fix: only batches "
                "whose arrays are all [B, T]"
            )
    used = segments != 0
    starts, sizes = used.argmax(axis=1), used.sum(axis=1)
    wrong = np.flatnonzero(
        (segments.max(axis=1) > 1) | (sizes != segments.shape[1] - used[:, ::-1].argmax(axis=1) - starts)
    )
    wrong = wrong[sizes[wrong] > 0]
    if wrong.size or sizes.max() > length:
        what = (
            f"row {wrong[0]} is not one sequence without gaps" if wrong.size else f"a sequence of {sizes.max()} tokens"
        )
        raise ValueError(f"pack: {what}, length {length}; fix: rows of one sequence each, and a length that holds them")
    rows = best_fit(sizes.tolist(), length)
    shape = (-(-len(rows) // multiple_of) * multiple_of, length)
    columns = np.arange(length)
    source, segment_ids = np.zeros(shape, np.int64), np.zeros(shape, segments.dtype)
    for r, row in enumerate(rows):
        at = 0
        for segment, i in enumerate(row, start=1):
            here = columns[at : at + sizes[i]]
            source[r, here] = i * segments.shape[1] + starts[i] + here - at
            segment_ids[r, here] = segment
            at += sizes[i]
    packed = jax.tree.map(
        lambda x: np.where(segment_ids != 0, np.asarray(x).reshape(-1)[source], 0).astype(x.dtype), batch
    )
    return packed.replace(segment_ids=segment_ids)


def best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which sequences share a row of `length` tokens: longest first, each into the row with the least room that still holds it.

    Best-fit decreasing: at most 11/9 of the fewest rows possible, plus 4 (Johnson et al. 1974). Sequences of no token are
    left out; no size may exceed `length`.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # room left -> rows
    for i in sorted((i for i, size in enumerate(sizes) if size), key=lambda i: -sizes[i]):
        room = next((room for room in range(sizes[i], length + 1) if with_room[room]), None)
        if room is None:
            rows.append([])
            room, row = length, len(rows) - 1
        else:
            row = with_room[room].pop()
        rows[row].append(i)
        with_room[room - sizes[i]].append(row)
    return rows
