"""Length limits, applied once to tokenised examples: refuse, drop, or cut prompts from the left.

A policy is a function `(prompt_length, response_length, length) -> prompt tokens to keep`, or a `Dropped`.
No policy ever cuts a response: its end is what is learned.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from rlhf_jax.data.json_lines import DataError, UnusableError
from rlhf_jax.data.records import DataReport, Dropped, TokenizedDemonstration, TokenizedRanking

OverlongPolicy: TypeAlias = Callable[[int, int, int], int | Dropped]
"""`(prompt_length, response_length, length) -> prompt tokens to keep | Dropped`, for overlong examples."""


def refuse_overlong(prompt_length: int, response_length: int, length: int) -> int | Dropped:
    """Nothing may be longer than the limit: `fit_*` raise a `DataError` that names the example."""
    raise UnusableError(
        f"{prompt_length} prompt + {response_length} response tokens > length {length}",
        "raise length, or choose drop_overlong or truncate_left",
    )


def drop_overlong(prompt_length: int, response_length: int, length: int) -> int | Dropped:
    """Drops the whole example."""
    return Dropped("overlong_responses" if response_length >= length else "overlong_prompts")


def truncate_left(prompt_length: int, response_length: int, length: int) -> int | Dropped:
    """Keeps the end of the prompt (a bos at its start goes too); drops when not one prompt token is left."""
    room = length - response_length
    return Dropped("overlong_responses") if room < 1 else min(prompt_length, room)


def fit_demonstrations(
    examples: Sequence[TokenizedDemonstration], *, length: int, overlong: OverlongPolicy
) -> tuple[list[TokenizedDemonstration], DataReport]:
    """Examples with `len(prompt) + len(response) <= length`, in order, and what became of the others."""
    kept, report = _fit([(e.prompt_ids, len(e.response_ids)) for e in examples], length, overlong)
    return [TokenizedDemonstration(prompt, examples[i].response_ids) for i, prompt in kept], report


def fit_rankings(
    examples: Sequence[TokenizedRanking], *, length: int, overlong: OverlongPolicy
) -> tuple[list[TokenizedRanking], DataReport]:
    """Rankings whose longest row fits. All responses of a ranking keep one and the same prompt."""
    sizes = [(e.prompt_ids, max(len(response) for response in e.responses)) for e in examples]
    kept, report = _fit(sizes, length, overlong)
    return [examples[i]._replace(prompt_ids=prompt) for i, prompt in kept], report


def fit_prompts(
    prompts: Sequence[tuple[int, ...]], *, length: int, overlong: OverlongPolicy
) -> tuple[list[tuple[int, ...]], DataReport]:
    """Prompts of at most `length` tokens, in order, and what became of the others."""
    kept, report = _fit([(prompt, 0) for prompt in prompts], length, overlong)
    return [prompt for _, prompt in kept], report


def _fit(
    sizes: Sequence[tuple[tuple[int, ...], int]], length: int, overlong: OverlongPolicy
) -> tuple[list[tuple[int, tuple[int, ...]]], DataReport]:
    """Places and prompts of what is kept, with the report."""
    kept: list[tuple[int, tuple[int, ...]]] = []
    counts: dict[str, int] = {"truncated_prompts": 0}
    for i, (prompt, response_length) in enumerate(sizes):
        if len(prompt) + response_length <= length:
            kept.append((i, tuple(prompt)))
            continue
        try:
            room = overlong(len(prompt), response_length, length)
        except UnusableError as error:
            raise DataError(f"example {i}: {error.what}; no example was used; fix: {error.fix}") from error
        if isinstance(room, Dropped):
            counts[room.reason] = counts.get(room.reason, 0) + 1
        else:
            counts["truncated_prompts"] += 1
            kept.append((i, tuple(prompt[len(prompt) - room :])))
    return kept, replace(DataReport(read=len(sizes), kept=len(kept)), **counts)
