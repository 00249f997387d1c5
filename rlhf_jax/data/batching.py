"""Batches: which examples, in what order, and how ragged token ids become arrays of one fixed shape.

The order is a pure function of (seed, step), so a resumed run needs no replay. Masks come from lengths, never
from `token == pad`, so `pad_id` may be any id, the end of sequence included. Length limits are applied once,
before training, by `fit_*`; collation refuses what does not fit, because dropping a row there would change
the shape.

Shapes: B rows, K responses per prompt, T tokens of a row, P tokens of a prompt. Arrays are numpy int32 and
bool.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from rlhf_jax.data.padding import best_fit
from rlhf_jax.data.records import (
    Demonstration,
    Preference,
    Prompt,
    Ranking,
    TokenizedDemonstration,
    TokenizedDialogue,
    TokenizedRanking,
)
from rlhf_jax.types import PromptBatch, RankingBatch, SequenceBatch

Record = TypeVar("Record", Demonstration, Preference, Ranking, Prompt)

MAX_TOKEN_ID = 2**31
"""Ids must be below this to survive the cast to int32."""

_AXES = {1: ("column",), 2: ("row", "column"), 3: ("row", "response", "column")}


def batch_indices(seed: int, step: int, *, num_examples: int, batch_size: int) -> np.ndarray:
    """The examples of one step: int64 `[batch_size]`, a pure function of its arguments.

    Step `s` belongs to epoch `s // (num_examples // batch_size)`. Each epoch has its own permutation, drawn
    from `numpy.random.default_rng([seed, epoch])`; no example occurs twice in an epoch, and the remainder of
    the epoch, fewer than `batch_size` examples, is left out of it. Raises `ValueError` for sizes that leave
    no full batch.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size {batch_size} with num_examples {num_examples}: no full batch exists; "
            f"fix: choose a batch_size from 1 to num_examples"
        )
    if seed < 0 or step < 0:
        raise ValueError(f"seed {seed} and step {step} must not be negative")
    epoch, position = divmod(step, num_examples // batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return order[position * batch_size : (position + 1) * batch_size]


def split_by_prompt(records: Sequence[Record], *, fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Splits into (train, validation) with about `fraction` of the prompts in validation; order is kept.

    The side is a hash of (seed, roles and text of the prompt with case and white space normalised): records
    that share a prompt share a side, whatever the order, the file, the machine or what else is there. Raises
    `ValueError` for a `fraction` outside (0, 1) and when a side stays empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} is not between 0 and 1")
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        sides[_prompt_hash(record, seed) < fraction].append(record)
    train, validation = sides
    if not train or not validation:
        raise ValueError(
            f"fraction {fraction} of {len(records)} records leaves {len(train)} for training and "
            f"{len(validation)} for validation; fix: more records, another fraction or another seed"
        )
    return train, validation


def demonstration_batch(
    examples: Sequence[TokenizedDemonstration], *, length: int, pad_id: int, vocab_size: int
) -> SequenceBatch:
    """Rows `prompt + response`, padded on the right: `tokens`, `segment_ids`, `loss_mask` `[B, length]`.

    `loss_mask` is True on the response, its end of sequence included. Raises `ValueError`, naming the row,
    for an example longer than `length`, an empty prompt or response, or an id outside the vocabulary.
    """
    for row, (prompt, response) in enumerate(examples):
        _check_fits(len(prompt), len(response), length, f"row {row}")
    tokens = _padded([[*prompt, *response] for prompt, response in examples], length, pad_id, vocab_size)
    starts = _column([len(prompt) for prompt, _ in examples])
    ends = starts + _column([len(response) for _, response in examples])
    places = np.arange(length)
    return SequenceBatch(
        tokens=tokens,
        segment_ids=(places < ends).astype(np.int32),
        loss_mask=(places >= starts) & (places < ends),
    )


def packed_demonstration_batch(
    examples: Sequence[TokenizedDemonstration], *, length: int, pad_id: int, vocab_size: int
) -> SequenceBatch:
    """Several examples a row, told apart by `segment_ids` 1, 2, 3, ...: fewer rows and little padding.

    Rows are filled by `best_fit`. Every token is computed as if its example stood alone, so the loss is the one of
    `demonstration_batch`. Raises as that does.
    """
    for row, (prompt, response) in enumerate(examples):
        _check_fits(len(prompt), len(response), length, f"example {row}")
    sizes = [len(prompt) + len(response) for prompt, response in examples]
    rows = [[examples[i] for i in row] for row in best_fit(sizes, length)]
    flat = [[token for example in row for ids in example for token in ids] for row in rows]
    tokens = _padded(flat, length, pad_id, vocab_size)
    segment_ids = np.zeros(tokens.shape, np.int32)
    loss_mask = np.zeros(tokens.shape, bool)
    for r, row in enumerate(rows):
        start = 0
        for segment, (prompt, response) in enumerate(row, start=1):
            end = start + len(prompt) + len(response)
            segment_ids[r, start:end] = segment
            loss_mask[r, start + len(prompt) : end] = True
            start = end
    return SequenceBatch(tokens=tokens, segment_ids=segment_ids, loss_mask=loss_mask)


def dialogue_batch(
    examples: Sequence[TokenizedDialogue], *, length: int, pad_id: int, vocab_size: int
) -> SequenceBatch:
    """Rows of whole dialogues, padded on the right: `tokens`, `segment_ids`, `loss_mask` `[B, length]`.

    `loss_mask` is True on every reply, its end included. Raises `ValueError`, naming the row, for a dialogue longer
    than `length`, one that teaches nothing or begins with what it teaches, or an id outside the vocabulary.
    """
    for row, (ids, mask) in enumerate(examples):
        if len(ids) != len(mask):
            raise ValueError(f"row {row}: {len(ids)} ids, but a loss mask of {len(mask)}; fix: give each id its own")
        start = mask.index(True) if True in mask else len(ids)
        _check_fits(start, len(ids) - start, length, f"row {row}")
    tokens = _padded([ids for ids, _ in examples], length, pad_id, vocab_size)
    masks = [[*mask, *[False] * (length - len(mask))] for _, mask in examples]
    ends = _column([len(ids) for ids, _ in examples])
    return SequenceBatch(
        tokens=tokens, segment_ids=(np.arange(length) < ends).astype(np.int32), loss_mask=np.array(masks, bool)
    )


def ranking_batch(
    examples: Sequence[TokenizedRanking], *, length: int, num_responses: int, pad_id: int, vocab_size: int
) -> RankingBatch:
    """Rows `prompt + response k`, padded on the right: `tokens`, `segment_ids`, `completion_mask` `[B, K, length]`.

    `ranks` and `mask` are `[B, K]`. K is `num_responses`; an example may have fewer, and its empty places
    have segment 0 throughout, rank 0 and mask False. Preferences are K = 2 with ranks (0, 1). Raises
    `ValueError` naming row and response, as `demonstration_batch` does, and for an example with more than K
    responses.
    """
    rows: list[list[int]] = []
    starts, ends = np.zeros((2, len(examples), num_responses, 1), np.int64)
    ranks = np.zeros((len(examples), num_responses), np.int32)
    mask = np.zeros((len(examples), num_responses), bool)
    for row, example in enumerate(examples):
        count = len(example.responses)
        if not 1 <= count <= num_responses or len(example.ranks) != count:
            raise ValueError(
                f"row {row} has {count} responses and {len(example.ranks)} ranks where 1 to num_responses "
                f"{num_responses} fit; fix: raise num_responses or keep fewer responses"
            )
        for k, response in enumerate(example.responses):
            _check_fits(len(example.prompt_ids), len(response), length, f"row {row}, response {k}")
            starts[row, k], ends[row, k] = len(example.prompt_ids), len(example.prompt_ids) + len(response)
        rows += [[*example.prompt_ids, *response] for response in example.responses]
        rows += [[]] * (num_responses - count)
        ranks[row, :count] = example.ranks
        mask[row, :count] = True
    tokens = _padded(rows, length, pad_id, vocab_size, shape=(len(examples), num_responses, length))
    columns = np.arange(length)
    return RankingBatch(
        tokens=tokens,
        segment_ids=(columns < ends).astype(np.int32),
        completion_mask=(columns >= starts) & (columns < ends),
        ranks=ranks,
        mask=mask,
    )


def prompt_batch(prompts: Sequence[Sequence[int]], *, length: int, pad_id: int, vocab_size: int) -> PromptBatch:
    """Prompts padded on the left, so that all end in the last column: `tokens`, `mask` `[B, length]`.

    Raises `ValueError`, naming the row, for an empty or overlong prompt or an id outside the vocabulary.
    """
    for row, prompt in enumerate(prompts):
        _check_fits(len(prompt), 0, length, f"row {row}", response_needed=False)
    tokens = _padded(prompts, length, pad_id, vocab_size, left=True)
    return PromptBatch(tokens=tokens, mask=np.arange(length) >= length - _column([len(prompt) for prompt in prompts]))


def check_token_ids(array: np.ndarray, vocab_size: int, name: str) -> None:
    """Checks ids, of any shape, before the cast to int32: integers with `0 <= id < min(vocab_size, 2**31)`.

    Raises `ValueError`: `tokens: token id 50260 >= vocabulary 50257 at row 7, column 3; ...`.
    """
    array = np.asarray(array)
    whole = array.dtype.kind in "iu" or (array.dtype.kind == "O" and all(type(i) is int for i in array.flat))
    if not whole:
        raise ValueError(
            f"{name}: ids have dtype {array.dtype}, expected integers; fix: pass the tokenizer's ids as they are"
        )
    limit = min(vocab_size, MAX_TOKEN_ID)
    outside = (array < 0) | (array >= limit)
    if not outside.any():
        return
    index = np.unravel_index(int(np.argmax(outside)), array.shape)
    token = array[index]
    if token < 0:
        fault = "< 0"
    elif token >= MAX_TOKEN_ID:
        fault = "does not fit int32"
    else:
        fault = f">= vocabulary {vocab_size}"
    axes = _AXES.get(array.ndim, tuple(f"axis {i}" for i in range(array.ndim)))
    place = ", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=True))
    count = int(outside.sum())
    raise ValueError(
        f"{name}: token id {token} {fault} at {place}"
        + (f" and {count - 1} more" if count > 1 else "")
        + "; the batch was not used; fix: use the model's own tokenizer, or resize the embedding"
    )


def _padded(
    rows: Sequence[Sequence[int]],
    length: int,
    pad_id: int,
    vocab_size: int,
    *,
    left: bool = False,
    shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    if not rows:
        raise ValueError("a batch of 0 rows; fix: give at least one example")
    filled = [
        [pad_id] * (length - len(row)) + list(row) if left else [*row, *[pad_id] * (length - len(row))] for row in rows
    ]
    tokens = np.array(filled)
    if tokens.dtype.kind == "f":  # numpy's answer to integers beyond 2**63 (and to floats, refused below)
        tokens = np.array(filled, dtype=object)
    tokens = tokens.reshape(shape or (len(rows), length))
    check_token_ids(tokens, vocab_size, "tokens")
    return tokens.astype(np.int32)


def _column(lengths: list[int]) -> np.ndarray:
    return np.array(lengths, np.int64)[:, None]


def _check_fits(prompt: int, response: int, length: int, where: str, *, response_needed: bool = True) -> None:
    if prompt == 0:
        raise ValueError(f"{where}: the prompt has no token; fix: drop the record or begin prompts with a bos token")
    if response_needed and response == 0:
        raise ValueError(f"{where}: the response has no token; fix: drop the record or end responses with eos")
    if prompt + response > length:
        raise ValueError(
            f"{where}: {prompt} prompt + {response} response tokens > length {length}; "
            "fix: apply fit_* with drop_overlong or truncate_left first, or raise length"
        )


def _prompt_hash(record: Record, seed: int) -> float:
    """A number in [0, 1), the same on every machine."""
    turns = [f"{message.role}:{' '.join(message.content.casefold().split())}" for message in record.prompt]
    digest = hashlib.sha256("\n".join([str(seed), *turns]).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
